SELECT count(*), sum(length(body)) FROM orders WHERE customer IN (11, 222, 3333);
SELECT count(*), sum(length(body)) FROM orders WHERE id BETWEEN 20000 AND 24000;
