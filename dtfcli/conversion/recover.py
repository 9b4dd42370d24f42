"""The recovery: a converted model learns for a while from the dense model inside it, by the loop of `dtf train`."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from dtfcli.conversion.text import Rows
from dtfcli.data.documents import OnProgress
from dtfcli.errors import ConfigError
from dtfcli.loading.load import load_model
from dtfcli.quiet import quiet_libraries
from dtfcli.runs.folder import MERGED_MODEL
from dtfcli.settings import load_settings
from dtfcli.training.events import TrainEvent
from dtfcli.training.loop import train_model

PRESET = "recover"
_AS_CONVERTED = ("architecture", "routed_part", "routed_layers", "bypass")
"""Of the preset's settings, those that the converted model decides."""


def recovery_folder(folder: Path) -> Path:
    """Where the run lies until the model of a folder is written.

    Raises:
        ConfigError: an earlier recovery was interrupted and lies there.
    """
    work = folder.with_name(f"{folder.name}-recovery")
    if work.exists():
        raise ConfigError(
            f"-o {folder}: {work} is of a recovery that was interrupted. Go on with it (dtf train --resume RUN, RUN "
            "being the folder in it that has checkpoints), remove it, or name another folder."
        )
    return work


def recover(model: Any, tokenizer: Any, rows: Rows, work: Path, seed: int, on_progress: OnProgress) -> Any:
    """A converted model after its recovery; `presets/recover.toml` says how.

    Args:
        model: fitted; it is spent.
        tokenizer: the model's.
        rows: text to learn from.
        work: folder of the run. It stays if the run is interrupted, else it goes.
        seed: of the run.
        on_progress: called with the share of the steps.

    Raises:
        TrainingInterrupted, DTFError: as in `training.loop.train_model`.
    """
    converted, text = work / "converted", work / "text.jsonl"
    dtype, device = model.dtype, model.device
    with quiet_libraries():
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
    texts = tokenizer.batch_decode(rows.ids, skip_special_tokens=True)
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts), "utf-8")
    base, length = f"model.base={json.dumps(str(converted))}", rows.ids.shape[1]
    rows_per_update = max(1, load_settings(PRESET, [base]).tokens_per_update // length)
    settings = load_settings(
        PRESET,
        [
            base,
            *(f"model.{name}={json.dumps(getattr(model.config, name))}" for name in _AS_CONVERTED),
            f"data.sources=[{{path={json.dumps(str(text))}}}]",
            f"data.cache_dir={json.dumps(str(work / 'tokens'))}",
            f"data.seq_len={length}",
            "data.validation_fraction=0",
            f"training.micro_batch_size={math.gcd(4, rows_per_update)}",
            f"training.tokens_per_update={rows_per_update * length}",
            f"training.max_steps={max(1, len(rows.ids) // rows_per_update)}",
            f"run.output_dir={json.dumps(str(work))}",
            f"run.seed={seed}",
            f"run.device={device}",
        ],
    )

    def show(event: TrainEvent) -> None:
        if event.kind == "step":
            on_progress("Recovering", event.step / max(1, event.total_steps))

    with quiet_libraries():
        result = train_model(settings, resume=None, rename=False, emit=show)
        recovered = load_model(str(result.run_dir / MERGED_MODEL), device=str(device), dtype=dtype)
    shutil.rmtree(work)
    return recovered.eval()
