"""The toolkit knows models with routed MLPs: it loads, runs, measures, inspects and adapts them as it does others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import dtfcli
from dtfcli.cost.accounting import forward_flops_per_token
from dtfcli.errors import ConfigError
from dtfcli.evaluation.lm import RoutedLM
from dtfcli.generation import Sampling, generate, generate_many
from dtfcli.inspection.text import inspect_text
from dtfcli.loading.adapters import adapt, adapter_state, save_adapter
from dtfcli.loading.load import load_model, load_tokenizer
from dtfcli.models.mlp_fitting import fit_routing
from dtfcli.models.savings import dense_flops, saved_share
from dtfcli.models.stock import attention_shape, longest_text
from dtfcli.settings import load_settings
from dtfcli.shares import measured_shares
from tests.conftest import Outcome
from tests.tiny import SHAPE, dense_model, tokens, word_tokenizer

SMALL = ContinuousBatchingConfig(page_size=16, num_blocks=32, max_batch_tokens=64, use_cuda_graph=False)
"""Else the cache takes most of the machine's memory."""
GREEDY = Sampling(max_new_tokens=6)


def fitted(family: str = "llama", **fields: Any) -> Any:
    model: Any = dtfcli.route_mlps(dense_model(family), **{"capacity": 0.6} | fields)
    fit_routing(model, [{"input_ids": tokens(8, 40)}])
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A granite: its head divides the logits."""
    folder = tmp_path_factory.mktemp("models") / "routed"
    fitted("granite").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def test_loaded(folder: Path) -> None:
    model: Any = load_model(folder, capacity=0.3)
    assert (model.capacity, model.config.capacity, model.routing) == (0.3, 0.6, "threshold")
    records = model(tokens(4, 40), output_routing=True).routing
    assert [record.layer for record in records] == model.routed_layers == [3, 4]
    assert records[0].scores.shape == records[0].selected.shape == (4, 40)
    assert torch.equal(records[0].selected, records[0].scores > records[0].threshold)
    with measured_shares(model) as meter:
        model(tokens(4, 40), attention_mask=(torch.arange(40) < 20).long().expand(4, -1))
    shares = meter.read()
    assert shares.tokens == 80
    assert shares.by_layer[4] == pytest.approx(records[1].selected[:, :20].float().mean().item())
    with pytest.raises(ConfigError, match="routed MLPs route by 'threshold' alone"):
        load_model(folder, routing="topk")


def test_generated(folder: Path) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    alone = generate(model, tokenizer, "a b c", GREEDY)
    assert 0 < alone.stats.routed_share < 1
    assert alone.stats.saved_share == pytest.approx(saved_share(model, alone.stats.routed_share))
    assert alone.stats.cache_bytes == alone.stats.dense_cache_bytes
    together = dict(generate_many(model, tokenizer, ["a b c", "d e f g h"], GREEDY, batch_size=2))
    assert together[0].text == alone.text
    assert generate(model, tokenizer, "a b c", GREEDY, use_cache=False).text == alone.text


def test_generated_without_some_mlps() -> None:
    stats = generate(fitted(architecture="layerdrop", capacity=0.5), word_tokenizer(), "a b c", GREEDY).stats
    assert stats.routed_share == 0.5
    assert stats.saved_share is not None
    assert stats.saved_share > 0


GPT: dict[str, Any] = {"vocab_size": 97, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64}
"""A decoder with other names for everything: `h` for its layers, `c_fc` for a projection."""


def fitted_gpt() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_bigcode", **GPT | {"initializer_range": 0.2})
    model: Any = dtfcli.route_mlps(AutoModelForCausalLM.from_config(config).eval(), capacity=0.6)
    fit_routing(model, [{"input_ids": tokens(8, 40)}])
    return model


def test_counted_inspected_and_adapted_by_other_names(folder: Path) -> None:
    model = fitted_gpt()
    dense = forward_flops_per_token(model, 1, dense=True)
    assert dense == pytest.approx(dense_flops(model), rel=0.05)
    assert forward_flops_per_token(model, 1) / dense == pytest.approx(1 - saved_share(model), abs=0.02)
    routing = inspect_text(model, word_tokenizer(), "a b c d", name="gpt")
    assert len(routing.source) == 4
    lora = load_settings("quickstart", [f"model.base={folder}", "lora.enabled=true"])
    adapted = {name.split(".lora_")[0] for name, _ in adapt(model, lora).named_parameters() if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in adapted} == {"c_attn", "c_fc", "c_proj"}
    lora = load_settings("quickstart", [f"model.base={folder}", "lora.enabled=true", 'lora.targets=["q_proj"]'])
    with pytest.raises(ConfigError, match=r"has none of them; its projections are c_attn, c_fc, c_proj\. Leave it out"):
        adapt(fitted_gpt(), lora)


@pytest.mark.parametrize(("family", "limit"), [("llama", 64), ("mpt", 64), ("xlnet", None), ("bloom", None)])
def test_the_longest_text(family: str, limit: int | None) -> None:
    """By the name that a configuration has for it; XLNet writes −1 for none."""
    fields = {"max_seq_len" if family == "mpt" else "max_position_embeddings": 64} if limit else {}
    assert longest_text(AutoConfig.for_model(family, **fields), 7) == (limit or 7)


def test_a_text_of_any_length() -> None:
    """Bloom has no limit."""
    config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=97)
    assert generate(AutoModelForCausalLM.from_config(config).eval(), word_tokenizer(), "a b c", GREEDY).stats


@pytest.mark.parametrize("family", ["gemma4_unified_text", "qwen3_5_text"])
def test_of_any_cache_the_bytes_are_counted(family: str) -> None:
    """Layers that differ in their heads, and linear attention, whose state is no keys and values."""
    dense: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | {"head_dim": 8})).eval()
    stats = generate(dense, word_tokenizer(), "a b c", GREEDY).stats
    assert stats.cache_bytes == stats.dense_cache_bytes > 0
    assert attention_shape(dense.config) == (4, 2, 8)


def test_batched_continuously() -> None:
    """The paged cache of Transformers takes a stock model's keys."""
    model, prompts = fitted(), [tokens(1, length, length)[0].tolist() for length in (5, 9, 3)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    written = model.generate_batch(prompts, generation_config=config, continuous_batching_config=SMALL)
    assert len(written) == len(prompts)
    for answer in written.values():
        prompt = torch.tensor([answer.prompt_ids])
        every = torch.ones_like(prompt)
        alone = model.generate(prompt, attention_mask=every, generation_config=config)[0, prompt.shape[1] :]
        assert answer.generated_tokens == alone.tolist()


def test_evaluated(folder: Path) -> None:
    lm = RoutedLM(load_model(folder), load_tokenizer(folder), 2)
    scored = [(None, [1, 2, 3], [4, 5]), (None, [6], [7, 8]), (None, [9, 10, 11, 12], [13])]
    together = lm._loglikelihood_tokens(scored)
    assert set(lm.meter.read().by_layer) == {3, 4}
    alone = [RoutedLM(load_model(folder), load_tokenizer(folder), 1)._loglikelihood_tokens([one])[0] for one in scored]
    assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], abs=1e-4)


