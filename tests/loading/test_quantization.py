"""Weights in fewer bits: the backbone's projections alone, and what comes out stays near."""

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import dtfcli
from dtfcli.cost.quantized import SAMPLE, in_words, quantize_and_measure
from dtfcli.errors import ConfigError
from dtfcli.evaluation.report import model_hash
from dtfcli.loading.quantization import check_quantize, projections, quantization_of, quantize, weight_bytes
from dtfcli.models.conversion import convert
from dtfcli.models.pretrained import is_added, is_routed
from dtfcli.training.compiling import compile_layers
from tests.conftest import Outcome
from tests.tiny import dense_model, tokens, word_tokenizer

pytest.importorskip("torchao")

FORECAST = {"score": "forecast_error", "bypass": "forecast", "kv_tokens": "all"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {}),
    "dtf": ("llama", {"architecture": "dtf"}),
    "dtf, forecast error": ("qwen2", {"architecture": "dtf", **FORECAST}),
    "mod": ("qwen2", {"architecture": "mod", "predictor_loss_weight": 0.1}),
}


def model_of(name: str) -> Any:
    """A small model, calibrated."""
    family, fields = MODELS[name]
    model: Any = dense_model(family, intermediate_size=64)
    if fields:
        model = convert(model, capacity=0.5, **fields)
        model.calibrate([{"input_ids": tokens(16, 48, seed=7)}])
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens(4, 24)).logits


@pytest.mark.parametrize("name", MODELS)
def test_projections_alone(name: str) -> None:
    plain = model_of(name)
    model = copy.deepcopy(plain)
    effect = quantize(model)
    changed = {name for name, layer in projections(plain)}
    assert len(changed) == 7 * 6
    before = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if key.removesuffix(".weight") in changed:
            assert type(after[key]) is not nn.Parameter, key
        else:
            assert type(after[key]) in (nn.Parameter, torch.Tensor), key
            assert torch.equal(after[key].nan_to_num(), tensor.nan_to_num()), key
    assert not [name for name in changed if is_added(name) or "lm_head" in name]
    assert effect.kind == "int8" == quantization_of(model).kind
    assert effect.bytes_before == weight_bytes(plain) > effect.bytes_after == weight_bytes(model)


@pytest.mark.parametrize("name", MODELS)
def test_near_the_plain_model_and_generates_alike_with_and_without_a_cache(name: str) -> None:
    plain = model_of(name)
    model = copy.deepcopy(plain)
    quantize(model)
    if name != "dense":  # all tokens enter: a score near its threshold may fall on the other side
        plain.set_routing("threshold", 1.0)
        model.set_routing("threshold", 1.0)
    difference = (logits(model) - logits(plain)).abs().mean()
    assert 0 < difference < 0.1  # of logits whose standard deviation is about 1
    if name != "dense":
        model.set_routing("threshold")
    options: dict[str, Any] = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    for beams in (1, 2):
        cached = model.generate(tokens(2, 12), num_beams=beams, **options)
        again = model.generate(tokens(2, 12), num_beams=beams, use_cache=False, **options)
        assert torch.equal(cached.sequences, again.sequences)
        assert torch.allclose(torch.stack(cached.logits), torch.stack(again.logits), atol=1e-3)


def test_decoding_in_fixed_shapes() -> None:
    torch._dynamo.reset()
    model = model_of("dtf, forecast error")
    quantize(model)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    growing = model.generate(tokens(2, 12), **options)
    assert torch.equal(model.generate(tokens(2, 12), cache_implementation="static", **options), growing)
    compile_layers(model, "aot_eager")
    with torch.no_grad():  # torch.compile takes no tensor subclass under inference_mode
        assert torch.equal(model.generate(tokens(2, 12), cache_implementation="static", **options), growing)


def test_kernels_that_read_plain_weights_are_refused() -> None:
    model = model_of("dtf")
    model.model.triton_kernels = True
    with pytest.raises(ConfigError, match="Triton kernels read plain weights"):
        quantize(model)
    model.model.triton_kernels = False
    quantize(model)
    with pytest.raises(ValueError, match=r"quantized|install triton"):
        model.model.use_triton_kernels()


