"""Eviction policies of the package libcachesim on a block trace, request by request.

Usage: eviction_peers.py CAPACITY[,CAPACITY...] TRACE.csv[.gz]

Rules, those of the peers' simulator: pages of 4 KiB; a read request hits only if all its pages are cached when it arrives;
then its cached pages are used and the missing ones inserted, in ascending order, for writes as for reads. One JSON line a
policy and capacity comes out.
"""

import csv
import gzip
import json
import sys
from importlib.metadata import version

from libcachesim import ARC, LRU, S3FIFO, Request, Sieve

PAGE = 4096
POLICIES = {"lru": LRU, "s3-fifo": S3FIFO, "sieve": Sieve, "arc": ARC}


def load(path):
    """(is a read, first page, last page) of every request with bytes."""
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", newline="") as file:
        rows = csv.reader(file)
        next(rows)
        for _, op, offset, length in rows:
            offset, length = int(offset), int(length)
            if length:
                yield op == "R", offset // PAGE, (offset + length - 1) // PAGE


def run(make, capacity, trace):
    # 2^20 buckets are plenty for these traces; the default's 2^24 costs 128 MB a cache
    cache = make(capacity, hashpower=20)
    request = Request(obj_size=1)
    reads = read_hits = read_pages = page_hits = 0
    for read, first, last in trace:
        cached, missing = [], []
        for page in range(first, last + 1):
            request.obj_id = page
            (missing if cache.find(request, update_cache=False) is None else cached).append(page)
        for page in cached + missing:
            request.obj_id = page
            cache.get(request)
        if read:
            reads += 1
            read_hits += not missing
            read_pages += last - first + 1
            page_hits += len(cached)
    return {
        "capacity_pages": capacity,
        "requests": len(trace),
        "reads": reads,
        "read_hits": read_hits,
        "read_pages": read_pages,
        "page_hits": page_hits,
    }


def main():
    capacities = [int(word) for word in sys.argv[1].split(",")]
    trace = list(load(sys.argv[2]))
    for capacity in capacities:
        for name, make in POLICIES.items():
            print(json.dumps({"policy": name, "version": version("libcachesim"), **run(make, capacity, trace)}), flush=True)


if __name__ == "__main__":
    main()
