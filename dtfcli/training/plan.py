"""Sizes and moments of a run: rows, tokens and micro-batches of a step; when to log, evaluate and save.

A pure function of the settings and the number of rows, so that a resumed run works out the same.
"""

import math
from dataclasses import dataclass

import numpy as np

from dtfcli.errors import ConfigError, DataError
from dtfcli.models.configuration_fields import has_routed_mlps
from dtfcli.settings import Settings

_EVALUATIONS = 10
_EVALUATION_SHARE = 0.2
"""Where the settings leave it open: this many evaluations in a run, unless they would take more than this share of the
time that training takes; and a checkpoint with each."""


@dataclass(frozen=True)
class TrainPlan:
    """Sizes of a run, in rows, tokens and steps."""

    seq_len: int
    rows_per_step: int
    micro_batch_size: int
    total_steps: int
    warmup_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.seq_len

    def micro_batches(self, rows: np.ndarray, rank: int = 0, processes: int = 1) -> list[np.ndarray]:
        """One process's rows [R, T] of a step in parts of `micro_batch_size`; the last may be smaller.

        Processes take equal parts of the rows, one after the other: the step is the same however many there are.
        """
        each = len(rows) // processes
        mine = rows[rank * each : (rank + 1) * each]
        return [mine[start : start + self.micro_batch_size] for start in range(0, each, self.micro_batch_size)]


def for_processes(settings: Settings, processes: int) -> Settings:
    """The settings for a number of processes: where the size of a step is unset, it is a micro-batch of each.

    Raises:
        ConfigError: the size of a step is no multiple of their micro-batches.
    """
    training = settings.training
    if training.tokens_per_update is not None:
        try:
            settings.accumulation_steps(processes)
        except ValueError as error:
            raise ConfigError(f"{error}.") from error
    if processes == 1 or training.tokens_per_update is not None:
        return settings
    tokens = training.micro_batch_size * settings.data.seq_len * processes
    return settings.model_copy(update={"training": training.model_copy(update={"tokens_per_update": tokens})})


def plan_run(settings: Settings, train_rows: int | None) -> TrainPlan | None:
    """Work out a run's sizes from its settings and its rows of training text.

    None rows are not known yet (a dry run); the plan is None when the number of steps follows from them.
    """
    training, seq_len = settings.training, settings.data.seq_len
    rows_per_step = settings.tokens_per_update // seq_len
    if train_rows == 0:
        raise DataError(
            f"data.sources give no row of data.seq_len = {seq_len} tokens to train on; add text or shorten the rows."
        )
    total = training.max_steps
    if total is None:
        if train_rows is None:
            return None
        total = max(1, int(training.epochs * train_rows / rows_per_step))
    every = max(1, total // _EVALUATIONS, _affordable_interval(settings))
    return TrainPlan(
        seq_len=seq_len,
        rows_per_step=rows_per_step,
        micro_batch_size=min(training.micro_batch_size, rows_per_step),
        total_steps=total,
        warmup_steps=round(training.warmup_ratio * total),
        log_every=training.log_every,
        eval_every=training.eval_every or every,
        checkpoint_every=training.checkpoint_every or every,
    )


def _affordable_interval(settings: Settings) -> int:
    """Steps between evaluations at which these take `_EVALUATION_SHARE` of the training's time.

    A token costs three forward passes in training, and one in each of the modes that are evaluated.
    """
    one = settings.model.architecture == "dense" or has_routed_mlps(settings.model.model_dump())
    modes = 1 if one else 2
    evaluation = modes * settings.data.validation_blocks * settings.data.seq_len
    return math.ceil(evaluation / (_EVALUATION_SHARE * 3 * settings.tokens_per_update))
