"""`dtf convert` on a small random model: the folder, its report, and what a user can get wrong."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dtfcli.cli import convert_view
from dtfcli.conversion import convert as conversion
from dtfcli.conversion.dial import saved_share
from dtfcli.conversion.report import ConversionReport, Part, Point
from dtfcli.conversion.text import read_text
from dtfcli.data.documents import Document
from dtfcli.data.tokenizer import train_tokenizer
from dtfcli.loading.load import load_model
from dtfcli.statistics import Difference
from dtfcli.training import loop
from tests.conftest import Outcome
from tests.faults import Dtf, counter, kill_at_file
from tests.tiny import SHAPE, dense_model, word_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small dense models, and text for them in several forms."""
    folder = tmp_path_factory.mktemp("work")
    words = np.array([f"{a}{b}" for a in ("ka", "lo", "mi", "tu", "se") for b in ("ra", "ne", "do", "ki", "pu")])
    generator = np.random.RandomState(0)
    texts = [" ".join(words[generator.randint(0, 25, size)]) for size in [3000] * 20 + [60] * 60]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    (folder / "books").mkdir()
    for number, text in enumerate(texts[:6]):
        (folder / "books" / f"{number}.txt").write_text(" ".join([text] * 3), "utf-8")
    (folder / "one.txt").write_text(" ".join(texts), "utf-8")
    (folder / "short.txt").write_text(texts[0][:2000], "utf-8")
    (folder / "column.jsonl").write_text('{"body": "x"}\n', "utf-8")
    tokenizer = train_tokenizer([Document(text) for text in texts], 300)
    tokenizer.chat_template = TEMPLATE
    models: dict[str, Any] = {
        "dense": dense_model("llama", vocab_size=300, intermediate_size=256),
        "shallow": dense_model("llama", vocab_size=300, num_hidden_layers=3),
        "experts": AutoModelForCausalLM.from_config(
            AutoConfig.for_model("mixtral", **SHAPE | {"vocab_size": 300, "num_local_experts": 2})
        ),
        "nomlp": AutoModelForCausalLM.from_config(
            AutoConfig.for_model("gpt2", n_embd=32, n_layer=5, n_head=4, vocab_size=300)
        ),
    }
    models["broken"] = dense_model("llama", vocab_size=300, intermediate_size=256)
    torch.nn.init.constant_(models["broken"].model.layers[3].mlp.up_proj.weight, torch.inf)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "weightless").mkdir()
    (folder / "weightless" / "config.json").write_text((folder / "dense" / "config.json").read_text("utf-8"), "utf-8")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine", "utf-8")
    return folder


@pytest.fixture(scope="module")
def converted(work: Path) -> Path:
    """The dense model, converted in this process."""
    from dtfcli.cli.app import run

    folder = work / "routed"
    assert run(["convert", str(work / "dense"), "-o", str(folder), "--text", str(work / "text.jsonl")]) == 0
    return folder


