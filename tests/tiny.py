"""Small random models that the tests share."""

from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dtfcli.models.conversion import convert
from dtfcli.models.families import FAMILIES as BACKBONES

VOCABULARY = 97
FAMILIES = ("llama", "qwen2")
ARCHITECTURES = ("dtf", "mod")
CONTROLS = ("random", "layerdrop")
EVERY_ARCHITECTURE = (*ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in CONTROLS))
"""The controls keep every promise, too; `make test` tries them on none."""
TOKENWISE = (*ARCHITECTURES, pytest.param("random", marks=pytest.mark.slow))
"""Those that choose tokens; `layerdrop` has neither thresholds nor predictors."""
OPTIONS: dict[str, dict[str, Any]] = {
    "surprise, running, forecast": {"surprise_scale": "running", "bypass": "forecast", "forecast_factor": 0.25},
    "surprise of an MLP": {"routed_part": "mlp"},
    "surprise of attention, forecast": {"routed_part": "attention", "kv_tokens": "all", "bypass": "forecast"},
    "update size": {"score": "update_size"},
    "update size of attention": {"score": "update_size", "routed_part": "attention", "score_factor": 0.125},
    "update size of an MLP, one budget": {"score": "update_size", "routed_part": "mlp", "budget": "model"},
    "forecast error": {"score": "forecast_error", "bypass": "forecast", "kv_tokens": "all"},
    "forecast error, one budget": {"score": "forecast_error", "bypass": "forecast", "budget": "model"},
    "forecast error of an MLP": {"score": "forecast_error", "bypass": "forecast", "routed_part": "mlp"},
    "forecast error of attention": {"score": "forecast_error", "bypass": "forecast", "routed_part": "attention"},
    "mod, forecast": {"architecture": "mod", "bypass": "forecast", "gate": "soft"},
    "mod, forecast, MLP": {"architecture": "mod", "bypass": "forecast", "routed_part": "mlp", "gate": "soft"},
    "random, attention": {"architecture": "random", "routed_part": "attention", "kv_tokens": "all"},
    "layerdrop, forecast": {"architecture": "layerdrop", "bypass": "forecast"},
    "layerdrop, forecast, MLP": {"architecture": "layerdrop", "bypass": "forecast", "routed_part": "mlp"},
    "layerdrop, attention": {"architecture": "layerdrop", "routed_part": "attention"},
}
"""Combinations of what tokens are ranked by, what they skip, and what they take instead."""
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Larger than the usual 0.02: small random models should have something to say.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}


def dense_model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A dense model in eval mode, float32."""
    torch.manual_seed(seed)
    stock = BACKBONES[family]
    return stock.dense_model(stock.dense_config(**SHAPE | {"pad_token_id": None} | changes)).eval()


def routed_model(
    family: str = "llama", architecture: str = "dtf", capacity: Any = 0.5, *, seed: int = 0, **fields: Any
) -> PreTrainedModel:
    """A converted model in eval mode, calibrated at its own capacity and on the grid; forecasts say something."""
    model = convert(dense_model(family, seed), architecture, capacity, **fields)
    for name, parameter in model.named_parameters():
        if "forecast" in name or name.endswith("router.w_out"):
            torch.nn.init.normal_(parameter, std=0.1 if "linear" in name else 0.2)
    model.calibrate([{"input_ids": tokens(32, 64, seed=7)}])
    return model


@cache
def shared_routed_model(family: str, architecture: str, **fields: Any) -> PreTrainedModel:
    """As `routed_model`, built once; do not change it."""
    return routed_model(family, architecture, **fields)


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def pad(row: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """A row [T] with padding on both sides, and its attention mask; padding is filled with real token ids."""
    filled = torch.cat([torch.full((left,), 3), row, torch.full((right,), 5)])
    mask = torch.cat([torch.zeros(left), torch.ones(len(row)), torch.zeros(right)]).long()
    return filled, mask


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of this vocabulary: letters and numbered words."""
    words = {chr(ord("a") + i): i for i in range(26)} | {f"w{i}": i for i in range(26, VOCABULARY - 1)}
    words["<unk>"] = VOCABULARY - 1
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
