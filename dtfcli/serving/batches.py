"""Transformers' continuous batches, in which every request is sampled its own way and leaves nothing behind.

The stock server samples all requests as the first one asks, computes on for a client that left before its stream began,
and keeps what it knows of every client who left.
"""

import asyncio
from typing import Any

import psutil
import torch
from transformers import GenerationConfig

from dtfcli.generation import dense_cache_bytes

RUNNER = ("transformers.generation.continuous_batching.continuous_api", "ModelRunner")
"""Where the class stands that computes a step and chooses its tokens."""
PAGE = 256
"""Tokens of a block of the paged cache, as Transformers has it."""


def paged_cache(model: Any, positions: int) -> dict[str, int]:
    """Sizes for a processor: eight texts of the model's positions, at most a quarter of the memory that is free.

    Transformers would take nine tenths of the machine's memory, whoever uses it.
    """
    room = min(8 * positions, psutil.virtual_memory().available // 4 // dense_cache_bytes(model, 1))
    return {"cb_num_blocks": max(1, room // PAGE), "cb_max_batch_tokens": 512}


class Batches:
    """The requests that are computed together, by name: how each chooses its tokens."""

    def __init__(self, model: Any) -> None:
        """Of a model on a CPU each request chooses for itself; a GPU replays one choice for all, the first one's."""
        self.model, self.chooses = model, model.device.type == "cpu"
        self.requests: dict[str, tuple[GenerationConfig, Any]] = {}

    def open(self, stock: Any, model: Any, config: Any) -> None:
        """As the stock `init_cb`; on a CPU the batch itself takes the likeliest token."""
        likeliest = GenerationConfig(do_sample=False, use_cache=False, eos_token_id=config.eos_token_id)
        stock(model, likeliest if self.chooses else config)

    def enter(self, manager: Any, request: str, length: int, config: Any) -> None:
        """Before a request of so many tokens is added: it ends with the task that waits for it."""
        handlers = manager.output_router.result_handlers
        # A stream's own handler comes after the request: what is computed in between waits for it in the event loop.
        manager.register_result_handler(request, lambda output: request in handlers and handlers[request][0](output))
        manager.output_router.output_queue.put = lambda *_, **__: None  # of tokens that nobody waits for
        self.requests[request] = config, self.model._get_logits_processor(config, length)

        def leave(_: Any) -> None:
            del self.requests[request]
            if handlers.pop(request, None):
                manager.cancel_request(request)

        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(leave)

    def runner(self, stock: Any) -> Any:
        """The class that computes a step: it takes the likeliest tokens of the scores that `choose` leaves."""
        choose = self.choose

        class Runner(stock):
            def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
                chosen = [each.state for each in self.inputs_and_outputs.requests_in_batch if each.has_new_token]
                for row, state in enumerate(chosen):
                    scores[:, row] = choose(state, scores[:, row])
                super()._sample(scores, output_ids)

        return Runner if self.chooses else stock

    def choose(self, state: Any, scores: torch.Tensor) -> torch.Tensor:
        """Scores [1, V] of which the largest is the request's choice, from the logits [1, V] of its next token."""
        request = self.requests.get(state.request_id)  # none, once its client is gone
        if request is None:
            return scores
        config, processors = request
        if not (processors or config.do_sample):
            return scores
        ids = torch.tensor([[*state.initial_tokens, *state.generated_tokens]], device=scores.device)
        scores = processors(ids, scores)
        # The largest of logits with Gumbel noise is a sample of their softmax.
        return scores - torch.empty_like(scores).exponential_().log() if config.do_sample else scores
