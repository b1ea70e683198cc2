"""Servers on loopback for the tests of remote shards, which can refuse, stall, cut, corrupt and forget."""

import http.server
import threading
from pathlib import Path

import pytest

from maedistill.data.remote.download import RetryPolicy


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; each request for a tar takes one fault off the list. Notes what it was asked for.

    Faults: a status ("503"); "to URL", a redirect; "cut" and "stall", which end or stop after half; "cut, no length";
    "lie", which states half the length; "flip", a wrong bit in the first byte.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked = {}, [], []  # files: {path: content}
        self.ranges, self.tag, self.pause, self.over = True, '"one"', 0.0, threading.Event()
        self.missing = 404  # what it answers for a file that it has not
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that went away."""

    def tars(self):
        """Byte ranges asked for of tars, but for the questions for the size."""
        return [(name, part) for name, part in self.asked if name.endswith(".tar") and part != "bytes=0-0"]


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, part = self.server, self.headers.get("Range")
        server.asked.append((self.path, part))
        fault = server.faults.pop(0) if server.faults and self.path.endswith(".tar") and part != "bytes=0-0" else ""
        if fault.isdigit() or self.path not in server.files:
            return self.send_error(int(fault or server.missing))
        if fault.startswith("to "):
            self.send_response(302)
            self.send_header("Location", fault[3:])
            return self.end_headers()
        whole = body = server.files[self.path]
        start = 0
        if server.ranges and part and self.headers.get("If-Range", server.tag) == server.tag:
            start, _, last = part.removeprefix("bytes=").partition("-")
            start = int(start)
            body = whole[start : int(last) + 1 if last else None]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(whole)}")
        else:
            self.send_response(200)
        if fault != "cut, no length":
            self.send_header("Content-Length", str(len(body) // 2 if fault == "lie" else len(body)))
        if server.tag:
            self.send_header("ETag", server.tag)
        self.end_headers()
        if fault == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        elif fault:
            body = body[: len(body) // 2]
        for at in range(0, len(body), 1 << 18):
            server.over.wait(server.pause)
            self.wfile.write(body[at : at + (1 << 18)])
        if fault == "stall":
            server.over.wait(10)


@pytest.fixture
def server(monkeypatch):
    """A server without files."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where remote shards are cached in this test, in which three tries with short waits are the default."""
    for name in ("MAEDISTILL_CACHE", "MAEDISTILL_CACHE_GB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(RetryPolicy.__init__, "__defaults__", (3, 0.5, 0.01, 20))
    return tmp_path / "cache" / "maedistill" / "shards"
