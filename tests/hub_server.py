"""A hub for one test: enough of the Hugging Face hub's HTTP API for the real client to push and to download.

Nothing of it is a mock of this project: scripts reach it through HF_ENDPOINT, as they would reach the hub.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

USER = "tester"
TOKEN = "hf_" + "SecretOfThisTest" * 2
COMMIT = "0" * 39 + "1"


class Hub:
    """What has arrived: `requests` as (method, path), `repositories` as {name: {path: bytes}}.

    It offers `public`, folders by the names of repositories.
    """

    def __init__(self, token: str, refuse_commits: bool = False, public: dict[str, Path] | None = None):
        self.token, self.refuse_commits = token, refuse_commits
        self.requests, self.repositories, self.objects = [], {}, {}
        self.public = {name: _contents(folder) for name, folder in (public or {}).items()}  # to be downloaded
        self.url = None

    def answer(self, method: str, path: str, authorization: str | None, body: bytes) -> tuple[int, dict]:
        """(status, JSON) of one request; `path` without its query."""
        self.requests.append((method, path))
        if upload := re.fullmatch(r"/objects/(\w+)", path):  # like the hub's storage: the address is the permission
            self.objects[upload[1]] = body
            return (200, {}) if hashlib.sha256(body).hexdigest() == upload[1] else (400, {"error": "wrong hash"})
        if method in ("GET", "HEAD") and (found := self._readable(path)) is not None:
            return found
        if authorization != f"Bearer {self.token}":
            return 401, {"error": f"Invalid credentials: {authorization}"}  # as careless as a server can be
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or USER}/{wanted['name']}"
            self.repositories.setdefault(name, {})
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            head = json.loads(body)["content"].startswith("---\n")
            return 200, {"errors": [] if head else [{"message": "no YAML head"}], "warnings": []}
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit)/main", path):
            if found[1] not in self.repositories:
                return 404, {"error": "Repository not found"}
            if found[2] == "commit" and self.refuse_commits:
                return 403, {"error": f"No right to write here: {authorization}"}
            return self._preupload(body) if found[2] == "preupload" else self._commit(found[1], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._lfs(item) for item in json.loads(body)["objects"]]}
        return 404, {"error": f"this hub does not know {method} {path}"}

    def _readable(self, path: str) -> tuple[int, dict | list | bytes] | None:
        """What a public repository says of itself, or one of its files; None if the path is of neither."""
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(/revision/\w+)?", path):
            if found[1] not in self.public:
                return 404, {"error": "Repository not found"}
            siblings = [{"rfilename": file} for file in sorted(self.public[found[1]])]
            return 200, {"id": found[1], "modelId": found[1], "sha": COMMIT, "siblings": siblings, "private": False}
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/tree/\w+", path):
            files = self.public.get(found[1], {}).items()
            return 200, [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files]
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)", path):
            content = self.public.get(found[1], {}).get(found[2])
            return (404, {"error": "Entry not found"}) if content is None else (200, content)
        return None

    def _preupload(self, body: bytes) -> tuple[int, dict]:
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if _is_large(file["path"]) else "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": modes}

    def _lfs(self, item: dict) -> dict:
        return {**item, "actions": {"upload": {"href": f"{self.url}/objects/{item['oid']}"}}}

    def _commit(self, name: str, body: bytes) -> tuple[int, dict]:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.repositories[name][value["path"]] = self.objects[value["oid"]]
        return 200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.url}/{name}/commit/{COMMIT}"}


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


@contextlib.contextmanager
def running(token: str, port: int = 0, **options):
    """A `Hub` that listens on 127.0.0.1 at `hub.url` until the block ends."""
    hub = Hub(token, **options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self):
            body = self._body()
            status, value = hub.answer(self.command, self.path.partition("?")[0], self.headers["Authorization"], body)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if data is value:
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            if status >= 400:
                self.send_header("X-Error-Message", value.get("error", ""))
                code = {"Repository not found": "RepoNotFound", "Entry not found": "EntryNotFound"}
                self.send_header("X-Error-Code", code.get(value.get("error"), ""))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        do_GET = do_HEAD = do_POST = do_PUT = _serve

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
