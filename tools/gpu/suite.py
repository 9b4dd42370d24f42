"""The tests marked `gpu`, by pytest in a process of its own; a rehearsal runs a few that need no GPU."""

import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

from tools.gpu.job import ERROR_LINES, Job

ROOT = Path(__file__).parents[2]
REHEARSED = ("tests/runs/test_files.py",)
NO_TESTS = 5
"""pytest's exit status where nothing was collected."""


def run(job: Job) -> None:
    """Run them, and write how many passed and what the others said."""
    files = marked_files(ROOT / "tests")
    selection = list(REHEARSED) if job.rehearse else [*files, "-m", "gpu and not long"]
    job.write(files=files)
    if not selection or not (files or job.rehearse):
        job.write(**_counts([]), exit_status=NO_TESTS)
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        status, stopped, output = run_pytest([*selection, f"--junit-xml={report}"], job.left())
        job.write(exit_status=status, output=output, **read_report(report))
        if stopped:
            job.write(stopped="the time was over before the last test")
    if status not in (0, NO_TESTS) and not stopped:
        job.found["errors"].append(f"pytest: exit status {status}\n" + "\n".join(output))


def marked_files(folder: Path) -> list[str]:
    """Test files that name the marker: others need packages that are not there, and take time to import."""
    found = [path for path in folder.rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    return sorted(str(path.relative_to(folder.parent)) for path in found if path.name != "test_gpu_script.py")


def run_pytest(arguments: list[str], seconds: float) -> tuple[int, bool, list[str]]:
    """Run pytest; returns its exit status, whether time ran out, and the last lines.

    When time is over it is interrupted, as by Ctrl-C, and still reports what it knows.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--continue-on-collection-errors",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    process = subprocess.Popen(
        [*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    stopped = False
    try:
        output, _ = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        stopped = True
        process.send_signal(signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=8.0)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    return process.returncode, stopped, output.splitlines()[-ERROR_LINES:]


def read_report(file: Path) -> dict[str, Any]:
    """Counts and failures of a JUnit file; zeros where there is none."""
    if not file.is_file():
        return _counts([])
    return _counts(list(xml.etree.ElementTree.parse(file).getroot().iter("testcase")))


def _counts(cases: list[Any]) -> dict[str, Any]:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in cases:
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        outcome = "failed" if problem is not None else "skipped" if case.find("skipped") is not None else "passed"
        counts[outcome] += 1
        if problem is not None:
            lines = (problem.text or problem.get("message") or "").splitlines()
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append({"test": name, "end": lines[-ERROR_LINES // 2 :]})
    return {"counts": counts, "failures": failures}
