"""A stand-in for the Hub's API: users, model repositories with branches and LFS, and faults on demand.

It answers the requests of a push, keeps everything in memory where tests can read it, and fails on demand: with a
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
from urllib.parse import unquote, urlsplit

import yaml  # type: ignore[import-untyped]


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
    cut: Literal["before", "middle", "after"] | None = None
    times: int = 10**6
    retry_after: int | None = None


@dataclass(frozen=True)
class Commit:
    """A commit, with all files of its tree."""

    oid: str
    message: str
    files: dict[str, bytes]


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
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
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
        first = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"} | (files or {})
        self.repositories[repo] = Repository(private, {"main": [self.new_commit("initial commit", first)]})
        return self.repositories[repo]

    def new_commit(self, message: str, files: dict[str, bytes]) -> Commit:
        """A commit with a hash of its own."""
        return Commit(hashlib.sha1(f"{next(self._numbers)}{message}".encode()).hexdigest(), message, files)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """All that somebody would see in a repository, without the Hub's own file."""
        head = self.repositories[repo].branches[branch][-1]
        return {name: data for name, data in head.files.items() if name != ".gitattributes"}

    def messages(self, repo: str, branch: str = "main") -> list[str]:
        """Of the commits of a branch, oldest first."""
        return [commit.message for commit in self.repositories[repo].branches[branch]]

    def take_fault(self, route: str) -> Fault | None:
        """The fault that this request meets."""
        with self.lock:
            fault = next((fault for fault in self.faults if fault.route == route and fault.times > 0), None)
            if fault is not None:
                fault.times -= 1
            return fault


@dataclass(frozen=True)
class Answer:
    """The answer of a route."""

    status: int = 200
    body: Any = None
    code: str | None = None


def is_lfs(name: str, size: int) -> bool:
    """Whether the Hub takes such a file as an LFS object."""
    return size >= 10 << 20 or name.endswith((".safetensors", ".png"))


