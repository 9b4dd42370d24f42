"""Differences between models: paired where the items are the same."""

import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from lm_eval.api.metrics import mean, weighted_perplexity
from transformers import PreTrainedTokenizerFast

from dtfcli.evaluation.report import Items
from dtfcli.evaluation.side_by_side import paired_stderr
from tests.conftest import Outcome
from tests.tiny import dense_model, routed_model


def _items(values: list[float], hashes: str = "abcdefgh") -> Items:
    return Items(tuple(hashes), {"acc": values}, {"acc": mean})


def test_a_mean_is_paired_by_item() -> None:
    a, b = [1, 1, 0, 0, 1, 0, 1, 1], [1, 0, 0, 1, 1, 0, 1, 0]
    expected = statistics.stdev([y - x for x, y in zip(a, b, strict=True)]) / math.sqrt(8)
    assert paired_stderr(_items(a), _items(b), "acc") == pytest.approx(expected)
    assert paired_stderr(_items(a), _items(a), "acc") == 0.0
    assert paired_stderr(_items(a), _items(b, "abcdefgx"), "acc") is None, "other items"
    assert paired_stderr(_items(a), None, "acc") is None
    assert paired_stderr(_items(a), _items(b), "f1") is None


def test_a_perplexity_is_paired_by_the_jackknife() -> None:
    rng = random.Random(0)
    words = [rng.randint(50, 500) for _ in range(60)]
    first = [(-5 * n + rng.gauss(0, n), n) for n in words]
    second = [(score + 0.1 * n + rng.gauss(0, 1), n) for score, n in first]
    a, b = (Items(tuple(map(str, range(60))), {"p": v}, {"p": weighted_perplexity}) for v in (first, second))
    paired = paired_stderr(a, b, "p")
    assert paired is not None
    resampled = []
    for _ in range(1000):
        kept = rng.choices(range(60), k=60)
        resampled.append(weighted_perplexity([second[i] for i in kept]) - weighted_perplexity([first[i] for i in kept]))
    assert paired == pytest.approx(statistics.stdev(resampled), rel=0.25)


def test_models_side_by_side(
    tmp_path: Path,
    data_dir: Path,
    task_dir: Path,
    tokenizer: PreTrainedTokenizerFast,
    dtf: Callable[..., Outcome],
) -> None:
    names = []
    for name, model in (("one", dense_model()), ("two", routed_model()), ("three", dense_model(seed=5))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        names.append(str(tmp_path / name))
    options = ["--tasks", "toy_group,toy_text", "--data-dir", str(data_dir), "--include-path", str(task_dir)]
    result = dtf("eval", *names, *options, "--json", "--output", str(tmp_path / "all.json"))
    assert result.code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document == json.loads((tmp_path / "all.json").read_text())
    assert [model["model"] for model in document["models"]] == names
    first, second, third = (model["results"] for model in document["models"])
    differences = {(d["model"], d["task"], d["metric"]): d for d in document["comparison"]}
    for name, results in ((names[1], second), (names[2], third)):
        for task, metric in (("toy_group", "acc"), ("toy_choice", "acc_norm"), ("toy_text", "word_perplexity")):
            difference = differences[name, task, metric]
            values = [scores[task]["metrics"][metric]["value"] for scores in (results, first)]
            assert difference["value"] == pytest.approx(values[0] - values[1])
            assert difference["paired"]
            assert difference["stderr"] > 0
    table = dtf("eval", *names, *options, "--limit", "6")
    assert table.code == 0
    assert "minus A" in table.stdout
    assert "NOT causal" not in table.stdout
    for name in names:
        assert (Path(name) / "eval" / "latest.json").is_file()
    single = dtf("eval", names[1], *options, "--limit", "6", "--routing", "topk")
    assert "NOT causal" in single.stdout
