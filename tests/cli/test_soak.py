"""`dtf serve --continuous-batching` under load, for seconds instead of minutes (`tools/soak.py`)."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

import dtfcli
from dtfcli.models.mlp_fitting import fit_routing
from dtfcli.serving.batches import Batches
from tests.tiny import dense_model, tokens, word_tokenizer
from tools import soak

MINUTES = {f"{kind} prompts, tokens/s of 16 over 1" for kind in ("short", "mixed")} | {"memory after a minute"}
"""What a few seconds on a busy machine do not say."""


@pytest.mark.slow
def test_every_client_gets_its_own_answer(tmp_path: Path) -> None:
    model = dtfcli.route_mlps(dense_model(), capacity=0.6)
    fit_routing(model, [{"input_ids": tokens(8, 40)}])
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(" ".join(f"w{number % 70 + 26} a b" for number in range(0, 4000, 7)))
    small = ["--clients", "8", "--seconds", "4", "--questions", "12", "--longest", "300", "--answers", "24"]
    files = ["--text", str(tmp_path / "text"), "--out", str(tmp_path / "out.json")]
    soak.main([str(tmp_path / "model"), *small, *files])
    figures = json.loads((tmp_path / "out.json").read_text())
    assert [row for row in figures["report"] if not row[3] and row[0] not in MINUTES] == []
    seen = figures["seen"]
    assert min(seen[kind] for kind in ("left", "sampled", "streamed", "whole", "refused with 400")) > 0
    assert figures["first token"]["median"] < figures["whole answer"]["median"]
    checked = {row[0] for row in figures["report"]}
    assert {"blocks left behind", "threads left behind", "refused with 429 meanwhile"} <= checked
    assert {"a request after SIGTERM", "end after a second SIGTERM"} <= checked


def test_a_wrong_answer_is_found_and_a_tie_is_named() -> None:
    pool = soak.Pool.__new__(soak.Pool)
    pool.model, pool.tokenizer = dense_model(), word_tokenizer()
    ours, other = pool._question("a b c", 6), pool._question("w30 w31", 6)
    pool.questions = [ours, other]
    assert pool.fault(ours, ours.text, is_whole=True) == pool.fault(ours, ours.text[:4], is_whole=False) == ""
    assert pool.fault(ours, ours.text[:4], is_whole=True).startswith("wrong: 3 tokens asked")
    assert pool.fault(ours, other.text, is_whole=True).startswith("another's answer")
    with torch.no_grad():
        pool.model.lm_head.weight.zero_()
    assert "two logits 0.0e+00 apart" in pool.fault(ours, "z", is_whole=True)


def test_each_request_of_a_batch_chooses_for_itself() -> None:
    batches = Batches(dense_model())
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    for name, config in {
        "greedy": GenerationConfig(do_sample=False),
        "sampled": GenerationConfig(do_sample=True, temperature=0.5, top_k=2),
        "new": GenerationConfig(do_sample=False, repetition_penalty=10.0),
    }.items():
        batches.requests[name] = config, batches.model._get_logits_processor(config, 1)

    def choice(name: str) -> int:
        state = SimpleNamespace(request_id=name, initial_tokens=[3], generated_tokens=[0])
        return int(batches.choose(state, scores.clone()).argmax())

    assert (choice("greedy"), choice("unknown"), choice("new")) == (0, 0, 1)
    torch.manual_seed(0)
    samples = [choice("sampled") for _ in range(2000)]
    assert set(samples) == {0, 1}
    assert samples.count(1) / 2000 == pytest.approx(torch.tensor([2.0, 4.0]).softmax(0)[0].item(), abs=0.03)
