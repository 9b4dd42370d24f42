"""Parameters and FLOPs of a model, counted before it runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dtfcli.cost.accounting import describe, forward_flops_per_token
from dtfcli.loading.build import build_model
from dtfcli.settings import load_settings
from dtfcli.settings.presets import preset_names
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("architecture", "capacity"), [("dense", 1.0), ("dtf", 0.5), ("dtf", 0.125), ("mod", 0.5)])
def test_flops_agree_with_torchs_counter(family: str, architecture: str, capacity: float) -> None:
    """To 1 %: matrix products are counted by both alike, the formula leaves out nothing else."""
    model = dense_model(family) if architecture == "dense" else routed_model(family, architecture, capacity)
    model.set_attn_implementation("eager")
    if architecture != "dense":
        model.set_routing("topk")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens(1, 64), use_cache=False)
    assert forward_flops_per_token(model, 64) * 64 == pytest.approx(counter.get_total_flops(), rel=0.01)
