"""A router against the tokens that lose most by skipping: costs, agreement, and the loss if those were routed."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from dtfcli.errors import ConfigError
from dtfcli.inspection.oracle import CHOOSERS
from dtfcli.inspection.statistics import RoutingStatistics, summarize
from dtfcli.inspection.tables import all_tables
from dtfcli.inspection.text import inspect_text
from dtfcli.models.routing import Scores
from tests.inspection.conftest import TEXT, model_by
from tests.tiny import routed_model


def mean_loss(report: Any) -> float:
    return float(np.nanmean(report.loss))


@pytest.mark.parametrize("fields", [{}, {"kv_tokens": "all"}, {"sink_tokens": 0}], ids=str)
@pytest.mark.parametrize("score", ["forecast_error", "surprise", "mod"])
def test_the_routers_pass_and_that_of_every_token_are_the_models_own(
    score: str, fields: dict[str, Any], words: Any
) -> None:
    model = model_by(score, **fields)
    report = inspect_text(model, words, TEXT, oracle=True)
    assert report.oracle is not None
    assert report.oracle.losses["router"].mean == pytest.approx(mean_loss(report), rel=1e-5)
    model.set_routing("threshold", 1.0)
    every_token = inspect_text(model, words, TEXT, other_mode=False)
    assert report.oracle.losses["every token"].mean == pytest.approx(mean_loss(every_token), rel=1e-5)


@pytest.mark.parametrize(
    ("score", "fields"),
    [("mod", {"sink_tokens": 2}), ("forecast_error", {}), ("surprise", {})],
    ids=str,
)
@torch.inference_mode()
def test_costs_and_agreement_are_those_of_a_naive_reading(score: str, fields: dict[str, Any], words: Any) -> None:
    """With one routed layer: its output when every token enters, against its output when none does."""
    model = model_by(score, routed_layers=[3], gate="straight_through", **fields)
    report = inspect_text(model, words, TEXT, oracle=True)
    ids, states = torch.tensor([words(TEXT).input_ids]), {}

    def keep(module: Any, args: Any, output: Any) -> None:
        states["before"], states["after"] = args[0][0], output[0][0]

    hook = model.model.layers[3].register_forward_hook(keep)
    with model.routing_mode("threshold", 1.0):
        model.model(ids, use_cache=False)
    before, entered = states["before"], states["after"]
    model.config.sink_tokens = 0
    model.model.layers[3].router.thresholds.fill_(torch.inf)
    model.model(ids, use_cache=False)
    hook.remove()
    costs = (entered - states["after"]).norm(dim=-1)
    layer, assert_close = report.layers[0], np.testing.assert_allclose
    assert_close(layer.figures["true_cost"], costs / 32**0.5, rtol=1e-4)

    counted = ~report.sinks
    assert report.oracle is not None
    measured = report.oracle.layers[3]
    assert measured.rank_correlation == pytest.approx(stats.spearmanr(layer.score[counted], costs[counted]).statistic)
    largest = costs.masked_fill(torch.tensor(report.sinks), torch.inf).topk(int(layer.selected.sum())).indices
    assert measured.overlap.both == int(layer.selected[largest].sum()) - int(report.sinks.sum())
    assert measured.overlap.shares[0] == measured.overlap.shares[1], "as many tokens as the router"
    if score == "forecast_error":
        missed = (costs**2 / (entered - before).norm(dim=-1) ** 2).numpy()
        skipping, routed = counted & ~layer.selected, counted & layer.selected
        assert measured.missed_shares == pytest.approx((missed[skipping].mean(), missed[routed].mean()), rel=1e-4)
        assert report.oracle.missed == pytest.approx(missed[skipping].mean(), rel=1e-4)
    else:
        assert measured.missed_shares == (None, None)


def test_a_router_that_is_the_oracle_agrees_and_loses_nothing(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_by("mod", gate="straight_through")
    model.set_routing("topk")
    for place, index in enumerate(model.model.routed):  # a layer's costs depend on what the layers below route
        cost = torch.tensor(inspect_text(model, words, TEXT, oracle=True).layers[place].figures["true_cost"])
        scores = Scores(cost[None].float(), torch.ones(1, len(cost)))

        def by_cost(*_: object, scores: Scores = scores) -> Scores:
            return scores

        monkeypatch.setattr(model.model.layers[index].router, "forward", by_cost)
    oracle = inspect_text(model, words, TEXT, oracle=True).oracle
    assert oracle is not None
    for layer in oracle.layers.values():
        assert layer.rank_correlation == pytest.approx(1.0)
        assert layer.overlap.jaccard == 1.0
    assert oracle.losses["oracle"].mean == pytest.approx(oracle.losses["router"].mean, rel=1e-5)


def test_texts_add_up(model: Any, words: Any) -> None:
    texts = [TEXT, TEXT[:40], "q r s t u v w30 w31 w32 w33 w34 a b"]
    reports = [inspect_text(model, words, text, oracle=True) for text in texts]
    statistics = RoutingStatistics()
    for report in reports:
        statistics.add(report)
    summary = statistics.result()
    total = summary.oracle
    assert total is not None
    singles = [report.oracle for report in reports if report.oracle is not None]
    for chooser in CHOOSERS:
        losses = [single.losses[chooser].mean for single in singles]
        assert total.losses[chooser].mean == pytest.approx(np.average(losses, weights=total.losses[chooser].targets))
    counted = sum(len(report.source) - int(report.sinks.sum()) for report in reports)
    assert all(layer.overlap.tokens == counted for layer in total.layers.values())
    tables = all_tables(reports[0], summary)
    assert [table.key for table in tables][-2:] == ["oracle", "ceiling"]
    forecasts = model.config.bypass == "forecast"
    assert ("missed: routed" in dict(tables[-2].columns)) == (total.missed is not None) == forecasts
    assert summarize(inspect_text(model, words, TEXT)).oracle is None, "only on request"


def test_there_must_be_a_choice(words: Any) -> None:
    with pytest.raises(ConfigError, match="name a dtf, mod or random model"):
        inspect_text(routed_model(architecture="layerdrop"), words, TEXT, oracle=True)
