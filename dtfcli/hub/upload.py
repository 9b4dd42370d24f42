"""What a push uploads: chosen by name, cleaned, described by a card, and read once more for what must not leave.

Choices: the weights go as the bytes that are on disk, so that hashes of evaluations stay true; everything that is not
known to belong to a model (checkpoints, pickles, notes) stays here and is named.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from dtfcli.errors import CheckpointError, ConfigError
from dtfcli.hub.card import CURVES_FILE, ModelFacts, model_card
from dtfcli.hub.leaks import find_leaks
from dtfcli.hub.results import EvalResults, read_results
from dtfcli.loading.adapters import read_adapter_config
from dtfcli.loading.load import load_model, load_tokenizer
from dtfcli.loading.paths import resolve_model_path, weights_hash
from dtfcli.models.configuration_fields import resolve_routed_layers
from dtfcli.quiet import quiet_libraries
from dtfcli.runs.files import read_metrics, replaced_folder
from dtfcli.runs.folder import MERGED_MODEL, METRICS_FILE, SETTINGS_FILE
from dtfcli.runs.public import (
    own_evaluation,
    public_name,
    public_settings,
    public_sources,
    run_settings_table,
    without_local_traces,
)

CARD_FILE = "README.md"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
)
_CONFIGS = ("config.json", "generation_config.json")
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_STALE_WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model)[\w.-]*\.(safetensors|bin)(\.index\.json)?")
_UNKNOWN_OWNER = "YOUR-NAME"


@dataclass(frozen=True)
class Upload:
    """Everything of one push.

    Attributes:
        repo: owner/name, or the name alone in a dry run that was not told the owner.
        architecture: dtf, mod or dense.
        files: name in the repository → content, or where it is.
        left_out: files of the model folder that stay here.
        warnings: what the user should know.
    """

    repo: str
    architecture: str
    files: dict[str, bytes | Path]
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def size(self) -> int:
        """Bytes in all."""
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
    """Whether a file of a repository is of a kind that pushes write, so that one left from before is stale."""
    code = {path.name for path in (Path(__file__).parents[1] / "models").glob("*.py")}
    known = {CARD_FILE, CURVES_FILE, _ADAPTER_CONFIG, *_CONFIGS, *_TOKENIZER, *code}
    return name in known or bool(_STALE_WEIGHTS.fullmatch(name))


def prepare_upload(
    model: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    eval_results: Path | None = None,
    merge_into: Path | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Upload:
    """Gather, clean, describe and check what a push of a model would upload.

    Args:
        model: model folder, adapter folder or run folder (its final model).
        repo: owner/name.
        revision: branch that it is meant for.
        eval_results: JSON of an evaluation; None: the newest beside the model that is of these weights, a causal one
            if there is any.
        merge_into: an empty folder, for an adapter that is to be uploaded as a plain model: it is written there, and
            has to stay until the upload is done.
        on_progress: told what is being done.

    Raises:
        CheckpointError: the model is missing, incomplete, no folder or holds what must not be published.
        ConfigError: the evaluation cannot be used; a merge was asked for where nothing can be merged.
    """
    tell = on_progress or (lambda message: None)
    named = folder = model_folder(model)
    run = _run_of(folder)
    adapter = (folder / _ADAPTER_CONFIG).is_file()
    base = _adapters_base(folder, run) if adapter and merge_into is None else None
    if merge_into is not None:
        if not adapter:
            raise ConfigError(f"--merge: {folder} is no adapter, there is nothing to merge; leave it out.")
        tell("merging the adapter into its base")
        folder = _merge(folder, merge_into)
    given = None if eval_results is None else read_results(eval_results, f"--eval-results {eval_results}")
    config = _read_json(folder / "config.json")
    weights = _weight_files(folder) if base is None else [folder / _ADAPTER_WEIGHTS]
    warnings: list[str] = []

    files: dict[str, bytes | Path] = {}
    for name in (*_CONFIGS, *_TOKENIZER):
        if (folder / name).is_file():
            files[name] = _cleaned(folder / name)
    if not any(name in files for name in ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")):
        warnings.append(f"{folder} has no tokenizer: those who download the model will miss it.")
    if base is None:
        files |= {path.name: path for path in _code_files(folder, config)}
    else:
        files[_ADAPTER_CONFIG] = _cleaned(folder / _ADAPTER_CONFIG)
    files |= {path.name: path for path in weights}
    if len(weights) > 1:
        files[_INDEX] = folder / _INDEX
    if run is not None and (run / CURVES_FILE).is_file():
        files[CURVES_FILE] = run / CURVES_FILE

    tell("hashing the weights")
    digests = [weights_hash(place) for place in _same_weights(named, run)]
    results, warning = _results_for(given, f"--eval-results {eval_results}", named, run, digests)
    warnings += [warning] if warning else []
    shown = repo if "/" in repo else f"{_UNKNOWN_OWNER}/{repo}"
    facts = _facts(shown, revision, config, weights, run, named, base, results, CURVES_FILE in files)
    try:
        files[CARD_FILE] = str(model_card(facts)).encode("utf-8")
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}.") from error

    tell("looking for what must not be published")
    _check_leaks(files, named, run)
    left_out = sorted(path.name for path in folder.iterdir() if path.name not in files)
    return Upload(repo, facts.architecture, dict(sorted(files.items())), left_out, warnings)


def model_folder(model: str | Path) -> Path:
    """The folder of a model that can be pushed.

    Raises:
        CheckpointError: it is not here, or no folder.
    """
    source = resolve_model_path(model)
    if source.kind == "hub":
        raise CheckpointError(
            f"{model}: not on this machine; push takes a model or run folder. A model of the Hub is there already."
        )
    if source.kind == "gguf":
        raise CheckpointError(
            f"{model}: a GGUF file is a dense base model; train it first (dtf train … model.base={model}), then push."
        )
    return Path(source.path)


def _run_of(folder: Path) -> Path | None:
    """The run folder that a model folder lies in."""
    named = folder.name in ("final_model", "best_model", MERGED_MODEL)
    return folder.parent if named and (folder.parent / SETTINGS_FILE).is_file() else None


def _adapters_base(folder: Path, run: Path | None) -> str:
    """The Hub id of an adapter's base.

    Raises:
        CheckpointError: it lies on this machine, where nobody else finds it; or the adapter is damaged.
    """
    name, on_hub = public_name(read_adapter_config(folder)["base_model_name_or_path"], run)
    if not on_hub:
        raise CheckpointError(
            f"{folder}: the base of this adapter is {name}, which nobody else has. "
            "Push it merged into its base: --merge."
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: an adapter without a config.json; push it merged into its base: --merge.")
    return name


def _merge(adapter: Path, folder: Path) -> Path:
    """Write the plain model that an adapter makes of its base."""
    model: Any = load_model(adapter, device="cpu")
    with quiet_libraries():
        model.save_pretrained(folder)
        load_tokenizer(adapter).save_pretrained(folder)
    return folder


def _same_weights(folder: Path, run: Path | None) -> list[Path]:
    """Folders whose evaluations are of these weights: a merged model was measured as the adapter it comes from."""
    merged = run is not None and folder.name == MERGED_MODEL and (run / "final_model").is_dir()
    return [folder, run / "final_model"] if merged and run is not None else [folder]


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the model consists of, and no shard left over from another save."""
    index = folder / _INDEX
    names = [_WEIGHTS]
    if not (folder / _WEIGHTS).is_file() and index.is_file():
        mapping = _read_json(index).get("weight_map")
        names = sorted(set(mapping.values())) if isinstance(mapping, dict) else []
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index}: names files outside its folder; save the model again.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        pickled = next(folder.glob("*.bin"), None)
        found = f", only {pickled.name}, a pickle, which is never uploaded" if pickled else ""
        what = missing[0] if missing else _WEIGHTS
        raise CheckpointError(
            f"{folder}: has no {what}{found}. Save it with save_pretrained, which writes safetensors."
        )
    return [folder / name for name in names]