def oid_of(name: str, data: bytes) -> str:
    """The hash by which LFS or git knows a file."""
    if is_lfs(name, len(data)):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\x00" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Routes requests to methods named after them."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    _repo = r"(?P<repo>[\w.-]+/[\w.-]+)"
    routes = (
        ("whoami", "GET", r"/api/whoami-v2"),
        ("validate", "POST", r"/api/validate-yaml"),
        ("create", "POST", r"/api/repos/create"),
        ("info", "GET", rf"/api/(?:models|spaces)/{_repo}(/revision/(?P<revision>[^/]+))?"),
        ("refs", "GET", rf"/api/models/{_repo}/refs"),
        ("branch", "POST", rf"/api/models/{_repo}/branch/(?P<revision>[^/]+)"),
        ("preupload", "POST", rf"/api/(?:models|spaces)/{_repo}/preupload/(?P<revision>[^/]+)"),
        ("batch", "POST", rf"/{_repo}\.git/info/lfs/objects/batch"),
        ("store", "PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"),
        ("commit", "POST", rf"/api/(?:models|spaces)/{_repo}/commit/(?P<revision>[^/]+)"),
    )

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        matches = ((n, re.fullmatch(pattern, path)) for n, method, pattern in self.routes if method == self.command)
        route, match = next(((name, match) for name, match in matches if match), ("", None))
        self.hub.requests.append(route or f"{self.command} {path}")
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
        answer = Answer(404, {"error": f"no such route: {self.command} {path}"})
        if match is not None:
            arguments = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            method: Callable[..., Answer] = getattr(self, f"on_{route}")
            with self.hub.lock:
                missing = "repo" in arguments and arguments["repo"] not in self.hub.repositories
                not_there = Answer(404, {"error": "Repository not found"}, "RepoNotFound")
                answer = not_there if missing else method(body, **arguments)
        if fault:
            self._hang_up()
        else:
            self._answer(answer)

    do_GET = do_POST = do_PUT = _serve

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

    def on_whoami(self, body: bytes) -> Answer:
        return Answer(200, self.hub.users[self.headers["Authorization"].removeprefix("Bearer ")])

    def on_validate(self, body: bytes) -> Answer:
        errors = card_errors(json.loads(body)["content"])
        return Answer(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def on_create(self, body: bytes) -> Answer:
        values = json.loads(body)
        repo = f"{values.get('organization') or self.on_whoami(b'').body['name']}/{values['name']}"
        if repo in self.hub.repositories:
            return Answer(409, {"error": "You already created this repository", "url": f"{self.hub.url}/{repo}"})
        self.hub.create(repo, values.get("visibility") == "private" or bool(values.get("private")))
        return Answer(200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def on_info(self, body: bytes, repo: str, revision: str = "main") -> Answer:
        repository = self.hub.repositories[repo]
        head = repository.branches[revision][-1]
        siblings = [{"rfilename": name} for name in head.files]
        document = {"id": repo, "sha": head.oid, "private": repository.private, "tags": [], "siblings": siblings}
        return Answer(200, document)

    def on_refs(self, body: bytes, repo: str) -> Answer:
        repository = self.hub.repositories[repo]
        heads = {name: commits[-1] for name, commits in repository.branches.items()}
        listed = {
            kind: [{"name": n, "ref": f"refs/{place}/{n}", "targetCommit": c.oid} for n, c in refs.items()]
            for kind, place, refs in (("branches", "heads", heads), ("tags", "tags", repository.tags))
        }
        return Answer(200, listed | {"converts": []})

    def on_branch(self, body: bytes, repo: str, revision: str) -> Answer:
        branches = self.hub.repositories[repo].branches
        branches[revision] = list(branches["main"])
        return Answer()

    def on_preupload(self, body: bytes, repo: str, revision: str) -> Answer:
        present = self.hub.repositories[repo].branches[revision][-1].files
        answers = [
            {
                "path": name,
                "uploadMode": "lfs" if is_lfs(name, entry["size"]) else "regular",
                "shouldIgnore": False,
                "oid": oid_of(name, present[name]) if name in present else None,
            }
            for entry in json.loads(body)["files"]
            for name in [entry["path"]]
        ]
        return Answer(200, {"files": answers})

    def on_batch(self, body: bytes, repo: str) -> Answer:
        objects = [{key: item[key] for key in ("oid", "size")} for item in json.loads(body)["objects"]]
        for item in objects:
            if item["oid"] not in self.hub.objects:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
        return Answer(200, {"transfer": "basic", "objects": objects})

    def on_store(self, body: bytes, oid: str) -> Answer:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        return Answer()

    def on_commit(self, body: bytes, repo: str, revision: str) -> Answer:
        commits = self.hub.repositories[repo].branches[revision]
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, commits[-1].oid):
            return Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(commits[-1].files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commits.append(self.hub.new_commit(header["summary"], files))
        oid = commits[-1].oid
        return Answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


_VALID: dict[str, Callable[[Any], bool]] = {
    "tags": _strings,
    "datasets": lambda value: _strings(value) and all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) for name in value),
    "base_model": lambda value: isinstance(value, str),
    "library_name": lambda value: isinstance(value, str),
    "pipeline_tag": lambda value: isinstance(value, str),
    "license": lambda value: value in {"apache-2.0", "mit", "cc-by-4.0", "llama3.2", "other"},
    "base_model_relation": lambda value: value in ("adapter", "merge", "quantized", "finetune"),
    "model-index": lambda value: all(
        isinstance(model.get("name"), str) and all(map(_valid_result, model["results"])) for model in value
    ),
}


def _valid_result(result: dict[str, Any]) -> bool:
    figures = [(metric.get("type"), metric.get("value")) for metric in result["metrics"]]
    named = bool(result["task"].get("type")) and all(
        isinstance(result["dataset"].get(k), str) for k in ("type", "name")
    )
    return named and all(k and isinstance(v, (int, float)) and math.isfinite(v) for k, v in figures)


def card_errors(content: str) -> list[str]:
    """The fields of a card's metadata that the Hub would refuse."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*\r?\n", content, re.DOTALL)
    data = yaml.safe_load(match.group(1)) if match else None
    if not isinstance(data, dict):
        return ["the card has no metadata"]
    return [f'"{key}" is not valid' for key, valid in _VALID.items() if key in data and not valid(data[key])]
