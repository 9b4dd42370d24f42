"""Pushes a model to the Hugging Face Hub: rights first, then everything in one commit.

- Whatever can be refused is refused before anything is created or sent: no login, a read-only token, another owner.
- Large files are stored before the commit, invisibly. The commit makes all files visible at once.
- Files of an earlier push that this one does not have (shards, code) are deleted by the same commit. All other files
  belong to the owner and stay.
- A push that fails leaves a new repository empty. The next push uses it.
"""

import re
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from huggingface_hub import get_token

from dtfcli.errors import ConfigError, DTFError
from dtfcli.hub.client import MAIN, HubClient, repo_id
from dtfcli.hub.errors import HubAccessError
from dtfcli.hub.space import FOLDER, push_space, space_files
from dtfcli.hub.upload import UNKNOWN_OWNER, OnProgress, PushOptions, Upload, model_folder, prepare_upload
from dtfcli.quiet import quiet_libraries

_BRANCH = re.compile(r"(?!refs/|.*(\.\.|//|@\{))\w[^\s~^:?*\[\\]*(?<!/)(?<!\.)(?<!\.lock)")
"""What git takes as the name of a branch."""


@dataclass(frozen=True)
class PushResult:
    """A finished push.

    Attributes:
        url: of the repository's page, or of the branch.
        commit: hash of the commit; of the present head if nothing had changed.
        space: address of the Space, if one was asked for.
    """

    upload: Upload
    url: str
    commit: str
    space: str | None = None


def push(
    model: str | Path,
    repo: str,
    options: PushOptions | None = None,
    on_progress: OnProgress = lambda message: None,
) -> PushResult:
    """Push a model to the Hub, as one commit.

    Args:
        model: model folder, adapter folder, or run folder (its final model).
        repo: owner/name, or a name alone; the owner is then `options.username` or the user.
        options: how.
        on_progress: called with each step.

    Raises:
        ConfigError, CheckpointError: repository id, branch, evaluation or model cannot be used.
        HubAccessError: not logged in, or without the rights.
        HubError: the Hub cannot be reached or fails.
    """
    options = options or PushOptions()
    _check(repo, options)
    model_folder(model)
    if get_token() is None:
        raise HubAccessError("not logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN.")
    with quiet_libraries(bars=sys.stderr.isatty(), prints=True), tempfile.TemporaryDirectory() as scratch:
        hub = HubClient(on_progress)
        on_progress("asking the Hub who you are")
        space = hub.owned_id(options.space, None) if options.space else None
        target = hub.find(hub.owned_id(repo, options.username), options.revision or MAIN, private=options.private)
        upload = prepare_upload(model, target.repo, options, Path(scratch), on_progress)
        hub.check_card(upload)
        message = options.commit_message or f"Upload {upload.architecture} model with dtf {metadata.version('dtfcli')}"
        created = hub.create(target, private=options.private)
        left = f"{target.repo} may exist now, without the model; the next push uses it."
        try:
            commit = hub.commit(upload, created, message)
        except DTFError as error:
            if target.exists:
                raise
            raise type(error)(f"{error} {left}") from error
        except KeyboardInterrupt:
            if not target.exists:
                on_progress(left)
            raise
        if space is not None:
            space = push_space(hub, space, space_files(target.repo, options.revision), private=options.private)
    url = f"{hub.api.endpoint}/{target.repo}" + (f"/tree/{target.branch}" if target.branch != MAIN else "")
    return PushResult(upload, url, commit, space)


def preview(
    model: str | Path,
    repo: str,
    folder: Path,
    options: PushOptions,
    on_progress: OnProgress = lambda message: None,
) -> Upload:
    """Write the files of a push into a folder, without a network.

    Raises:
        ConfigError, CheckpointError: as for `push`, or the folder has content.
        DTFError: the folder cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--dry-run {folder}: exists and is not empty; name another folder.")
    full = _check(repo, options)
    with tempfile.TemporaryDirectory() as scratch:
        upload = prepare_upload(model, full, options, Path(scratch), on_progress)
        upload.write(folder)
        if options.space:
            (folder / FOLDER).mkdir()
            opened = full if "/" in full else f"{UNKNOWN_OWNER}/{full}"
            for name, content in space_files(opened, options.revision).items():
                (folder / FOLDER / name).write_bytes(content)
        on_progress(f"{len(upload.files)} files, {upload.size() / 2**20:.1f} MiB; nothing was uploaded")
    return upload


def _check(repo: str, options: PushOptions) -> str:
    """Refuse wrong options without a network; returns `repo_id`.

    Raises:
        ConfigError: names the option and the remedy.
    """
    full = repo_id(repo, options.username)
    if options.space is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.space):
        raise ConfigError(f"--space '{options.space}': not the id of a Space; give OWNER/NAME.")
    branch, message = options.revision, options.commit_message
    if branch is not None and not _BRANCH.fullmatch(branch):
        raise ConfigError(f"--revision '{branch}': not a branch name; use letters, digits and - _ . / such as v1.0.")
    if message is not None and not message.strip():
        raise ConfigError("--commit-message '': is empty; say what changed, or leave it out.")
    return full
