"""The conversation with the Hub: requests, retries, and errors in words.

A request is repeated a few times if that can help. A commit names its parent, so a repeated one cannot become two
commits: after a lost answer the Hub refuses the second, and the next push finds nothing to change.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from dtfcli.errors import ConfigError, HubError
from dtfcli.hub.errors import WAITS, HTTPError, HubAccessError, delay_before_next, explained, status_of
from dtfcli.hub.upload import CARD_FILE, OnProgress, Upload, is_replaced_by_a_push

T = TypeVar("T")

MAIN = "main"


@dataclass(frozen=True)
class Target:
    """The destination of a push.

    Attributes:
        exists: whether the repository exists.
        head: commit of the branch; None if the branch does not exist.
        names: files in that commit.
    """

    repo: str
    branch: str
    exists: bool
    head: str | None = None
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
        self.api = HfApi(library_name="dtfcli", library_version=metadata.version("dtfcli"))
        self.tell = tell

    def owned_id(self, repo: str, username: str | None) -> str:
        """owner/name, after a check that the user may write there.

        Raises:
            HubAccessError: the token is refused or read-only, or somebody else owns the repository.
        """
        user, roles, token_role = self._ask("the Hub does not name the owner of your token", self._account)
        if token_role == "read":
            raise HubAccessError(
                "your token may only read: create one with write access in your settings on the Hub, then run "
                "`hf auth login`."
            )
        full = repo_id(repo, username)
        owner, _, name = full.rpartition("/")
        owner = {account.lower(): account for account in (user, *roles)}.get(owner.lower(), owner) or user
        if owner != user and owner not in roles:
            others = f" or an organization of yours ({', '.join(sorted(roles))})" if roles else ""
            raise HubAccessError(
                f"REPO '{full}': belongs to {owner}, and you are logged in as {user}. "
                f"Push to {user}/{name}{others}, or log in as {owner} (`hf auth login`)."
            )
        if roles.get(owner) == "read":
            raise HubAccessError(f"REPO '{full}': you may only read in {owner}; ask its admins for write access.")
        return f"{owner}/{name}"

    def _account(self) -> tuple[str, dict[str, str | None], str | None]:
        """The token's owner, their role in each organization, and the token's own role."""
        answer: dict[str, Any] = self.api.whoami()
        roles = {entry["name"]: entry.get("roleInOrg") for entry in answer.get("orgs") or []}
        if not all(isinstance(name, str) for name in (answer["name"], *roles)):
            raise TypeError("a user or an organization without a name")
        return answer["name"], roles, ((answer.get("auth") or {}).get("accessToken") or {}).get("role")

    def find(self, repo: str, branch: str, *, private: bool) -> Target:
        """Find the repository and the branch.

        Raises:
            ConfigError: `private` is set and the repository is public, or the branch is a tag.
        """
        try:
            info = self._ask(f"{repo} cannot be read", lambda: self.api.model_info(repo))
        except HubError as error:
            cause = error.__cause__
            if isinstance(cause, RepositoryNotFoundError) and status_of(cause) == 404:
                return Target(repo, branch, exists=False)
            raise
        if private and not info.private:
            raise ConfigError(
                f"--private: {repo} exists and is public. Change that in its settings on the Hub, or leave it out."
            )
        refs = self._ask(f"the branches of {repo} cannot be listed", lambda: self.api.list_repo_refs(repo))
        if branch in [tag.name for tag in refs.tags]:
            raise ConfigError(f"--revision {branch}: a tag of {repo}, which does not move; name a branch.")
        exists = branch in [ref.name for ref in refs.branches]
        return self._with_files(repo, branch) if exists else Target(repo, branch, exists=True)

    def _with_files(self, repo: str, branch: str) -> Target:
        """A branch that exists, with its head and its files."""

        def target() -> Target:
            info = self.api.model_info(repo, revision=branch)
            names = [item.rfilename for item in info.siblings or []]
            if not all(isinstance(name, str) for name in (info.sha, *names)):
                raise TypeError("a commit or a file without a name")
            return Target(repo, branch, True, info.sha, tuple(names))

        return self._ask(f"the files of {repo} cannot be listed", target)

    def check_card(self, upload: Upload) -> None:
        """Let the Hub check the card's metadata.

        Raises:
            ConfigError: the metadata is not valid.
        """
        content = upload.files[CARD_FILE]
        assert isinstance(content, bytes)
        card = ModelCard(content.decode("utf-8"))
        try:
            self._ask("the model card cannot be checked", card.validate, upload.repo)
        except HubError as error:
            if not isinstance(error.__cause__, ValueError):
                raise
            reasons = " ".join(str(error.__cause__).split())
            raise ConfigError(f"{CARD_FILE}: the Hub refuses the metadata of the model card ({reasons}).") from error

    def create(self, target: Target, *, private: bool) -> Target:
        """Create the repository and the branch if they are missing."""
        repo, branch = target.repo, target.branch
        if target.exists and (target.head is not None or branch == MAIN):
            return target
        if not target.exists:
            self.tell(f"creating {repo}")
            self._ask(f"{repo} cannot be created", lambda: self.api.create_repo(repo, private=private or None), repo)
        if branch != MAIN:
            self._ask(f"{branch} cannot be created", lambda: self.api.create_branch(repo, branch=branch), repo)
        return self._with_files(repo, branch)

    def commit(self, upload: Upload, target: Target, message: str) -> str:
        """Upload all files and delete stale ones, in one commit; returns its hash."""
        repo, branch = target.repo, target.branch
        additions = [
            CommitOperationAdd(name, str(item) if isinstance(item, Path) else item)
            for name, item in upload.files.items()
        ]
        self.tell(f"uploading {len(additions)} files, {upload.size() / 2**20:.1f} MiB, to {repo}")
        with explained(f"the upload to {repo} failed", repo):  # which repeats its requests itself
            self.api.preupload_lfs_files(repo, additions, revision=branch, free_memory=False)
        stale = [name for name in target.names if is_replaced_by_a_push(name) and name not in upload.files]
        operations: list[Any] = [*additions, *(CommitOperationDelete(name) for name in stale)]
        self.tell("committing")
        commit = self._ask(
            f"the commit to {repo} failed",
            lambda: self.api.create_commit(
                repo, operations, commit_message=message, revision=branch, parent_commit=target.head
            ),
            repo,
        )
        return commit.oid

    def _ask(self, failed: str, call: Callable[[], T], repo: str = "") -> T:
        """Make a request that may be repeated.

        Raises:
            HubError: begins with `failed`.
        """
        with explained(failed, repo):
            for wait in WAITS:
                try:
                    return call()
                except (HTTPError, OSError) as error:
                    delay = delay_before_next(error, wait)
                    if delay is None:
                        raise
                    status = status_of(error)
                    answer = f"nothing ({type(error).__name__})" if status is None else str(status)
                self.tell(f"the Hub answered {answer}; trying again in {delay:.0f} s")
                time.sleep(delay)
            return call()
