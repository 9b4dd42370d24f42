"""Routed MLPs: any decoder of Transformers whose layers have an `mlp`, without a list of families."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import dtfcli
from dtfcli.models import least_squares, mlp_fitting, mlp_survey, savings
from dtfcli.models.cache import CACHE_NAME
from dtfcli.models.conversion import route_mlps
from dtfcli.models.mlp_fitting import fit_routing
from dtfcli.models.mlp_survey import rank_layers
from dtfcli.models.modeling_routed_mlp import interpolated, routed_mlps
from tests.tiny import SHAPE, tokens

FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "smollm3",
    "olmo2",
    "granite",
    "gemma3_text",
    "phi3",
    "glm",
    "cohere",
    "starcoder2",
    "stablelm",
    "phi",
    "nemotron",
    "apertus",  # its activation has parameters
    "bitnet",  # has a norm over the neurons
    "gpt_bigcode",  # calls its layers `h`
    "gemma4_unified_text",  # layers differ in the size of heads
    "qwen3_5_text",  # linear attention
]
EXPERTS = ["qwen3_moe", "mixtral"]
FEW: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2} | dict.fromkeys(
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4
)
SHAPES: list[dict[str, Any]] = [
    {},
    FEW,
    {"head_dim": None},
    FEW | {"num_key_value_heads": 4, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1},
    {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True},
    {"rotary_dim": 8},  # GPT-J, CodeGen
    {"attention_types": [[["global", "local"], 3]]},  # GPT-Neo
]


def dense_model(family: str, **changes: Any) -> PreTrainedModel:
    values = {"head_dim": 8, "pad_token_id": None} | SHAPE | changes
    config = AutoConfig.for_model(
        family, **{name: value for name, value in values.items() if name != "head_dim" or value}
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def fitted(dense: PreTrainedModel) -> Any:
    model: Any = route_mlps(dense, capacity=0.6, forecast_maps=2)
    fit_routing(model, [{"input_ids": tokens(8, 40)}])
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_decoder_stays_what_it_is(family: str, tmp_path: Path) -> None:
    """Lossless at γ = 1; cached = chunked = alone = padded; no token sees a later one; reload with three code files."""
    dense = dense_model(family)
    check_promises(dense, fitted(dense), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("kind", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(FAMILIES)))
def test_every_other_kind_stays_what_it_is_or_is_refused(kind: str, tmp_path: Path) -> None:
    """All causal language models that Transformers has, as far as small ones can be made of their configurations."""
    errors = []
    for changes in SHAPES:
        try:
            with torch.device("meta"):
                assert dense_model(kind, **changes).num_parameters() < 200_000_000, "too large"
            dense = dense_model(kind, **changes)
            cache = dense(tokens(1, 8), use_cache=True).get(CACHE_NAME)
            dense(tokens(1, 8), **{CACHE_NAME: cache})
            break
        except Exception as error:  # whatever a configuration of another shape raises
            errors.append(repr(error)[:100])
    else:
        pytest.skip(f"no small {kind}: {errors}")
    reason = ""
    try:
        model = fitted(dense)
    except ValueError as error:
        reason = str(error)
    if reason:
        assert re.search("route|convert", reason)
    else:
        with torch.no_grad():
            check_promises(dense, model, tmp_path)


def check_promises(dense: PreTrainedModel, model: Any, tmp_path: Path) -> None:
    ids = tokens(3, 24, seed=1)
    assert model.routed_layers == [3, 4]
    logits = model(ids).logits
    close = 2e-5 * max(5.0, logits.abs().max().item())
    assert (logits - dense(ids).logits).abs().max() > 1e-3
    with model.routing_mode(capacity=1.0):
        assert torch.equal(model(ids).logits, dense(ids).logits)
    cache = model(ids[:1, :9], use_cache=True)[CACHE_NAME]
    rest = model(ids[:1, 9:], **{CACHE_NAME: cache}).logits
    assert (rest - logits[:1, 9:]).abs().max() < close
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 97
    assert (model(changed).logits[:, :12] - logits[:, :12]).abs().max() < close
    padded, mask = torch.cat([ids[:1, :5], ids[:1]], 1), torch.ones(1, 29, dtype=torch.long)
    mask[:, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    shifted = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    assert (shifted - logits[:1]).abs().max() < close
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.py"))) == 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert (again(ids).logits - logits).abs().max() < 1e-5  # other addresses, other kernels


@pytest.mark.parametrize("family", EXPERTS)
def test_a_mixture_of_experts_cannot_route(family: str) -> None:
    with pytest.raises(ValueError, match=r"no MLP of .* can route\. Of layers 3 to 4: "):
        route_mlps(dense_model(family))


def test_layers_with_experts_stay_dense() -> None:
    config = AutoConfig.for_model(
        "qwen3_moe", **{"head_dim": 8, "mlp_only_layers": [2, 4], "num_experts": 4, "num_experts_per_tok": 2} | SHAPE
    )
    model = fitted(AutoModelForCausalLM.from_config(config).eval())
    assert model.routed_layers == model.config.routed_layers == [4]
    assert 0 < savings.saved_share(model, 0.0) < 0.1


def test_neurons_that_share_parameters_stay_together() -> None:
    """Dory scales its neurons by parameters of the MLP itself: no forecast takes a few of them."""
    model = fitted(dense_model("dory"))
    assert all(mlp.forecast.narrow is None for mlp in routed_mlps(model).values())
    assert not [name for name in model.state_dict() if "forecast" in name and "suv" in name]


def test_what_is_saved() -> None:
    """γ follows from the share of the FLOPs to leave out; the MLPs of two of six layers leave out a third of theirs."""
    dense = dense_model("llama")
    model: Any = dtfcli.route_mlps(dense, save=0.1)
    weights = sum(p.numel() for p in dense.model.layers.parameters() if p.ndim > 1) + dense.lm_head.weight.numel()
    assert savings.dense_flops(model) == 2 * weights
    mlp, narrow = 3 * 32 * 48, 3 * 32 * 6
    assert model.capacity == pytest.approx(1 - 0.1 * weights / (2 * (mlp - 32 * 32 - narrow - 32)))
    assert savings.saved_share(model) == pytest.approx(0.1)
    assert dtfcli.convert(dense, routed_part="mlp").capacity == model.capacity
    assert dtfcli.route_mlps(dense, save=0.05, architecture="layerdrop").config.layer_capacities() == {3: 0.0, 4: 1.0}
    for refused in (0.3, -0.1):
        with pytest.raises(ValueError, match=r"save = .*: routing 2 MLPs leaves out at most 1\d.\d %"):
            dtfcli.route_mlps(dense, save=refused)


def test_scores_and_thresholds_are_fitted_alone() -> None:
    """Forecasts that learned stay; scores then predict their errors. Gradients reach forecasts, whoever enters."""
    model = fitted(dense_model("llama"))
    forecasts = {name: p for name, p in model.named_parameters() if "forecast" in name}
    before = {name: p.detach().mul_(1.5).clone() for name, p in forecasts.items()}
    scores = [mlp.router.weight.clone() for mlp in routed_mlps(model).values()]
    ids = tokens(400, 20)  # scores of a random model go together within a row
    fit_routing(model, [{"input_ids": ids}], forecasts=False)
    assert all(torch.equal(p, before[name]) for name, p in forecasts.items())
    for mlp, score in zip(routed_mlps(model).values(), scores, strict=True):
        assert not torch.equal(mlp.router.weight, score)
    with model.recorded() as records:
        model(ids)
    assert sum(float(r.selected.float().mean()) for r in records) / len(records) == pytest.approx(0.6, abs=0.03)
    with model.routing_mode(capacity=1.0):
        model(input_ids=tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    assert all(p.grad is not None for name, p in forecasts.items() if "centers" not in name)


@torch.no_grad()
def test_first_tokens_enter_at_any_capacity() -> None:
    """They carry massive activations: without their MLPs all later tokens are lost."""
    dense: Any = dense_model("llama")
    dense.model.embed_tokens.weight[5] *= 20.0
    dense.model.layers[3].mlp.down_proj.weight *= 0.05  # skipping this layer costs little
    ids = tokens(32, 40)
    ids[ids == 5] = 6
    ids[:, 0] = 5
    model: Any = route_mlps(dense, capacity=0.6, forecast_maps=2)
    fit_routing(model, [{"input_ids": ids}])
    for capacity in (1 / 32, 2 / 32, 0.2, 0.5):
        with model.routing_mode(capacity=capacity), model.recorded() as records:
            model(ids)
        assert all(record.selected[:, 0].all() for record in records), capacity
        assert sum(record.selected.float().mean() for record in records) / len(records) < capacity + 0.05


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox_japanese"])
def test_a_text_in_parts_gives_the_same_fit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts pass a few rows at a time; masks go with their rows, and what all rows share stays."""
    dense = dense_model(family)
    mask = torch.ones(30, 40, dtype=torch.long)
    mask[::3, 25:] = 0
    batch, found = {"input_ids": tokens(30, 40), "attention_mask": mask}, list[dict[str, Any]]()
    for chunk in (8192, 240):
        for module in (least_squares, mlp_survey, mlp_fitting):
            monkeypatch.setattr(module, "CHUNK", chunk)
        model = route_mlps(dense, capacity=0.6)
        torch.manual_seed(0)
        fit_routing(model, [batch])
        found.append(model.state_dict())
        assert not any("forward" in vars(part) for part in model.modules())
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=0, atol=1e-4, msg=name)


