"""The files of a run folder: the log of metrics, folders that appear whole, failures in words."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dtfcli.errors import CheckpointError, DTFError
from dtfcli.runs.files import MetricsLog, read_metrics, replaced_folder, tidy_folders
from dtfcli.runs.folder import run_settings


def test_metrics_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"step": 1, "mfu": None})
    kept = log.bytes
    log.write({"step": 2})
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert MetricsLog(path, keep_bytes=kept).bytes == kept
    path.write_text(path.read_text() + '{"st')
    assert read_metrics(path) == [{"step": 1, "mfu": None}]
    assert MetricsLog(tmp_path / "lost.jsonl", keep_bytes=100).bytes == 0
    assert log.write({"mfu": float("nan")}) == {"mfu": None}


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("one", "two"):
        with replaced_folder(target) as partial:
            (partial / "file").write_text(content)
        assert (target / "file").read_text() == content
    with pytest.raises(TypeError), replaced_folder(target) as partial:
        (partial / "file").write_text(3)
    assert (target / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folders_are_tidied_after_a_kill(tmp_path: Path) -> None:
    for name in (".best_model.previous", ".best_model.partial", ".other.previous", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    tidy_folders(tmp_path)
    assert {path.name: (path / "file").read_text() for path in tmp_path.iterdir()} == {
        "best_model": ".best_model.previous",
        "other": "other",
    }


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "no permission to write"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_explained(tmp_path: Path, error: Exception, reason: str) -> None:
    folder = tmp_path / "checkpoints" / "step-000001"
    with pytest.raises(DTFError) as caught, replaced_folder(folder):
        raise error
    assert caught.value.exit_code == 1
    assert str(folder.parent) in str(caught.value)
    assert reason in str(caught.value)
    assert "run.output_dir" in str(caught.value)


def test_other_errors_are_not_explained_away(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), replaced_folder(tmp_path / "x"):
        raise RuntimeError("shapes differ")


def test_settings_of_an_earlier_version(tmp_path: Path) -> None:
    """A setting that is gone does no harm where it was off; otherwise the error names it and the remedy."""
    path = tmp_path / "settings.toml"
    path.write_text('[model]\nbudget = "layer"\n[training]\nrouter_warmup_steps = 0\n')
    assert run_settings(tmp_path).training.max_steps is None
    path.write_text("[training]\nrouter_warmup_steps = 3\n")
    with pytest.raises(CheckpointError, match=r"settings\.toml.* training\.router_warmup_steps: .*gone.* Leave it out"):
        run_settings(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")
def test_files_are_as_open_as_others(tmp_path: Path) -> None:
    """Safetensors writes files that nobody else can read."""
    (tmp_path / "other").touch()
    with replaced_folder(tmp_path / "model") as partial:
        (partial / "weights").touch(0o600)
    assert (tmp_path / "model" / "weights").stat().st_mode == (tmp_path / "other").stat().st_mode
