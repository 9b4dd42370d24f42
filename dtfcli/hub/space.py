"""A Space on the Hub that shows a pushed model with `dtf demo`: its card, its program and what it installs."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd
from jinja2 import Template

from dtfcli.hub.client import HubClient
from dtfcli.hub.errors import explained

FOLDER = "space"
"""Of its files in a dry run."""
SDK_VERSION = "6.31.0"
"""Of Gradio: the one that the page is tested with."""


def space_files(model: str, revision: str | None = None) -> dict[str, bytes]:
    """The files of a Space by name; `model` is the repository that it opens, at a branch if one is named."""
    card = Template(Path(__file__).with_name("space.md.jinja").read_text("utf-8"), keep_trailing_newline=True)
    opened = model if revision is None else f"{model}@{revision}"
    program = f"""# The page of `dtf demo`, for everybody who can see this Space.
from dtfcli.cli.app import run

raise SystemExit(run(["demo", "{opened}", "--host", "0.0.0.0", "--port", "7860", "--no-api-key"]))
"""
    text = {
        "README.md": card.render(model=model, opened=opened, name=model.rpartition("/")[2], sdk_version=SDK_VERSION),
        "app.py": program,
        "requirements.txt": "dtfcli[demo]\n",
    }
    return {name: content.encode("utf-8") for name, content in text.items()}


def push_space(hub: HubClient, space: str, files: dict[str, bytes], *, private: bool) -> str:
    """Create a Space if it is missing, and replace its files in one commit; returns its address.

    Raises:
        HubError: the Hub refuses or fails; the model is there all the same.
    """
    api = hub.api
    hub.tell(f"writing the Space {space}")
    with explained(f"the model is on the Hub, the Space {space} is not finished", space):
        api.create_repo(space, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(space, additions, commit_message="Show the model with dtf demo", repo_type="space")
    url = f"{api.endpoint}/spaces/{space}"
    hub.tell(f"the Space: {url}")
    return url
