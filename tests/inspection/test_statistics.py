"""Sums over texts are what adding up by hand gives, in bounded memory."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dtfcli.inspection.corpus import Corpus, inspect_corpus
from dtfcli.inspection.statistics import RoutingStatistics, summarize
from dtfcli.inspection.text import inspect_text
from tests.inspection.conftest import TEXT

TEXTS = [TEXT, "a b c w33 . b a", "w40 w41 w42 w43 a a a a a a a a b"]


def test_a_corpus_is_its_texts_pooled(model: Any, words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    calls: list[int] = []
    corpus = inspect_corpus(model, words, Corpus(file), on_document=lambda count, share: calls.append(count))
    reports = [inspect_text(model, words, text) for text in TEXTS]
    summary = corpus.summary
    assert calls == [1, 2, 3]
    assert (summary.texts, summary.tokens) == (3, sum(len(r.source) for r in reports))

    keep = np.concatenate([~r.sinks for r in reports])
    depth = np.concatenate([r.depth for r in reports])
    assert summary.routed_share == pytest.approx(depth.mean() / len(summary.layers))
    loss = np.concatenate([r.loss for r in reports])
    paired = keep & ~np.isnan(loss)
    assert summary.loss == pytest.approx(loss[paired].mean())
    for i, layer in enumerate(summary.layers):
        chosen = np.concatenate([r.layers[i].selected for r in reports])
        assert layer.routed_share == pytest.approx(chosen.mean())
        for name, mean in layer.means.items():
            values = np.concatenate([r.layers[i].measures()[name] for r in reports])
            assert mean == pytest.approx(values[keep].mean())
            assert layer.routed_means[name] == pytest.approx(values[keep & chosen].mean())
            assert layer.skipping_means[name] == pytest.approx(values[keep & ~chosen].mean())
        if corpus.score != "surprise":
            assert not layer.criteria
            continue
        part = np.concatenate([r.layers[i].figures["ce_part"] for r in reports])
        score = np.concatenate([r.layers[i].score for r in reports])
        assert layer.criteria["by CE"] == pytest.approx((part[keep & chosen] > 0.5).mean())
        ranking = np.cov((part * score)[keep], score[keep])
        assert layer.criteria["rank CE"] == pytest.approx(ranking[0, 1] / ranking[1, 1], rel=1e-4)

    classes = np.concatenate([r.classes for r in reports])
    rows = {row.name: row for row in summary.groups["class"]}
    assert set(rows) == set(classes[keep])
    for name, row in rows.items():
        values = depth[(classes == name) & keep] / len(summary.layers)
        assert row.tokens == len(values)
        assert row.routed_share == pytest.approx(values.mean())
        if len(values) > 1:
            assert row.routed_error == pytest.approx(values.std(ddof=1) / len(values) ** 0.5)
    assert sum(row.tokens for row in summary.groups["loss"]) == paired.sum()
    assert summary.agreement is not None
    assert summary.agreement.overall.tokens == len(classes) * len(summary.layers)


def test_memory_does_not_grow_with_the_corpus(dtf_model: Any, words: PreTrainedTokenizerFast) -> None:
    report = inspect_text(dtf_model, words, TEXT)
    statistics = RoutingStatistics()
    for _ in range(5):
        statistics.add(report)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(300):
        statistics.add(report)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 50_000  # one list entry for each token would be 80 kB and more
    assert statistics.result().texts == 305


def test_position_groups_are_those_of_shares(dtf_model: Any, words: PreTrainedTokenizerFast) -> None:
    rows = {row.name: row.tokens for row in summarize(inspect_text(dtf_model, words, TEXT)).groups["position"]}
    tokens = len(words(TEXT)["input_ids"])
    assert rows == {"1-15": 15, "16-63": tokens - 16}
