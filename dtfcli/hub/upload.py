"""Prepares a push: chooses files by name, cleans them, adds a card, and checks all for secrets and local paths.

The weights are uploaded as the bytes on disk, so that hashes in evaluations stay true. Files that do not belong to a
model (checkpoints, pickles, notes) stay on this machine and are named.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_relative_import_files

from dtfcli.errors import CheckpointError, ConfigError, read_json_object, reading
from dtfcli.hub.card import model_card
from dtfcli.hub.facts import LocalModel, choose_results, gather_facts
from dtfcli.hub.leaks import find_leaks
from dtfcli.loading.load import load_model, load_tokenizer
from dtfcli.loading.model_files import INDEX, WEIGHTS, check_files, read_adapter_config
from dtfcli.loading.source import open_source
from dtfcli.models.conversion import ROUTING_FIELD_NAMES
from dtfcli.models.pretrained import ROUTED_TYPES
from dtfcli.quiet import quiet_libraries
from dtfcli.runs.files import replaced_folder
from dtfcli.runs.folder import BEST_MODEL, CURVES_FILE, FINAL_MODEL, MERGED_MODEL, SETTINGS_FILE
from dtfcli.runs.public import public_name, without_local_traces

OnProgress = Callable[[str], None]

CARD_FILE = "README.md"
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
)
_CONFIGS = ("config.json", "generation_config.json")
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_STALE_WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model)[\w.-]*\.(safetensors|bin)(\.index\.json)?")
UNKNOWN_OWNER = "YOUR-NAME"
_AGAIN = "save the model again"


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """How to push.

    Attributes:
        username: owner of a bare repository name; None: the user.
        eval_results: JSON of an evaluation for the card; None: the newest in eval/ of the model.
        revision: branch, created if it is missing; None: main.
        commit_message: first line of the commit; None: a line with the architecture and the version.
        merge: publish an adapter as a plain model, merged into its base.
        space: owner/name of a Space that shows the model; None: no Space.
    """

    username: str | None = None
    eval_results: Path | None = None
    private: bool = False
    revision: str | None = None
    commit_message: str | None = None
    merge: bool = False
    space: str | None = None


@dataclass(frozen=True)
class Upload:
    """The files of one push.

    Attributes:
        repo: owner/name; the name alone in a dry run without an owner.
        files: by name in the repository: content, or path of the file.
        left_out: files of the model folder that are not uploaded.
    """

    repo: str
    architecture: str
    files: dict[str, bytes | Path]
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def size(self) -> int:
        """Total bytes."""
        return sum(len(item) if isinstance(item, bytes) else item.stat().st_size for item in self.files.values())

    def write(self, folder: Path) -> None:
        """Write the files into a folder, which appears whole or not at all.

        Raises:
            DTFError: it cannot be written.
        """
        with replaced_folder(folder) as partial:
            for name, item in self.files.items():
                if isinstance(item, bytes):
                    (partial / name).write_bytes(item)
                else:
                    shutil.copyfile(item, partial / name)


def is_replaced_by_a_push(name: str) -> bool:
    """Whether pushes write a file of this name, so that one of an earlier push is stale."""
    code = {path.name for path in (Path(__file__).parents[1] / "models").glob("*.py")}
    return name in {CARD_FILE, CURVES_FILE, _ADAPTER_CONFIG, *_CONFIGS, *_TOKENIZER, *code} or bool(
        _STALE_WEIGHTS.fullmatch(name)
    )


def prepare_upload(
    model: str | Path,
    repo: str,
    options: PushOptions = PushOptions(),
    scratch: Path | None = None,
    on_progress: OnProgress = lambda message: None,
) -> Upload:
    """Gather, clean, describe and check the files of a push.

    Args:
        model: model folder, adapter folder or run folder (its final model).
        repo: owner/name.
        options: how to push.
        scratch: an empty folder for a merged model; it must exist until the upload is done.
        on_progress: called with each step.

    Raises:
        CheckpointError: the model is missing, incomplete, not a folder, or holds what must not be published.
        ConfigError: the evaluation cannot be used, or there is nothing to merge.
    """
    assert scratch is not None or not options.merge, "a merged model needs a folder"
    source = _open(model_folder(model), scratch if options.merge else None, on_progress)
    files = _files(source)
    on_progress("hashing the weights")
    results, warnings = choose_results(source, options.eval_results)
    if not files.keys() & {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json"}:
        warnings.insert(0, f"{source.folder} has no tokenizer; users of the model will miss it.")
    full = repo if "/" in repo else f"{UNKNOWN_OWNER}/{repo}"
    facts = gather_facts(source, full, options.revision, results, CURVES_FILE in files)
    files[CARD_FILE] = str(model_card(facts)).encode("utf-8")
    on_progress("checking for secrets and local paths")
    _check_leaks(files, source)
    left_out = sorted(path.name for path in source.folder.iterdir() if path.name not in files)
    return Upload(repo, facts.architecture, dict(sorted(files.items())), left_out, warnings)


def model_folder(model: str | Path) -> Path:
    """The folder of a model that can be pushed.

    Raises:
        CheckpointError: it is not on this machine, or not a folder.
    """
    source = open_source(model)
    if source.kind == "hub":
        raise CheckpointError(
            f"{model}: not on this machine; push takes a model or run folder. A model on the Hub is there already."
        )
    if source.kind == "gguf":
        raise CheckpointError(
            f"{model}: a GGUF file is a dense base model; train it first (dtf train … model.base={model}), then push."
        )
    return Path(source.path)


def _open(named: Path, merge_into: Path | None, tell: OnProgress) -> LocalModel:
    """Read a model folder, and merge its adapter into the base if `merge_into` asks for it."""
    run = named.parent if named.name in (FINAL_MODEL, BEST_MODEL, MERGED_MODEL) else None
    run = run if run is not None and (run / SETTINGS_FILE).is_file() else None
    folder, base = named, None
    is_adapter = (named / _ADAPTER_CONFIG).is_file()
    if merge_into is not None:
        if not is_adapter:
            raise ConfigError(f"--merge: {named} is not an adapter, there is nothing to merge; leave it out.")
        tell("merging the adapter into its base")
        folder, plain_model = merge_into, load_model(named, device="cpu")
        with quiet_libraries():
            plain_model.save_pretrained(folder)
            load_tokenizer(named).save_pretrained(folder)
    elif is_adapter:
        base = _adapters_base(named, run)
    config = _checked_config(folder)
    weights = _weight_files(folder) if base is None else [folder / _ADAPTER_WEIGHTS]
    return LocalModel(named, folder, run, base, config, weights)


def _checked_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder whose files fit it; of a routed model, one that a routed model can be built by.

    Raises:
        CheckpointError: a file is damaged, or they do not fit each other.
    """
    path = folder / "config.json"
    config = read_json_object(path, _AGAIN)
    if str(config.get("model_type", "")).startswith(ROUTED_TYPES):
        with reading(path, _AGAIN, also=(StrictDataclassError,)), quiet_libraries():
            built = AutoConfig.for_model(**config)
        # Fields that an earlier version did not write have their defaults.
        config = {name: getattr(built, name) for name in ROUTING_FIELD_NAMES} | config
    return config


