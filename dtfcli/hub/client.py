"""The conversation with the Hub: requests, retries, and errors in words.

A request is repeated a few times if that can help. A commit names its parent, so a repeated one cannot become two
commits: after a lost answer the Hub refuses the second, and the next push finds nothing to change.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from dtfcli.errors import ConfigError, DTFError
from dtfcli.hub.errors import (
    ANY_TROUBLE,
    NO_JSON,
    PASSING,
    WAITS,
    HTTPError,
    HubAccessError,
    delay_before_next,
    explain,
    odd_answer,
    reason,
    status_of,
)
from dtfcli.hub.upload import CARD_FILE, OnProgress, Upload, is_replaced_by_a_push

T = TypeVar("T")

MAIN = "main"


@dataclass(frozen=True)
class Target:
    """The destination of a push.

    Attributes:
        repo: owner/name.
        branch: its name.
        exists: whether the repository exists.
        head: commit of the branch; None if the branch does not exist.
        names: files in that commit.
    """

    repo: str
    branch: str
    exists: bool
    head: str | None
    names: tuple[str, ...] = ()


def repo_id(repo: str, username: str | None = None) -> str:
    """The repository's id as far as it is known without the Hub: owner/name, or the name alone.

    Raises:
        ConfigError: it is not a valid id, or names another owner than `username`.
    """
    owner, slash, _ = repo.rpartition("/")
    full = f"{username}/{repo}" if username and not slash else repo
    try:
        validate_repo_id(full)
        if slash and not owner:
            raise HFValidationError
    except HFValidationError:
        raise ConfigError(
            f"REPO '{full}': not a Hub id; give owner/name or a name, of letters, digits and . _ - (at most 96)."
        ) from None
    if username and slash and owner.lower() != username.lower():
        raise ConfigError(f"REPO '{repo}': its owner is {owner}, --hf-username says {username}; give one of them.")
    return full


class HubClient:
    """The Hub, as a push sees it."""

    def __init__(self, tell: OnProgress) -> None:
        """`tell` is called with each step and each repeated request."""
        # huggingface_hub takes an empty HF_ENDPOINT at its word.
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT or "https://huggingface.co"
        self.api = HfApi(endpoint=endpoint, library_name="dtfcli", library_version=metadata.version("dtfcli"))
        self.tell = tell

    def owned_id(self, repo: str, username: str | None) -> str:
        """owner/name, after a check that the user may write there.

        Raises:
            HubAccessError: the token is refused or read-only, or somebody else owns the repository.
        """
        nameless = "the Hub does not name the owner of your token"
        account = self._ask(self.api.whoami, nameless)
        try:
            user, roles, access = _account(account)
        except NO_JSON as error:
            raise odd_answer(error, nameless) from error
        if access.get("role") == "read":
            name = access.get("displayName", "")
            raise HubAccessError(
                f"your token{f' {name!r}' if name else ''} may only read: create one with write access in your "
                "settings on the Hub, then run `hf auth login`."
            )
        full = repo_id(repo, username)
        owner, slash, name = full.rpartition("/")
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

    def find(self, repo: str, branch: str, *, private: bool) -> Target:
        """Look up the repository and the branch.

        Raises:
            ConfigError: `private` is set and the repository is public, or the branch is a tag.
        """
        try:
            info = self._ask(lambda: self.api.model_info(repo), f"{repo} cannot be read", missing=True)
        except RepositoryNotFoundError:
            return Target(repo, branch, exists=False, head=None)
        if private and not info.private:
            raise ConfigError(
                f"--private: {repo} exists and is public. Change that in its settings on the Hub, or leave it out."
            )
        refs = self._ask(lambda: self.api.list_repo_refs(repo), f"the branches of {repo} cannot be listed")
        if branch in [tag.name for tag in refs.tags]:
            raise ConfigError(f"--revision {branch}: a tag of {repo}, which does not move; name a branch.")
        target = Target(repo, branch, exists=True, head=None)
        return self._with_files(target) if branch in [ref.name for ref in refs.branches] else target

    def _with_files(self, target: Target) -> Target:
        """The target with the head of its branch and the names of its files."""
        failed = f"the files of {target.repo} cannot be listed"
        info = self._ask(lambda: self.api.model_info(target.repo, revision=target.branch), failed)
        names = tuple(item.rfilename for item in info.siblings or [])
        if not all(isinstance(name, str) for name in (info.sha, *names)):
            raise odd_answer(TypeError("a commit or a file without a name"), failed)
        return replace(target, head=info.sha, names=names)

    def check_card(self, upload: Upload) -> None:
        """Let the Hub check the card's metadata.

        Raises:
            ConfigError: the metadata is not valid.
        """
        content = upload.files[CARD_FILE]
        assert isinstance(content, bytes)
        try:
            card = ModelCard(content.decode("utf-8"))
            self._ask(card.validate, "the model card cannot be checked", upload.repo, refused=True)
        except ValueError as error:
            reasons = " ".join(str(error).split())
            raise ConfigError(f"{CARD_FILE}: the Hub refuses the metadata of the model card ({reasons}).") from error

    def create(self, target: Target, *, private: bool) -> Target:
        """Create the repository and the branch if they are missing."""
        repo, branch = target.repo, target.branch
        if target.exists and (target.head is not None or branch == MAIN):
            return target
        if not target.exists:
            self.tell(f"creating {repo}")
            self._ask(lambda: self.api.create_repo(repo, private=private or None), f"{repo} cannot be created", repo)
        if branch != MAIN:
            self._ask(lambda: self.api.create_branch(repo, branch=branch), f"{branch} cannot be created", repo)
        return self._with_files(Target(repo, branch, exists=True, head=None))

    def commit(self, upload: Upload, target: Target, message: str) -> str:
        """Upload all files and delete stale ones, in one commit; returns its hash."""
        additions = [
            CommitOperationAdd(name, str(item) if isinstance(item, Path) else item)
            for name, item in upload.files.items()
        ]
        self.tell(f"uploading {len(additions)} files, {upload.size() / 2**20:.1f} MiB, to {target.repo}")
        with _explained(f"the upload to {target.repo} failed", target.repo):
            self.api.preupload_lfs_files(target.repo, additions, revision=target.branch, free_memory=False)
        stale = [name for name in target.names if is_replaced_by_a_push(name) and name not in upload.files]
        operations: list[Any] = [*additions, *(CommitOperationDelete(name) for name in stale)]
        self.tell("committing")
        failed = f"the commit to {target.repo} failed"
        with _explained(failed, target.repo):
            commit = self._ask(
                lambda: self.api.create_commit(
                    target.repo,
                    operations,
                    commit_message=message,
                    revision=target.branch,
                    parent_commit=target.head,
                ),
                failed,
                target.repo,
                refused=True,
            )
        return commit.oid

    def _ask(
        self, call: Callable[[], T], failed: str, repo: str = "", *, missing: bool = False, refused: bool = False
    ) -> T:
        """Make a request that may be repeated; `missing` passes "no such repository" on, `refused` a ValueError."""
        for wait in (*WAITS, None):
            try:
                return call()
            except NO_JSON as error:
                raise odd_answer(error, failed) from error
            except ValueError as error:
                if refused or isinstance(error, (HTTPError, OSError)):
                    raise
                raise odd_answer(error, failed) from error
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


def _account(answer: Any) -> tuple[str, dict[str, str | None], dict[str, Any]]:
    """Who a token belongs to, their role in each organization, and what is known about the token.

    Raises:
        TypeError, LookupError, AttributeError: the answer is not the Hub's.
    """
    roles = {entry["name"]: entry.get("roleInOrg") for entry in answer.get("orgs") or []}
    access = (answer.get("auth") or {}).get("accessToken") or {}
    if not all(isinstance(name, str) for name in (answer["name"], *roles)) or not isinstance(access, dict):
        raise TypeError("a user or an organization without a name")
    return answer["name"], roles, access


@contextmanager
def _explained(failed: str, repo: str) -> Iterator[None]:
    """Explain the errors of calls that repeat their requests themselves."""
    try:
        yield
    except DTFError:
        raise
    except ANY_TROUBLE as error:
        raise explain(error, failed, repo) from error
