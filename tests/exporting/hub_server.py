"""A hub of our own on this machine: what huggingface_hub asks of the Hugging Face hub to make a repository and to push.

    with hub_server() as hub:   HF_ENDPOINT=hub.url HF_HUB_DISABLE_XET=1; hub.repos, hub.requests

Files of weights go through Git LFS, all others into the commit itself. Every request needs the token, except the
PUT of a file's bytes, whose address is its own permission, as on the hub.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "aBcD1234" * 4
_LFS = (".safetensors", ".onnx", ".pt2")


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.onnx lfs"})
    commits: list[list[dict[str, Any]]] = field(default_factory=list)  # operations of each

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((len(self.commits), sorted(self.files))).encode()).hexdigest()


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Hub:
    url: str = ""
    repos: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)  # of Git LFS, by sha256
    refuses: int | None = None  # whatever comes, with this status
    read_only: bool = False  # the token
    moved: dict[str, str] = field(default_factory=dict)  # names of renamed repositories

    def answer(self, request: Request) -> tuple[int, Any]:
        """The status and the JSON of an answer."""
        self.requests.append(request)
        if self.refuses:
            return self.refuses, {"error": "not today"}
        if request.method == "PUT":
            self.stored[request.path.rpartition("/")[2]] = request.body
            return 200, {}
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "who are you?"}
        given = json.loads(request.body) if request.body and "/commit/" not in request.path else {}
        if self.read_only and request.path.endswith(("/create", "/auth-check/write")):
            return 403, {"error": "read only"}
        if request.path == "/api/repos/create":
            name = f"{given['organization']}/{given['name']}"
            if name in self.repos or name in self.moved:
                return 409, {"error": "it is there", "url": f"{self.url}/{name}"}
            self.repos[name] = Repository(given.get("visibility") == "private" or given.get("private") is True)
            return 200, {"url": f"{self.url}/{name}"}
        if request.path == "/api/validate-yaml":
            return (200, {}) if given["content"].startswith("---\n") else (400, {"errors": [{"message": "no card"}]})
        if request.path.endswith(".git/info/lfs/objects/batch"):
            actions = [{"upload": {"href": f"{self.url}/lfs/{one['oid']}"}} for one in given["objects"]]
            pairs = zip(given["objects"], actions, strict=True)
            return 200, {"objects": [one | {"actions": action} for one, action in pairs]}
        name, what = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/?(\w*).*", request.path).groups()
        name = self.moved.get(name, name)
        repository = self.repos[name]
        if what == "preupload":
            modes = {one["path"]: "lfs" if one["path"].endswith(_LFS) else "regular" for one in given["files"]}
            return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
        if what == "commit":
            return self.commit(name, [json.loads(line) for line in request.body.splitlines()])
        files = [{"rfilename": file} for file in repository.files]
        return 200, {"id": name, "sha": repository.sha, "private": repository.private, "siblings": files}

    def commit(self, name: str, operations: list[dict[str, Any]]) -> tuple[int, Any]:
        (header, *changes), repository = operations, self.repos[name]
        if header["value"].get("parentCommit") != repository.sha:
            return 412, {"error": "it has changed"}
        for change in changes:
            value = change["value"]
            if change["key"] == "deletedFile":
                del repository.files[value["path"]]
            else:
                data = self.stored[value["oid"]] if change["key"] == "lfsFile" else base64.b64decode(value["content"])
                repository.files[value["path"]] = data
        repository.commits.append(changes)
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{repository.sha}", "commitOid": repository.sha}


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub without repositories, on a free port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.read_body()
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, answer = hub.answer(Request(self.command, self.path, headers, body))
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = handle_any

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