def test_inspected(folder: Path, dtf: Callable[..., Outcome], tmp_path: Path) -> None:
    """Scores and who entered, no surprise; losses are those of the model's own head."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    report = inspect_text(model, tokenizer, "a b c d e f")
    assert report.agreement is None
    assert set(report.layers[0].figures) == {"predicted_cost"}
    ids = torch.tensor([report.source.ids])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert report.loss[1:].mean() == pytest.approx(loss, abs=1e-5)
    result = dtf("inspect-routing", str(folder), "a b c", "--html", str(tmp_path / "page.html"))
    assert result.code == 0, result.stderr
    assert "predicted error" in result.stdout
    assert "D_st" not in (tmp_path / "page.html").read_text()
    document = json.loads(dtf("inspect-routing", str(folder), "a b c", "--json").stdout)
    assert document["score"] == "forecast_error"
    refused = dtf("inspect-routing", str(folder), "a b c", "--against-oracle")
    assert (refused.code, "routes MLPs alone" in refused.stderr) == (2, True)


def test_quantized(folder: Path) -> None:
    model: Any = load_model(folder, quantize="int8")
    mlp = model.model.layers[3].mlp
    assert hasattr(mlp.up_proj.weight, "__tensor_flatten__")
    assert type(mlp.forecast.linear.weight.data) is torch.Tensor
    assert (model(tokens(2, 9)).logits - load_model(folder)(tokens(2, 9)).logits).abs().max() < 0.5


def test_adapted(folder: Path, tmp_path: Path) -> None:
    """LoRA of the MLP itself, not of the neurons that its forecast has."""
    settings = load_settings("quickstart", [f"model.base={folder}", "lora.enabled=true", "training.max_steps=1"])
    model: Any = adapt(load_model(folder), settings).eval()
    state = adapter_state(model)
    assert any("mlp.up_proj.lora_A" in name for name in state)
    assert not any("narrow.up_proj.lora" in name for name in state)
    for name, tensor in state.items():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.1)
    save_adapter(model, tmp_path, state)
    opened: Any = load_model(tmp_path)
    assert (opened(tokens(2, 9)).logits - model(tokens(2, 9)).logits).abs().max() < 1e-4


@pytest.mark.parametrize("fields", [{}, {"forecast_maps": 2}, {"architecture": "layerdrop", "capacity": 0.5}])
@torch.no_grad()
def test_flops_are_those_that_torch_counts(fields: dict[str, Any]) -> None:
    """At the share really routed, and of a saving: short texts, so that attention is small."""
    model = fitted("qwen2", **fields)
    ids = tokens(1, 64)
    model.set_attn_implementation("eager")
    with measured_shares(model) as meter, FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False)
    shares = meter.read().by_layer
    counted = forward_flops_per_token(model, 64, shares=shares) * 64
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)
    by_capacity = forward_flops_per_token(model, 1) / forward_flops_per_token(model, 1, dense=True)
    assert by_capacity == pytest.approx(1 - saved_share(model), abs=0.02)


def test_timed(folder: Path, dtf: Callable[..., Outcome]) -> None:
    options = ["--phases", "prefill,decode", "--seq-len", "16", "--new-tokens", "3", "--capacities", "0.75,0.25"]
    options += ["--repeats", "1", "--calibration-tokens", "64", "--device", "cpu"]
    result = dtf("bench", str(folder), *options, "--json")
    assert result.code == 0, result.stderr
    for phase in ("prefill", "decode"):
        few, many = sorted(
            (entry for entry in json.loads(result.stdout)["results"] if entry["phase"] == phase),
            key=lambda entry: entry["capacity"],
        )
        assert few["routed_share"] < many["routed_share"]
        assert few["theory"] < many["theory"] < 1.0
        assert few["cache_ratio"] == 1.0
    refused = dtf("bench", str(folder), "--phases", "decode", "--static")
    assert (refused.code, "not for routed MLPs" in refused.stderr) == (2, True)


def test_timed_with_random_weights(dtf: Callable[..., Outcome]) -> None:
    """A preset's shape; nothing is fitted to random weights."""
    shape = ["model.scratch.hidden_size=64", "model.scratch.intermediate_size=192", "model.scratch.num_hidden_layers=6"]
    options = ["--phases", "prefill", "--seq-len", "32", "--capacities", "0.5", "--repeats", "1", "--device", "cpu"]
    fields = ["model.routed_part=mlp", "model.score=forecast_error", "model.bypass=forecast"]
    result = dtf("bench", "quickstart", *shape, *fields, *options, "--calibration-tokens", "512", "--json")
    assert result.code == 0, result.stderr
    entries = {entry["architecture"]: entry for entry in json.loads(result.stdout)["results"]}
    assert 0.2 < entries["dtf"]["routed_share"] < 0.8


