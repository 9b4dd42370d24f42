"""The grid: collapsed points, equal terms, keys by which finished runs are found, and wrong input."""

from pathlib import Path

import pytest

from dtfcli.errors import ConfigError
from dtfcli.settings import load_settings
from dtfcli.studies.execute import folder_of, train_command
from dtfcli.studies.grid import (
    check_equal_terms,
    parse_axes,
    parse_points,
    parse_seeds,
    plan_grid,
    plan_points,
    settings_key,
)

AXES = ["model=dtf,mod,dense", "model.capacity=0.25,0.5"]


def test_a_point_that_does_not_read_an_axis_collapses(tmp_path: Path) -> None:
    runs = plan_grid("quickstart", parse_axes(AXES), [1, 2], ["training.max_steps=60"], tmp_path)
    assert [run.point.name for run in runs[:5]] == ["dtf 0.25", "dtf 0.5", "mod 0.25", "mod 0.5", "dense"]
    assert len(runs) == 10
    assert {run.seed for run in runs} == {1, 2}
    assert len({run.settings.run.name for run in runs}) == 10


def test_a_setting_for_some_is_left_out_for_others(tmp_path: Path) -> None:
    runs = plan_grid("quickstart", parse_axes(["model=dtf,dense"]), [1], ["model.capacity=0.25"], tmp_path)
    assert [run.settings.model.routing_fields().get("capacity") for run in runs] == [0.25, None]


def test_the_key_is_that_of_the_settings_alone(tmp_path: Path) -> None:
    one = load_settings("quickstart", ["run.name=a", f"run.output_dir={tmp_path}"])
    other = load_settings("quickstart", ["run.name=b"])
    assert settings_key(one) == settings_key(other)
    assert settings_key(one) != settings_key(load_settings("quickstart", ["run.seed=7"]))
    assert settings_key(one) == settings_key(load_settings("quickstart", ["model.kv_tokens=routed"])), "the default"
    two = [load_settings("quickstart", [f"training.gradient_clip={value}"]) for value in ("2", "2.0")]
    assert settings_key(two[0]) == settings_key(two[1])
    dense = [load_settings("quickstart", ["model=dense"]), load_settings("quickstart", ["model=dense", "run.name=b"])]
    assert settings_key(dense[0]) == settings_key(dense[1]) != settings_key(one)


def test_a_run_of_another_grid_is_found(tmp_path: Path) -> None:
    one, other = (
        plan_grid("quickstart", parse_axes(axes), [1], ["model.capacity=0.25"], tmp_path)
        for axes in (["model=mod,dtf"], ["model=mod,dtf", "model.kv_tokens=routed,all"])
    )
    mod, same = one[0].settings, other[0].settings
    assert mod.run.name != same.run.name
    folder = tmp_path / "2026-01-31" / mod.run.name
    folder.mkdir(parents=True)
    assert folder_of(same) == folder
    assert folder_of(other[1].settings) is None


def test_a_run_that_another_process_may_train_is_not_cleared_away(tmp_path: Path) -> None:
    run = plan_grid("quickstart", parse_axes(["model=mod,dtf"]), [1], (), tmp_path)[0]
    folder = tmp_path / "2026-01-31" / run.settings.run.name
    folder.mkdir(parents=True)
    assert "--config" in train_command(run.settings), "a folder without settings was never begun"
    (folder / "settings.toml").write_text("")
    assert train_command(run.settings)[-2:] == ["--resume", str(folder)]
    twin = tmp_path / "2026-02-01" / f"other-{run.key[:8]}"
    twin.mkdir(parents=True)
    (folder / "final_model").mkdir()
    assert folder_of(run.settings) == folder, "the finished one, though it is older"


def test_runs_that_differ_in_a_setting_that_both_read_are_refused() -> None:
    for models, message in (
        ((["model=dense"], ["model=dtf"], ["model=random", "model.sink_tokens=4"]), "sink_tokens"),
        ((["model=dtf"], ["model=mod", "data.seq_len=64"]), r"data\.seq_len: runs are not on equal terms"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_equal_terms([load_settings("quickstart", list(items)) for items in models], ["model.architecture"])


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([], "--vary: name at least one axis"),
        (["model"], "write KEY=A,B"),
        (["model=dtf"], "one value is nothing to compare"),
        (["model=dtf,dtf"], "named twice"),
        (["modle=dtf,mod"], "there is no setting 'modle'"),
        (["run.seed=1,2"], "use --seeds"),
        (["run.name=a,b"], "each run gets its own"),
        (["model=dtf,mod", "model=dense,random"], "an axis already"),
    ],
)
def test_wrong_axes(axes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_axes(axes)


@pytest.mark.parametrize("text", ["0", "x", "1,1", "", "-1"])
def test_seeds(text: str) -> None:
    assert (parse_seeds("3"), parse_seeds("1,7")) == ([1, 2, 3], [1, 7])
    with pytest.raises(ConfigError, match="--seeds"):
        parse_seeds(text)


POINTS = ["plain: ", "wide prior: model.prior_factor=0.25", "mod: model=mod model.kv_tokens=all"]


def test_points_have_names_of_their_own(tmp_path: Path) -> None:
    """What a point does not read of the common settings is left out for it; runs are found like those of a grid."""
    runs = plan_points("quickstart", parse_points(POINTS), [1, 2], ["model.m_cu_init=1.2"], tmp_path)
    assert [(run.seed, run.point.name) for run in runs] == [
        (seed, name) for seed in (1, 2) for name in ("plain", "wide prior", "mod")
    ]
    assert runs[1].settings.model.prior_factor == 0.25
    assert runs[1].settings.run.name.startswith("wide-prior-s1-")
    assert runs[0].settings.model.m_cu_init == 1.2
    assert runs[2].settings.model.m_cu_init is None
    of_grid = plan_grid(
        "quickstart", parse_axes(["model.prior_factor=0.25,0.5"]), [1], ["model.m_cu_init=1.2"], tmp_path
    )
    assert of_grid[0].key == runs[1].key


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (["plain"], "NAME: KEY=VALUE"),
        ([": model=mod", "b: model=dtf"], "NAME: KEY=VALUE"),
        (["a: model", "b: model=mod"], "NAME: KEY=VALUE"),
        (["a: model='mod", "b: model=dtf"], "NAME: KEY=VALUE"),
        (["a: run.seed=3", "b: model=dtf"], "run.seed=3 differs from run to run"),
        (["a: model=mod", "a: model=dtf"], "two points are called a"),
        (["a: model=mod"], "one point is nothing to compare"),
        (["a: model=mod model.prior_factor=0.5", "b: model=dtf"], "nothing reads model.prior_factor=0.5"),
        (["a: model=dtf", "b: "], "a and b are the same run"),
        (["a: model=mod", "b: model.kapazity=3"], "model.kapazity"),
    ],
)
def test_wrong_points(points: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_points("quickstart", parse_points(points), [1], (), tmp_path)