def test_linear_maps_that_compute_otherwise_are_refused() -> None:
    config = AutoConfig.for_model("falcon", vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ConfigError, match="torchao cannot stand in for FalconLinear"):
        quantize(AutoModelForCausalLM.from_config(config))


def test_what_cannot_be_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("dense")
    with pytest.raises(ConfigError, match="quantize = 'int3': choose int8"):
        check_quantize("int3")
    model.config.quantization_config = {"quant_method": "other"}
    with pytest.raises(ConfigError, match="quantized already"):
        quantize(model)
    del model.config.quantization_config
    quantize(model)
    with pytest.raises(ConfigError, match="quantized already"):
        quantize(model)
    with pytest.raises(ConfigError, match="is not saved"):
        model.save_pretrained("nowhere")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "torchao" else find_spec(name))
    with pytest.raises(ConfigError, match=r"pip install 'dtfcli\[quantize\]'"):
        check_quantize("int8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_precision(dtype: torch.dtype) -> None:
    model = model_of("mod").to(dtype)
    quantize(model)
    assert logits(model).dtype == dtype
    assert torch.isfinite(logits(model)).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A routed model with its tokenizer."""
    path = tmp_path_factory.mktemp("quantized") / "model"
    model_of("dtf, forecast error").save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def test_loaded_in_fewer_bits(folder: Path) -> None:
    model: Any = dtfcli.load_model(folder, quantize="int8", device="cpu")
    assert quantization_of(model).kind == "int8"
    assert quantization_of(dtfcli.load_model(folder, device="cpu")) is None
    digests = {model_hash(m, None) for m in (model, dtfcli.load_model(folder, device="cpu"))}
    assert len(digests) == 2
    assert model_hash(copy.deepcopy(model), None) in digests


@pytest.mark.parametrize("name", ["dense", "dtf", "mod"])
def test_what_it_cost(name: str) -> None:
    model = model_of(name)
    routed = is_routed(model)
    if routed:
        model.set_routing("topk", 0.5)  # measured causally all the same, and left as it was
    effect = quantize_and_measure(model, word_tokenizer())
    assert effect == quantization_of(model)
    assert effect.tokens == min(512, len(word_tokenizer()(SAMPLE)["input_ids"]))
    assert effect.loss_before != effect.loss_after
    assert abs(effect.loss_before - effect.loss_after) < 0.2
    assert (effect.routed_before is not None) == routed
    if routed:
        assert model.routing == "topk"
        assert abs(effect.routed_before - effect.routed_after) < 0.1
    words = in_words(effect)
    assert all(word in words for word in ["quantized int8", " MB → ", "tokens of the sample: loss"])
    assert ("routed" in words) == routed


def test_nothing_to_measure() -> None:
    uncalibrated = convert(dense_model(intermediate_size=64), "dtf", 0.5)
    assert "loss" not in in_words(quantize_and_measure(uncalibrated, word_tokenizer()))
    effect = quantize_and_measure(model_of("dense"), lambda text: {"input_ids": [1]})
    assert effect.tokens == 0
    assert "loss" not in in_words(effect)


def test_generate_says_what_it_cost(dtf: Callable[..., Outcome], folder: Path) -> None:
    result = dtf("generate", str(folder), "a b", "-n", "3", "--quantize", "int8", "--json", "--device", "cpu")
    assert result.code == 0, result
    assert "quantized int8: " in result.stderr
    effect = json.loads(result.stdout)["quantization"]
    assert effect["kind"] == "int8"
    assert effect["bytes_after"] < effect["bytes_before"]
    assert effect["routed_after"] is not None
    plain = dtf("generate", str(folder), "a b", "-n", "3", "--json", "--device", "cpu")
    assert "quantization" not in json.loads(plain.stdout)
    assert "quantized" not in plain.stderr
