"""`dtf push`: a model, its code and its card to the Hugging Face Hub, in one commit."""

from pathlib import Path
from typing import Annotated

import typer

from dtfcli.cli import options

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model or adapter folder, or a run folder (its final model).")
]
Repo = Annotated[str, typer.Argument(metavar="REPO", help="Repository on the Hub: owner/name, or a bare name.")]
HfUsername = Annotated[
    str | None,
    typer.Option("--hf-username", metavar="USER", help="Owner of a bare name: you, or an organization of yours."),
]
EvalResults = Annotated[
    Path | None,
    typer.Option(
        "--eval-results",
        metavar="FILE",
        help="JSON of `dtf eval` or lm-eval for the card. Default: the newest beside the model.",
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="BRANCH", help="Push to this branch, which is created if it is missing."),
]
CommitMessage = Annotated[
    str | None, typer.Option("--commit-message", "-m", metavar="M", help="First line of the commit.")
]
Merge = Annotated[bool, typer.Option("--merge", help="Publish an adapter as a plain model, merged into its base.")]
Space = Annotated[
    str | None,
    typer.Option(
        "--space", metavar="OWNER/NAME", help="Write a Space, too: it shows the model with the page of `dtf demo`."
    ),
]
DryRun = Annotated[
    Path | None,
    typer.Option("--dry-run", metavar="DIR", help="Write the files to this folder instead, without a network."),
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
    space: Space = None,
    dry_run: DryRun = None,
    json: options.Json = False,
) -> None:
    """Publish a model: weights, tokenizer, model card, and the code to open it without dtf.

    Your rights are checked before anything is uploaded. One commit makes all files visible. Log in first, with
    `hf auth login`.

    \b
    Examples:
      dtf push outputs/2026-01-31/quickstart my-first-dtf --dry-run preview
      dtf push outputs/2026-01-31/quickstart my-first-dtf --private
      dtf push outputs/2026-01-31/lora my-dtf --merge
      dtf push MODEL my-group/dtf-0.5b --eval-results eval/latest.json
      dtf push MODEL me/my-dtf --space me/my-dtf-demo   # and a Space
    """
    from dtfcli.cli import render
    from dtfcli.hub.push import preview
    from dtfcli.hub.push import push as push_model
    from dtfcli.hub.upload import PushOptions

    push_options = PushOptions(
        username=hf_username,
        eval_results=eval_results,
        private=private,
        revision=revision,
        commit_message=commit_message,
        merge=merge,
        space=space,
    )
    if dry_run is not None:
        upload = preview(model, repo, dry_run, push_options, render.note)
        document: dict[str, object] = {"repo": upload.repo, "folder": dry_run, "files": list(upload.files)}
        line = str(dry_run)
    else:
        result = push_model(model, repo, push_options, render.note)
        upload = result.upload
        document = {"repo": upload.repo, "url": result.url, "commit": result.commit, "files": list(upload.files)}
        line = result.url
        render.note(f"{len(upload.files)} files in commit {result.commit[:8]}")
        document |= {"space": result.space} if result.space else {}
    if upload.left_out:
        render.note(f"not uploaded: {', '.join(upload.left_out)}")
    for warning in upload.warnings:
        render.warn(warning)
    if json:
        render.emit_json(document)
    else:
        render.emit(line)