def _code_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    """The Python files that `auto_map` names, and those they import."""
    mapped = config.get("auto_map")
    entries = mapped.values() if isinstance(mapped, dict) else []
    classes = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
    modules = sorted({str(name).rpartition(".")[0] for name in classes if "--" not in str(name)})
    found = {folder / f"{module}.py" for module in modules}
    if not found and str(config.get("model_type", "")).startswith("dynamic_"):
        raise CheckpointError(
            f"{folder}: its config.json names no code (auto_map), without which it opens nowhere else; "
            "load it with dtfcli.load_model and save it again."
        )
    try:
        for path in sorted(found):
            found |= {Path(name) for name in get_relative_import_files(path)}
    except OSError as error:
        missing = Path(error.filename or "").name
        raise CheckpointError(f"{folder}: its code needs {missing}, which is missing; save the model again.") from error
    return sorted(found)


def _cleaned(path: Path) -> bytes | Path:
    """A JSON file without local traces; the file itself where there are none."""
    if path.suffix != ".json" or path.name in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        return path
    document = _read_json(path)
    clean = without_local_traces(document)
    if clean == document:
        return path
    return (json.dumps(clean, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); save the model again.") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: no JSON object; save the model again.")
    return document


def _results_for(
    given: EvalResults | None, label: str, folder: Path, run: Path | None, digests: list[str]
) -> tuple[EvalResults | None, str | None]:
    """The evaluation to show, and a warning; `label` is what to call the given one.

    Raises:
        ConfigError: the given one is of other weights.
    """
    if given is not None:
        if given.model_hash is None:
            return given, f"{label}: does not say which weights it measured; be sure that it was these."
        if given.model_hash not in digests:
            raise ConfigError(
                f"{label}: measured other weights (model_hash {given.model_hash[:12]}…, this model has "
                f"{digests[0][:12]}…); run `dtf eval {folder}`."
            )
        return given, None
    found = [path for place in (folder, run) if place is not None for path in (place / "eval").glob("*.json")]
    own = []
    for path in sorted(found, key=lambda path: path.stat().st_mtime):
        with suppress(ConfigError):  # a damaged or foreign file is no reason not to push
            results = read_results(path, str(path))
            own += [results] if results.model_hash in digests else []
    if own:
        return next((results for results in reversed(own) if results.causal), own[-1]), None
    if found:
        return (
            None,
            f"{found[0].parent} has no results of these weights; `dtf eval {folder}` would add them to the card.",
        )
    return None, None