def test_back_to_the_dense_model() -> None:
    dense = dense_model("gemma3_text")
    again = dtfcli.to_dense(fitted(dense))
    assert type(again) is type(dense)
    assert type(again.config) is type(dense.config)
    assert again.state_dict().keys() == dense.state_dict().keys()
    assert torch.equal(again(tokens(2, 9)).logits, dense(tokens(2, 9)).logits)


@torch.no_grad()
def test_controls() -> None:
    """A random score stays as it was drawn; layerdrop leaves out whole MLPs, in the order asked for."""
    dense, ids = dense_model("llama"), tokens(400, 20)
    fields: dict[str, Any] = {"routed_part": "mlp", "routed_layers": [1, 2, 3, 4]}
    model: Any = dtfcli.convert(dense, "random", 0.6, **fields)
    drawn = model.model.layers[1].mlp.router.weight.clone()
    fit_routing(model, [{"input_ids": ids}])
    assert torch.equal(model.model.layers[1].mlp.router.weight, drawn)
    assert drawn.any()
    with model.recorded() as records:
        model(ids)
    assert all(record.selected.float().mean() == pytest.approx(0.6, abs=0.05) for record in records)
    model = dtfcli.convert(dense, "layerdrop", 0.5, **fields)
    before = {mlp.layer_idx: mlp.capacity for mlp in routed_mlps(model).values()}
    torch.nn.init.zeros_(model.model.layers[3].mlp.down_proj.weight)  # costs nothing to leave out
    order = rank_layers(model, [{"input_ids": ids}])
    assert sorted(order) == [1, 2, 3, 4]
    assert order[-1] == 3
    assert {mlp.layer_idx: mlp.capacity for mlp in routed_mlps(model).values()} == before
    dense = dense_model("llama")
    model = dtfcli.convert(dense, "layerdrop", 0.5, layer_order=[3, 1, 2, 4], **fields)
    fit_routing(model, [{"input_ids": ids}])
    with model.recorded() as records:
        model(ids)
    assert {record.layer: record.selected.float().mean().item() for record in records} == {1: 1, 2: 0, 3: 1, 4: 0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score": "surprise"}, "score = 'surprise': routed MLPs take 'forecast_error' alone"),
        ({"bypass": "identity"}, "bypass = 'identity': routed MLPs take 'forecast'"),
        ({"routing": "topk"}, "routing = 'topk': routed MLPs take 'threshold'"),
        ({"routed_layer": [1]}, "routed_layer is not a field of a routed model. Did you mean 'routed_layers'?"),
        ({"capacity": 1.5}, "capacity = 1.5: the share of tokens"),
        ({"forecast_width": 1.0}, "forecast_width = 1.0: must be a share of neurons"),
        ({"routed_layers": [9]}, "routed_layers = .9.: must be increasing layer indices from 0 to 5"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dtfcli.convert(dense_model("llama"), routed_part="mlp", **fields)


def test_what_cannot_be_routed() -> None:
    with pytest.raises(ValueError, match="its layers route already"):
        route_mlps(route_mlps(dense_model("llama")))
    with pytest.raises(ValueError, match="both say how much"):
        route_mlps(dense_model("llama"), 0.1, capacity=0.5)
    with pytest.raises(ValueError, match="in models of Transformers called"):
        route_mlps(dense_model("llama").model)


def test_offloaded_weights_are_not_drawn_anew() -> None:
    dense = dense_model("llama")
    dense.model.layers[2].to("meta")  # what accelerate leaves in its place
    with pytest.raises(ValueError, match=r"layers\.2\..* is offloaded .* open the model on one device"):
        route_mlps(dense)


def test_shares_are_as_asked() -> None:
    model: Any = route_mlps(dense_model("llama"), capacity=0.6)
    fit_routing(model, [{"input_ids": tokens(600, 20)}])  # scores of a random model go together within a row
    with model.recorded() as records, torch.no_grad():
        model(tokens(600, 20, seed=2))
    assert {record.layer for record in records} == set(routed_mlps(model))
    mlps = routed_mlps(model)
    for record in records:
        share = float(interpolated(mlps[record.layer].router.shares, 0.6))
        assert record.selected.float().mean() == pytest.approx(share, abs=0.05)
    assert torch.stack([r.selected.float().mean() for r in records]).mean() == pytest.approx(0.6, abs=0.03)


def test_activations_that_are_not_finite_name_the_layer() -> None:
    model: Any = route_mlps(dense_model("llama"), capacity=0.6)
    torch.nn.init.constant_(model.model.layers[3].mlp.up_proj.weight, torch.inf)
    with pytest.raises(ValueError, match="layer 3"):
        fit_routing(model, [{"input_ids": tokens(8, 40)}])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_stock_generation(family: str) -> None:
    """Static cache, assistant, prompt lookup: the greedy text. Beams with and without a cache: the same."""
    model, prompt = fitted(dense_model(family)), tokens(1, 9, seed=4)
    given: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    greedy = model.generate(prompt, **given)
    for option in (
        {"cache_implementation": "static", "disable_compile": True},
        {"assistant_model": dense_model(family)},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
    ):
        assert torch.equal(model.generate(prompt, **given, **option), greedy), option
    beams = model.generate(prompt, num_beams=3, **given)
    assert torch.equal(model.generate(prompt, num_beams=3, use_cache=False, **given), beams)


def test_stock_training() -> None:
    """Gradient checkpointing changes no gradient. Tokens that skip teach the forecast, and others the MLP."""
    model, ids = fitted(dense_model("llama")).train(), tokens(2, 24, seed=5)
    gradients = []
    for recomputed in (False, True):
        if recomputed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() < 1e-5, name
    for part in ("forecast.linear.weight", "forecast.narrow.up_proj.weight", "up_proj.weight"):
        assert gradients[0][f"model.layers.3.mlp.{part}"].any()


def test_stock_adapters(tmp_path: Path) -> None:
    """PEFT's own functions, without ours."""
    model, ids = fitted(dense_model("qwen2")), tokens(2, 9, seed=6)
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    logits = adapted.eval()(ids).logits
    adapted.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(fitted(dense_model("qwen2")), tmp_path).eval()
    assert (again(ids).logits - logits).abs().max() < 1e-5
    assert (again.merge_and_unload()(ids).logits - logits).abs().max() < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_compiled() -> None:
    model, ids = fitted(dense_model("llama", num_hidden_layers=5)), tokens(2, 24, seed=7)
    assert model.routed_layers == [3]
    assert (torch.compile(model)(ids).logits - model(ids).logits).abs().max() < 1e-4


@torch.no_grad()
def test_hooks_see_the_mlp_alone() -> None:
    """Its forecast has a part of the same class."""
    mlp: Any = fitted(dense_model("llama")).model.layers[3].mlp
    seen = list[Any]()
    mlp.register_forward_hook(lambda module, *_: seen.append(module))
    mlp.forecast(tokens(1, 4).float().expand(32, 4).t())
    assert not seen
    mlp(torch.randn(2, 4, 32))
    assert seen == [mlp]


@pytest.mark.parametrize("length", [2, 4, 8, 16])
@torch.no_grad()
def test_first_tokens_of_short_texts_are_made_up_for(length: int) -> None:
    """The mean of shares is γ where γ is more than first tokens take; no share is below twice theirs."""
    model: Any = route_mlps(dense_model("llama"), capacity=0.6)
    fit_routing(model, [{"input_ids": tokens(512 // length, length)}])
    shares = torch.stack([mlp.router.shares for mlp in routed_mlps(model).values()])
    asked = torch.arange(mlp_survey.GRID + 1) / mlp_survey.GRID
    least = min(1.0, 2 / length)
    assert shares[:, 1:].min() >= least - 1e-6
    assert (shares.mean(0) - asked.clamp(min=least))[1:].abs().max() < 0.01


def test_tracing_looks_no_threshold_up() -> None:
    """As vLLM does it: it traces modules by torch.fx before it loads weights, and fills tensors in place."""
    mlp: Any = fitted(dense_model("llama")).model.layers[3].mlp
    mlp.router.current = None
    with pytest.raises(TypeError, match="depends on the data"):
        torch.fx.symbolic_trace(mlp)
    assert mlp.router.current is None
