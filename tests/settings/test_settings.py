"""Settings: layers and their order, overrides, what is refused, and the way back to TOML."""

from pathlib import Path
from typing import get_args

import pytest

from dtfcli.errors import ConfigError
from dtfcli.models.configuration_fields import RoutingFields, architectures
from dtfcli.settings import Settings, load_settings
from dtfcli.settings.model import Architecture, ModelSettings
from dtfcli.settings.schema import file_problems
from dtfcli.settings.sources import parse_value


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_layers_override_one_another_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _write(tmp_path / "my.toml", "[training]\nmax_steps = 2\nlog_every = 2\nmicro_batch_size = 2\n")
    monkeypatch.setenv("DTF_TRAINING__MAX_STEPS", "3")
    monkeypatch.setenv("DTF_TRAINING__LOG_EVERY", "3")
    monkeypatch.setenv("DTF_TRAINING__LEARNING_RATES__BASE", "2e-4")
    monkeypatch.setenv("DTF_DATA__SOURCES", '[{path = "a.txt"}]')
    monkeypatch.setenv("DTF_MODEL", "mod")
    settings = load_settings("quickstart", ["training.max_steps=4"], config)
    assert settings.training.max_steps == 4  # override
    assert settings.training.log_every == 3  # environment, which reaches nested keys and lists
    assert settings.training.learning_rates.base == 2e-4
    assert [source.path for source in settings.data.sources] == ["a.txt"]
    assert settings.model.architecture == "mod"
    assert settings.training.micro_batch_size == 2  # file
    assert settings.data.seq_len == 256  # preset
    assert settings.training.gradient_clip == 1.0  # default


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("3.5", 3.5),
        ("1e3", 1000.0),
        ("true", True),
        ("null", None),
        ("[1, 3]", [1, 3]),
        ('[{path="a.txt", ratio=0.5}]', [{"path": "a.txt", "ratio": 0.5}]),
        ('[{"path": "a.txt"}]', [{"path": "a.txt"}]),
        ("{base = 1e-3}", {"base": 1e-3}),
        ("'quoted'", "quoted"),
        ("plain words", "plain words"),
        ("a=b", "a=b"),
        ("", ""),
        ("1\nx = 2", "1\nx = 2"),
    ],
)
def test_values_are_json_else_toml_else_text(text: str, value: object) -> None:
    assert parse_value(text) == value


def test_the_schema_decides_between_text_and_numbers() -> None:
    overrides = ["run.name=007", "data.tokenizer=1e3", "run.output_dir=true", "training.max_steps=1e3"]
    settings = load_settings("quickstart", overrides)
    assert (settings.run.name, settings.data.tokenizer, settings.run.output_dir) == ("007", "1e3", "true")
    assert settings.training.max_steps == 1000


def test_model_is_short_for_the_architecture_and_picks_the_preset() -> None:
    settings = load_settings(overrides=["model=mod", "run.name=x"])
    assert settings.model.architecture == "mod"
    assert settings.model.base == "Qwen/Qwen2.5-0.5B"
    assert load_settings().model.architecture == "dtf"
    assert load_settings(overrides=["model=dense"]).model.routing_fields() == {}


def test_a_file_that_names_its_model_needs_no_preset(tmp_path: Path) -> None:
    whole = _write(tmp_path / "whole.toml", "[model.scratch]\nhidden_size = 64\n")
    part = _write(tmp_path / "part.toml", "[training]\nmax_steps = 3\n")
    assert load_settings(config=whole).model.base == ""
    assert load_settings(config=part).model.base == "Qwen/Qwen2.5-0.5B"


@pytest.mark.parametrize("preset", ["quickstart", "thesis-dtf", "thesis-mod"])
def test_a_preset_gives_way_to_another_architecture_and_to_epochs(preset: str) -> None:
    for architecture in get_args(Architecture):
        settings = load_settings(preset, [f"model={architecture}"])
        assert settings.model.architecture == architecture
        if architecture == "dense":
            assert settings.model.routing_fields() == {}
    settings = load_settings(preset, ["training.epochs=2"])
    assert (settings.training.max_steps, settings.training.epochs) == (None, 2.0)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model.prior_factor=0.1", "model=mod"], "model.architecture is mod"),
        (["model.mod_gate=raw", "model=dtf"], "model.architecture is dtf"),
        (["model.capacity=0.5", "model=dense"], "model.architecture is dense"),
        (["training.learning_rates.router=1", "model=dense"], "model.architecture is dense"),
        (["training.capacity_schedule=linear", "model=dense"], "model.architecture is dense"),
        (["model.scratch.hidden_size=64", "model.base=x"], "model.base = x"),
        (["model.revision=main"], "model.base is empty"),
        (["training.fit_tokens=100", "model.score=update_size"], "model.base is empty"),
        (["training.fit_tokens=100", "model.base=x"], "there is no forecast to fit"),
        (["training.epochs=2", "training.max_steps=3"], "training.max_steps = 3 is set"),
        (["model.dense_edges=1", "model.routed_layers=[1]"], "model.routed_layers lists the layers"),
        (["training.eval_every=5", "data.validation_fraction=0"], "data.validation_fraction is 0"),
        (["training.capacity_fraction=0.5"], "training.capacity_schedule is constant"),
        (["training.capacity_start=0.5"], "training.capacity_schedule is constant"),
        (["eval.limit=5"], "eval.after is empty"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(overrides: list[str], reason: str) -> None:
    key = overrides[0].partition("=")[0].replace("scratch.hidden_size", "scratch")
    with pytest.raises(ConfigError, match=rf"^{key} = .*nothing reads it, since .*{reason}") as error:
        load_settings("quickstart", overrides)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.capacity_fraction=0"], "greater than 0"),
        (
            ["training.capacity_fraction=0.8", "training.threshold_fraction=0.3"],
            r"thresholds take over \(threshold_fraction = 0.3\); at most 0.7",
        ),
        (["training.fit_tokens=-1"], "fit_tokens"),
        (["training.fit_tokens=some"], "fit_tokens"),
    ],
)
def test_wrong_values(overrides: list[str], message: str) -> None:
    valid = ["model.base=x", "model.score=update_size", "training.capacity_schedule=linear"]
    with pytest.raises(ConfigError, match=message):
        load_settings("quickstart", [*valid, *overrides])


