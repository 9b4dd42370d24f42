"""A stand-in for the Hub's API: users, model repositories with branches and LFS, and faults on demand.

It answers what a push asks, keeps what it is given in memory where tests can look, and can be told to fail: with a
status, or by cutting the connection before it acts, in the middle of a body, or after it has acted.
"""

import base64
import hashlib
import itertools
import json
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml  # type: ignore[import-untyped]

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LFS_FROM = 10 << 20
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "llama3.2", "other"}

Cut = Literal["before", "middle", "after"]


@dataclass
class Fault:
    """The next requests of a route fail.

    Attributes:
        route: name of a route, see `Handler.routes`.
        status: answered instead of acting.
        cut: break the connection instead.
        times: so many requests; then the route works again.
        retry_after: seconds, as a header.
    """

    route: str
    status: int = 500
    cut: Cut | None = None
    times: int = 10**6
    retry_after: int | None = None


@dataclass(frozen=True)
class Blob:
    """A file in a commit."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """As git or LFS would name it."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\x00" % len(self.data) + self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A commit, with all files of its tree."""

    oid: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repository:
    """A model repository: branches are lists of commits, newest last."""

    private: bool
    branches: dict[str, list[Commit]]
    tags: dict[str, Commit] = field(default_factory=dict)


class Hub:
    """The state, and the server that shows it; use as a context manager."""

    def __init__(self) -> None:
        self.users: dict[str, dict[str, Any]] = {}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_user(self, name: str, token: str, role: str = "write", orgs: dict[str, str] | None = None) -> None:
        """Somebody who may log in with a token, and their organizations with their role there."""
        self.users[token] = {
            "type": "user",
            "name": name,
            "orgs": [{"type": "org", "name": org, "roleInOrg": role_in} for org, role_in in (orgs or {}).items()],
            "auth": {"type": "access_token", "accessToken": {"displayName": "cli", "role": role}},
        }

    def create(self, repo: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repository:
        """A repository as the Hub makes one, with further files in its first commit."""
        blobs = {name: Blob(data, False) for name, data in ({".gitattributes": GITATTRIBUTES} | (files or {})).items()}
        self.repositories[repo] = Repository(private, {"main": [self.new_commit("initial commit", blobs)]})
        return self.repositories[repo]

    def new_commit(self, message: str, files: dict[str, Blob]) -> Commit:
        """A commit with a hash of its own."""
        return Commit(hashlib.sha1(f"{next(self._numbers)}{message}".encode()).hexdigest(), message, files)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What somebody would see in a repository, without the Hub's own file."""
        head = self.repositories[repo].branches[branch][-1]
        return {name: blob.data for name, blob in head.files.items() if name != ".gitattributes"}

    def messages(self, repo: str, branch: str = "main") -> list[str]:
        """Of the commits of a branch, oldest first."""
        return [commit.message for commit in self.repositories[repo].branches[branch]]

    def take_fault(self, route: str) -> Fault | None:
        """The fault that this request meets."""
        with self.lock:
            for fault in self.faults:
                if fault.route == route and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


@dataclass(frozen=True)
class Answer:
    """What a route answers."""

    status: int
    body: Any = None
    code: str | None = None


def _handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    return type("Handler", (Handler,), {"hub": hub})


