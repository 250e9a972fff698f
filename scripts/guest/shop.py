"""A small web application, so that the guest's boot starts more than an operating system."""

import argparse
import http.server
import json
import logging
import os
import socket
import sqlite3
import ssl  # noqa: F401  what a real one loads too

logging.basicConfig(level=logging.INFO)


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/orders":
            return super().do_GET()
        (count,) = self.server.database.execute("SELECT max(id) FROM orders").fetchone()
        body = json.dumps({"orders": count}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


parser = argparse.ArgumentParser()
parser.add_argument("--database", default="/srv/data/shop.db")
parser.add_argument("--root", default="/srv/www")
parser.add_argument("--port", type=int, default=8080)
options = parser.parse_args()
os.chdir(options.root)
server = http.server.HTTPServer(("127.0.0.1", options.port), Handler)
server.database = sqlite3.connect(f"file:{options.database}?mode=ro&immutable=1", uri=True)
server.database.execute("SELECT max(id) FROM orders").fetchone()
if path := os.environ.get("NOTIFY_SOCKET"):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(path.replace("@", "\0", 1))
        notify.send(b"READY=1")
server.serve_forever()