def _files(source: LocalModel) -> dict[str, bytes | Path]:
    """The files of the model, without the card."""
    folder, run = source.folder, source.run
    files: dict[str, bytes | Path] = {
        name: _cleaned(folder / name) for name in (*_CONFIGS, *_TOKENIZER) if (folder / name).is_file()
    }
    if source.base is None:
        files |= {path.name: path for path in _code_files(folder, source.config)}
    else:
        files[_ADAPTER_CONFIG] = _cleaned(folder / _ADAPTER_CONFIG)
    files |= {path.name: path for path in source.weights}
    if len(source.weights) > 1:
        files[INDEX] = folder / INDEX
    if run is not None and (run / CURVES_FILE).is_file():
        files[CURVES_FILE] = run / CURVES_FILE
    return files


def _adapters_base(folder: Path, run: Path | None) -> str:
    """The Hub id of an adapter's base.

    Raises:
        CheckpointError: the base is only on this machine, or the adapter is damaged.
    """
    name, on_hub = public_name(read_adapter_config(folder)["base_model_name_or_path"], run)
    if not on_hub:
        raise CheckpointError(
            f"{folder}: the base of this adapter is {name}, which exists only here. "
            "Push the adapter merged into its base: --merge."
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: an adapter without a config.json; push it merged into its base: --merge.")
    return name


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model, without shards of an earlier save."""
    names = check_files(folder)
    if not names:
        pickled = next(folder.glob("*.bin"), None)
        only = f", only {pickled.name}, a pickle, which is never uploaded" if pickled else ""
        raise CheckpointError(
            f"{folder}: has no {WEIGHTS}{only}. Save it with save_pretrained, which writes safetensors."
        )
    return [folder / name for name in names]


def _code_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    """The Python files that `auto_map` names, and the files that these import."""
    mapped = config.get("auto_map")
    entries = mapped.values() if isinstance(mapped, dict) else []
    classes = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
    modules = sorted({str(name).rpartition(".")[0] for name in classes if "--" not in str(name)})
    if foreign := [module for module in modules if not module.isidentifier()]:
        raise CheckpointError(
            f"{folder}: auto_map in its config.json names {foreign[0]!r}, no file of its folder; {_AGAIN}."
        )
    files = {folder / f"{module}.py" for module in modules}
    if not files and str(config.get("model_type", "")).startswith(ROUTED_TYPES):
        raise CheckpointError(
            f"{folder}: its config.json names no code (auto_map), so it opens only where dtf is installed; "
            "load it with dtfcli.load_model and save it again."
        )
    try:
        for path in sorted(files):
            files |= {Path(name) for name in get_relative_import_files(path)}
        if outside := [path for path in files if path.resolve().parent != folder.resolve()]:
            raise CheckpointError(f"{folder}: its code imports {outside[0]}, outside its folder; {_AGAIN}.")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{folder}: its code is not UTF-8 text; {_AGAIN}.") from error
    except OSError as error:
        missing = Path(error.filename or "").name
        raise CheckpointError(f"{folder}: its code needs {missing}, which is missing; {_AGAIN}.") from error
    return sorted(files)


def _cleaned(path: Path) -> bytes | Path:
    """A JSON file without local traces; the file itself if it has none."""
    if path.suffix != ".json" or path.name in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        return path
    document = read_json_object(path, _AGAIN)
    clean = without_local_traces(document)
    if clean == document:
        return path
    return (json.dumps(clean, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")


def _check_leaks(files: dict[str, bytes | Path], source: LocalModel) -> None:
    places = tuple(folder.resolve() for folder in (source.named, source.run) if folder is not None)
    for name, item in files.items():
        if leaks := find_leaks(name, item, places):
            where = item if isinstance(item, Path) else f"{source.named}: {name}"
            raise CheckpointError(
                f"{where}: holds {leaks[0]}, which must not be published. Take it out, or save the model again."
            )
