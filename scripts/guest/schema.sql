-- Rows of one customer lie far from each other (Knuth's multiplicative hash), as they do in a table filled over years.
PRAGMA page_size = 4096;
PRAGMA journal_mode = OFF;
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer INTEGER NOT NULL, body TEXT NOT NULL);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60000)
INSERT INTO orders
SELECT i, (i * 2654435761 % 4294967296) % 400 * 11 + 11, printf('%d:%.*c', i * 7919 % 1000003, 180 + i * 31 % 120, 'x') FROM n;
CREATE INDEX orders_by_customer ON orders (customer);
