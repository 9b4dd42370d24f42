"""What each layer costs to leave out, and the order that follows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtfcli.inspection.sensitivity import sensitivity
from dtfcli.models.conversion import convert, to_dense
from tests.conftest import Outcome
from tests.inspection.conftest import TEXT
from tests.tiny import dense_model, routed_model

TEXTS = [TEXT, TEXT[:40], "q r s t u v w30 w31 w32 w33 w34 a b"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.inference_mode()
def test_a_layer_left_out_is_a_model_without_it(family: str, words: Any) -> None:
    model = dense_model(family)
    found = sensitivity(model, words, [TEXT])
    ids = torch.tensor([words(TEXT).input_ids])
    whole = float(model(ids, labels=ids).loss)
    assert found.loss == pytest.approx(whole, rel=1e-5)
    for left_out in range(6):
        shorter = dense_model(family)
        del shorter.model.layers[left_out]
        shorter.config.num_hidden_layers = 5
        assert found.cost(left_out).value == pytest.approx(
            float(shorter(ids, labels=ids, use_cache=False).loss) - whole, abs=1e-5
        )


def test_a_routed_model_is_measured_by_its_backbone(words: Any) -> None:
    routed = routed_model(dense_edges=1)
    found, expected = (sensitivity(model, words, TEXTS) for model in (routed, to_dense(routed)))
    assert found.losses[3].mean == expected.losses[3].mean
    assert found.routed == list(routed.model.routed) == [1, 3]
    assert expected.routed == [1, 3, 5]
    assert all((found.cost(layer).stderr or 0) > 0 for layer in found.layers)
    assert sensitivity(routed, words, [TEXT]).cost(3).stderr is None


def test_the_order_is_what_layerdrop_takes(words: Any) -> None:
    found = sensitivity(dense_model(), words, TEXTS)
    assert [found.cost(layer).value for layer in found.order] == sorted(
        (found.cost(layer).value for layer in found.routed), reverse=True
    )
    dropping = convert(dense_model(), "layerdrop", 0.34, layer_order=found.order)
    kept = [layer for layer, share in dropping.config.layer_capacities().items() if share]
    assert kept == found.order[:1]


def test_command(dtf: Callable[..., Outcome], tmp_path: Path, words: Any) -> None:
    model = tmp_path / "dense"
    dense_model().save_pretrained(model)
    words.save_pretrained(model)
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    output = tmp_path / "cost.json"
    shown = dtf("inspect-routing", str(model), "--file", str(file), "--sensitivity", "--output", str(output))
    assert shown.code == 0, shown.stderr
    document = json.loads(output.read_text())
    assert f"model.layer_order={json.dumps(document['layer_order'], separators=(',', ':'))}" in shown.stdout
    assert document["texts"] == 3
    assert [layer["layer"] for layer in document["layers"]] == [0, 1, 2, 3, 4, 5]
    one = dtf("inspect-routing", str(model), TEXT, "--sensitivity", "--json")
    assert json.loads(one.stdout)["texts"] == 1