def test_mistakes_say_where_they_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _write(tmp_path / "my.toml", "[training]\nlog_every = 0\n")
    monkeypatch.setenv("DTF_TRAINING__MAX_STEPS", "many")
    monkeypatch.setenv("DTF_TRAINING__MAXSTEPS", "3")
    with pytest.raises(ConfigError) as error:
        load_settings("quickstart", ["run.seed=-1"], config)
    lines = str(error.value).splitlines()
    assert "run.seed = -1: must be at least 0." in lines
    assert 'training.max_steps = "many" (from DTF_TRAINING__MAX_STEPS): expected a whole number.' in lines
    assert f"training.log_every = 0 (in {config}): must be at least 1." in lines
    assert lines[-1] == "… and 1 more."
    unknown = next(line for line in file_problems(config) if "unknown" in line)
    assert unknown == (
        "training.maxsteps: unknown key (from DTF_TRAINING__MAXSTEPS). Did you mean 'training.max_steps'?"
    )


def test_one_mistake_does_not_hide_another(tmp_path: Path) -> None:
    config = _write(
        tmp_path / "my.toml",
        '[run]\nnmae = "x"\n[model]\nbase = ""\ncapacity = 2\ngate = "hard"\n'
        '[data]\nsources = [{path = "a.txt", ratio = 2}]\n[training]\nschedule = "cosin"\nepochs = 0\n',
    )
    keys = {line.split(" = ")[0].split(":")[0] for line in file_problems(config)}
    assert keys == {
        "run.nmae",
        "model.capacity",
        "model.gate",
        "data.sources[0].ratio",
        "training.schedule",
        "training.epochs",
    }
    # A check across keys comes with the other mistakes, too.
    config = _write(
        tmp_path / "my.toml", '[model]\nbase = ""\n[run]\nnmae = "x"\n[training]\ntokens_per_update = 1000\n'
    )
    text = "\n".join(file_problems(config))
    assert "run.nmae" in text
    assert "training.tokens_per_update = 1000" in text


def test_tokens_per_update_names_the_nearest_that_work() -> None:
    with pytest.raises(ConfigError, match=r"= 16 × 256 = 4096; the nearest are 8192 and 12288"):
        load_settings("quickstart", ["training.micro_batch_size=16", "training.tokens_per_update=10000"])
    with pytest.raises(ConfigError, match=r"or set training\.micro_batch_size=4"):
        load_settings("quickstart", ["training.micro_batch_size=16", "training.tokens_per_update=1024"])
    settings = load_settings("quickstart", ["training.micro_batch_size=16", "training.tokens_per_update=8192"])
    assert settings.accumulation_steps() == 2
    assert settings.accumulation_steps(processes=2) == 1
    with pytest.raises(ValueError, match=r"× processes = 16 × 256 × 4 = 16384; the smallest is 16384"):
        settings.accumulation_steps(processes=4)


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_toml_comes_back_the_same(tmp_path: Path, architecture: str) -> None:
    overrides = [f"model={architecture}", 'data.sources=[{path="ä \\"b\\".txt", ratio=0.5}, {path="c"}]']
    settings = load_settings("quickstart", overrides)
    again = load_settings(config=_write(tmp_path / "settings.toml", settings.to_toml()))
    assert again.to_toml() == settings.to_toml()
    assert again.data == settings.data
    assert again.model.routing_fields() == settings.model.routing_fields()


def test_architecture_fields_are_defined_once() -> None:
    assert get_args(Architecture) == (*architectures(), "dense")
    for name, field in RoutingFields.__dataclass_fields__.items():
        if name != "architecture":
            assert ModelSettings.model_fields[name].description == field.metadata["help"]
            assert ModelSettings.model_fields[name].default is None


def test_settings_do_not_change() -> None:
    settings = load_settings("quickstart")
    assert isinstance(settings, Settings)
    with pytest.raises(ValueError, match="frozen"):
        settings.training.max_steps = 3  # type: ignore[misc]  # read-only, as it should be
