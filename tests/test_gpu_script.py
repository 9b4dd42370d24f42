"""The GPU script: it runs whole on a CPU, keeps to its time, loses no stage to another's error, and packs what fits."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tools.gpu import __main__ as script
from tools.gpu.bench import CASES, Case, run_cases
from tools.gpu.job import Job, OutOfTime, read_json, run_stage
from tools.gpu.pack import LIMIT, pack
from tools.gpu.suite import ROOT, marked_files, read_report

ARCHITECTURES = ["dense", "dtf", "dtf", "mod", "mod"]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m tools.gpu --rehearse` leaves behind."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "tools.gpu", "--rehearse", "--out", str(out), "--data", str(out / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
class TestRehearsal:
    def test_every_stage_is_complete_and_without_error(self, rehearsed: Path) -> None:
        files = sorted(path.name for path in rehearsed.iterdir())
        assert files == sorted([*(f"{name}.json" for name in script.STAGES), "summary.md"])
        assert len(files) <= 8, "no more come back from a lent machine"
        for name in script.STAGES:
            found = read_json(rehearsed / f"{name}.json")
            assert found["errors"] == []
            assert found["complete"]
            assert found["rehearsal"]
            assert "stopped" not in found
            assert 0 < found["seconds"] < 500

    def test_the_machine_is_measured(self, rehearsed: Path) -> None:
        found = read_json(rehearsed / "environment.json")
        assert found["machine"]["device"] == "cpu"
        assert found["versions"]["torch"]
        assert all(row["tflops"] > 1e-4 for row in found["matmul"])
        assert found["copy"]["gb_per_second"] > 0.1
        assert found["latency"]["launch_us"] > 0.1

    def test_tests_were_run(self, rehearsed: Path) -> None:
        found = read_json(rehearsed / "tests.json")
        assert found["exit_status"] == 0
        assert found["counts"]["passed"] > 3
        assert found["failures"] == []

    def test_each_phase_is_measured_for_each_model(self, rehearsed: Path) -> None:
        cases = read_json(rehearsed / "bench.json")["cases"]
        assert [case["phase"] for case in cases] == ["train", "prefill", "decode", "decode"]
        train, *inference = cases
        rows = train["report"]["training"]
        assert [row["architecture"] for row in rows] == ARCHITECTURES
        assert all(0 < row["time_ratio"] < 1000 for row in rows)
        assert [row["flop_ratio"] < 1 for row in rows] == [False, True, True, True, True]
        for case in inference:
            assert {row["phase"] for row in case["report"]["results"]} == {case["phase"]}
            assert [row["architecture"] for row in case["report"]["results"]] == ARCHITECTURES[1:]
            assert [row["capacity"] for row in case["report"]["results"]] == [0.125, 0.5] * 2
            assert all(0 < row["theory"] <= 1 and row["time_ratio"] > 0 for row in case["report"]["results"])

    def test_profiles_count_operations(self, rehearsed: Path) -> None:
        profiles = read_json(rehearsed / "profile.json")["profiles"]
        names = [(profile["phase"], profile["model"]) for profile in profiles]
        assert names == [("train", "dense"), ("train", "dtf"), ("decode", "dense"), ("decode", "dtf")]
        for profile in profiles:
            assert profile["kernels"] > 100
            assert profile["wall_ms"] > 0
            assert profile["device_ms"] > 0
            assert len(profile["top"]) == 15
            assert any(row["name"].startswith("aten::") for row in profile["top"])

    def test_both_models_learn_from_the_same_text(self, rehearsed: Path) -> None:
        found = read_json(rehearsed / "adapt.json")
        assert not found["packed"]
        assert [run["architecture"] for run in found["runs"]] == ["dtf", "dense"]
        for run in found["runs"]:
            losses = [line["val/loss"] for line in run["curve"] if "val/loss" in line]
            assert losses[-1] < losses[0]
            assert run["final"]["val/loss"] == losses[-1]
            assert run["tokens"] == 256 * run["steps"]
            assert run["tokens_per_second"] > 0
            assert math.isfinite(run["mfu"])
        assert 0 < found["runs"][0]["final"]["val/routed_share"] < 1

    def test_the_summary_has_a_table_of_each_stage(self, rehearsed: Path) -> None:
        text = (rehearsed / "summary.md").read_text()
        for name in ("Environment", "Tests", "Bench", "Profile", "Adapt"):
            assert f"## {name}" in text
        assert "Not complete" not in text
        assert "| 0.5B train 2x64 | dtf | 0.125 |" in text


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def new_job(folder: Path, seconds: float = 100.0, **others: Any) -> Job:
    return Job("bench", folder / "out", folder / "data", seconds, **others)


class TestTime:
    def test_a_case_is_left_out_when_it_does_not_fit(self, tmp_path: Path) -> None:
        clock = Clock()
        cases = [Case("0.5B", "train", 1, size, seconds) for size, seconds in ((1, 30), (2, 90), (3, 30), (4, 30))]

        def work(case: Case) -> dict[str, Any]:
            clock.now += case.seconds + 5
            return {"of": case.name}

        run_cases(new_job(tmp_path, clock=clock), cases, work)
        found = read_json(tmp_path / "out" / "bench.json")
        assert [case["report"] for case in found["cases"]] == [{"of": "0.5B train 1x1"}, {"of": "0.5B train 1x3"}]
        # 35 seconds for one of 30: the last is expected to take 35, and 30 are left.
        assert found["skipped"] == [
            {"name": "0.5B train 1x2", "why": "about 105 s, 65 s were left"},
            {"name": "0.5B train 1x4", "why": "about 35 s, 30 s were left"},
        ]
        assert found["errors"] == []

    def test_a_case_that_takes_too_long_is_given_up(self, tmp_path: Path) -> None:
        clock = Clock()
        job = new_job(tmp_path, clock=clock)

        def work(case: Case) -> dict[str, Any]:
            clock.now += 101
            job.check("train, round 1 of 7")
            return {}

        run_cases(job, [Case("0.5B", "train", 1, 1, 30), Case("0.5B", "train", 1, 2, 30)], work)
        assert job.found["cases"] == []
        assert [case["why"] for case in job.found["skipped"]] == [
            "the stage's 100 seconds are over",
            "about 30 s, 0 s were left",
        ]

    def test_what_one_stage_leaves_the_next_has(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[float] = []

        def command(name: str, out: Path, data: Path, seconds: float, rehearse: bool) -> list[str]:
            given.append(seconds)
            return [sys.executable, "-c", ""]

        monkeypatch.setattr(script, "stage_command", command)
        script.run_all(tmp_path, tmp_path, 10.0, False)
        shares = [share for _, share in script.STAGES.values()]
        assert math.isclose(sum(shares), 1.0)
        whole = 600 - script.RESERVE
        assert given == pytest.approx([whole * sum(shares[: n + 1]) for n in range(len(shares))], abs=20)

    def test_a_process_that_hangs_is_ended_with_its_children(self, tmp_path: Path) -> None:
        child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
        began = time.monotonic()
        errors = script.run_process("bench", [sys.executable, "-c", child], tmp_path, 1.0)
        assert time.monotonic() - began < 30
        assert "was ended after 1 seconds" in errors[0]

    def test_the_important_cases_come_first(self) -> None:
        assert [case.name for case in CASES[:3]] == ["0.5B train 8x1024", "0.5B prefill 1x8192", "0.5B decode 1x1024"]
        assert len({case.name for case in CASES}) == len(CASES)
        assert not [case for case in CASES if case.shape == "7B" and case.phase == "train"]


class TestErrors:
    def test_an_error_in_a_case_leaves_the_others(self, tmp_path: Path) -> None:
        def work(case: Case) -> dict[str, Any]:
            if case.seq_len == 1:
                raise ValueError("out of luck")
            return {}

        job = new_job(tmp_path)
        run_stage(lambda job: run_cases(job, [Case("7B", "decode", 1, n, 1) for n in (1, 2)], work), job)
        found = read_json(tmp_path / "out" / "bench.json")
        assert [case["name"] for case in found["cases"]] == ["7B decode 1x2"]
        assert found["errors"][0].startswith("7B decode 1x1\nTraceback")
        assert found["errors"][0].endswith("ValueError: out of luck")
        assert found["complete"]

    def test_what_was_known_before_an_error_stays(self, tmp_path: Path) -> None:
        def stage(job: Job) -> None:
            job.write(known=1)
            raise RuntimeError("broken")

        run_stage(stage, new_job(tmp_path))
        found = read_json(tmp_path / "out" / "bench.json")
        assert found["known"] == 1
        assert "RuntimeError: broken" in found["errors"][0]

    def test_time_that_is_over_is_no_error(self, tmp_path: Path) -> None:
        def stage(job: Job) -> None:
            raise OutOfTime("over")

        job = new_job(tmp_path)
        run_stage(stage, job)
        assert job.found["errors"] == []
        assert job.found["stopped"] == "over"

    @pytest.mark.parametrize("how", ["raise SystemExit('spoiled device')", "import os; os.abort()"])
    def test_a_stage_that_dies_leaves_the_others(
        self, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def command(name: str, out: Path, data: Path, seconds: float, rehearse: bool) -> list[str]:
            values = {"stage": name, "complete": True, "errors": [], "seconds": 1.0}
            work = f"open({str(out / f'{name}.json')!r}, 'w').write({json.dumps(values)!r})"
            return [sys.executable, "-c", how if name == "bench" else work]

        monkeypatch.setattr(script, "stage_command", command)
        assert script.run_all(tmp_path, tmp_path, 1.0, False) == ["bench"]
        assert all(read_json(tmp_path / f"{name}.json")["complete"] for name in script.STAGES if name != "bench")
        assert "exit status" in read_json(tmp_path / "bench.json")["errors"][0]
        assert "| bench | broken off |" in (tmp_path / "summary.md").read_text()
        assert "bench: 0 s" in capsys.readouterr().out

    def test_without_a_gpu_only_a_rehearsal_runs(self, tmp_path: Path) -> None:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        with pytest.raises(RuntimeError, match="--rehearse"):
            new_job(tmp_path).device()
        assert new_job(tmp_path, rehearse=True).device().type == "cpu"


class TestSuite:
    def test_only_files_that_name_the_marker_are_collected(self, tmp_path: Path) -> None:
        tests = tmp_path / "tests"
        (tests / "deep").mkdir(parents=True)
        (tests / "deep" / "test_a.py").write_text("@pytest.mark.gpu\ndef test(): ...\n")
        (tests / "test_b.py").write_text("def test(): ...\n")
        assert marked_files(tests) == ["tests/deep/test_a.py"]

    def test_failures_are_told_by_their_last_lines(self, tmp_path: Path) -> None:
        report = tmp_path / "junit.xml"
        report.write_text(
            "<testsuites><testsuite><testcase classname='a' name='passes'/>"
            "<testcase classname='a' name='fails'><failure message='no'>one\nE assert 1 == 2</failure></testcase>"
            "<testcase classname='a' name='skips'><skipped/></testcase></testsuite></testsuites>"
        )
        found = read_report(report)
        assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
        assert found["failures"] == [{"test": "a::fails", "end": ["one", "E assert 1 == 2"]}]
        assert read_report(tmp_path / "none.xml")["counts"]["passed"] == 0


class TestPack:
    @pytest.fixture
    def novels(self, tmp_path: Path) -> Path:
        books = ["\n".join(f"{book} {n} " + "word " * 60 for n in range(400)) for book in range(3)]
        pq.write_table(pa.table({"text": books}), tmp_path / "train.parquet")
        return tmp_path

    @staticmethod
    def fake(size: int) -> Any:
        def download(requirements: Iterable[str], folder: Path) -> None:
            folder.mkdir(parents=True)
            for requirement in requirements:
                assert "==" in requirement, "one version of each: two would stop the installation"
                (folder / f"{requirement}.whl").write_bytes(b"")
            (folder / "large.whl").write_bytes(bytes(size))

        return download

    def test_parts_make_the_model_again(self, novels: Path, tmp_path: Path) -> None:
        model = tmp_path / "small.gguf"
        model.write_bytes(b"GGUF" + bytes(range(256)) * 5 + b"!")
        folder = tmp_path / "pack"
        told = pack(folder, novels=novels, model=model, download=self.fake(10))
        parts = [folder / "first" / "model.gguf.part1", folder / "second" / "model.gguf.part2"]
        assert b"".join(part.read_bytes() for part in parts) == model.read_bytes()
        texts = [json.loads(line)["text"] for line in (folder / "second" / "text.jsonl").read_text().splitlines()]
        assert texts
        assert all("word" in text for text in texts)
        for expected in ("first: 0.0 MiB", "second: 0.0 MiB", "--no-index", "python3 -m tools.gpu", "cat model.gguf"):
            assert expected in told
        assert (folder / ".gitignore").read_text() == "*\n"

    def test_too_much_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="more than 60 MiB: second"):
            pack(tmp_path / "pack", novels=None, model=None, download=self.fake(LIMIT + 1))
        assert "second" in pack(tmp_path / "pack", novels=None, model=None, download=self.fake(LIMIT // 2))


def test_a_profile_of_a_gpu_counts_kernels_launches_and_waits() -> None:
    """A made-up one: this machine has none to profile."""
    from tools.gpu.profiling import counted

    def row(key: str, device: str, count: int, microseconds: float) -> SimpleNamespace:
        return SimpleNamespace(
            key=key,
            device_type=SimpleNamespace(name=device),
            count=count,
            is_user_annotation=False,
            self_device_time_total=microseconds,
            self_cpu_time_total=1.0,
        )

    rows = [
        row("aten::mm", "CPU", 3, 50.0),  # an operation is given its kernels' time, too
        row("cudaLaunchKernel", "CPU", 5, 0.0),
        row("cudaStreamSynchronize", "CPU", 2, 0.0),
        row("cudaDeviceSynchronize", "CPU", 1, 0.0),
        row("aten::_local_scalar_dense", "CPU", 2, 0.0),
        row("gemm", "CUDA", 3, 50.0),
        row("elementwise", "CUDA", 2, 10.0),
        row("Memcpy DtoH (Device -> Pinned)", "CUDA", 2, 4.0),
    ]
    found = counted(rows, "cuda")
    assert (found["kernels"], found["launches"], found["waits"], found["copies_to_host"]) == (5, 5, 2, 2)
    assert found["waiting_operations"] == {"aten::_local_scalar_dense": 2}
    assert found["device_ms"] == pytest.approx(0.064)
    assert [entry["name"] for entry in found["top"]][:2] == ["gemm", "elementwise"]
