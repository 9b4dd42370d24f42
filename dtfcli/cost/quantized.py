"""The cost of quantizing a model: bytes, loss and routed share before and after, over a passage of prose."""

from dataclasses import replace
from typing import Any

import torch

from dtfcli.errors import DTFError
from dtfcli.loading.load import load_model_and_tokenizer
from dtfcli.loading.quantization import Quantization, check_quantize, quantize
from dtfcli.loading.source import ModelSource
from dtfcli.models.pretrained import is_routed
from dtfcli.models.stock import longest_text
from dtfcli.quiet import quiet_libraries
from dtfcli.shares import measured_shares

SAMPLE = """\
The ferry left at six, while the harbor was still gray and the gulls had not yet made up their minds about the day. On
the upper deck a woman in a green coat counted the crates that were being carried aboard: forty of apples, twelve of
nails, three marked FRAGILE in letters that somebody had painted twice. She had crossed the strait every Thursday for
nineteen years, and in that time she had learned to read the water as other people read a newspaper. A band of darker
blue beyond the lighthouse meant wind by noon. A smooth patch near the rocks meant that the tide had turned. Nothing
in particular meant that there would be fog, except that the cook, who was never wrong, had put on his thick socks.

"You will want to sit on the left side," she told a boy who was traveling alone. "On the right you see only the open
sea, and it looks the same whether you are going out or coming home."

The boy had a letter in his pocket for an uncle he had never met. According to his mother the uncle repaired clocks,
kept bees, and owed the family 250 crowns since the winter of 1931; according to his father he did none of these
things. The boy did not know which of the two stories he wanted to be true. He moved to the left side, put his bag
between his feet, and watched the town grow smaller: first the people, then the doors, then the windows, until there
was only the church tower, as thin as a pencil, and a little smoke.

Halfway across, the engine stopped. It did not cough or complain; it simply stopped, and in the silence everyone could
suddenly hear the apples shifting in their crates. The captain came down from the bridge, wiped his hands on his
trousers and asked, quite politely, whether anyone on board happened to know something about clocks.
"""
"""Prose of our own, which no model has been trained on."""
_MOST_TOKENS = 512


def load_quantized(source: ModelSource, kind: str, **options: Any) -> tuple[Any, Any]:
    """Load a model, quantize it, and measure the effect, which is then `quantization_of(model)`.

    Args:
        source: the model's files.
        kind: int8.
        options: the other arguments of `load_model_and_tokenizer`.

    Raises:
        ConfigError, CheckpointError, HubError: as `load_model`.
    """
    check_quantize(kind)
    model, tokenizer = load_model_and_tokenizer(source, **options)
    quantize_and_measure(model, tokenizer)
    return model, tokenizer


def quantize_and_measure(model: Any, tokenizer: Any) -> Quantization:
    """Quantize a model in place as `quantize` does, with loss and routed share of the sample before and after.

    Routing is the model's own if that is causal, else by threshold. Nothing is measured without thresholds for the
    model's γ, or if the sample has fewer than two tokens.
    """
    with quiet_libraries():  # some say that a text is longer than their model takes
        ids = tokenizer(SAMPLE)["input_ids"]
    ids = ids[: min(_MOST_TOKENS, longest_text(model.config))]
    before = _measure(model, ids)
    quantization = quantize(model)
    after = _measure(model, ids)
    if before is not None and after is not None:
        figures: dict[str, Any] = {"loss_before": before[0], "routed_before": before[1]}
        figures |= {"loss_after": after[0], "routed_after": after[1]}
        model.quantization = replace(quantization, tokens=len(ids), **figures)
    return model.quantization


@torch.inference_mode()
def _measure(model: Any, ids: list[int]) -> tuple[float, float | None] | None:
    """Nats per token, and the share of tokens that routed layers took; None: there is nothing to measure."""
    if len(ids) < 2:
        return None
    row = torch.tensor([ids], device=model.device)
    if not is_routed(model):
        return float(model(input_ids=row, labels=row, use_cache=False).loss), None
    try:
        with model.routing_mode(model.causal_routing, model.capacity_override), measured_shares(model) as meter:
            loss = float(model(input_ids=row, labels=row, use_cache=False, output_logits=False).loss)
    except (ValueError, DTFError):  # not calibrated: whoever asked for topk need not have thresholds
        return None
    return loss, meter.read().overall


def in_words(change: Quantization) -> str:
    """One line: the effect of quantizing."""
    line = f"quantized {change.kind}: {change.bytes_before / 1e6:,.1f} MB → {change.bytes_after / 1e6:,.1f} MB"
    if change.loss_before is None or change.loss_after is None:
        return line
    line += f"; on {change.tokens} tokens of the sample: loss {change.loss_before:.3f} → {change.loss_after:.3f}"
    if change.routed_before is None or change.routed_after is None:
        return line
    return f"{line}, routed {change.routed_before:.1%} → {change.routed_after:.1%}"
