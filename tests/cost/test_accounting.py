"""Parameters and FLOPs of a model, counted before it runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dtfcli.cost.accounting import describe, forward_flops_per_token, training_step_flops
from dtfcli.loading.build import build_model
from dtfcli.settings import load_settings
from dtfcli.settings.sources import preset_names
from tests.tiny import FAMILIES, dense_model, routed_model, tokens


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_builds_on_the_meta_device(preset: str) -> None:
    settings = load_settings(preset)
    model = build_model(settings, meta=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    account = describe(model, seq_len=settings.data.seq_len, micro_batch_size=1, dtype="bfloat16", checkpointing=False)
    assert account.trainable_parameters == account.parameters > 1e6
    assert (account.new_parameters == 0) == (settings.model.architecture == "dense")
    assert account.share_of_dense == 1.0 if settings.model.architecture == "dense" else account.share_of_dense < 1.0


def test_parameters_of_known_models() -> None:
    sizes = {"dense-qwen2.5-0.5b": 494_032_768, "dtf-smollm2-135m": 134_515_008}
    for preset, size in sizes.items():
        account = describe(
            build_model(load_settings(preset), meta=True),
            seq_len=1024,
            micro_batch_size=1,
            dtype="float32",
            checkpointing=True,
        )
        assert account.parameters - account.new_parameters == size


PARTS = [
    {"routed_part": part, "kv_tokens": kv, "bypass": "forecast", "score": "forecast_error"}
    for part, kv in (
        ("block", "routed"),
        ("block", "all"),
        ("mlp", "all"),
    )
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("architecture", "capacity", "fields"),
    [
        ("dense", 1.0, {}),
        ("dtf", 0.5, {}),
        ("dtf", 0.125, {}),
        ("mod", 0.5, {}),
        ("layerdrop", 0.5, {"bypass": "forecast"}),
        *(("dtf", 0.25, fields) for fields in PARTS),
    ],
)
def test_flops_agree_with_torchs_counter(
    family: str, architecture: str, capacity: float, fields: dict[str, str]
) -> None:
    """To 1 %: matrix products are counted by both alike, the formula leaves out nothing else."""
    model = dense_model(family) if architecture == "dense" else routed_model(family, architecture, capacity, **fields)
    model.set_attn_implementation("eager")
    if architecture != "dense":
        model.set_routing("topk")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens(1, 64), use_cache=False)
    assert forward_flops_per_token(model, 64) * 64 == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("explore", [0.0, 0.5])
@pytest.mark.parametrize("fields", PARTS)
def test_flops_of_training_with_a_forecast(fields: dict[str, str], explore: float) -> None:
    """To 3 %: the loss's head and the keys of explored tokens are counted more simply than they run."""
    model = routed_model("llama", "dtf", 0.25, explore=explore, **fields)
    model.set_attn_implementation("eager")
    model.train()
    row = tokens(1, 64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=row, labels=row, use_cache=False).loss.backward()
    assert training_step_flops(model, 64) * 64 == pytest.approx(counter.get_total_flops(), rel=0.03)
