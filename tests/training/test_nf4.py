"""QLoRA: adapters over projections in nf4; what is saved belongs to the base as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dtfcli
from dtfcli.cost.accounting import forward_flops_per_token, training_step_flops
from dtfcli.errors import ConfigError
from dtfcli.experiment import preview, train
from dtfcli.loading.adapters import adapt
from dtfcli.loading.build import build_model
from dtfcli.loading.model_files import weights_hash
from dtfcli.loading.quantization import NF4_BYTES, check_nf4, numel, projections, quantize_nf4
from dtfcli.models.pretrained import is_added
from dtfcli.training import loop
from tests.tiny import tokens
from tests.training.small_runs import Killed, kill_at, resume, small_settings, the_run

LORA = {"enabled": True, "r": 4, "quantize": "nf4"}
FORECAST = {"score": "forecast_error", "bypass": "forecast", "kv_tokens": "all"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model that a run has left; do not change it."""
    return train(small_settings(tmp_path_factory.mktemp("base"), "dense", training={"max_steps": 2})).final_model_path


def settings_of(folder: Path, base: Path, **groups: Any) -> Any:
    model = {"base": str(base), **groups.pop("model", {})}
    return small_settings(folder, "dtf", model=model, lora=LORA | groups.pop("lora", {}), **groups)


def test_trains_on_four_bits(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitted, distilled, calibrated, merged; the base is left as it was, and the adapter opens on it."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    runs: list[Any] = []
    finish = loop.finish

    def keep(run: Any) -> Any:
        runs.append(run)
        return finish(run)

    monkeypatch.setattr(loop, "finish", keep)
    before = weights_hash(base)
    settings = settings_of(tmp_path, base, model=FORECAST, lora={"merge": True}, distill={"enabled": True})
    result = train(settings)
    assert weights_hash(base) == before
    model, parent = runs[0].model, runs[0].objective.distillation.parent
    quantized = dict(projections(model))
    assert len(quantized) == 7 * 4
    assert all(isinstance(layer, bitsandbytes.nn.Linear4bit) for layer in quantized.values())
    assert not any(isinstance(layer, bitsandbytes.nn.Linear4bit) for _, layer in projections(parent))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name or is_added(name)}
    assert all(parameter.dtype == torch.float32 for name, parameter in model.named_parameters() if name in trained)
    assert all(parameter.abs().max() > 0 for name, parameter in model.named_parameters() if "lora_B" in name)

    stored = load_file(result.final_model_path / "adapter_model.safetensors")
    assert not [name for name, tensor in stored.items() if tensor.dtype == torch.uint8]
    opened, merged = (
        dtfcli.load_model(path, device="cpu") for path in (result.run_dir, result.run_dir / "merged_model")
    )
    ids = tokens(3, 30) % 90
    with torch.no_grad():
        assert torch.allclose(opened(ids).logits, merged(ids).logits, atol=1e-5)
    assert opened.is_calibrated


def test_a_stopped_run_goes_on(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    undisturbed = train(settings_of(tmp_path / "whole", base))
    with pytest.raises(Killed):
        train(settings_of(tmp_path / "stopped", base), on_event=kill_at("checkpoint", 2))
    result = resume(the_run(tmp_path / "stopped"))
    ours, theirs = (r.final_model_path / "adapter_model.safetensors" for r in (result, undisturbed))
    assert ours.read_bytes() == theirs.read_bytes()


def test_counts(base: Path, tmp_path: Path) -> None:
    """Two weights share an element, and are counted as two; the dry run counts half a byte for each."""
    settings = settings_of(tmp_path, base)
    whole, four = (build_model(settings) for _ in range(2))
    weights = sum(layer.weight.numel() for _, layer in projections(whole))
    plain = preview(settings_of(tmp_path, base, lora={"quantize": "none"})).account
    saved = plain.training_bytes - preview(settings).account.training_bytes
    assert abs(saved - weights * (4 - NF4_BYTES)) <= 1
    pytest.importorskip("bitsandbytes")
    quantize_nf4(four, torch.device("cpu"), torch.float32)
    assert sum(map(numel, four.parameters())) == sum(p.numel() for p in whole.parameters())
    assert forward_flops_per_token(four, 32) == forward_flops_per_token(whole, 32)
    assert training_step_flops(adapt(four, settings), 32) == training_step_flops(adapt(whole, settings), 32)


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(ConfigError, match=r"pip install 'dtfcli\[qlora\]'"):
        check_nf4()
