"""`dtf push`: a model, its code and its card to the Hugging Face Hub, in one commit."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtfcli.cli import options

if TYPE_CHECKING:
    from dtfcli.hub.upload import Upload


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model or adapter folder, or a run folder (its final model).", show_default=False
    ),
]
Repo = Annotated[
    str,
    typer.Argument(
        metavar="REPO", help="Repository on the Hub: owner/name, or a name; then it is yours.", show_default=False
    ),
]
HfUsername = Annotated[
    str | None,
    typer.Option("--hf-username", metavar="USER", help="Owner of a bare name: you, or an organization of yours."),
]
EvalResults = Annotated[
    Path | None,
    typer.Option(
        "--eval-results",
        metavar="FILE",
        help="JSON of `dtf eval` or lm-eval for the card; unset: the newest beside the model.",
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="BRANCH", help="Push to this branch; it is made when there is none."),
]
CommitMessage = Annotated[
    str | None, typer.Option("--commit-message", "-m", metavar="M", help="What the commit is called.")
]
Merge = Annotated[bool, typer.Option("--merge", help="Publish an adapter as a plain model, merged into its base.")]
DryRun = Annotated[
    Path | None,
    typer.Option("--dry-run", metavar="DIR", help="Write what would be uploaded to this folder, and ask nobody."),
]


def push(
    model: Model,
    repo: Repo,
    hf_username: HfUsername = None,
    eval_results: EvalResults = None,
    private: Private = False,
    revision: Revision = None,
    commit_message: CommitMessage = None,
    merge: Merge = False,
    dry_run: DryRun = None,
    json: options.Json = False,
) -> None:
    """Publish a model: weights, tokenizer, the code it needs where dtf is not installed, and a model card.

    Nothing is uploaded before the rights are known, and everything becomes visible in one commit. Log in with
    `hf auth login` first.

    \b
    Examples:
      dtf push outputs/2026-01-31/quickstart my-first-dtf --dry-run preview
      dtf push outputs/2026-01-31/quickstart my-first-dtf --private
      dtf push outputs/2026-01-31/lora my-dtf --merge
      dtf push MODEL my-group/dtf-0.5b --eval-results eval/latest.json --revision v2
    """
    from dtfcli.cli import render

    if dry_run is not None:
        upload = _dry_run(model, repo, hf_username, eval_results, revision, commit_message, merge, dry_run)
        _remark(upload.left_out, upload.warnings)
        if json:
            render.emit_json({"repo": upload.repo, "folder": dry_run, "files": list(upload.files)})
            return
        render.emit(str(dry_run))
        return
    from dtfcli.hub import push as hub

    result = hub.push(
        model,
        repo,
        username=hf_username,
        eval_results=eval_results,
        private=private,
        revision=revision,
        commit_message=commit_message,
        merge=merge,
        on_progress=render.note,
    )
    _remark(result.left_out, result.warnings)
    if json:
        render.emit_json({"repo": result.repo, "url": result.url, "commit": result.commit, "files": result.files})
        return
    render.note(f"{len(result.files)} files in commit {result.commit[:8]}")
    render.emit(result.url)


def _dry_run(
    model: str,
    repo: str,
    username: str | None,
    eval_results: Path | None,
    revision: str | None,
    commit_message: str | None,
    merge: bool,
    folder: Path,
) -> "Upload":
    from dtfcli.cli import render
    from dtfcli.errors import ConfigError

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--dry-run {folder}: exists and is not empty; name another folder.")
    import tempfile

    from dtfcli.hub.push import check_options
    from dtfcli.hub.upload import prepare_upload

    full = check_options(repo, username, revision, commit_message)
    with tempfile.TemporaryDirectory() as scratch:
        upload = prepare_upload(
            model,
            full,
            revision=revision,
            eval_results=eval_results,
            merge_into=Path(scratch) if merge else None,
            on_progress=render.note,
        )
        upload.write(folder)
        render.note(f"{len(upload.files)} files, {upload.size() / 2**20:.1f} MiB; nothing was uploaded")
    return upload


def _remark(left_out: list[str], warnings: list[str]) -> None:
    """What stayed here, and what the user should know."""
    from dtfcli.cli import render

    if left_out:
        render.note(f"not uploaded: {', '.join(left_out)}")
    for warning in warnings:
        render.warn(warning)
