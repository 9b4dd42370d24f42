"""The public part of a run's settings, for trackers and model cards: kinds of text and models, no local paths."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from dtfcli.errors import CheckpointError
from dtfcli.runs.folder import BEST_MODEL, SETTINGS_FILE

_TEXT_KINDS = {"", ".txt", ".md", ".py", ".jsonl", ".json", ".parquet"}
_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def run_settings_table(run: Path) -> dict[str, Any]:
    """The settings of a run as they were written, unchecked, so that runs of other versions work.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = run / SETTINGS_FILE
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); copy the model folder elsewhere and push that.") from error


def own_evaluation(lines: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The metrics line of the weights in a model folder of a run: the best for `best_model`, else the last."""
    measured = [line for line in lines if line.get("val/loss") is not None and line.get("step", 0) > 0]
    if not measured:
        return next((line for line in reversed(lines) if "step" in line), {})
    return min(measured, key=lambda line: line["val/loss"]) if name == BEST_MODEL else measured[-1]


def public_name(text: str | None, run: Path | None) -> tuple[str, bool]:
    """The public name of a base, tokenizer or source, and whether it is a Hub id.

    A local one is named by its kind. A name like "data/novels" can be either: it is local if such a path exists in
    the working folder or in a folder above the run.
    """
    if not text:
        return "", False
    if text == "python-stdlib":
        return "Python standard library", False
    path = Path(text)
    candidates = [path, *(parent / path for parent in (run.resolve().parents if run is not None else ()))]
    local = looks_like_a_path(text) or any(candidate.exists() for candidate in candidates)
    if not local and _HUB_ID.fullmatch(text) and path.suffix not in _TEXT_KINDS - {""} and path.suffix != ".gguf":
        return text, True
    if path.suffix == ".gguf":
        return f"{path.name} (a local file)", False
    return (f"local text ({path.suffix})" if path.suffix in _TEXT_KINDS - {""} else "a local folder"), False


def public_sources(settings: dict[str, Any], run: Path | None) -> list[tuple[str, str, float, bool]]:
    """For each source: Hub id or kind, configuration, share of the documents kept, and whether it is on the Hub."""
    public = []
    for source in settings.get("data", {}).get("sources", []):
        name, on_hub = public_name(str(source.get("path", "")), run)
        public.append((name, str(source.get("name", "")) if on_hub else "", float(source.get("ratio", 1.0)), on_hub))
    return public


def public_settings(settings: dict[str, Any], run: Path | None) -> dict[str, Any]:
    """A run's settings with local sources named by their kind, and without folders of this machine."""
    if not settings:
        return {}
    public = json.loads(json.dumps(settings))
    public.pop("hub", None)
    for values in public.values():
        for key in [key for key in values if key.endswith("_dir")]:
            del values[key]
    for group, key in (("model", "base"), ("data", "tokenizer")):
        if public.get(group, {}).get(key):
            public[group][key] = public_name(public[group][key], run)[0]
    for source in public.get("data", {}).get("sources", []):
        if source.get("path") != "python-stdlib":
            source["path"] = public_name(source.get("path"), run)[0]
    cleaned = without_local_traces(public)
    return {group: values for group, values in cleaned.items() if values != {}}


_LOCAL_KEYS = frozenset(
    {
        *("_name_or_path", "name_or_path", "_commit_hash", "is_local", "local_files_only", "cache_dir"),
        *("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "added_tokens_file"),
        *("token", "use_auth_token", "hub_token", "output_dir", "logging_dir"),
    }
)
"""Keys that locate a model and do not describe it."""
_VERBATIM = frozenset({"added_tokens_decoder", "chat_template"})
"""Text that belongs to a tokenizer, even if it looks like a path; `hub.leaks` reads it, too."""
_PATH_VALUE = re.compile(r"(?:\.{1,2}/|/[^/\s]+/|~[\w-]*/|[A-Za-z]:[\\/]|\\\\|file:).*")


def looks_like_a_path(value: str) -> bool:
    """Whether the whole value is an absolute path or a home path of any system."""
    return "\n" not in value and bool(_PATH_VALUE.fullmatch(value))


def without_local_traces(value: Any) -> Any:
    """A JSON document without local paths and without the keys that hold them."""
    if isinstance(value, dict):
        return {
            key: item if key in _VERBATIM else without_local_traces(item)
            for key, item in value.items()
            if key not in _LOCAL_KEYS and not (isinstance(item, str) and looks_like_a_path(item))
        }
    if isinstance(value, list):
        return [without_local_traces(item) for item in value if not (isinstance(item, str) and looks_like_a_path(item))]
    return value
