"""lm-eval's HFLM for models that route: the true padding mask, measured shares, answers that survive a kill.

Prompts, tokenization, scoring and stop sequences are HFLM's. Differences:

- HFLM pads on the right and passes no mask when it scores: padding would compete for capacity under `topk` and be
  counted as routed in any mode. A routed model gets the mask here, and forms logits for the continuations alone, not
  for a prompt of 25 examples times the vocabulary. A dense model is called as HFLM calls it: other matrix shapes would
  change the last digits of its scores.
- Log-likelihoods are summed in float32, not in the model's precision: in bfloat16 a sum of -200 has steps of 1.
- Batches are the same as HFLM's but are formed here, one at a time: a batch with known answers is not run again.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs
from torch import Tensor

from dtfcli.evaluation.answers import AnsweredBatch, AnswerStore
from dtfcli.models.pretrained import is_routed
from dtfcli.shares import ShareMeter, measured_shares

_CPU_BYTES = 2**30
_LARGEST_BATCH = 64

Scored = tuple[Any, list[int], list[int]]
"""What HFLM scores: (context and continuation as text, or None; context ids; continuation ids)."""


class RoutedLM(HFLM):
    """A routed or dense model behind lm-eval's interface.

    Attributes:
        routing: the model's routing mode; "dense" for a dense model.
        store: holds the answers; each job has its own.
        meter: routed shares over the answers in `store`.
        truncated: requests in `store` that lost their beginning.
        shortened: generation lengths that exceeded the model's positions, with the lengths used instead.
        on_answers: called with the number of new answers.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | None) -> None:
        """Wrap a loaded model.

        Args:
            model: a causal language model on its device.
            tokenizer: the model's, with an end-of-text token.
            batch_size: rows at a time; None: as many as fit into memory.
        """
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or 1, softmax_dtype=torch.float32)
        self._rows = batch_size
        self._routed = is_routed(model)
        self.routing: str = model.routing if self._routed else "dense"
        self._lengths: list[tuple[int, int]] | None = None
        self.on_answers: Callable[[int], None] = lambda count: None
        self.begin(AnswerStore())

    def begin(self, store: AnswerStore) -> None:
        """Start a job."""
        self.store = store
        self.meter = ShareMeter()
        self.truncated = 0
        self.seconds = 0.0
        self.shortened: dict[int, int] = {}

    def _answered(self, content: Any, truncated: int, compute: Callable[[str], list[Any]]) -> list[Any]:
        """The answers to a batch, from the store or computed; counted in both cases."""
        key = self.store.key(content)
        batch = self.store.find(key)
        if batch is None:
            started = time.perf_counter()
            with measured_shares(self.model) as meter:
                answers = compute(key)
            batch = AnsweredBatch(answers, meter.counts(), truncated, time.perf_counter() - started)
            self.store.add(key, batch)
        self.meter.add_counts(batch.counts)
        self.truncated += batch.truncated
        self.seconds += batch.seconds
        self.on_answers(len(batch.answers))
        return batch.answers

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether greedy decoding would produce them."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score continuations, batch by batch."""
        collator = Collator(requests, sort_fn=_longest_first, group_by="contexts", group_fn=_inputs)
        members = defaultdict(list)
        for place, request in enumerate(requests):
            members[tuple(_inputs(request))].append(place)
        answers: list[Any] = [None] * len(requests)
        size = override_bs or self._rows_for(max(len(_inputs(request)) for request in requests), scored=True)
        for rows in collator.get_batched(n=size):
            places = [place for row in rows for place in members[tuple(_inputs(row))]]
            batch = [requests[place] for place in places]
            truncated = sum(
                len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in batch
            )
            # Of each row: input tokens, and the number of last tokens whose logits are read.
            lengths = [(min(len(_inputs(row)), self.max_length), len(row[2])) for row in rows]

            def score(key: str, batch: Any = batch, lengths: Any = lengths) -> list[Any]:
                self._lengths, self.batch_size_per_gpu = lengths, len(lengths)
                try:
                    return super(RoutedLM, self)._loglikelihood_tokens(
                        batch, disable_tqdm=True, override_bs=len(lengths)
                    )
                finally:
                    self._lengths = None

            content = [(context, continuation) for _, context, continuation in batch]
            for place, answer in zip(places, self._answered(content, truncated, score), strict=True):
                answers[place] = tuple(answer)
        return answers

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits of right-padded rows [B, T]: [B, T, V], or for a routed model [B, K, V], the last K positions.

        HFLM finds a continuation by counting from the end of the logits. So K positions are enough if no continuation
        begins before them.
        """
        if not self._routed:
            return super()._model_call(inps)
        assert self._lengths is not None, "only scoring calls the model here"
        tokens = inps.shape[1]
        assert len(inps) == len(self._lengths), "HFLM formed other batches than these"
        assert tokens == self._lengths[0][0], "HFLM sorts rows by length"
        lengths = torch.tensor([length for length, _ in self._lengths], device=inps.device)
        mask = (torch.arange(tokens, device=inps.device) < lengths.unsqueeze(1)).long()
        keep = max(tokens - length + scored for length, scored in self._lengths)
        with torch.inference_mode():
            return self.model(inps, attention_mask=mask, logits_to_keep=keep, use_cache=False).logits

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole documents, in windows of the model's positions."""
        self.batch_size_per_gpu = self._rows_for(self.max_length, scored=True)
        on_answers, self.on_answers = self.on_answers, lambda count: None  # windows, whose number is unknown
        try:
            scores = super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.on_answers = on_answers
        self.on_answers(len(requests))
        return scores

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop sequence, batch by batch, left-padded and with a mask."""
        collator = Collator(
            [(*request.args, request) for request in requests],
            sort_fn=lambda item: (-len(self.tok_encode(item[0])), item[0]),
            group_by="gen_kwargs",
            group_fn=lambda item: item[1],
        )
        answers: list[str] = []
        for rows in collator.get_batched(n=self._rows_for(self.max_length)):
            batch = [row[2] for row in rows]
            length = normalize_gen_kwargs(rows[0][1], self.max_gen_toks)["max_gen_toks"]
            # HFLM gives up if no position is left for the prompt.
            allowed = length if length < self.max_length else self.max_length // 2
            if allowed < length:
                self.shortened[length] = allowed
                for request in batch:
                    request.args[1]["max_gen_toks"] = allowed
            truncated = sum(len(self.tok_encode(row[0])) > self.max_length - allowed for row in rows)

            def write(key: str, batch: Any = batch) -> list[str]:
                self.batch_size_per_gpu = len(batch)
                torch.manual_seed(int(key[:8], 16))  # tasks that sample draw the same after a kill
                return super(RoutedLM, self).generate_until(batch, disable_tqdm=True)

            answers += self._answered([row[:2] for row in rows], truncated, write)
        return collator.get_original(answers)

    def _rows_for(self, tokens: int, *, scored: bool = False) -> int:
        """Rows of a batch: as asked for, else the largest power of two whose activations fit into memory.

        On a CPU a dense model scores row by row: the whole logits of several rows would exceed the cache many times.
        """
        if self._rows is not None:
            return self._rows
        if scored and not self._routed and self.device.type == "cpu":
            return 1
        config = self.model.config
        row = 4 * tokens * (2 * config.vocab_size + 10 * config.hidden_size)
        budget = _CPU_BYTES
        if self.device.type == "cuda":
            budget = torch.cuda.get_device_properties(self.device).total_memory // 4
        rows = 1
        while rows < _LARGEST_BATCH and 2 * rows * row <= budget:
            rows *= 2
        return rows


def _inputs(request: Scored) -> list[int]:
    """The input tokens: all but the last, which is only predicted."""
    return request[1] + request[2][:-1]


def _longest_first(request: Scored) -> tuple[int, tuple[int, ...]]:
    tokens = request[1] + request[2]
    return -len(tokens), tuple(tokens)