def test_pushed(folder: Path, dtf: Callable[..., Outcome], tmp_path: Path) -> None:
    """The card says what `dtf convert` has measured."""
    point = {"capacity": 0.6, "loss_gap": 0.031, "stderr": 0.0088, "agreement": 0.83, "kl": 0.08, "routed_share": 0.61}
    chosen, none = point | {"saving": 0.1, "tokens": 8192}, point | {"capacity": 1.0, "saving": 0.0, "tokens": 1024}
    lower = point | {"capacity": 0.3, "saving": 0.2, "tokens": 1024}
    report = {"model": "/somewhere/dense", "text": {"fit_tokens": 20224}, "dial": [none, lower], "chosen": chosen}
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "report.json").write_text(json.dumps(report))
    result = dtf("push", str(tmp_path / "model"), "me/new", "--dry-run", str(tmp_path / "preview"))
    tmp_path = tmp_path / "preview"
    assert result.code == 0, result.stderr
    assert len(list(tmp_path.glob("*.py"))) == 3
    card = (tmp_path / "README.md").read_text()
    for words in ("The MLPs of 2 of 6 layers", "vllm serve me/new", "trust_remote_code=True", "capacity=0.3)"):
        assert words in card
    assert "| **10.0%** | 0.600 | +0.0310 ± 0.0088 | 0.830 | 0.080 | 0.610 | 8,192 |" in card
    assert "converted from dense" in card
    assert "/somewhere" not in card
    assert "topk" not in card
    assert "surprise" not in card
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_routed_mlp.RoutedGraniteForCausalLM"


def test_not_fitted(dtf: Callable[..., Outcome], tmp_path: Path) -> None:
    dtfcli.route_mlps(dense_model()).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    for command in ("generate", "inspect-routing"):
        refused = dtf(command, str(tmp_path), "a b c")
        assert (refused.code, "not fitted to text" in refused.stderr) == (2, True), refused.stderr


def test_a_fit_reads_rows_of_any_length_and_leaves_the_model_as_it_was() -> None:
    """At the γ of the fit the asked share of its text enters, in a model that is being trained, too."""
    model: Any = dtfcli.route_mlps(dense_model(), capacity=0.6).train()
    rows = [{"input_ids": tokens(16, 24)}, {"input_ids": tokens(16, 40, seed=1)}]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    fit_routing(model, rows)
    assert model.training
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    with torch.no_grad(), model.recorded() as records:
        for batch in rows:
            model.eval()(**batch)
    counts = {
        layer: torch.cat([r.selected.flatten() for r in records if r.layer == layer]) for layer in model.routed_layers
    }
    assert float(torch.stack([each.float().mean() for each in counts.values()]).mean()) == pytest.approx(0.6, abs=0.03)
