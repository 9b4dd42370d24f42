"""The command line's manners: quick, quiet, exit codes, one JSON document, suggestions, completion."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import typer

import dtfcli
from dtfcli.cli import options, render
from dtfcli.cli.app import app
from dtfcli.cli.render import emit_json
from dtfcli.errors import ConfigError, DTFError
from tests.conftest import Outcome

Dtf = Callable[..., Outcome]


def _process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dtfcli", *arguments],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="children's processor time is not counted there")
def test_help_answers_at_once() -> None:
    """In processor time: other tests run at the same time."""
    seconds = []
    for _ in range(3):
        before = os.times()
        assert _process("--help").returncode == 0
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert 0.0 < min(seconds) < 0.4, f"best of {len(seconds)}: {min(seconds):.2f} s"


def test_the_package_and_its_help_import_nothing_heavy() -> None:
    code = "import sys, dtfcli\nprint(*{'torch', 'transformers', 'pydantic', 'typer'} & set(sys.modules))\n"
    code += "import dtfcli.cli.app as a\nsys.argv = ['dtf', '--help']\ntry: a.main()\nfinally: "
    code += "print(*{'torch', 'transformers', 'pydantic', 'datasets', 'numpy'} & set(sys.modules), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("\n")
    assert result.stderr.strip() == ""


def test_python_m_is_the_same() -> None:
    result = _process("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"dtf {dtfcli.__version__}\n", "")
    assert metadata.version("dtfcli") == dtfcli.__version__


@pytest.mark.parametrize(
    "command", [[], ["train"], ["generate"], ["inspect-routing"], ["serve"], ["env"], ["presets", "list"]]
)
def test_every_command_explains_itself_with_examples(dtf: Dtf, command: list[str]) -> None:
    result = dtf(*command, "--help")
    assert result.code == 0
    assert "Examples:" in result.stdout
    assert f"dtf {' '.join(command)}".strip() in result.stdout


def test_without_a_command_it_shows_help(dtf: Dtf) -> None:
    result = dtf()
    assert result.code == 2
    assert "Commands" in result.stdout + result.stderr
    assert "Error" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["presets", "lst"], "Did you mean 'list'?"),
        (["presets", "list", "--jsn"], "Did you mean '--json'?"),
    ],
)
def test_unknown_names_get_a_suggestion(dtf: Dtf, arguments: list[str], suggestion: str) -> None:
    result = dtf(*arguments)
    assert result.code == 2
    assert suggestion in result.stderr
    assert len(result.stderr.splitlines()) <= 2
    assert result.stdout == ""


def test_options_may_be_spelled_with_underscores(dtf: Dtf) -> None:
    result = dtf("generate", "no/such/model/anywhere", "x", "--max_new_tokens", "3")
    assert "No such option" not in result.stderr
    assert "--f_g" in dtf("presets", "show", "--", "--f_g").stderr, "what follows -- stays"


@pytest.mark.parametrize("arguments", [["--debug", "presets", "show", "x"], ["presets", "show", "x", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(dtf: Dtf, arguments: list[str]) -> None:
    result = dtf(*arguments)
    assert result.code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("Error: There is no preset 'x'. `dtf presets list` shows them all.\n")
    assert "no preset '--debug'" in dtf("presets", "show", "--", "--debug").stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DTFError("disk full"), 1, "Error: disk full\n"),
        (ConfigError("[red]x = 1[/]: wrong"), 2, "Error: [red]x = 1[/]: wrong\n"),
        (KeyboardInterrupt(), 130, "Error: interrupted.\n"),
        (RuntimeError("first\nsecond"), 1, "Error: unexpected RuntimeError: first\nRun the command again with --debug"),
        (typer.BadParameter("no good"), 2, "Error: Invalid value: no good.\nTry 'dtf"),
        (typer.Exit(3), 3, ""),
    ],
)
def test_errors_become_exit_codes(
    dtf: Dtf, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def raise_it(_: str) -> None:
        raise error

    monkeypatch.setattr("dtfcli.settings.sources.read_preset", raise_it)
    result = dtf("presets", "show", "quickstart", "--json")
    assert (result.code, result.stdout) == (code, "")
    assert result.stderr.startswith(said)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["presets", "list"], ["presets", "show", "thesis-mod"], ["presets", "validate", "quickstart"], ["env"]],
)
def test_json_is_one_document_and_nothing_else(dtf: Dtf, arguments: list[str]) -> None:
    result = dtf(*arguments, "--json")
    assert result.code == 0
    assert json.loads(result.stdout)
    assert result.stderr == ""


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json({"loss": float("nan"), "path": Path("a"), "steps": (1, 2.5, True, None)})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "path": "a", "steps": [1, 2.5, True, None]}


def test_terminal_settings_are_respected() -> None:
    colorful = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    assert "\x1b[" in _process("presets", "show", "x", **colorful).stderr
    assert "\x1b[3" not in _process("presets", "show", "x", NO_COLOR="1", **colorful).stderr
    listed = _process("presets", "list", COLUMNS="60").stdout
    assert "\x1b[" not in listed
    assert max(map(len, listed.splitlines())) <= 60


def test_a_pipe_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(render, "_LINE_EVERY_SECONDS", 0.1)
    began = time.monotonic()
    with render.Steps() as show:
        for done in range(1, 251):
            show("Fitting", done / 1000)
            time.sleep(0.001)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 1 + (time.monotonic() - began) / 0.1
    assert all(re.fullmatch(r"Fitting \d+% \d+:\d\d left", line) for line in lines), lines


def test_a_wide_table_is_not_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(render.out, "_width", 40)
    render.show_table([f"column {i}" for i in range(6)], [[str(i) * 9 for i in range(6)]])
    assert capsys.readouterr().out.splitlines()[1].split() == [str(i) * 9 for i in range(6)]


def test_examples_fit_a_narrow_terminal() -> None:
    texts = [command.help or "" for command in typer.main.get_command(app).commands.values()]
    assert [line for text in texts for line in text.splitlines() if line.startswith("  ") and len(line) > 78] == []


@pytest.mark.slow
def test_libraries_are_not_heard() -> None:
    """torchao, bitsandbytes and torch remark on missing kernels when they are imported."""
    code = "import importlib, dtfcli.quiet as q\nq.quiet_imports()\nfor name in ('torchao', 'bitsandbytes', 'peft'):\n"
    code += " try: importlib.import_module(name)\n except ImportError: pass"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


def test_a_picture_of_what_a_command_prints(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.pictures", "terminal", str(tmp_path / "a.svg"), "--until", "thesis"]
    subprocess.run([*command, "--", "dtf", "presets", "list"], stdout=subprocess.DEVNULL, check=True)
    drawn = (tmp_path / "a.svg").read_text("utf-8")
    assert "quickstart" in drawn
    assert "thesis-mod" not in drawn


def test_an_ascii_terminal_is_no_reason_to_fail() -> None:
    result = _process("generate", "--help", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.returncode == 0
    assert "--capacity" in result.stdout


def test_a_closed_pipe_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "dtfcli", "presets", "show", "quickstart"]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert result.returncode == 1
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("pre", "presets"),
        ("presets show thesis-d", "thesis-dtf"),
        ("train quick", "quickstart"),
        ("train quickstart training.max_s", "training.max_steps="),
    ],
)
def test_completion_knows_presets_and_settings(
    dtf: Dtf, monkeypatch: pytest.MonkeyPatch, typed: str, offered: str
) -> None:
    monkeypatch.setenv("_DTF_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"dtf {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split())))
    assert offered in dtf().stdout.splitlines()


def test_validate_reports_everything_at_once(dtf: Dtf, tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text('[run]\nnmae = "x"\n[training]\nepochs = 0\nlog_every = -1\nmax_steps = "a"\nschedule = "b"\n')
    result = dtf("presets", "validate", str(file))
    assert result.code == 2
    assert len(result.stderr.splitlines()) == 5
    document = dtf("presets", "validate", str(file), "--json")
    assert document.code == 2
    assert len(json.loads(document.stdout)["problems"]) == 5


def test_copying_to_a_file_of_ones_own(dtf: Dtf, tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    assert dtf("presets", "copy", "quickstart", str(file)).stdout == f"{file}\n"
    assert dtf("presets", "validate", str(file)).stdout == f"{file}: valid\n"
    assert dtf("presets", "copy", "quickstart", str(file)).code == 2


@pytest.mark.parametrize(("text", "share"), [("80%", 0.8), (" 0.8 ", 0.8), ("1", 1.0), ("12.5 %", 0.125), (".5", 0.5)])
def test_a_share_may_be_percent(text: str, share: float) -> None:
    assert options.share("--capacity")(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["ten", "%", "80%%", ""])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--capacity .*: a share; write 80% or 0\.8"):
        options.share("--capacity")(text)