def test_the_folder_opens_everywhere(work: Path, converted: Path) -> None:
    model = load_model(converted)
    stock = AutoModelForCausalLM.from_pretrained(converted, trust_remote_code=True).eval()
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)
        with model.routing_mode(capacity=1.0):
            assert torch.equal(model(ids).logits, load_model(work / "dense")(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.chat_template == TEMPLATE
    assert list(work.glob(".*")) == []


def test_the_report(converted: Path) -> None:
    report = json.loads((converted / "report.json").read_text("utf-8"))
    assert json.loads((converted / "config.json").read_text("utf-8"))["capacity"] == report["chosen"]["capacity"]
    assert report["chosen"]["saving"] == pytest.approx(0.10, abs=0.002)
    assert report["chosen"]["tokens"] == 8192 == report["text"]["measure_tokens"]
    assert report["chosen"]["stderr"] > 0
    assert report["chosen"]["routed_share"] == pytest.approx(report["chosen"]["capacity"], abs=0.1)
    dense, *others = report["dial"]
    assert (dense["capacity"], dense["loss_gap"], dense["agreement"]) == (1.0, 0.0, 1.0)
    assert abs(dense["kl"]) < 1e-5
    assert [round(point["saving"], 2) for point in others] + report["out_of_reach"] == [0.05, 0.1, 0.15, 0.2, 0.3, 0.4]
    assert [point["agreement"] for point in others] == sorted((p["agreement"] for p in others), reverse=True)
    assert all(point["prefill_time"] > 0 and point["token_time"] > 0 for point in report["dial"])
    assert [part["name"] for part in report["parts"]][1:4] == ["Opening the model", "Reading text", "Fitting"]
    page = (converted / "report.md").read_text("utf-8")
    assert report["sentence"] in page
    assert "`--capacity γ`" in page
    assert (converted / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_conversion_ends_with_what_to_do_next(capsys: pytest.CaptureFixture[str], converted: Path) -> None:
    data = json.loads((converted / "report.json").read_text("utf-8"))
    data["parts"] = [Part(**part) for part in data["parts"]]
    for name in ("sentence", "total"):
        del data[name]
    data |= {"chosen": Point(**data["chosen"]), "dial": [Point(**point) for point in data["dial"]]}
    convert_view.show(ConversionReport(**data), converted)
    report, _, following, command = capsys.readouterr().err.splitlines()[-4:]
    assert report == f"Report: {converted / 'report.md'}"
    assert (following, command) == ("Next:", f"  dtf generate {converted} 'Once upon a time'")


def test_recovery_brings_the_model_nearer_to_dense(
    dtf: Callable[..., Outcome], work: Path, converted: Path, tmp_path: Path
) -> None:
    """The folder has one plain model, the report what was before, and nothing else stays."""
    out = tmp_path / "out"
    options = ["--save", "20%", "--recover", "40k", "--text", str(work / "text.jsonl"), "--json"]
    outcome = dtf("convert", str(work / "dense"), "-o", str(out), *options)
    assert outcome.code == 0, outcome
    report = json.loads(outcome.stdout)
    assert report["text"]["recover_tokens"] == 40_000
    assert report["chosen"]["capacity"] == report["before"]["capacity"]
    assert report["chosen"]["kl"] < report["before"]["kl"]
    assert "of recovery" in report["sentence"]
    assert "Recovering" in [part["name"] for part in report["parts"]]
    assert list(tmp_path.iterdir()) == [out]
    names = {name for name, _ in load_model(out).named_parameters()}
    assert names == {name for name, _ in load_model(converted).named_parameters()}


def test_a_stopped_recovery_goes_on(
    dtf: Callable[..., Outcome], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same command, from the last checkpoint; another command is refused, and nothing is lost."""
    seen: list[int] = []

    def stopping(run: Any) -> dict[str, Any]:
        seen.append(run.state.step)
        if len(seen) == 3:
            raise loop.StopRequested
        if len(seen) == 4:
            raise torch.OutOfMemoryError
        return loop_step(run)

    loop_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", stopping)
    out, left = tmp_path / "out", tmp_path / "out-recovery"
    command = ["convert", str(work / "dense"), "-o", str(out), "--recover", "12k", "--text", str(work / "text.jsonl")]
    stopped = dtf(*command)
    assert stopped.code == 130
    assert "same command goes on" in stopped.stderr
    assert [*tmp_path.iterdir()] == [left]
    other = dtf(*command, "--save", "5%")
    assert other.code == 2
    assert "of another conversion" in other.stderr
    full = dtf(*command)
    assert full.code == 1
    assert "--base" in full.stderr
    assert "ran out of memory" in full.stderr
    assert dtf(*command).code == 0
    assert seen == [0, 1, 2, 2, *range(2, 12_000 // 2048)]
    assert [*tmp_path.iterdir()] == [out]


def test_text_without_conversations_is_named(tmp_path: Path) -> None:
    """Of a model that chats."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    config = SimpleNamespace(hidden_size=32, max_position_embeddings=64)
    texts = {"prose": "a b c " * 4000, "chat": "<turn> a b c " * 4000}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text, "utf-8")
    remarks = [read_text(str(tmp_path / f"{name}.txt"), tokenizer, config, 0).remark for name in texts]
    tokenizer.chat_template = "<turn> {{ messages[0].content }}"
    chatting = [read_text(str(tmp_path / f"{name}.txt"), tokenizer, config, 0).remark for name in texts]
    assert ["no conversations" in remark for remark in remarks + chatting] == [False, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recover", "kills"),
    [
        ("--recover 6k", 3),
        pytest.param("", 20, marks=pytest.mark.long),
        pytest.param("--recover 6k", 20, marks=pytest.mark.long),
    ],
)
def test_sigkill_at_random_moments(work: Path, tmp_path: Path, recover: str, kills: int) -> None:
    """The folder is whole or absent; the same command then goes on and ends as if nothing had happened.

    Half of the moments are operations on files, which are rare and where most can go wrong; the others are times.
    """
    rng, moments = random.Random(20260131), list[float]()

    def attempt(place: Path, kill_after: float = 300.0, kill_at: int = 0) -> int:
        """Convert into a folder of `place`, once; returns the exit code."""
        begin, count.value = partial(kill_at_file, kill_at, place, count), 0
        options = ["-o", place / "out", "--text", work / "text.jsonl", *recover.split()]
        return Dtf(tmp_path, "convert", work / "dense", *options, fault=begin).ends(kill_after).code

    def content(place: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (place / "out").iterdir() if path.stem != "report"}

    count, began = counter(), time.monotonic()
    assert attempt(tmp_path / "whole") == 0
    seconds, operations, whole = time.monotonic() - began, count.value, content(tmp_path / "whole")
    place = tmp_path / "killed"
    while len(moments) < kills:
        by_file = len(moments) % 2 == 0
        moments.append(rng.randint(1, operations) if by_file else rng.uniform(0.0, seconds))
        code = attempt(place, kill_at=int(moments[-1])) if by_file else attempt(place, kill_after=moments[-1])
        assert code in (0, -signal.SIGKILL), moments
        if (place / "out").exists():
            assert content(place) == whole, moments
            assert (place / "out" / "report.json").stat().st_size > 0
            shutil.rmtree(place)  # the next one begins again
    assert (place / "out").exists() or attempt(place) == 0, moments
    assert content(place) == whole
    assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--capacity 0.5", "books"),
        ("--save 0.2", "one.txt"),
        ("--to random", "text.jsonl"),
        ("--to layerdrop --save 5%", "text.jsonl"),
        ("--to mod --capacity 0.5", "text.jsonl"),
    ],
)
def test_options(dtf: Callable[..., Outcome], work: Path, tmp_path: Path, options: str, text: str) -> None:
    out = tmp_path / "out"
    outcome = dtf(
        "convert", str(work / "dense"), "-o", str(out), "--text", str(work / text), "--json", *options.split()
    )
    assert outcome.code == 0, outcome
    assert outcome.stderr == ""
    report = json.loads(outcome.stdout)
    chosen, remarks = report["chosen"], " ".join(report["remarks"])
    assert report["folder"] == str(out)
    model: Any = load_model(out)
    assert model.capacity == chosen["capacity"]
    if "capacity" in options:
        assert chosen["capacity"] == 0.5
    if "0.2" in options and "save" in options:
        assert chosen["saving"] == pytest.approx(0.2, abs=0.002)
    assert ("one document" in remarks) == (text == "one.txt")
    assert ("needs training" in remarks) == ("mod" in options)


@pytest.mark.parametrize(("most", "curve"), [(0.05, 2.0), (0.001, 2.0), (9.0, 2.0), (0.0001, 2.0), (0.06, 1.0)])
def test_the_largest_saving_below_a_loss_is_found(
    dtf: Callable[..., Outcome], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: float, curve: float
) -> None:
    """The gap is made up, 3 · saving^curve with some noise on the dial: random models often gain by skipping."""
    tries = list[int]()

    def made_up(dense: Any, model: Any, rows: Any, capacities: dict[float, int], *_: Any) -> Any:
        tries.append(len(capacities))
        gaps = {capacity: 3.0 * saved_share(model, capacity) ** curve for capacity in capacities}
        noise = 1.3 if len(capacities) > 1 else 1.0
        each = {
            capacity: conversion.Compared(1, Difference(gap * noise, 0.0, 9), 1.0, 0.0, capacity, 1.0)
            for capacity, gap in gaps.items()
        }
        return each, 1.0

    monkeypatch.setattr(conversion, "compare", made_up)
    text = str(work / "text.jsonl")
    outcome = dtf("convert", str(work / "dense"), "-o", str(tmp_path / "out"), "--text", text, "--max-loss", str(most))
    if most < 3.0 * 0.01**curve:
        assert outcome.code == 2
        assert f"--max-loss {most:g}: leaving out 1% of the FLOPs costs 0.0003 nats; allow more" in outcome.stderr
        return
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert outcome.code == 0
    assert 0.85 * min(most, 3.0 * report["largest_saving"] ** curve) <= report["chosen"]["loss_gap"] <= most
    usual = next(point["capacity"] for point in report["dial"] if round(point["saving"], 2) == 0.1)
    again = abs(report["chosen"]["capacity"] - usual) >= 0.1
    assert [part["name"] for part in report["parts"]].count("Fitting again") == again
    assert len(tries) <= 5 * (1 + again)


def test_fit_and_measurement_share_no_document_and_little_is_read(work: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work / "dense")
    config = AutoConfig.from_pretrained(work / "dense")
    text = read_text(str(work / "text.jsonl"), tokenizer, config, seed=0)
    fit = {tuple(row[-16:].tolist()) for row in text.fit.ids}
    assert text.fit.tokens == 79 * 256 >= 20_000
    assert text.measure.tokens == 32 * 256
    assert fit.isdisjoint(tuple(row[-16:].tolist()) for row in text.measure.ids)
    stdlib = read_text("python-stdlib", tokenizer, config, seed=0)
    assert stdlib.documents < 400


def test_the_default_text_is_on_the_hub(dtf: Callable[..., Outcome], work: Path, tmp_path: Path) -> None:
    outcome = dtf("convert", str(work / "dense"), "-o", str(tmp_path / "out"))
    assert outcome.code == 2
    assert "--text FILE" in outcome.stderr


def test_no_space(dtf: Callable[..., Outcome], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: Full)
    outcome = dtf("convert", str(work / "dense"), "-o", str(tmp_path / "out"), "--text", str(work / "text.jsonl"))
    assert outcome.code == 1
    assert "free some space" in outcome.stderr
    assert list(tmp_path.iterdir()) == []


WRONG = [
    ("{w}/nomlp -o out", 2, ["cannot be converted"]),
    ("{w}/experts -o out", 2, ["cannot be converted", "experts"]),
    ("{w}/shallow -o out", 2, ["3 layers are too few", "deeper"]),
    ("{w}/routed -o out", 2, ["routed already", "to_dense"]),
    ("{w}/weightless -o out", 2, ["no weights", "copy them there"]),
    ("{w}/broken -o out --text {w}/text.jsonl", 1, ["layer 3", "not finite"]),
    ("{w}/dense -o {w}/full", 2, ["-o", "full", "not empty", "name another"]),
    ("{w}/dense -o {w}/one.txt", 2, ["one.txt", "no folder"]),
    ("{w}/dense -o {w}/one.txt/out", 2, ["one.txt", "name another"]),
    ("{w}/dense -o out --text {w}/short.txt", 2, ["--text", "short.txt", "tokens to fit", "at least", "give more"]),
    ("{w}/dense -o out --text {w}/column.jsonl", 2, ["column.jsonl", "no column 'text'", "body"]),
    ("{w}/dense -o out --text {w}/textt.jsonl", 2, ["--text", "textt.jsonl", "Did you mean"]),
    ("{w}/dense -o out --text {w}/text.jsonl --save 90%", 2, ["--save 90", "at most", "ask for less"]),
    ("{w}/dense -o out --save 10", 2, ["--save 10", "10% or 0.1"]),
    ("{w}/dense -o out --save ten", 2, ["--save ten", "80% or 0.8"]),
    ("{w}/dense -o out --save 10% --capacity 0.5", 2, ["--save and --capacity", "one of them"]),
    ("{w}/dense -o out --capacity 0", 2, ["--capacity 0", "above 0"]),
    ("{w}/dense -o out --max-loss -1", 2, ["--max-loss -1", "above 0"]),
    ("{w}/dense -o out --recover 1M --max-loss 1", 2, ["--max-loss", "--recover", "--save"]),
    ("{w}/dense -o out --recover many", 2, ["--recover many", "300k"]),
    ("{w}/dense -o out --recover 10", 2, ["--recover 10", "4,096"]),
    ("{w}/dense -o out --to mod --max-loss 1", 2, ["--max-loss", "mod", "--capacity"]),
    ("{w}/dense -o out --to dtff", 2, ["--to", "dtff"]),
    ("{w}/dense", 2, ["-o"]),
    ("{w}/nothing -o out", 2, ["nothing", "no such file or folder"]),
]


@pytest.mark.parametrize(("command", "code", "expected"), WRONG, ids=[row[0] for row in WRONG])
def test_wrong_input(
    dtf: Callable[..., Outcome],
    work: Path,
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    code: int,
    expected: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = dtf("convert", *command.replace("{w}", str(work)).split())
    assert outcome.code == code, outcome
    for text in expected:
        assert text in outcome.stderr
    assert len(outcome.stderr.splitlines()) <= 2, outcome.stderr
    assert outcome.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert [path.name for path in (work / "full").iterdir()] == ["mine.txt"]
