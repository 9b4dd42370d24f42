"""Pushes a model to the Hugging Face Hub: rights first, then everything in one commit, or nothing.

The notable choices:

- What can be refused is refused before anything is created or sent: no login, a token that only reads, another owner.
- Large files are stored before the commit, where nobody sees them; the commit makes all files visible at once.
- A new repository is created right before the upload. If that fails, it is deleted again, provided it was created by
  this call and holds nothing yet; a branch likewise. What cannot be taken back is named.
- A commit whose answer got lost may have happened: the branch is looked at before it is sent again, so that one push
  never becomes two commits.
- Files that an earlier push left and this one does not have (shards, code) are deleted by the same commit; files of
  any other kind are the owner's and stay.
"""

import hashlib
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    http_backoff,
    validate_repo_id,
)

from dtfcli.errors import ConfigError, DTFError, HubError
from dtfcli.hub.errors import (
    NOT_DONE,
    PASSING,
    WAITS,
    HTTPError,
    HubAccessError,
    delay_before_next,
    explain,
    reason,
    status_of,
)
from dtfcli.hub.upload import CARD_FILE, Upload, is_replaced_by_a_push, model_folder, prepare_upload

T = TypeVar("T")
Listener = Callable[[str], None]

MAIN = "main"


@dataclass(frozen=True)
class PushResult:
    """A finished push.

    Attributes:
        repo: owner/name.
        url: of its page, or of the branch.
        commit: hash of the commit; that of the present head when nothing had changed.
        files: names in the repository.
        left_out: files of the model folder that were not uploaded.
        warnings: what the user should know.
    """

    repo: str
    url: str
    commit: str
    files: list[str]
    left_out: list[str]
    warnings: list[str]


@dataclass(frozen=True)
class _Target:
    """Where a push goes; head is the commit of the branch and names its files, None and none without a branch."""

    repo: str
    branch: str
    exists: bool
    head: str | None
    names: tuple[str, ...] = ()


def push(
    model: str | Path,
    repo: str,
    *,
    username: str | None = None,
    eval_results: Path | None = None,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    merge: bool = False,
    on_progress: Listener | None = None,
) -> PushResult:
    """Push a model folder or run folder to the Hub, as one commit.

    Args:
        model: model folder, adapter folder, or run folder (its final model).
        repo: owner/name, or a name; then the owner is `username` or who is logged in.
        username: owner, of a bare name.
        eval_results: JSON of an evaluation for the card; None: the newest beside the model.
        private: make a new repository private.
        revision: branch; it is made when there is none. None: main.
        commit_message: first line of the commit; None: says what it is.
        merge: publish an adapter as a plain model, merged into its base.
        on_progress: told what is being done.

    Raises:
        ConfigError, CheckpointError: repository id, branch, evaluation or model cannot be used.
        HubAccessError: not logged in, or no rights.
        HubError: the Hub cannot be reached or fails; says what is visible there.
    """
    tell = on_progress or (lambda message: None)
    check_options(repo, username, revision, commit_message)
    model_folder(model)
    if get_token() is None:
        raise HubAccessError("not logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN.")
    with _quiet_client(), tempfile.TemporaryDirectory() as scratch:
        hub = _Hub(tell)
        tell("asking the Hub who you are")
        target = hub.find(hub.owned_id(repo, username), revision or MAIN, private)
        upload = prepare_upload(
            model,
            target.repo,
            revision=revision,
            eval_results=eval_results,
            merge_into=Path(scratch) if merge else None,
            on_progress=tell,
        )
        message = commit_message or _default_message(upload)
        commit = hub.commit(upload, target, message, private)
    url = f"{hub.api.endpoint}/{target.repo}" + (f"/tree/{target.branch}" if target.branch != MAIN else "")
    return PushResult(target.repo, url, commit, list(upload.files), upload.left_out, upload.warnings)


def check_options(repo: str, username: str | None, revision: str | None, commit_message: str | None) -> str:
    """Refuse what is wrong without asking anybody; returns `repo_id`.

    Raises:
        ConfigError: names the option and the remedy.
    """
    full = repo_id(repo, username)
    _check_branch(revision)
    if commit_message is not None and not commit_message.strip():
        raise ConfigError("--commit-message '': is empty; say what changed, or leave it out.")
    return full


