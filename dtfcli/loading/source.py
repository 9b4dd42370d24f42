"""What the user's MODEL means: a model folder, a run folder, a .gguf file, or a Hub id, optionally with @revision.

`open_source` finds it out once. Everything that opens, builds or measures the model takes the `ModelSource` it returns.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dtfcli.errors import CheckpointError, did_you_mean, reading
from dtfcli.loading.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, check_files, read_adapter_config
from dtfcli.runs.folder import BEST_MODEL, CHECKPOINTS, FINAL_MODEL, SETTINGS_FILE, STATE_FILE

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_KERNELS = ("_attn_implementation", "_experts_implementation")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        kind: folder, gguf (a file) or hub.
        path: the folder or file, or the Hub id.
        revision: branch, tag or commit on the Hub; None: its default.
        trust_remote_code: whether code that comes with the model may run.
        is_adapter: whether it is a folder of adapters (LoRA), which name the base that they belong to.
        tensors: in the weights of a folder; 0: not known.
    """

    kind: Literal["folder", "gguf", "hub"]
    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    is_adapter: bool = False
    tensors: int = 0

    @cached_property
    def configuration(self) -> Any:
        """The model's configuration, read when it is first asked for; an adapter without one has that of its base.

        Raises:
            CheckpointError: it is damaged, or names code that is not trusted.
            OSError, ValueError: as Transformers raises them for the Hub.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, PreTrainedConfig

        place, file, options = self.path, self.path, dict[str, Any]()
        if self.kind == "gguf":
            place, options = str(Path(self.path).parent), {"gguf_file": Path(self.path).name}
        elif self.kind == "hub":
            options = {"revision": self.revision}
        elif self.is_adapter and not (Path(self.path) / CONFIG).is_file():
            return self.base().configuration
        else:
            file = str(Path(self.path) / CONFIG)
        try:
            if self.tensors:  # a model of so many layers would take hours to build
                layers = PreTrainedConfig.get_config_dict(place)[0].get("num_hidden_layers")
                if isinstance(layers, int) and layers > self.tensors:
                    raise ValueError(f"num_hidden_layers = {layers}, but the weights are {self.tensors} tensors")
            config = AutoConfig.from_pretrained(place, trust_remote_code=self.trust_remote_code, **options)
        except Exception as error:
            if self.kind == "hub":
                raise
            if "trust_remote_code" in str(error):
                raise untrusted_code(file) from error
            problem, remedy = "cannot be read", "save or download the model again"
            if self.kind == "gguf":
                problem, remedy = "damaged or cut off", "download the GGUF file again"
            with reading(file, remedy, also=(StrictDataclassError,), what=problem):
                raise
        for name in _KERNELS:
            kernel = str(getattr(config, name, None))
            if "/" in kernel and not self.trust_remote_code:
                raise CheckpointError(
                    f"{file}: {name.removeprefix('_')} = {kernel!r} names code on the Hub, which is not run; take the "
                    "entry out."
                )
        return config

    @cached_property
    def fetched(self) -> "ModelSource":
        """Of a Hub id: the folder of its adapter, downloaded; of a whole model the source itself."""
        from huggingface_hub import snapshot_download
        from transformers.utils.peft_utils import find_adapter_config_file

        if find_adapter_config_file(self.path, revision=self.revision) is None:
            return self
        files = ["*.json", ADAPTER_WEIGHTS]
        folder = snapshot_download(self.path, revision=self.revision, allow_patterns=files)
        return ModelSource("folder", folder, None, self.trust_remote_code, is_adapter=True)

    def base(self) -> "ModelSource":
        """The base model of an adapter folder.

        Raises:
            CheckpointError: the adapter is damaged, or its base is not there.
        """
        config = read_adapter_config(Path(self.path))
        return open_source(
            config["base_model_name_or_path"], config.get("revision") or None, trust_remote_code=self.trust_remote_code
        )


def untrusted_code(name: str) -> CheckpointError:
    """The error of a model that brings its own code."""
    return CheckpointError(
        f"{name}: runs code that comes with it, which is not trusted; read that code, then allow it with "
        "--trust-remote-code (model.trust_remote_code = true for a base)."
    )


def open_source(
    model: str | Path, revision: str | None = None, *, trust_remote_code: bool = False, weights: bool = True
) -> ModelSource:
    """Find out what MODEL is, and check the files of a folder.

    Args:
        model: model or adapter folder, run folder (its final model, else its best), .gguf file, or Hub id[@revision].
        revision: of a Hub id; says the same as @revision.
        trust_remote_code: run code that comes with the model; dtf's own classes need none.
        weights: a folder has to have some; else its config.json is enough.

    Raises:
        CheckpointError: nothing is there, or something that is not a model, or a file that leads out of its folder;
            says which and what to give instead.
    """
    text = str(model)
    path = Path(text).expanduser()
    if text and path.exists():
        kind, place = _local(path, weights)
        if revision:
            raise CheckpointError(f"{text} is on this machine: revision = {revision!r} is for models on the Hub.")
        tensors = sum(check_files(place).values()) if kind == "folder" else 0
        return ModelSource(kind, str(place), None, trust_remote_code, (place / ADAPTER_CONFIG).is_file(), tensors)
    hub_id, _, at_revision = text.partition("@")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(hub_id) or _looks_local(hub_id):
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings).replace(" '", f" '{text.rstrip('/').removesuffix(path.name)}", 1)
        remedy = hint or " Give a model folder, a .gguf file or a Hub id."
        raise CheckpointError(f"{text or repr(text)}: no such file or folder.{remedy}")
    if at_revision and revision and at_revision != revision:
        raise CheckpointError(f"{text}: names a revision, and revision = {revision!r} names another; give one.")
    return ModelSource("hub", hub_id, at_revision or revision or None, trust_remote_code)


def _looks_local(hub_id: str) -> bool:
    """Whether something that does not exist was meant as a path: a known suffix, or a first folder that is here."""
    first, slash, _ = hub_id.partition("/")
    return hub_id.endswith((".gguf", ".safetensors", ".toml")) or (bool(slash) and Path(first).is_dir())


def _local(path: Path, weights: bool) -> tuple[Literal["folder", "gguf"], Path]:
    """Kind and place of a model on this machine."""
    if path.is_file():
        return "gguf", _gguf_file(path)
    if (path / ADAPTER_CONFIG).is_file():
        return "folder", path
    if (path / CONFIG).is_file():
        if weights and not any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
            raise CheckpointError(f"{path}: has a config.json but no weights (model.safetensors); copy them there.")
        return "folder", path
    for name in (FINAL_MODEL, BEST_MODEL):
        if (path / name / CONFIG).is_file():
            return "folder", path / name
    raise CheckpointError(f"{path}: {_why_no_model(path)}")


def _gguf_file(path: Path) -> Path:
    if path.suffix == ".gguf":
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path}: not a GGUF file (it does not start with GGUF); download it again.")
        return path
    if (path.parent / CONFIG).is_file():
        raise CheckpointError(f"{path}: a file of a model; give its folder, {path.parent}.")
    raise CheckpointError(f"{path}: a file, but not a model; give a model folder, a run folder or a .gguf file.")


def _why_no_model(folder: Path) -> str:
    """Why a folder is not a model, and what to give instead."""
    entries = sorted(folder.iterdir())
    if not entries:
        return "an empty folder; give a model folder, a run folder or a Hub id."
    if (folder / STATE_FILE).is_file() and folder.parent.name == CHECKPOINTS:
        return f"a training checkpoint; go on with it by `dtf train --resume {folder.parent.parent}`."
    if (folder / SETTINGS_FILE).is_file():
        return f"a run that has not finished; go on with it by `dtf train --resume {folder}`."
    gguf = [entry for entry in entries if entry.suffix == ".gguf"]
    if gguf:
        return f"a folder of .gguf files; name one, such as {gguf[0]}."
    inside = [entry for entry in entries if (entry / CONFIG).is_file() or (entry / SETTINGS_FILE).is_file()]
    if inside:
        return f"not a model itself; inside it are {', '.join(str(entry) for entry in inside[:3])}."
    return "not a model folder (it has no config.json); give a model folder, a run folder or a Hub id."
