"""A Hugging Face Hub on this machine, small enough to read: what huggingface_hub's own client needs to push and pull.

    with HubServer() as server:
        subprocess.run(command, env={**os.environ, **server.environment(cache_folder, token=WRITE_TOKEN)})

The client reads HF_ENDPOINT and its cache folder when it is imported, hence the process of its own. Model repositories
only, kept in memory; refusals carry the status and the X-Error-Code that the real Hub answers with. `server.trouble` is
what goes wrong, once each: a status, or DROP, the connection that breaks in the middle.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from conftest import ROOT

USER = "tester"
WRITE_TOKEN, READ_TOKEN, BAD_TOKEN = "hf_write", "hf_read", "hf_expired"
DROP = -1
PART = 32 << 20  # bytes: a larger LFS file travels in parts of this size
LFS_FROM = 4096  # files from this size on travel by LFS, in a request of their own, as weights do on the real Hub


class Refusal(Exception):
    """An answer other than 200: its status, the Hub's name for the error and the sentence that goes with it."""

    def __init__(self, status: int, message: str, code: str = "", body: dict | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass
class Reply:
    """A body (bytes as they are, anything else as JSON) and headers."""

    body: object = b""
    headers: tuple[tuple[str, str], ...] = ()
    status: int = 200


@dataclass
class Commit:
    sha: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    commits: list[Commit]


class HubServer:
    """The repositories, and a thread that serves them until the `with` block ends."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}  # LFS objects by their SHA-256
        self.requests: list[tuple[str, str]] = []  # (method, path), in order
        self.trouble: list[
            tuple[str, str, int]
        ] = []  # (method, end of the path, status or DROP), each goes wrong once
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache: Path, token: str = "") -> dict[str, str]:
        """Variables that point a new process's client here, with an empty cache of its own and this token."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # the newer upload protocol, which this server does not speak
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def files(self, repo_id: str) -> dict[str, bytes]:
        """What a repository's newest commit holds."""
        return self.repos[repo_id].commits[-1].files

    def find(self, token: str, repo_id: str, revision: str = "main") -> Commit:
        """A commit by its SHA, or the newest as "main"; a private repository is not there for strangers."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not token):
            raise Refusal(404 if token else 401, "Repository not found", "RepoNotFound")
        if revision == "main":
            return repo.commits[-1]
        found = next((commit for commit in repo.commits if commit.sha == revision), None)
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found


class Handler(BaseHTTPRequestHandler):
    """One request: check the token, find the route, send its reply or its refusal."""

    hub: HubServer
    protocol_version = "HTTP/1.1"  # the client keeps its connections open
    disable_nagle_algorithm = True  # else every reply waits 40 ms for the client to acknowledge its headers

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            trouble = next((t for t in self.hub.trouble if t[0] == self.command and path.endswith(t[1])), None)
            if trouble:
                self.hub.trouble.remove(trouble)
        self.drops = trouble is not None and trouble[2] == DROP
        if self.drops and self.command != "GET":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            return
        body = self.read_body()
        with self.hub.lock:
            try:
                if trouble and not self.drops:
                    raise Refusal(trouble[2], "too much at once")
                reply = self.route(path, body)
            except Refusal as refusal:
                headers = (("X-Error-Message", refusal.message), ("X-Error-Code", refusal.code))
                headers = tuple(pair for pair in headers if pair[1])
                reply = Reply(refusal.body or {"error": refusal.message}, headers, refusal.status)
        self.send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, *_) -> None:
        """Nothing on the test's terminal."""

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()  # the line break after a chunk
        self.rfile.readline()
        return b"".join(parts)

    def route(self, path: str, body: bytes) -> Reply:
        for methods, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                self.token = self.check_token()
                return answer(self, body, **match.groupdict())
        raise Refusal(404, f"no such route: {self.command} {path}")

    def check_token(self) -> str:
        """The caller's token, "" for none; one that is unknown is refused everywhere, for public files too."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", WRITE_TOKEN, READ_TOKEN):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token

    def must_write(self, repo_id: str) -> None:
        if not self.token:
            raise Refusal(401, "Invalid username or password.")
        if self.token != WRITE_TOKEN or not repo_id.startswith(f"{USER}/"):
            raise Refusal(403, f"You don't have the rights to write to {repo_id}")

    def send(self, reply: Reply) -> None:
        body, headers = reply.body, dict(reply.headers)
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        headers.setdefault("Content-Length", str(len(body)))
        self.send_response(reply.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.drops:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(body)

    # --- repositories ---

    def create_repo(self, body: bytes) -> Reply:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        self.must_write(repo_id)
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            raise Refusal(409, "You already created this model repo", body={**answer, "error": "exists"})
        first = Commit(hashlib.sha1(repo_id.encode()).hexdigest(), {".gitattributes": b"*.safetensors filter=lfs\n"})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))  # older clients say the latter
        self.hub.repos[repo_id] = Repo(private, [first])
        return Reply(answer)

    def model_info(self, _: bytes, repo_id: str, revision: str | None = None) -> Reply:
        commit = self.hub.find(self.token, repo_id, revision or "main")
        return Reply(
            {
                "_id": "0",
                "id": repo_id,
                "modelId": repo_id,
                "sha": commit.sha,
                "private": self.hub.repos[repo_id].private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in commit.files],
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
            }
        )

    def tree(self, _: bytes, repo_id: str, revision: str) -> Reply:
        commit = self.hub.find(self.token, repo_id, revision)
        return Reply([_entry(path, data) for path, data in sorted(commit.files.items())])

    # --- upload: how each file is to travel, the large ones, then one commit ---

    def validate_card(self, _: bytes) -> Reply:
        return Reply({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> Reply:
        self.must_write(repo_id)
        self.hub.find(self.token, repo_id, revision)
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LFS_FROM else "regular", "shouldIgnore": False}
            for f in json.loads(body)["files"]
        ]
        return Reply({"files": modes})

    def lfs_batch(self, body: bytes, repo_id: str) -> Reply:
        self.must_write(repo_id)
        objects = []
        for asked in json.loads(body)["objects"]:
            known = asked["oid"] in self.hub.uploads
            address = f"{self.hub.url}/lfs/{asked['oid']}"
            upload = {"href": address, "header": {}}
            if asked["size"] > PART:
                parts = range(1, -(-asked["size"] // PART) + 1)
                header = {"chunk_size": str(PART), **{f"{i:05d}": f"{address}/{i}" for i in parts}}
                upload = {"href": address, "header": header}
            objects.append(asked if known else {**asked, "actions": {"upload": upload}})
        return Reply(
            {"transfer": "basic", "objects": objects}, headers=(("Content-Type", "application/vnd.git-lfs+json"),)
        )

    def lfs_put(self, body: bytes, sha256: str) -> Reply:
        if hashlib.sha256(body).hexdigest() != sha256:
            raise Refusal(400, "the upload does not match its checksum")
        self.hub.uploads[sha256] = body
        return Reply()

    def lfs_put_part(self, body: bytes, sha256: str, part: str) -> Reply:
        self.hub.uploads[f"{sha256}/{part}"] = body
        return Reply(headers=(("ETag", hashlib.md5(body).hexdigest()),))

    def lfs_complete(self, body: bytes, sha256: str) -> Reply:
        parts = [p["partNumber"] for p in json.loads(body)["parts"]]
        return self.lfs_put(b"".join(self.hub.uploads.pop(f"{sha256}/{part}") for part in parts), sha256)

    def commit(self, body: bytes, repo_id: str, revision: str) -> Reply:
        self.must_write(repo_id)
        before = self.hub.find(self.token, repo_id, revision)
        files = dict(before.files)
        for line in filter(None, body.splitlines()):
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif kind == "deletedFile":
                files.pop(value["path"], None)
            elif kind != "header":
                raise Refusal(400, f"a commit operation that this server lacks: {kind}")
        sha = hashlib.sha1(before.sha.encode() + body).hexdigest()
        self.hub.repos[repo_id].commits.append(Commit(sha, files))
        return Reply({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    # --- download ---

    def resolve(self, _: bytes, repo_id: str, revision: str, path: str) -> Reply:
        commit = self.hub.find(self.token, repo_id, revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data = commit.files[path]
        headers = (("ETag", f'"{_git_sha(data)}"'), ("X-Repo-Commit", commit.sha), ("Accept-Ranges", "bytes"))
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return Reply(data, headers)
        first, last = int(part[1]), int(part[2] or len(data) - 1)
        return Reply(data[first : last + 1], (*headers, ("Content-Range", f"bytes {first}-{last}/{len(data)}")), 206)


def _git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(data), "oid": _git_sha(data)}


_MODEL = r"/api/models/(?P<repo_id>[^/]+/[^/]+)"
_FILES = r"/(?P<repo_id>[^/]+/[^/]+?)"
_REVISION = r"/(?P<revision>[^/]+)"
ROUTES = (
    ("POST", r"/api/repos/create", Handler.create_repo),
    ("POST", r"/api/validate-yaml", Handler.validate_card),
    ("GET", _MODEL, Handler.model_info),
    ("GET", _MODEL + r"/revision" + _REVISION, Handler.model_info),
    ("GET", _MODEL + r"/tree" + _REVISION, Handler.tree),
    ("POST", _MODEL + r"/preupload" + _REVISION, Handler.preupload),
    ("POST", _MODEL + r"/commit" + _REVISION, Handler.commit),
    ("POST", _FILES + r"\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<sha256>[0-9a-f]{64})", Handler.lfs_put),
    ("PUT", r"/lfs/(?P<sha256>[0-9a-f]{64})/(?P<part>\d+)", Handler.lfs_put_part),
    ("POST", r"/lfs/(?P<sha256>[0-9a-f]{64})", Handler.lfs_complete),
    ("GET HEAD", _FILES + r"/resolve" + _REVISION + r"/(?P<path>.+)", Handler.resolve),
)

# What tests start against it

CALLS = """
import json, os, sys, hub
said, hub.RETRY_SECONDS = {}, (0, 0)
for name, token, function, arguments, options in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    try:
        said[name] = [True, str(getattr(hub, function)(*arguments, **options))]
    except SystemExit as stop:
        said[name] = [False, str(stop)]
print("SAID" + json.dumps(said))
"""


def run_together(**commands: tuple[dict[str, str], list[str]]) -> dict[str, subprocess.CompletedProcess]:
    """Start Python with each command's environment and arguments, all at once; results by name."""
    always = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = {
        name: subprocess.Popen([sys.executable, *words], env={**always, **environment}, **pipes)
        for name, (environment, words) in commands.items()
    }
    done = {}
    for name, process in started.items():
        out, err = process.communicate(timeout=300)
        done[name] = subprocess.CompletedProcess(process.args, process.returncode, out, err)
        assert "Traceback" not in err, err
    return done


def said(process: subprocess.CompletedProcess) -> dict[str, tuple[bool, str]]:
    line = next(line for line in process.stdout.splitlines() if line.startswith("SAID"))
    return {name: tuple(answer) for name, answer in json.loads(line[4:]).items()}
