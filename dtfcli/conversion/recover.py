"""The recovery: a converted model learns for a while from the dense model inside it, by the loop of `dtf train`."""

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dtfcli.conversion.text import has_control_tokens
from dtfcli.data.documents import OnProgress
from dtfcli.errors import ConfigError, DTFError
from dtfcli.loading.load import load_model
from dtfcli.models.stock import longest_text
from dtfcli.quiet import quiet_libraries
from dtfcli.runs.files import replaced_folder
from dtfcli.runs.folder import FINAL_MODEL, MERGED_MODEL, SETTINGS_FILE, run_settings
from dtfcli.settings import Settings, load_settings
from dtfcli.training.events import TrainEvent
from dtfcli.training.failures import OutOfMemory
from dtfcli.training.loop import TrainingInterrupted, train_model

PRESET = "recover"
_CONVERTED, _TEXT, _ASKED = "converted", "text.jsonl", "conversion.json"
_AS_CONVERTED = ("architecture", "routed_layers", "bypass")
"""Settings that the converted model decides."""
_json = partial(json.dumps, ensure_ascii=False)


class Recovery:
    """A recovery beside the folder that its model is for; it stays there until that folder is written.

    Attributes:
        work: its folder: the converted model, text to learn from, what was asked for, and the run.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any]) -> None:
        """Look whether it has begun.

        Args:
            folder: of the model to write.
            asked: the options of the conversion.

        Raises:
            ConfigError: a recovery with other options lies there.
        """
        self.work, self.asked = folder.with_name(f"{folder.name}-recovery"), json.loads(_json(asked))
        file = self.work / _ASKED
        if not self.work.exists():
            return
        if not file.is_file() or json.loads(file.read_text("utf-8")) != self.asked:
            raise ConfigError(
                f"-o {folder}: {self.work} is there already, of another conversion. Give its options to go on with it, "
                "remove it, or name another folder."
            )

    def recover(self, model: Any, tokenizer: Any, texts: Sequence[str], tokens: int, on_progress: OnProgress) -> Any:
        """A converted model after learning; `presets/recover.toml` says how. A run that was stopped goes on.

        Args:
            model: fitted.
            tokenizer: the model's.
            texts: to learn from.
            tokens: how many, over and over if there are fewer.
            on_progress: called with the share of the steps, and with warnings.

        Raises:
            TrainingInterrupted: by Ctrl-C or SIGTERM; all is saved.
            DTFError: the run cannot go on.
        """
        if not self.work.exists():
            with quiet_libraries(), replaced_folder(self.work, "choose another folder") as new:
                model.save_pretrained(new / _CONVERTED)
                tokenizer.save_pretrained(new / _CONVERTED)
                (new / _TEXT).write_text("".join(_json({"text": text}) + "\n" for text in texts), "utf-8")
                (new / _ASKED).write_text(_json(self.asked), "utf-8")
        run = self._run()
        settings = self._settings(model, tokens, has_control_tokens(tokenizer)) if run is None else run_settings(run)

        def show(event: TrainEvent) -> None:
            if event.kind == "step":
                on_progress("Recovering", event.step / max(1, event.total_steps))
            elif event.kind == "warning":
                on_progress(event.message, None)

        try:
            with quiet_libraries():
                if run is None or not (run / FINAL_MODEL).exists():
                    run = train_model(settings, resume=run, rename=False, emit=show).run_dir
                recovered = load_model(
                    run / MERGED_MODEL,
                    device=model.device,
                    dtype=model.dtype,
                    attn_implementation=settings.model.attn_implementation,
                )
        except TrainingInterrupted:
            raise TrainingInterrupted(f"Interrupted; saved in {self.work}. The same command goes on with it.") from None
        except OutOfMemory as error:
            less = f"`dtf train {PRESET} --base {self.work / _CONVERTED} --text TEXT training.micro_batch_size=1`"
            raise DTFError(
                f"The recovery ran out of memory. What it learned is kept in {self.work}, and the same command goes on "
                f"with it where more is free. {less} takes less."
            ) from error
        except DTFError as error:
            raise DTFError(
                f"The recovery stopped: {error} It is kept in {self.work}, and the same command goes on with it. "
                "Without --recover the model is converted alone."
            ) from error
        return recovered

    def remove(self) -> None:
        """All of it, once the model is saved elsewhere."""
        shutil.rmtree(self.work)

    def _run(self) -> Path | None:
        """The run that is there."""
        return next((path.parent for path in self.work.glob(f"*/*/{SETTINGS_FILE}")), None)

    def _settings(self, model: Any, tokens: int, control_tokens: bool) -> Settings:
        preset = load_settings(PRESET)
        source = {"path": str(self.work / _TEXT), "control_tokens": control_tokens}
        length, device = min(preset.data.seq_len, longest_text(model.config)), model.device
        return load_settings(
            PRESET,
            [
                f"model.base={_json(str(self.work / _CONVERTED))}",
                *(f"model.{name}={_json(getattr(model.config, name))}" for name in _AS_CONVERTED),
                f"model.attn_implementation={model.config._attn_implementation}",
                f"data.sources={_json([source])}",
                f"data.cache_dir={_json(str(self.work / 'tokens'))}",
                f"data.seq_len={length}",
                "data.validation_fraction=0",
                f"training.tokens_per_update={preset.accumulation_steps() * preset.training.micro_batch_size * length}",
                f"training.calibration_tokens={2 * model.config.hidden_size}",  # the conversion fits them afterwards
                f"training.max_steps={max(1, tokens // preset.tokens_per_update)}",
                f"run.output_dir={_json(str(self.work))}",
                f"run.seed={self.asked['seed']}",
                f"run.device={device if device.type == 'cuda' else device.type}",
            ],
        )