def _facts(
    repo: str,
    revision: str | None,
    config: dict[str, Any],
    weights: list[Path],
    run: Path | None,
    folder: Path,
    adapters_base: str | None,
    results: EvalResults | None,
    has_curves: bool,
) -> ModelFacts:
    parameters, added = _count_parameters(weights)
    settings = run_settings_table(run) if run is not None else {}
    base, on_hub = public_name(settings.get("model", {}).get("base"), run) if settings else (None, False)
    if adapters_base is not None:
        base, on_hub = adapters_base, True
    lines = read_metrics(run / METRICS_FILE) if run is not None and (run / METRICS_FILE).is_file() else []
    return ModelFacts(
        repo=repo,
        config=without_local_traces(config),
        parameters=parameters,
        added_parameters=added,
        weights_sha256={path.name: _sha256(path) for path in weights},
        revision=revision if revision != "main" else None,
        routed_layers=_routed_layers(config),
        base=base,
        base_on_hub=on_hub,
        is_adapter=adapters_base is not None,
        datasets=public_sources(settings, run),
        settings=public_settings(settings, run),
        evaluation=own_evaluation(lines, folder.name),
        unigram=next((line["val/unigram"] for line in lines if "val/unigram" in line), None),
        has_curves=has_curves,
        results=results,
        version=metadata.version("dtfcli"),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _routed_layers(config: dict[str, Any]) -> list[int]:
    if not str(config.get("model_type", "")).startswith("dynamic_"):
        return []
    return resolve_routed_layers(config["routed_layers"], config["dense_edges"], config["num_hidden_layers"])


def _count_parameters(weights: list[Path]) -> tuple[int, int]:
    """Parameters in all, and those that routing adds, from the headers of the weight files."""
    from safetensors import safe_open

    total = added = 0
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # no mapping
                    size = math.prod(file.get_slice(name).get_shape())
                    if "threshold" in name:  # a table, not a parameter
                        continue
                    total += size
                    added += size * any(part in name for part in ("router", "prior", "predictor"))
        except Exception as error:  # SafetensorError, whose place in the library has moved
            raise CheckpointError(f"{path}: no safetensors file ({error}); save the model again.") from error
    return total, added


def _check_leaks(files: dict[str, bytes | Path], folder: Path, run: Path | None) -> None:
    places = (folder.resolve(), *([run.resolve()] if run is not None else []))
    for name, item in files.items():
        if found := find_leaks(name, item, places):
            where = item if isinstance(item, Path) else f"{folder}: {name}"
            raise CheckpointError(
                f"{where}: holds {found[0]}, which must not be published. Take it out, or save the model again."
            )