def repo_id(repo: str, username: str | None = None) -> str:
    """The repository's id as far as it is known without the Hub: owner/name, or the name alone.

    Raises:
        ConfigError: it is no id, or names another owner than `username`.
    """
    owner, slash, _ = repo.rpartition("/")
    full = f"{username}/{repo}" if username and not slash else repo
    try:
        validate_repo_id(full)
        if slash and not owner:
            raise HFValidationError
    except HFValidationError:
        raise ConfigError(
            f"REPO '{full}': no Hub id; give owner/name or a name, of letters, digits and . _ - (96 at most)."
        ) from None
    if username and slash and owner.lower() != username.lower():
        raise ConfigError(f"REPO '{repo}': its owner is {owner}, --hf-username says {username}; give one of them.")
    return full


def _check_branch(name: str | None) -> None:
    """Refuse what git would not take as the name of a branch."""
    if name is None:
        return
    bad = any(part in name for part in ("..", "//", "@{", "\\", *" ~^:?*[")) or not name.isprintable()
    if not name or bad or name.startswith(("-", "/", "refs/")) or name.endswith(("/", ".", ".lock")):
        raise ConfigError(f"--revision '{name}': no name for a branch; use letters, digits and - _ . / such as v1.0.")


class _Hub:
    """A conversation with the Hub: every request is repeated a few times where that can help."""

    def __init__(self, tell: Listener) -> None:
        from os import environ

        # Asked now: the library itself looks at the variable only when it is imported.
        endpoint = environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT
        self.api = HfApi(endpoint=endpoint, library_name="dtfcli", library_version=metadata.version("dtfcli"))
        self.tell = tell
        self._uncertain = False  # whether a commit may have happened or not

    def owned_id(self, repo: str, username: str | None) -> str:
        """owner/name, after the Hub has said that the user may write there.

        Raises:
            HubAccessError: the token is refused or only reads, or the owner is somebody else.
        """
        account = self._ask(self.api.whoami, "the Hub does not say who you are")
        access = account.get("auth", {}).get("accessToken", {})
        if access.get("role") == "read":
            name = access.get("displayName", "")
            raise HubAccessError(
                f"your token{f' {name!r}' if name else ''} may only read: make one with write access in your settings "
                "on the Hub, then run `hf auth login`."
            )
        user = account["name"]
        full = repo_id(repo, username)
        owner, slash, name = full.rpartition("/")
        roles = {entry.get("name", ""): entry.get("roleInOrg") for entry in account.get("orgs", [])}
        known = {item.lower(): item for item in (user, *roles)}
        owner = owner if slash else user
        if owner.lower() not in known:
            others = f" or an organization of yours ({', '.join(sorted(roles))})" if roles else ""
            raise HubAccessError(
                f"REPO '{full}': belongs to {owner}, and you are logged in as {user}. "
                f"Push to {user}/{name}{others}, or log in as {owner} (`hf auth login`)."
            )
        owner = known[owner.lower()]
        if roles.get(owner) == "read":
            raise HubAccessError(f"REPO '{full}': you may only read in {owner}; ask its admins for write access.")
        return f"{owner}/{name}"

    def find(self, repo: str, branch: str, private: bool) -> _Target:
        """Look at the repository, if there is one.

        Raises:
            ConfigError: `private` is asked for and it is public, or the branch is a tag.
        """
        try:
            info = self._ask(lambda: self.api.model_info(repo), f"{repo} cannot be looked at", missing=True)
        except RepositoryNotFoundError:
            return _Target(repo, branch, exists=False, head=None)
        if private and not info.private:
            raise ConfigError(
                f"--private: {repo} exists and is public. Change that in its settings on the Hub, or leave it out."
            )
        refs = self._ask(lambda: self.api.list_repo_refs(repo), f"the branches of {repo} cannot be listed")
        if branch in [tag.name for tag in refs.tags]:
            raise ConfigError(f"--revision {branch}: a tag of {repo}, which does not move; name a branch.")
        target = _Target(repo, branch, exists=True, head=None)
        return self._with_files(target) if branch in [ref.name for ref in refs.branches] else target

    def _with_files(self, target: _Target) -> _Target:
        """The target with the head of its branch and the names of the files there."""
        info = self._ask(
            lambda: self.api.model_info(target.repo, revision=target.branch),
            f"the files of {target.repo} cannot be listed",
        )
        names = tuple(item.rfilename for item in info.siblings or [])
        return replace(target, head=info.sha, names=names)

    def commit(self, upload: Upload, target: _Target, message: str, private: bool) -> str:
        """Create what is missing, upload, commit; returns the commit's hash.

        Raises:
            HubError: it failed; says what is left there.
        """
        self.validate_card(upload)
        begun = _Begun()
        try:
            target = self._create(target, private, begun)
            additions = [
                CommitOperationAdd(name, str(item) if isinstance(item, Path) else item)
                for name, item in upload.files.items()
            ]
            self.tell(f"uploading {len(additions)} files, {upload.size() / 2**20:.1f} MiB, to {target.repo}")
            with self._explained(f"the upload to {target.repo} failed", target.repo):
                self.api.preupload_lfs_files(target.repo, additions, revision=target.branch, free_memory=False)
            stale = [name for name in target.names if is_replaced_by_a_push(name) and name not in upload.files]
            operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
            self.tell("committing")
            return self._send(upload, target, operations, message)
        except BaseException as error:
            left = self._take_back(target, begun)
            if isinstance(error, DTFError) and not self._uncertain:
                raise type(error)(f"{error} {left}") from error
            raise

    def validate_card(self, upload: Upload) -> None:
        """Let the Hub check the card's metadata, before anything is created.

        Raises:
            ConfigError: it is not valid.
        """
        content = upload.files[CARD_FILE]
        assert isinstance(content, bytes)
        body = {"repoType": "model", "content": content.decode("utf-8")}
        url = f"{self.api.endpoint}/api/validate-yaml"
        with self._explained("the model card cannot be checked", upload.repo):
            response = http_backoff("POST", url, json=body)
            if response.status_code == 400:
                answer = response.json() if "json" in response.headers.get("content-type", "") else {}
                reasons = "; ".join(str(item.get("message")) for item in answer.get("errors", [])) or response.text
                raise ConfigError(f"{CARD_FILE}: the Hub refuses the metadata of the model card ({reasons}).")
            response.raise_for_status()

    def _create(self, target: _Target, private: bool, begun: "_Begun") -> _Target:
        """Make the repository and the branch where they are missing."""
        repo, branch = target.repo, target.branch
        if not target.exists:
            self.tell(f"creating {repo}")
            self._ask(lambda: self.api.create_repo(repo, private=private or None), f"{repo} cannot be created", repo)
            begun.repository = True
        if target.head is None and branch != MAIN:
            self._ask(lambda: self.api.create_branch(repo, branch=branch), f"{branch} cannot be created", repo)
            begun.branch = True
        if begun.repository or begun.branch:
            return self._with_files(_Target(repo, branch, exists=True, head=None))
        return target

    def _send(self, upload: Upload, target: _Target, operations: list[Any], message: str) -> str:
        """Send the commit; after an answer that leaves it open whether it happened, look before sending it again."""
        repo, failed = target.repo, f"the commit to {target.repo} failed"
        for wait in (*WAITS, None):
            try:
                return self.api.create_commit(
                    repo, operations, commit_message=message, revision=target.branch, parent_commit=target.head
                ).oid
            except (HTTPError, OSError, ValueError) as error:
                status = status_of(error)
                passing = status in PASSING or (status is None and not isinstance(error, ValueError))
                if self._uncertain or (passing and status not in NOT_DONE):
                    arrived = self._arrived(upload, target)
                    self._uncertain = arrived is None
                    if arrived:
                        return arrived
                delay = delay_before_next(error, wait) if passing else None
                if delay is None and self._uncertain:
                    raise HubError(
                        f"{failed}: the answer was {reason(error)}, and whether it arrived cannot be told. "
                        "Push again when the Hub can be reached: what has arrived is not sent twice."
                    ) from error
                if delay is None:
                    raise explain(error, failed, repo) from error
                self.tell(f"the Hub answered {reason(error)}; trying again in {delay:.0f} s")
                time.sleep(delay)
        raise AssertionError("the last round returns or raises")

    def _arrived(self, upload: Upload, target: _Target) -> str | None:
        """The head of the branch if it holds this upload and was not there before; "" if not; None if not known.

        Raises:
            HubError: somebody else has committed meanwhile.
        """
        try:
            info = self.api.model_info(target.repo, revision=target.branch, files_metadata=True)
        except (HTTPError, OSError):
            return None
        if info.sha == target.head:
            return ""
        remote = {item.rfilename: item for item in info.siblings or []}
        if all(name in remote and _is_same(item, remote[name]) for name, item in upload.files.items()):
            return info.sha
        raise HubError(f"{target.repo} was changed by somebody else meanwhile; run the same command again.")

    def _take_back(self, target: _Target, begun: "_Begun") -> str:
        """Delete the empty repository or branch that this call created; returns what is there now, for people."""
        repo, branch = target.repo, target.branch
        if not begun.repository and not begun.branch:
            return f"Nothing of it is visible in {repo}." if target.exists else "Nothing was created."
        what = repo if begun.repository else f"the branch {branch} of {repo}"
        try:
            main = self.api.model_info(repo, revision=MAIN)
            found = self.api.model_info(repo, revision=branch) if begun.branch else main
            names = {item.rfilename for item in [*(found.siblings or []), *(main.siblings or [])]}
            # A new repository holds what the Hub puts there, a new branch stands where main does.
            untouched = names <= {".gitattributes"} if begun.repository else found.sha == main.sha
            if not untouched:
                return f"{what} has a commit and was left as it is."
        except (HTTPError, OSError):
            return f"{what} was created, and the Hub does not say what is in it now."
        try:
            if begun.repository:
                self.api.delete_repo(repo)
            else:
                self.api.delete_branch(repo, branch=branch)
        except (HTTPError, OSError):
            return f"{what} was created and is empty: it could not be deleted again."
        return "Nothing is left there."

    def _ask(self, call: Callable[[], T], failed: str, repo: str = "", *, missing: bool = False) -> T:
        """Make a request that may be repeated; `missing` lets "no such repository" through."""
        for wait in (*WAITS, None):
            try:
                return call()
            except (HTTPError, OSError) as error:
                status = status_of(error)
                if missing and isinstance(error, RepositoryNotFoundError) and status == 404:
                    raise
                if isinstance(error, OfflineModeIsEnabled) or (status is not None and status not in PASSING):
                    raise explain(error, failed, repo) from error
                delay = delay_before_next(error, wait)
                if delay is None:
                    raise explain(error, failed, repo) from error
                self.tell(f"the Hub answered {reason(error)}; trying again in {delay:.0f} s")
                time.sleep(delay)
        raise AssertionError("the last round returns or raises")

    @contextmanager
    def _explained(self, failed: str, repo: str) -> Iterator[None]:
        """For calls that repeat their requests themselves."""
        try:
            yield
        except DTFError:
            raise
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            raise explain(error, failed, repo) from error


@dataclass
class _Begun:
    """What this call created."""

    repository: bool = False
    branch: bool = False


def _is_same(item: bytes | Path, remote: Any) -> bool:
    """Whether a file in a repository has this content."""
    data = item if isinstance(item, bytes) else item.read_bytes()
    if remote.lfs is not None:
        return remote.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return remote.blob_id == hashlib.sha1(b"blob %d\x00" % len(data) + data).hexdigest()


def _default_message(upload: Upload) -> str:
    return f"Upload {upload.architecture} model with dtf {metadata.version('dtfcli')}"


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Keep the client's notices of repeated requests off stderr, and its bars where that is no terminal."""
    log = logging.getLogger("huggingface_hub")
    level, hidden = log.level, are_progress_bars_disabled()
    log.setLevel(logging.ERROR)
    if not hidden and not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if not hidden:
            enable_progress_bars()
