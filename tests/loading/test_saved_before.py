"""Folders that earlier versions saved still open, and answer the same.

`saved_by_0_1/` is such a folder, with the logits that the version gave: DTF by `forecast_error`, two routed layers, a
predictor. Its parameters have names that are gone (`forecast_prior`, `router.level`), its configuration fields that are
gone (`budget`, `score_factor`, …).
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dtfcli

SAVED = Path(__file__).parent / "saved_by_0_1"


def test_the_logits_are_those_of_the_version_that_saved_it(tmp_path: Path) -> None:
    expected = load_file(SAVED / "expected.safetensors")
    model = dtfcli.load_model(SAVED)
    again = tmp_path / "again"
    model.save_pretrained(again)
    for opened in (model, dtfcli.load_model(again)):
        torch.testing.assert_close(opened(expected["input_ids"]).logits, expected["logits"], atol=1e-5, rtol=0)
        opened.set_routing("threshold", capacity=0.3)
        torch.testing.assert_close(opened(expected["input_ids"]).logits, expected["logits_quarter"], atol=1e-5, rtol=0)
    assert not [name for name in load_file(again / "model.safetensors") if "forecast_prior" in name or "level" in name]
    assert "budget" not in json.loads((again / "config.json").read_text())


@pytest.mark.parametrize(
    ("field", "value"), [("budget", "model"), ("score_factor", 0.5), ("surprise_scale", "running")]
)
def test_a_struck_field_that_meant_something_is_refused(tmp_path: Path, field: str, value: object) -> None:
    folder = tmp_path / "model"
    shutil.copytree(SAVED, folder)
    config = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=f"{field} = .*this field is gone"):
        dtfcli.load_model(folder)
