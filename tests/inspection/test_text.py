"""What is reported about a text equals what the model itself says, computed the slow way."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dtfcli.errors import ConfigError
from dtfcli.inspection.text import inspect_text
from tests.inspection.conftest import TEXT, model_by
from tests.tiny import dense_model, routed_model


def test_records_and_loss_are_the_models_own(model: Any, words: PreTrainedTokenizerFast) -> None:
    report = inspect_text(model, words, TEXT)
    ids = torch.tensor([words(TEXT)["input_ids"]])
    with torch.no_grad():
        out = model(ids, labels=ids, output_routing=True)
    log_p = out.logits[0].log_softmax(-1)
    naive = [-log_p[t - 1, ids[0, t]].item() for t in range(1, ids.shape[1])]
    assert math.isnan(report.loss[0])
    np.testing.assert_allclose(report.loss[1:], naive, rtol=1e-4)
    assert report.loss[1:].mean() == pytest.approx(out.lm_loss.item(), rel=1e-5)
    for layer, record in zip(report.layers, out.routing, strict=True):
        assert layer.layer == record.layer
        assert layer.selected.tolist() == record.selected[0].tolist()
        np.testing.assert_allclose(layer.score, record.scores[0], rtol=1e-5)
        np.testing.assert_allclose(layer.figures["gate"], record.gate[0], rtol=1e-5)
        assert layer.threshold == pytest.approx(float(record.threshold))
        for name in ("static_surprise", "change_surprise", "s_ce", "s_cu"):
            values = getattr(record, name)
            assert (name in layer.figures) == (values is not None)
            if values is not None:
                np.testing.assert_allclose(layer.figures[name], values[0], rtol=1e-5)
    depth = [sum(bool(r.selected[0, t]) for r in out.routing) for t in range(ids.shape[1])]
    assert report.depth == depth
    assert report.routed_share == pytest.approx(sum(depth) / len(depth) / len(out.routing))
    assert report.sinks.tolist() == [True] + [False] * (len(depth) - 1)


@pytest.mark.parametrize("score", ["forecast_error", "update_size"])
def test_a_predicted_cost_lets_in_what_is_above_the_threshold(score: str, words: PreTrainedTokenizerFast) -> None:
    report = inspect_text(model_by("forecast_error", score=score), words, TEXT)
    assert report.name == f"DTF by {score}"
    for layer in report.layers:
        cost = layer.figures["predicted_cost"]
        np.testing.assert_allclose(cost, np.exp(layer.score - 1.5) ** 0.5)
        assert layer.shown_threshold is not None
        assert (layer.selected == (cost > layer.shown_threshold) | report.sinks).all()
    assert set(report.layers[0].figures) == {"gate", "predicted_cost"}


def test_the_part_of_expected_change_is_its_share_of_the_score(words: PreTrainedTokenizerFast) -> None:
    report = inspect_text(model_by("surprise"), words, TEXT)
    for layer in report.layers:
        s_ce, s_cu = layer.figures["s_ce"], layer.figures["s_cu"]
        exact = np.maximum(s_ce, s_cu) < 0.999  # −ln(1 − S) is not to be had from a saturated S
        ce, cu = -np.log(1 - s_ce[exact]), -np.log(1 - s_cu[exact])
        np.testing.assert_allclose(layer.figures["ce_part"][exact], ce / (ce + cu), atol=2e-3)


@pytest.mark.parametrize(("mode", "other"), [("threshold", "topk"), ("topk", "threshold")])
def test_agreement_is_with_the_other_mode_at_the_same_capacity(
    words: PreTrainedTokenizerFast, mode: str, other: str
) -> None:
    model: Any = routed_model()
    model.set_routing(mode, 0.25)
    report = inspect_text(model, words, TEXT)
    assert (model.routing, model.capacity) == (mode, 0.25)  # left as it was
    model.set_routing(other, 0.25)
    with torch.no_grad():
        records = model(torch.tensor([words(TEXT)["input_ids"]]), output_routing=True).routing
    assert report.agreement is not None
    assert (report.agreement.first, report.agreement.second) == (mode, other)
    for layer, record in zip(report.layers, records, strict=True):
        mine, theirs = layer.selected, record.selected[0].numpy()
        overlap = report.agreement.layers[layer.layer]
        assert overlap.jaccard == pytest.approx((mine & theirs).sum() / (mine | theirs).sum())
        assert overlap.same == pytest.approx((mine == theirs).mean())
        chance = mine.mean() * theirs.mean() + (1 - mine.mean()) * (1 - theirs.mean())
        assert overlap.kappa == pytest.approx((overlap.same - chance) / (1 - chance))
    assert report.causal == (mode != "topk")


def test_a_long_text_is_routed_window_by_window(dtf_model: Any, words: PreTrainedTokenizerFast) -> None:
    size = dtf_model.config.max_position_embeddings
    text = " ".join([TEXT] * (size // 20))
    whole = inspect_text(dtf_model, words, text)
    assert whole.windows == list(range(0, len(whole.source), size))
    assert len(whole.windows) > 1
    start = whole.windows[1]
    second = inspect_text(dtf_model, words, words.decode(whole.source.ids[start : start + size]))
    for layer, alone in zip(whole.layers, second.layers, strict=True):
        assert layer.selected[start : start + size].tolist() == alone.selected.tolist()
    np.testing.assert_allclose(whole.loss[start : start + size], second.loss, rtol=1e-4)
    assert whole.positions[start] == 0
    assert np.isnan(whole.loss[whole.windows]).all()


def test_one_token_is_a_text(model: Any, words: PreTrainedTokenizerFast) -> None:
    report = inspect_text(model, words, "a")
    assert len(report.source) == 1
    assert np.isnan(report.loss).all()


def test_what_is_refused(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="dense"):
        inspect_text(dense_model(), words, "a b")
    with pytest.raises(ConfigError, match="empty"):
        inspect_text(routed_model(), words, "")
    fresh: Any = routed_model()
    for router in fresh.model.routers.values():
        router.thresholds.fill_(float("nan"))
    with pytest.raises(ConfigError, match="not calibrated"):
        inspect_text(fresh, words, "a b")
    fresh.set_routing("topk")
    assert inspect_text(fresh, words, "a b").agreement is None
