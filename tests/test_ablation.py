"""The ablation's command: its studies plan what docs/results.md says, every setting of every point is read."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtfcli.studies.grid import parse_points, plan_points
from tools import ablation


@pytest.mark.parametrize("steps", ["0", "150"])
def test_every_point_can_be_planned(steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    books = ["\n\n".join(f"{book} {n}\n" + "word " * 60 for n in range(80)) for book in range(2)]
    pq.write_table(pa.table({"text": books}), tmp_path / "train.parquet")
    (tmp_path / "model.gguf").touch()
    calls: dict[str, list[str]] = {}
    monkeypatch.setattr(ablation, "compare", lambda output, name, arguments: calls.update({name: arguments}))
    arguments = ["--novels", str(tmp_path), "--model", str(tmp_path / "model.gguf"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["ablation", *arguments, "--steps", steps])
    ablation.main()
    assert list(calls) == [f"choosers-{steps}", f"details-{steps}"]
    planned = []
    for name, given in calls.items():
        points = [given[at + 1] for at, item in enumerate(given) if item == "--point"]
        overrides = [item for item in given[: given.index("--point")] if "=" in item]
        runs = plan_points("dtf-smollm2-135m", parse_points(points), [1, 2, 3], overrides, tmp_path)
        assert len(runs) == 3 * len(points), name
        planned.append(runs)
    choosers, details = ({run.key for run in runs} for runs in planned)
    assert len(choosers & details) == 3, "the best recipe is trained once for all"