class Handler(BaseHTTPRequestHandler):
    """Routes requests to methods named after them."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    _repo = r"(?P<repo>[\w.-]+/[\w.-]+)"
    routes = (
        ("whoami", "GET", r"/api/whoami-v2"),
        ("validate", "POST", r"/api/validate-yaml"),
        ("create", "POST", r"/api/repos/create"),
        ("info", "GET", rf"/api/models/{_repo}(/revision/(?P<revision>[^/]+))?"),
        ("refs", "GET", rf"/api/models/{_repo}/refs"),
        ("branch", "POST", rf"/api/models/{_repo}/branch/(?P<revision>[^/]+)"),
        ("preupload", "POST", rf"/api/models/{_repo}/preupload/(?P<revision>[^/]+)"),
        ("batch", "POST", rf"/{_repo}\.git/info/lfs/objects/batch"),
        ("store", "PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"),
        ("commit", "POST", rf"/api/models/{_repo}/commit/(?P<revision>[^/]+)"),
    )

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        matches = [
            (n, re.fullmatch(pattern, parts.path)) for n, method, pattern in self.routes if method == self.command
        ]
        route, match = next(((name, found) for name, found in matches if found), ("", None))
        self.hub.requests.append(route or f"{self.command} {parts.path}")
        fault = self.hub.take_fault(route)
        length = int(self.headers.get("Content-Length", 0))
        if fault and fault.cut in ("before", "middle"):
            self.rfile.read(length // 2 if fault.cut == "middle" else 0)
            self._hang_up()
            return
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if fault and fault.cut is None:
            self._answer(Answer(fault.status, {"error": "a fault on demand"}), fault.retry_after)
            return
        if match is None:
            self._answer(Answer(404, {"error": f"no such route: {self.command} {parts.path}"}))
            return
        arguments = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
        method: Callable[..., Answer] = getattr(self, f"on_{route}")
        with self.hub.lock:
            answer = method(body, parse_qs(parts.query), **arguments)
        if fault:
            self._hang_up()
        else:
            self._answer(answer)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _answer(self, answer: Answer, retry_after: int | None = None) -> None:
        is_raw = isinstance(answer.body, bytes)
        content = answer.body if is_raw else json.dumps(answer.body if answer.body is not None else {}).encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if answer.code:
            self.send_header("X-Error-Code", answer.code)
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        self.end_headers()
        self.wfile.write(content)

    # Who asks, and what for.

    @property
    def user(self) -> dict[str, Any] | None:
        """Who the token belongs to."""
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _may_write(self, owner: str) -> bool:
        user = self.user
        if user is None or user["auth"]["accessToken"]["role"] == "read":
            return False
        return owner == user["name"] or any(o["name"] == owner and o["roleInOrg"] != "read" for o in user["orgs"])

    def _refusal(self, repo: str, *, write: bool) -> Answer | None:
        """Why this user may not do this; None: go on."""
        owner = repo.partition("/")[0]
        if self.headers.get("Authorization") and self.user is None:
            return Answer(401, {"error": "Invalid credentials in Authorization header"})
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self._may_write(owner)):
            return Answer(404, {"error": "Repository not found"}, "RepoNotFound")
        if write and not self._may_write(owner):
            return Answer(403, {"error": f"You have read access but not the required permissions on {repo}"})
        return None

    def on_whoami(self, body: bytes, query: Any) -> Answer:
        return Answer(200, self.user) if self.user else Answer(401, {"error": "Invalid username or password."})

    def on_validate(self, body: bytes, query: Any) -> Answer:
        errors = card_errors(json.loads(body)["content"])
        return Answer(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def on_create(self, body: bytes, query: Any) -> Answer:
        wanted = json.loads(body)
        if self.user is None:
            return Answer(401, {"error": "Invalid credentials"})
        repo = f"{wanted.get('organization') or self.user['name']}/{wanted['name']}"
        if not self._may_write(repo.partition("/")[0]):
            return Answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        if repo in self.hub.repositories:
            return Answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"})
        self.hub.create(repo, wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return Answer(200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def _head(self, repo: str, revision: str) -> Commit | None:
        found = self.hub.repositories[repo]
        if revision in found.branches:
            return found.branches[revision][-1]
        commits = [commit for branch in found.branches.values() for commit in branch if commit.oid == revision]
        return found.tags.get(revision) or next(iter(commits), None)

    def on_info(self, body: bytes, query: Any, repo: str, revision: str = "main") -> Answer:
        if refusal := self._refusal(repo, write=False):
            return refusal
        head = self._head(repo, revision)
        if head is None:
            return Answer(404, {"error": f"Invalid rev id: {revision}"}, "RevisionNotFound")
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in head.files]
        found = self.hub.repositories[repo]
        return Answer(200, {"id": repo, "sha": head.oid, "private": found.private, "tags": [], "siblings": siblings})

    def on_refs(self, body: bytes, query: Any, repo: str) -> Answer:
        if refusal := self._refusal(repo, write=False):
            return refusal
        found = self.hub.repositories[repo]
        heads = {name: commits[-1] for name, commits in found.branches.items()}
        listed = {
            kind: [{"name": n, "ref": f"refs/{place}/{n}", "targetCommit": c.oid} for n, c in refs.items()]
            for kind, place, refs in (("branches", "heads", heads), ("tags", "tags", found.tags))
        }
        return Answer(200, listed | {"converts": []})

    def on_branch(self, body: bytes, query: Any, repo: str, revision: str) -> Answer:
        if refusal := self._refusal(repo, write=True):
            return refusal
        branches = self.hub.repositories[repo].branches
        if revision in branches:
            return Answer(409, {"error": "Reference already exists"})
        branches[revision] = list(branches["main"])
        return Answer(200)

    def on_preupload(self, body: bytes, query: Any, repo: str, revision: str) -> Answer:
        if refusal := self._refusal(repo, write=True):
            return refusal
        head = self._head(repo, revision)
        assert head is not None
        answers = []
        for entry in json.loads(body)["files"]:
            present = head.files.get(entry["path"])
            lfs = entry["size"] >= LFS_FROM or entry["path"].endswith((".safetensors", ".png"))
            mode = "lfs" if lfs else "regular"
            oid = present.oid if present else None
            answers.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer(200, {"files": answers})

    def on_batch(self, body: bytes, query: Any, repo: str) -> Answer:
        if refusal := self._refusal(repo, write=True):
            return refusal
        objects = [
            {key: item[key] for key in ("oid", "size")}
            | ({} if item["oid"] in self.hub.objects else self._where_to(item["oid"]))
            for item in json.loads(body)["objects"]
        ]
        return Answer(200, {"transfer": "basic", "objects": objects})

    def _where_to(self, oid: str) -> dict[str, Any]:
        return {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{oid}", "header": {}}}}

    def on_store(self, body: bytes, query: Any, oid: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return Answer(400, {"error": "the content does not match its hash"})
        self.hub.objects[oid] = body
        return Answer(200)

    def on_commit(self, body: bytes, query: Any, repo: str, revision: str) -> Answer:
        if refusal := self._refusal(repo, write=True):
            return refusal
        commits = self.hub.repositories[repo].branches.get(revision)
        if commits is None:
            return Answer(404, {"error": f"Invalid rev id: {revision}"}, "RevisionNotFound")
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = header.get("parentCommit")
        if parent is not None and parent != commits[-1].oid:
            return Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(commits[-1].files)
        for line in lines:
            value, path = line["value"], line["value"].get("path")
            if line["key"] == "file":
                files[path] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return Answer(400, {"error": f"{path}: its object was not uploaded"})
                files[path] = Blob(self.hub.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                if path not in files:
                    return Answer(404, {"error": "A file with this name doesn't exist"}, "EntryNotFound")
                del files[path]
        commit = self.hub.new_commit(header["summary"], files)
        commits.append(commit)
        return Answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit.oid}", "commitOid": commit.oid})


def card_errors(content: str) -> list[str]:
    """What the Hub would not accept in a card's metadata."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*\r?\n", content, re.DOTALL)
    if found is None:
        return ["the card has no metadata"]
    try:
        data = yaml.safe_load(found.group(1))
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    errors = []
    for key in ("tags", "datasets", "language"):
        value = data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            errors.append(f'"{key}" must be an array of strings')
    for name in data.get("datasets") or []:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            errors.append(f'"datasets[0]" with value "{name}" is not valid')
    for key in ("base_model", "library_name", "pipeline_tag", "license"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    if data.get("license", "mit") not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if data.get("base_model_relation", "finetune") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" is not valid')
    for model in data.get("model-index") or []:
        if not isinstance(model.get("name"), str):
            errors.append('"model-index[0].name" is required')
        for result in model.get("results", []):
            if not result.get("task", {}).get("type"):
                errors.append('"model-index[0].results[0].task.type" is required')
            if not all(isinstance(result.get("dataset", {}).get(key), str) for key in ("type", "name")):
                errors.append('"model-index[0].results[0].dataset" needs "type" and "name"')
            for metric in result.get("metrics", [{}]):
                value = metric.get("value")
                if not metric.get("type") or not isinstance(value, (int, float)) or not math.isfinite(value):
                    errors.append('"model-index[0].results[0].metrics[0]" needs "type" and a finite "value"')
    return errors
