"""Presets: they exist, validate, build, and are copied without overwriting anything."""

from pathlib import Path

import pytest

from dtfcli.errors import ConfigError
from dtfcli.loading.build import build_model
from dtfcli.models.savings import saved_share
from dtfcli.settings import load_settings
from dtfcli.settings.resolve import ROUTING_NAMES, unread_keys
from dtfcli.settings.schema import file_problems
from dtfcli.settings.sources import copy_preset, lookup, preset_names, preset_path, preset_summary, read_preset

NEEDED = {
    *("quickstart", "thesis-dtf", "thesis-mod", "dtf-smollm2-135m", "dtf-qwen2.5-0.5b-lora"),
    *(f"{architecture}-qwen2.5-0.5b" for architecture in ("dtf", "mod", "dense")),
    *(f"dtf-qwen2.5-{size}" for size in ("1.5b", "7b")),
}


def test_the_presets_exist() -> None:
    assert set(preset_names()) >= NEEDED


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_valid_and_builds_on_the_meta_device(name: str) -> None:
    assert file_problems(preset_path(name)) == []
    assert preset_summary(name).endswith(".")
    settings = load_settings(name)
    assert settings.run.name == name
    model = build_model(settings, meta=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    if settings.model.architecture != "dense":
        assert model.config.architecture == settings.model.architecture
        assert model.routed_layers


def test_thesis_presets_set_every_field() -> None:
    for name in ("thesis-dtf", "thesis-mod"):
        values = read_preset(name)
        read = {key for key in ROUTING_NAMES if f"model.{key}" not in unread_keys(values)}
        assert read <= set(values["model"]), name
    assert read_preset("thesis-dtf")["model"]["gate"] == "soft"
    assert read_preset("thesis-mod")["model"]["mod_gate"] == "raw"
    rates = read_preset("thesis-mod")["training"]["learning_rates"]
    assert rates["router"] == rates["base"]


def test_presets_of_the_comparison_differ_in_what_routes_alone() -> None:
    """DTF's route MLPs, MoD's blocks; data, steps and rates are the same."""
    dtf, mod, dense = (read_preset(f"{name}-qwen2.5-0.5b") for name in ("dtf", "mod", "dense"))
    assert dtf["data"] == mod["data"] == dense["data"]
    rates = [preset["training"].pop("learning_rates") for preset in (dtf, mod, dense)]
    assert rates[0]["base"] == rates[1]["base"] == rates[2]["base"]
    assert dtf["training"] == mod["training"] == dense["training"]
    assert dtf["model"]["base"] == mod["model"]["base"] == dense["model"]["base"]
    assert dtf["model"]["bypass"] == mod["model"]["bypass"] == "forecast"


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("dtf-")])
def test_adaptations_route_mlps_and_save_a_tenth(name: str) -> None:
    settings = load_settings(name)
    assert settings.model.routed_part == "mlp"
    values = read_preset(name)
    assert [key for key in unread_keys(values) if lookup(values, key) is not None] == []
    model = build_model(settings, meta=True)
    assert model.routed_layers == list(range(3, model.config.num_hidden_layers - 1))
    assert saved_share(model) == pytest.approx(0.1, abs=0.003)


def test_copying_never_overwrites(tmp_path: Path) -> None:
    target = copy_preset("quickstart", tmp_path)
    assert target == tmp_path / "quickstart.toml"
    assert target.read_bytes() == preset_path("quickstart").read_bytes()
    target.write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        copy_preset("quickstart", target)
    assert target.read_text() == "mine"
