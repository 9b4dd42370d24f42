"""Every backbone keeps the promises: norms of keys, windows, layers without positions, scaled sums, norms behind."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtfcli.models.cache import CACHE_NAME, RoutedCache
from dtfcli.models.conversion import convert, to_dense
from dtfcli.models.families import FAMILIES
from dtfcli.models.layers import RoutedLayerMixin
from tests.budget import examples
from tests.tiny import SHAPE, tokens

WINDOWS = ["sliding_attention", "full_attention"] * 3
"""Layers 1, 3, 5 route, so both kinds have to: see `ROUTED`."""
ROUTED = [1, 2, 4, 5]
BACKBONES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "layer_types": WINDOWS},
    "qwen3": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 6, "layer_types": WINDOWS},
    "mistral": {"sliding_window": 6, "head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0, 1, 0], "use_sliding_window": False, "pad_token_id": None},
    "olmo2": {"pad_token_id": None},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 4.0,
    },
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, "layer_types": WINDOWS},
}
"""Small models of each, in what they differ from Llama."""
NEW = [name for name in BACKBONES if name not in ("llama",)]
OPTIONS: dict[str, dict[str, Any]] = {
    "surprise, keys of routed tokens": {"sink_tokens": 1},
    "mod": {"architecture": "mod"},
    "forecast error, keys of all": {"score": "forecast_error", "bypass": "forecast", "kv_tokens": "all"},
    "update size of an MLP": {"score": "update_size", "routed_part": "mlp"},
    "update size of attention, keys of all": {"score": "update_size", "routed_part": "attention", "kv_tokens": "all"},
    "update size of attention": {"score": "update_size", "routed_part": "attention"},
}


def dense_model(family: str) -> Any:
    """A small random dense model, in eval mode."""
    torch.manual_seed(0)
    stock = FAMILIES[family]
    return stock.dense_model(stock.dense_config(**SHAPE | BACKBONES[family])).eval()


_MADE: dict[tuple[str, str], Any] = {}


def routed_model(family: str, option: str) -> Any:
    """A converted and calibrated one; shared, so do not change it."""
    if (family, option) not in _MADE:
        fields = {"architecture": "dtf", **OPTIONS[option]}
        layers = [1, 3, 5] if fields["architecture"] == "dtf" and "score" not in fields else ROUTED
        model: Any = convert(dense_model(family), fields.pop("architecture"), 0.5, routed_layers=layers, **fields)
        for name, parameter in model.named_parameters():
            if "forecast" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.calibrate([{"input_ids": tokens(8, 40, seed=7)}], capacities=())
        _MADE[family, option] = model
    return _MADE[family, option]


every_backbone = pytest.mark.parametrize("family", BACKBONES)
every_option = pytest.mark.parametrize("option", OPTIONS)


def test_every_backbone_is_here() -> None:
    assert set(BACKBONES) == set(FAMILIES)


@every_backbone
@every_option
@torch.no_grad()
def test_capacity_1_is_dense(family: str, option: str) -> None:
    dense, fields = dense_model(family), {"architecture": "dtf", **OPTIONS[option]}
    layers = [1, 3, 5] if fields["architecture"] == "dtf" and "score" not in fields else ROUTED
    model: Any = convert(dense, fields.pop("architecture"), 1.0, routed_layers=layers, **fields)
    ids = tokens(2, 24)
    assert torch.allclose(model(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)
    mask = torch.ones(2, 24).long()
    mask[0, :5] = 0
    ours, theirs = model(ids, attention_mask=mask).logits, dense(ids, attention_mask=mask).logits
    assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], rtol=1e-5, atol=2e-5)
    back = to_dense(model)
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), dense.state_dict().values(), strict=True))


@pytest.mark.parametrize("family", NEW)
@every_option
@settings(max_examples=examples(3), deadline=None)
@given(data=st.data())
def test_cached_is_uncached_is_chunked(family: str, option: str, data: st.DataObject) -> None:
    """For any split, with padding or without, with layers that look and with some that do not."""
    model = routed_model(family, option)
    sizes = data.draw(st.lists(st.sampled_from([1, 1, 3, 11]), min_size=2, max_size=5))
    length, rows = sum(sizes), data.draw(st.integers(1, 2))
    left = data.draw(st.lists(st.integers(0, sizes[0]), min_size=rows, max_size=rows))
    mask = (torch.arange(length) >= torch.tensor(left).unsqueeze(1)).long() if data.draw(st.booleans()) else None
    real = torch.ones(rows, length, dtype=torch.bool) if mask is None else mask.bool()
    ids = tokens(rows, length, seed=data.draw(st.integers(0, 9)))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model, "looks", data.draw(st.booleans()))
        whole = model(ids, attention_mask=mask).logits
        cache, parts, start = RoutedCache(model.config), [], 0
        for size in sizes:
            end = start + size
            seen = None if mask is None else mask[:, :end]
            parts.append(model(ids[:, start:end], attention_mask=seen, **{CACHE_NAME: cache}).logits)
            start = end
    assert torch.allclose(torch.cat(parts, dim=1)[real], whole[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", NEW)
@pytest.mark.parametrize("option", ["mod", "forecast error, keys of all", "surprise, keys of routed tokens"])
@torch.no_grad()
def test_no_future_leak(family: str, option: str) -> None:
    model, ids = routed_model(family, option), tokens(1, 24)
    before = model(ids).logits
    for at in (3, 11, 20):
        changed = ids.clone()
        changed[0, at] = (ids[0, at] + 1) % SHAPE["vocab_size"]
        assert torch.allclose(model(changed).logits[:, :at], before[:, :at], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", NEW)
@pytest.mark.parametrize("option", ["mod", "forecast error, keys of all"])
@torch.no_grad()
def test_windows_count_positions(family: str, option: str) -> None:
    """A routed layer is the stock layer over all tokens, whose mask says which keys there are and how far back."""
    model, ids = routed_model(family, option), tokens(2, 30)
    seen: list[tuple[Any, Tensor, dict[str, Any], Any]] = []

    def note(layer: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        seen.append((layer, arguments[0], keywords, output))

    hooks = [model.model.layers[i].register_forward_hook(note, with_kwargs=True) for i in model.routed_layers]
    model(ids)
    for hook in hooks:
        hook.remove()
    positions = torch.arange(30)
    for layer, x, keywords, output in seen:
        selected, window = output[2], model.config.window(layer.layer_idx)
        visible = positions <= positions.unsqueeze(1)
        if window is not None:
            visible = visible & (positions > positions.unsqueeze(1) - window)
        keys = selected.unsqueeze(1) if option == "mod" else torch.ones_like(selected).unsqueeze(1)
        mask = (visible & (keys | torch.eye(30, dtype=torch.bool))).unsqueeze(1)
        stock = super(RoutedLayerMixin, layer).forward
        dense = stock(x, attention_mask=mask, position_embeddings=keywords["position_embeddings"])
        skipped = x if layer.forecast_prior is None else x + layer.forecast_prior(x)
        expected = torch.where(selected.unsqueeze(-1), dense, skipped)
        assert torch.allclose(output[0], expected, rtol=1e-5, atol=1e-5)
        assert 0 < int(selected.sum()) < selected.numel()


@pytest.mark.parametrize("family", NEW)
def test_generate_train_and_adapt(family: str) -> None:
    model = routed_model(family, "forecast error, keys of all")
    ids = tokens(2, 12)
    growing = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
    fixed = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0, cache_implementation="static")
    assert torch.equal(growing, fixed)
    adapted: Any = peft.get_peft_model(
        convert(dense_model(family), "dtf", 0.5, **OPTIONS["forecast error, keys of all"]),
        peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2),
    )
    losses = []
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(4):
        loss = adapted.train()(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    whole: Any = convert(dense_model(family), "mod", 0.5).train()
    whole(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in whole.model.layers[1].parameters() if p.requires_grad)


def test_losses_are_the_stock_ones() -> None:
    """Granite divides its logits, Gemma scales its embeddings: at γ 1 the loss is the stock model's."""
    ids = tokens(2, 12)
    for family in BACKBONES:
        dense = dense_model(family)
        model: Any = convert(dense, "mod", 1.0)
        with torch.no_grad():
            expected = dense(ids, labels=ids).loss
            assert torch.allclose(model(ids, labels=ids).lm_loss, expected, rtol=1e-5)
            assert torch.allclose(model.train()(ids, labels=ids).lm_loss, expected, rtol=1e-5)


@pytest.mark.slow
def test_saved_models_load_without_dtfcli(tmp_path: Path) -> None:
    """All backbones in one process that does not know the package."""
    ids = tokens(1, 12)
    for family in NEW:
        model = routed_model(family, "forecast error, keys of all")
        model.save_pretrained(tmp_path / family)
        torch.save(model(ids).logits, tmp_path / f"{family}.pt")
    script = f"""
import sys, torch
sys.modules["dtfcli"] = None
from pathlib import Path
from transformers import AutoModelForCausalLM
for family in {NEW!r}:
    model = AutoModelForCausalLM.from_pretrained(Path({str(tmp_path)!r}) / family, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(torch.tensor({ids.tolist()})).logits
    assert torch.equal(logits, torch.load(Path({str(tmp_path)!r}) / f"{{family}}.pt")), family
print("all")
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "/usr/bin:/bin"}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert result.stdout.strip() == "all", result.stderr[-2000:]
