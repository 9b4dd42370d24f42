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
from dtfcli.models.families import FAMILIES as STOCK

VOCABULARY = 97
FAMILIES = ("llama", "qwen2")
ARCHITECTURES = ("dtf", "mod")
CONTROLS = ("random", "layerdrop")
EVERY_ARCHITECTURE = (*ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in CONTROLS))
"""The controls keep every promise, too; `make test` tries them on none."""
TOKENWISE = (*ARCHITECTURES, pytest.param("random", marks=pytest.mark.slow))
"""Those that choose tokens; `layerdrop` has neither thresholds nor predictors."""
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
    "pad_token_id": None,
}
WINDOWS = ["full_attention", "sliding_attention", "full_attention"] * 2
"""Layers 1, 3 and 5 route: layer 1 has a window, and so has layer 4, which does not route."""
BACKBONES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 6, "layer_types": WINDOWS},
    "mistral": {"sliding_window": 6, "head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0, 0, 1, 1, 0], "use_sliding_window": False},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 4.0,
    },
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, "layer_types": WINDOWS},
}
"""Small models of each backbone, in what they differ from Llama."""


def dense_model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A dense model in eval mode, float32."""
    torch.manual_seed(seed)
    stock = STOCK[family]
    return stock.dense_model(stock.dense_config(**SHAPE | BACKBONES[family] | changes)).eval()


def routed_model(
    family: str = "llama", architecture: str = "dtf", capacity: Any = 0.5, *, seed: int = 0, **fields: Any
) -> PreTrainedModel:
    """A converted model in eval mode, calibrated at its own capacity and on the grid; forecasts say something."""
    model = convert(dense_model(family, seed), architecture, capacity, **fields)
    for name, parameter in model.named_parameters():
        if "forecast" in name:
            torch.nn.init.normal_(parameter, std=0.1)
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
