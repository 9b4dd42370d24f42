"""One continuation while it is written: its tokens, their depth, and the figures so far.

The model writes in a thread of its own; whoever draws the answer reads it meanwhile. A token's depth is that of
`dtf inspect-routing`: how many routed layers computed it when the model read it. The last one written was not read.
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from threading import Thread
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from dtfcli.cost.accounting import forward_flops_per_token
from dtfcli.generation import Sampling, generate
from dtfcli.models.observed import observed_passes
from dtfcli.models.pretrained import is_routed

PAUSE = 0.05
"""Seconds between two looks at an answer."""


class _StoppedError(Exception):
    """The reader wants no more."""


class Answer(BaseStreamer):
    """A continuation that grows.

    Attributes:
        layers: indices of the routed layers; none of a dense model.
        pieces: text of each token; "" while a character is not complete.
        depths: for each token that was written and read, how many routed layers computed it.
        read: tokens that the model read, the prompt's included.
        entered: how many of these each routed layer computed, int64 [L].
        state: "writing", "done", "stopped" or "failed".
        is_stopped: set it to end the answer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.layers: list[int] = model.routed_layers if is_routed(model) else []
        self.read, self.entered = 0, torch.zeros(len(self.layers), dtype=torch.int64)
        self.pieces, self.depths, self._ids, self._times = list[str](), list[int](), list[int](), list[float]()
        self.state, self.is_stopped, self._has_prompt = "writing", False, False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt [1, T], then each token [1], as Transformers hands them over."""
        if self.is_stopped:
            raise _StoppedError
        if self._has_prompt:
            self._times.append(time.perf_counter())
            self._ids += value.tolist()
            text = str(self.tokenizer.decode(self._ids, skip_special_tokens=True))
            self.pieces.append("" if text.endswith("\ufffd") else text[len("".join(self.pieces)) :])
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is held back."""

    def _note(self, output: Any) -> None:
        """Count who entered the routed layers in a pass of T tokens."""
        selected = torch.stack([record.selected[0] for record in output.routing])  # L × [T] → [L, T]
        self.entered, self.read = self.entered + selected.sum(1).cpu(), self.read + selected.shape[1]
        if self.pieces:
            self.depths.append(int(selected[:, -1].sum()))

    def write(self, prompt: str, sampling: Sampling, chat: bool) -> Iterator["Answer"]:
        """Write; yields itself every now and then, and at the end. Raises what `generate` raises."""
        failures: list[Exception] = []

        def work() -> None:
            try:
                with observed_passes(self.model, self._note) if self.layers else nullcontext():
                    generate(self.model, self.tokenizer, prompt, sampling, chat=chat, on_text=self)
                self.state = "done"
            except _StoppedError:
                self.state = "stopped"
            except Exception as error:
                self.state = "failed"
                failures.append(error)

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(PAUSE)
                yield self
        finally:
            self.is_stopped = True  # the reader may be gone
            thread.join()
        for error in failures:
            raise error
        yield self

    def figures(self) -> dict[str, str]:
        """Speed after the first token; of a routed model its FLOPs over the dense model's, and who entered."""
        times, read = self._times, self.read
        speed = f"{(len(times) - 1) / (times[-1] - times[0]):.1f}" if len(times) > 1 else "–"
        figures = {"tokens": str(len(times)), "tokens a second": speed}
        if self.layers and read:
            shares = dict(zip(self.layers, (self.entered.double() / read).tolist(), strict=True))
            flops = forward_flops_per_token(self.model, read, shares=shares)
            flops /= forward_flops_per_token(self.model, read, dense=True)
            entered = sum(shares.values()) / len(shares)
            figures |= {"of dense FLOPs": f"{flops:.1%}", "of tokens entered": f"{entered:.1%}"}
        return figures
