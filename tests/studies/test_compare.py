"""`dtf compare` from the outside: five outputs, nothing done twice, one line for each wrong input."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome
from tests.faults import Dtf
from tests.training.small_runs import write_text

Run = Callable[..., Outcome]
OUTPUTS = {"report.json", "report.md", "report.png", "report.html"}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A study of runs of a few seconds."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 300}
    return [
        "compare",
        "quickstart",
        *(f"model.scratch.{name}={value}" for name, value in shape.items()),
        "data.sources=[{path='text.jsonl'}]",
        "data.seq_len=32",
        "data.validation_fraction=0.1",
        "data.validation_blocks=8",
        f"data.cache_dir={tmp_path / 'cache'}",
        "training.tokens_per_update=128",
        "training.micro_batch_size=2",
        "training.max_steps=4",
        "training.checkpoint_every=1",
        "training.calibration_tokens=512",
        "run.device=cpu",
        "run.dtype=float32",
    ]


@pytest.mark.slow
def test_five_outputs_and_nothing_done_twice_also_after_sigkill(dtf: Run, command: list[str], tmp_path: Path) -> None:
    """The report of a study that was killed half-way, and went on with two runs at once, is an undisturbed one's."""
    arguments = [*command, "--vary", "model=random,layerdrop,dense", "--seeds", "2"]
    process = Dtf(tmp_path, *arguments, "--output", "killed")
    deadline = time.monotonic() + 120
    while not list(Path("killed").rglob("final_model/model.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.ends(kill_after=0.0)
    finished = {p: p.stat().st_mtime_ns for p in Path("killed").rglob("final_model/model.safetensors")}
    assert 0 < len(finished) < 6
    assert dtf(*arguments, "--output", "killed", "--parallel", "2", "--no-bench").code == 0
    assert {p: p.stat().st_mtime_ns for p in finished} == finished

    result = dtf(*arguments)
    assert result.code == 0, result.stderr
    page = Path(result.stdout.strip().splitlines()[-1])
    assert page == Path("study/report.html")
    assert {file.name for file in page.parent.iterdir()} >= OUTPUTS
    assert "random" in result.stdout
    report = json.loads((page.parent / "report.json").read_text())
    assert json.loads(Path("killed/report.json").read_text())["differences"] == report["differences"]
    assert [row["name"] for row in report["rows"]] == ["random", "layerdrop", "dense"]
    assert {d["control"] for d in report["differences"]} == {"random"}
    assert all(d["sentence"] in (page.parent / "report.md").read_text() for d in report["differences"])
    shares = {row["name"]: row["routed_share"] for row in report["rows"]}
    assert shares["dense"] is None
    assert shares["layerdrop"] == 0.5
    assert "http" not in page.read_text().replace("http-equiv", "")

    weights = {p: p.stat().st_mtime_ns for p in Path("study").rglob("model.safetensors")}
    again = dtf(*arguments, "--no-bench")
    assert again.code == 0, again.stderr
    assert again.stderr.count("reused") == 6
    assert {p: p.stat().st_mtime_ns for p in Path("study").rglob("model.safetensors")} == weights
    assert json.loads((page.parent / "report.json").read_text())["differences"] == report["differences"]

    folders = [argument for folder in report["runs"].values() for argument in ("--from", folder)]
    existing = dtf("compare", *folders, "--output", "existing", "--no-bench", "--json")
    assert existing.code == 0, existing.stderr
    assert [d["value"] for d in json.loads(existing.stdout)["differences"]] == [
        d["value"] for d in report["differences"]
    ]


def test_the_plan_trains_nothing(dtf: Run, command: list[str], tmp_path: Path) -> None:
    result = dtf(*command, "--vary", "model=dtf,dense", "--vary", "model.capacity=0.25,0.5", "--seeds", "2", "--plan")
    assert result.code == 0, result.stderr
    for text in ("6 runs", "dtf 0.25", "dense", "tokens", "min", "MiB"):
        assert text in result.stdout
    planned = dtf(*command, "--vary", "model=dtf,dense", "--seeds", "1", "--plan", "--json")
    assert [run["point"] for run in json.loads(planned.stdout)["runs"]] == ["dtf", "dense"]
    assert not Path("study").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--vary", "model=dtf,mod"], "PRESET: name one"),
        (["compare", "quickstrat", "--vary", "model=dtf,mod"], "Did you mean 'quickstart'?"),
        (["compare", "quickstart", "--vary", "model=dtf,mood"], "model.architecture"),
        (["compare", "quickstart", "--vary", "model=dtf,mod", "--against", "random"], "--against random: not a point"),
        (["compare", "quickstart", "--vary", "model=mod,dense", "model.ma_window=9"], "no run of this study reads it"),
        (["compare", "quickstart", "--vary", "model.gate=soft,straight_through", "model=dense"], "same run"),
        (["compare", "--from", "nowhere", "--from", "nowhere"], "named twice"),
        (["compare", "--from", "nowhere"], "nowhere: no run"),
        (["compare", "quickstart", "--from", "nowhere"], "--from: reports on runs that exist"),
        (["compare", "--from", "nowhere", "--seeds", "2"], "leave PRESET, settings, --vary, --point, --seeds"),
    ],
)
def test_wrong_input(
    dtf: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = dtf(*arguments)
    assert result.code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_lacks_something_is_named(dtf: Run, command: list[str]) -> None:
    settings = [item for item in command[2:] if not item.startswith("data.validation")]
    assert dtf("train", "quickstart", *settings, "data.validation_fraction=0", "run.name=blind").code == 0
    (run,) = Path("outputs").glob("*/blind")
    result = dtf("compare", "--from", str(run))
    assert result.code == 2
    assert "no val/loss" in result.stderr
