"""An S3 server on loopback, moto's, behind a proxy that fails as networks do; tests and benchmark
use it.

    with FaultyS3() as s3:                          # both run in one other process
        s3.client.put_object(...)                   # boto3's client, past the proxy
        s3.set(latency=0.2, errors=0.1)             # see Faults; s3.set() is a clean network again
        s3.url                                      # endpoint behind the proxy; s3.direct without

As a script it is that other process: it prints its two ports and takes lines of JSON, the faults
from now on.
"""
from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Slow down.</Message></Error>"


@dataclass(frozen=True)
class Faults:
    latency: float = 0.0                # seconds before an answer
    errors: float = 0.0                 # share of requests answered with 503 SlowDown
    truncated: float = 0.0              # share of bodies that end half way
    resets: float = 0.0                 # share of connections reset in the body
    drips: float = 0.0                  # share of bodies that come as a byte every 50 ms
    rate: float = 0.0                   # bytes a second of all bodies together; 0: no limit
    outage: bool = False                # all connections are reset
    broken: str = ""                    # keys that contain this are answered with 503, always
    unsized: str = ""                   # bodies of these come without Content-Length
    claims: str = ""                    # bodies of these are said to have 40 TB


class FaultyS3:
    """The process, its ports and a client."""

    def __init__(self, buckets: tuple[str, ...] = ("cellpainting-gallery",)):
        self._process = subprocess.Popen([sys.executable, __file__], text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.DEVNULL)
        ports = json.loads(self._process.stdout.readline())
        self.direct, self.url = (f"http://127.0.0.1:{port}" for port in ports)
        import boto3
        from botocore.config import Config
        self.client = boto3.session.Session().client(
            "s3", endpoint_url=self.direct, region_name="us-east-1", aws_access_key_id="test",
            aws_secret_access_key="test", config=Config(connect_timeout=3,
                                                        retries={"total_max_attempts": 10}))
        for bucket in buckets:
            self.client.create_bucket(Bucket=bucket, ACL="public-read-write")

    def set(self, **faults) -> None:
        self._process.stdin.write(json.dumps(faults) + "\n")
        self._process.stdin.flush()
        self._process.stdout.readline()             # done

    def __enter__(self) -> FaultyS3:
        return self

    def __exit__(self, *_) -> None:
        self.client.close()
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))        # of PUT
        faults = self.server.faults
        time.sleep(faults.latency)
        if faults.outage:
            return self.reset()
        draw = self.server.random.random()
        if draw < faults.errors or (faults.broken and faults.broken in self.path):
            return self.answer(503, {"Content-Type": "application/xml",
                                     "Content-Length": str(len(BUSY))},
                               BUSY * (self.command != "HEAD"))
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        upstream.request(self.command, self.path, sent or None, {
            k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")})
        response = upstream.getresponse()
        body = response.read()
        upstream.close()
        headers = {k: v for k, v in response.getheaders() if k.lower() not in (
            "connection", "transfer-encoding", "content-length", "server", "date")}
        headers["Content-Length"] = str(len(body))
        draw -= faults.errors
        if faults.unsized and faults.unsized in self.path:
            del headers["Content-Length"]
            headers["Connection"] = "close"
            self.close_connection = True
        elif faults.claims and faults.claims in self.path:
            headers["Content-Length"] = str(40 << 40)
            self.close_connection = True
        if draw < faults.truncated:
            self.answer(response.status, headers, body[:len(body) // 2])
            self.close_connection = True
        elif (draw := draw - faults.truncated) < faults.resets:
            self.answer(response.status, headers, body[:len(body) // 3])
            self.reset()
        elif draw - faults.resets < faults.drips:
            self.answer(response.status, headers, b"")
            for number in range(len(body)):
                time.sleep(0.05)
                self.wfile.write(body[number:number + 1])
        else:
            self.answer(response.status, headers, body)

    do_PUT = do_HEAD = do_GET

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(body), 1 << 16):
            part = body[start:start + (1 << 16)]
            self.server.spend(len(part))
            self.wfile.write(part)

    def reset(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def handle(self) -> None:
        with contextlib.suppress(OSError):          # the client has left, or we have
            super().handle()


class Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, upstream: int):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.faults, self.random = upstream, Faults(), random.Random(0)
        # free: when the line has sent what it was given
        self.turn, self.free = threading.Lock(), 0.0

    def spend(self, size: int) -> None:
        """Wait for `size` bytes on a line that all bodies share."""
        if self.faults.rate:
            with self.turn:
                self.free = max(self.free, time.monotonic()) + size / self.faults.rate
                wait = self.free - time.monotonic()
            time.sleep(max(0.0, wait))

    def shutdown_request(self, request) -> None:
        with contextlib.suppress(OSError):          # reset before
            super().shutdown_request(request)


def main() -> None:
    from moto.server import ThreadedMotoServer
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    proxy = Proxy(moto.get_host_and_port()[1])
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    print(json.dumps([proxy.upstream, proxy.server_address[1]]), flush=True)
    for line in sys.stdin:
        proxy.faults = dataclasses.replace(Faults(), **json.loads(line))
        print("done", flush=True)


if __name__ == "__main__":
    main()
