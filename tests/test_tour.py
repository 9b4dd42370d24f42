"""The first steps of a new user: `make quickstart`, docs/quickstart.md and docs/tour.ipynb are one journey."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tools import quickstart
from tools.quickstart import CONVERT, LOOK, STDLIB, TRAIN, WRITE, arguments_of, places

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tour.ipynb"
RUN = "outputs/2026-11-30/quickstart"
SMALL = {
    "DTF_DATA__SOURCES": '[{"path": "python-stdlib", "ratio": 0.02}]',
    "DTF_DATA__VALIDATION_BLOCKS": "2",
    "DTF_DATA__SEQ_LEN": "128",
    "DTF_TRAINING__TOKENS_PER_UPDATE": "1024",
    "OMP_NUM_THREADS": "1",
}


def test_the_page_has_the_commands_of_make_quickstart() -> None:
    words = places(RUN, Path(RUN) / "routed") | {"PROMPT": "def main(", "TEXT": STDLIB}
    commands = [command.format_map(words) for step in (TRAIN, CONVERT, WRITE, LOOK) for command in step.commands]
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8").splitlines()
    assert [line.removeprefix("$ ") for line in page if line.startswith("$ dtf ")] == commands
    assert "\t$(BIN)/python -m tools.quickstart" in (ROOT / "Makefile").read_text(encoding="utf-8")


def journey(monkeypatch: pytest.MonkeyPatch, *arguments: str, failing: str = "") -> tuple[int, list[str]]:
    """The exit status of a journey whose commands do nothing, and these commands."""
    ran: list[str] = []

    def run(arguments: list[str], *, captured: bool) -> tuple[int, str]:
        ran.append(" ".join(arguments))
        return int(arguments[0] == failing), f"{RUN}/final_model" if captured else ""

    monkeypatch.setattr(quickstart, "_run", run)
    monkeypatch.setattr("sys.argv", ["quickstart", *arguments])
    return quickstart.main(), ran


def test_the_four_steps_follow_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    status, ran = journey(monkeypatch)
    assert status == 0
    assert ran == [
        "train quickstart model=dense",
        f"convert {RUN} -o {RUN}/routed --text python-stdlib",
        f"generate {RUN}/routed def main( --max-new-tokens 40 --capacity 1",
        f"generate {RUN}/routed def main( --max-new-tokens 40",
        f"inspect-routing {RUN}/routed --html {RUN}/routed/routing.html",
    ]
    shown = capsys.readouterr().out
    assert f'dtf generate {RUN}/routed "def main(" --max-new-tokens 40 --capacity 1\n' in shown
    assert "Step 4 of 4." in shown
    assert shown.rstrip().endswith("make quickstart MODEL=HuggingFaceTB/SmolLM2-135M")


def test_a_model_of_ones_own_is_not_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "SmolLM2-135M-routed").mkdir(parents=True)
    _, ran = journey(monkeypatch, "HuggingFaceTB/SmolLM2-135M")
    assert ran[0] == "convert HuggingFaceTB/SmolLM2-135M -o outputs/SmolLM2-135M-routed-2"
    _, ran = journey(monkeypatch, "models/own-1.7B.gguf", "--text", "my notes")
    assert ran[0] == "convert models/own-1.7B.gguf -o outputs/own-1.7B-routed --text my notes"


def test_a_step_that_fails_ends_the_journey(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, ran = journey(monkeypatch, failing="convert")
    assert (status, len(ran)) == (1, 2)
    assert "Step 2 failed" in capsys.readouterr().out


def test_an_option_without_a_value_is_left_out() -> None:
    words = {"DENSE": "a", "ROUTED": "b", "TEXT": ""}
    assert arguments_of(CONVERT.commands[0], words) == ["dtf", "convert", "a", "-o", "b"]


def test_the_notebook_in_git_has_no_output() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DTF_DATA__CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    setup = next(cell for cell in notebook.cells if cell.id == "setup")
    assert "STEPS = 600" in setup.source
    setup.source = setup.source.replace("STEPS = 600", "STEPS = 20")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    cells = {cell.id: cell for cell in notebook.cells}
    assert "validation loss" in printed(cells["train-run"])
    assert "→ 10.0%" in printed(cells["convert-run"])
    assert printed(cells["write-run"]).count("def main(") == 2
    assert "layer 4" in printed(cells["look-run"])
    assert "\x1b" not in "".join(printed(cell) for cell in notebook.cells)
    for name in ("curves", "convert-picture"):
        assert any("image/png" in output.get("data", {}) for output in cells[name].outputs)
    assert any("iframe" in output.get("data", {}).get("text/html", "") for output in cells["page"].outputs)


def printed(cell: Any) -> str:
    """What a cell wrote to stdout and stderr."""
    return "".join(output.text for output in cell.get("outputs", []) if output.output_type == "stream")
