"""A small in-memory Hugging Face Hub on 127.0.0.1, for the real huggingface_hub client.

It serves whoami, repository creation, branches, model info, tree, paths-info, pre-upload, the LFS batch with its PUT,
commits, and resolve with headers and ranges. Xet is not supported: the client runs with HF_HUB_DISABLE_XET=1.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import Popen
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_tests"
READER = "hf_that_may_only_read"
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(frozen=True)
class Blob:
    """A file of a repository."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """git's id of the content, or of the LFS pointer."""
        held = self.data
        if self.lfs:
            held = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(held)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass
class Repo:
    """A repository: the files of each commit, and the commit of each branch."""

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, Blob]) -> str:
        content = [title, self.branches.get(branch), sorted((path, blob.etag) for path, blob in files.items())]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


class Refusal(Exception):
    """An error response, with the headers by which the client recognizes it."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass
class Fault:
    """A fault of the next request whose "METHOD path" matches: cut off, refused, or a flipped bit."""

    request: str
    cut_after: int | None = None
    refuse: Refusal | None = None
    damage: int | None = None  # which byte
    kill: Popen[bytes] | None = None  # who asked


class Hub:
    """The server, with its `repos`, the `log` of requests, and the `faults` to come."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.clear()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def clear(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.log: list[str] = []
        self.faults: list[Fault] = []

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch by path."""
        at = self.repos[repo]
        return {path: blob.data for path, blob in at.commits[at.branches[branch]].items()}

    def asked(self, pattern: str) -> int:
        """Number of matching requests."""
        return sum(re.search(pattern, line) is not None for line in self.log)

    def fault_for(self, request: str) -> Fault | None:
        for fault in self.faults:
            if re.search(fault.request, request):
                self.faults.remove(fault)
                return fault
        return None


Route = tuple[str, re.Pattern[str], Callable[..., None]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[Hub]
    fault: Fault | None

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that was cut off, or was killed
            super().handle()

    def serve(self) -> None:
        url = urlsplit(self.path)
        request = f"{self.command} {url.path}"
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.body = self._read_body()
        with self.hub.lock:
            self.hub.log.append(request)
            self.fault = self.hub.fault_for(request)
            try:
                if self.fault is not None and self.fault.kill is not None:
                    self.fault.kill.kill()
                    self.fault.kill.wait()
                if self.fault is not None and self.fault.refuse is not None:
                    raise self.fault.refuse
                self._route(url.path)
            except Refusal as refusal:
                self.answer(refusal.status, {"error": str(refusal)}, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _route(self, path: str) -> None:
        verb = "GET" if self.command == "HEAD" else self.command
        for method, pattern, function in ROUTES:
            if method == verb and (match := pattern.fullmatch(path)):
                arguments = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                self._authorize(function in WRITES, arguments.get("id"))
                return function(self, **arguments)
        raise Refusal(404, f"nothing is served at {self.command} {path}")

    def _authorize(self, writes: bool, repo: str | None) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READER):
            raise Refusal(401, "Invalid credentials in Authorization header")
        if writes and token != TOKEN:
            raise Refusal(403 if token else 401, "You have no right to write here")
        if repo in self.hub.repos and self.hub.repos[repo].private and not token:
            raise Refusal(401, "Repository not found", "RepoNotFound")

    def answer(self, status: int, body: bytes | dict | list, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = self.fault
        if fault is not None and fault.damage is not None:
            damaged = bytearray(data)
            damaged[fault.damage] ^= 1
            data = bytes(damaged)
        if fault is not None and fault.cut_after is not None:
            self.wfile.write(data[: fault.cut_after])
            self.wfile.flush()
            self.connection.shutdown(2)
            self.close_connection = True
        else:
            self.wfile.write(data)

    # -- what is asked

    def _repo(self, id: str) -> Repo:
        if id not in self.hub.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.hub.repos[id]

    def _commit(self, id: str, rev: str) -> tuple[str, dict[str, Blob]]:
        repo = self._repo(id)
        sha = repo.branches.get(rev, rev)
        if sha not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return sha, repo.commits[sha]

    def whoami(self) -> None:
        if not self.headers.get("Authorization"):
            raise Refusal(401, "Invalid username or password.")
        role = "read" if self.headers["Authorization"] == f"Bearer {READER}" else "write"
        token = {"displayName": "tests", "role": role}
        self.answer(200, {"type": "user", "id": "0", "name": "me", "orgs": [], "auth": {"accessToken": token}})

    def validate_yaml(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{id}", "name": id, "id": "0"}
        if id in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo"} | answer)
        self.hub.repos[id] = Repo(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self.hub.repos[id].commit("main", "initial commit", {".gitattributes": Blob(ATTRIBUTES, False)})
        return self.answer(200, answer)

    def create_branch(self, id: str, rev: str) -> None:
        repo = self._repo(id)
        if rev in repo.branches:
            raise Refusal(409, f"Reference already exists: {rev}")
        repo.branches[rev] = self._commit(id, json.loads(self.body or b"{}").get("startingPoint") or "main")[0]
        self.answer(200, {})

    def info(self, id: str, rev: str = "main") -> None:
        sha, files = self._commit(id, rev)
        siblings = [{"rfilename": path} for path in sorted(files)]
        state = {"private": self._repo(id).private, "gated": False, "disabled": False}
        config = json.loads(files["config.json"].data) if "config.json" in files else {}
        state["config"] = {name: config[name] for name in ("architectures", "auto_map", "model_type") if name in config}
        self.answer(200, {"_id": "0", "id": id, "modelId": id, "sha": sha, "tags": [], "siblings": siblings} | state)

    def tree(self, id: str, rev: str, path: str = "") -> None:
        above = f"{path}/" if path else ""
        files = {name: blob for name, blob in sorted(self._commit(id, rev)[1].items()) if name.startswith(above)}
        if not files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        if self.query.get("recursive") != "false":
            return self.answer(200, [_entry(name, blob) for name, blob in files.items()])
        folders = dict.fromkeys(
            above + name.removeprefix(above).split("/")[0] for name in files if "/" in name[len(above) :]
        )
        found = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]
        found += [_entry(name, blob) for name, blob in files.items() if "/" not in name[len(above) :]]
        return self.answer(200, found)

    def paths_info(self, id: str, rev: str) -> None:
        files = self._commit(id, rev)[1]
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = (json.loads(self.body) if is_json else parse_qs(self.body.decode()))["paths"]
        self.answer(200, [_entry(path, files[path]) for path in paths if path in files])

    def resolve(self, id: str, rev: str, path: str) -> None:
        sha, files = self._commit(id, rev)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        blob = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Size": str(len(blob.data)), "X-Linked-Etag": f'"{blob.etag}"'}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), int(asked[2] or len(blob.data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(blob.data)}"
            return self.answer(206, blob.data[first : last + 1], headers)
        return self.answer(200, blob.data, headers)

    def preupload(self, id: str, rev: str) -> None:
        sha, files = self._commit(id, rev)
        modes = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") or file["size"] > 10 * 2**20 else "regular"
            held = files.get(file["path"])
            oid = None if held is None else held.etag
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": modes, "commitOid": sha})

    def lfs_batch(self, id: str) -> None:
        self._repo(id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}
            has_it = wanted["oid"] in self.hub.lfs
            objects.append({"oid": wanted["oid"], "size": wanted["size"]} | ({} if has_it else {"actions": upload}))
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        damaged = self.fault is not None and self.fault.damage is not None
        if damaged or hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(422, "the content does not have the SHA-256 that was announced")
        self.hub.lfs[oid] = self.body
        self.answer(200, {})

    def commit(self, id: str, rev: str) -> None:
        files, title = dict(self._commit(id, rev)[1]), ""
        for item in map(json.loads, self.body.splitlines()):
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = Blob(self.hub.lfs[value["oid"]], True)
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"no such operation: {item['key']}")
        sha = self._repo(id).commit(rev, title, files)
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{id}/commit/{sha}"})


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)}
    return entry | ({"lfs": {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}} if blob.lfs else {})


def _routes() -> Iterator[Route]:
    model = "/api/(?:models|datasets)/(?P<id>[^/]+/[^/]+)"
    rev = "(?P<rev>[^/]+)"
    for method, pattern, function in (
        ("GET", "/api/whoami-v2", _Handler.whoami),
        ("POST", "/api/validate-yaml", _Handler.validate_yaml),
        ("POST", "/api/repos/create", _Handler.create_repo),
        ("GET", model, _Handler.info),
        ("GET", f"{model}/revision/{rev}", _Handler.info),
        ("GET", f"{model}/tree/{rev}(?:/(?P<path>.+))?", _Handler.tree),
        ("POST", f"{model}/paths-info/{rev}", _Handler.paths_info),
        ("POST", f"{model}/branch/{rev}", _Handler.create_branch),
        ("POST", f"{model}/preupload/{rev}", _Handler.preupload),
        ("POST", f"{model}/commit/{rev}", _Handler.commit),
        ("POST", r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
        ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
        ("GET", f"/(?:datasets/)?(?P<id>[^/]+/[^/]+)/resolve/{rev}/(?P<path>.+)", _Handler.resolve),
    ):
        yield method, re.compile(pattern), function


ROUTES = list(_routes())
WRITES = {_Handler.create_repo, _Handler.create_branch, _Handler.preupload, _Handler.commit, _Handler.lfs_batch}


def put(hub: Hub, repo: str, folder: Path) -> str:
    """Store a folder in `hub` as if it had been pushed, and return the commit."""
    from huggingface_hub import create_repo  # not earlier: conftest sets its environment

    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {str(path.relative_to(folder)): Blob(path.read_bytes(), path.suffix == ".safetensors") for path in paths}
    create_repo(repo)
    return hub.repos[repo].commit("main", "all of it", files)
