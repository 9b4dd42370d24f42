"""A router against the tokens whose update is largest: agreement, and the loss if those were routed."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dtfcli.errors import ConfigError
from dtfcli.inspection.oracle import CHOOSERS, _Walk
from dtfcli.inspection.statistics import RoutingStatistics, summarize
from dtfcli.inspection.tables import all_tables
from dtfcli.inspection.text import inspect_text
from tests.inspection.conftest import TEXT
from tests.tiny import routed_model, tokens


def walk(model: Any, length: int = 60) -> _Walk:
    return _Walk(model, tokens(1, length, seed=3), np.random.default_rng(0))


@torch.inference_mode()
def hidden_at_full_capacity(model: Any, row: Tensor) -> Tensor:
    with model.routing_mode(model.routing, 1.0):
        return model.model(row, use_cache=False).last_hidden_state


@pytest.mark.parametrize("fields", [{}, {"kv_tokens": "all"}, {"sink_tokens": 0}], ids=str)
@pytest.mark.parametrize("architecture", ["dtf", "mod", "random"])
@torch.inference_mode()
def test_the_walk_is_the_models_own_pass(architecture: str, fields: dict[str, Any]) -> None:
    model = routed_model(architecture=architecture, **fields)
    ours = walk(model)
    out = model.model(ours.row, use_cache=False)
    torch.testing.assert_close(ours.along_router({}), out.last_hidden_state)
    assert ours.counts == {record.layer: int(record.selected.sum()) for record in out.routing}
    torch.testing.assert_close(ours.chosen_by("every token"), hidden_at_full_capacity(model, ours.row))


@torch.inference_mode()
def test_sizes_and_choice_are_those_of_a_naive_reading() -> None:
    """A model with one routed layer: the oracle's tokens are the largest changes that full capacity makes there."""
    model = routed_model(architecture="mod", routed_layers=[3], gate="straight_through", sink_tokens=2)
    seen: dict[str, Tensor] = {}
    layer = model.model.layers[3]
    before = layer.register_forward_pre_hook(lambda module, args: seen.update(x=args[0][0]))
    after = layer.register_forward_hook(lambda module, args, out: seen.update(y=out[0][0]))
    ours = walk(model)
    hidden_at_full_capacity(model, ours.row)
    before.remove()
    after.remove()
    sizes = (seen["y"] - seen["x"]).norm(dim=-1)
    record = model.model(ours.row, use_cache=False).routing[0]
    count = int(record.selected.sum())
    sizes_of_others = sizes.clone()
    sizes_of_others[:2] = torch.inf
    expected = sizes_of_others >= sizes_of_others.sort(descending=True).values[count - 1]

    layers: dict[int, Any] = {}
    ours.along_router(layers)
    found = layers[3]
    assert found.rank_correlation == pytest.approx(stats.spearmanr(record.scores[0, 2:], sizes[2:]).statistic)
    assert found.overlap.both == int((expected & record.selected[0])[2:].sum())
    assert found.overlap.shares[0] == found.overlap.shares[1], "as many tokens as the router"
    passing = ours._enter()
    for index in range(3):
        model.model.step(index, passing)
    assert torch.equal(ours._choice("oracle", 3, passing), expected)


@torch.inference_mode()
def test_a_router_that_is_the_oracle_agrees_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed_model(architecture="mod", gate="straight_through")
    model.set_routing("topk")
    ours = walk(model)

    def by_size(index: int, score: Any) -> Any:
        def scores(hidden: Tensor, surprises: Any, frame: Any, store: Any = None) -> Any:
            found = score(hidden, surprises, frame, store)
            if frame.capacities[index] == 1.0 or frame.chosen is not None:  # the look at the sizes itself
                return found
            sizes = ours._sizes(index, replace(ours._enter(), hidden_states=hidden))
            return found._replace(score=sizes.unsqueeze(0))

        return scores

    for index in model.model.routed:
        layer = model.model.layers[index]
        monkeypatch.setattr(layer, "score", by_size(index, layer.score))
    layers: dict[int, Any] = {}
    hidden = ours.along_router(layers)
    assert all(found.rank_correlation == pytest.approx(1.0) for found in layers.values())
    assert all(found.overlap.jaccard == 1.0 for found in layers.values())
    torch.testing.assert_close(ours.chosen_by("oracle"), hidden)


@pytest.mark.parametrize("fields", [{"routed_part": "mlp"}, {"bypass": "forecast"}, {"routed_part": "attention"}])
@torch.no_grad()
def test_sizes_are_what_skipping_loses(fields: dict[str, str]) -> None:
    """Of the part that is routed alone, and against the forecast."""
    model = routed_model(architecture="mod", kv_tokens="all", **fields)
    ours = walk(model)
    passing, index = ours._enter(), 1
    model.model.step(0, passing)
    sizes = ours._sizes(index, passing)
    layer, frame = model.model.layers[index], passing.frame
    for token in (3, 7):
        chosen = torch.ones_like(ours.row, dtype=torch.bool)
        states = []
        for enters in (True, False):
            chosen[0, token] = enters
            how = {
                "frame": replace(frame, chosen={index: chosen.clone()}),
                "capacity": 0.5,
                **passing.layer_inputs["full_attention"],
            }
            states.append(layer(passing.hidden_states, **how)[0][0, token])
        assert sizes[token] == pytest.approx((states[0] - states[1]).norm().item(), rel=1e-3)


def test_texts_add_up(model: Any, words: Any) -> None:
    texts = [TEXT, TEXT[:40], "q r s t u v w30 w31 w32 w33 w34 a b"]
    reports = [inspect_text(model, words, text, against=["oracle"]) for text in texts]
    statistics = RoutingStatistics()
    for report in reports:
        statistics.add(report)
    total = statistics.result().oracle
    assert total is not None
    singles = [report.oracle for report in reports if report.oracle is not None]
    assert len(singles) == 3
    for chooser in CHOOSERS:
        losses = [single.losses[chooser].mean for single in singles]
        assert total.losses[chooser].mean == pytest.approx(np.average(losses, weights=total.losses[chooser].targets))
    tokens_seen = sum(len(report.source) - int(report.sinks.sum()) for report in reports)
    assert all(layer.overlap.tokens == tokens_seen for layer in total.layers.values())
    router_loss = np.nansum(np.concatenate([report.loss for report in reports])) / total.losses["router"].targets.sum()
    assert total.losses["router"].mean == pytest.approx(router_loss, rel=1e-5)
    keys = [table.key for table in all_tables(statistics.result())]
    assert keys[-2:] == ["oracle", "ceiling"]
    assert summarize(inspect_text(model, words, TEXT)).oracle is None, "only where it was asked for"


def test_there_must_be_a_choice(words: Any) -> None:
    with pytest.raises(ConfigError, match="name a dtf, mod or random model"):
        inspect_text(routed_model(architecture="layerdrop"), words, TEXT, against=["oracle"])
