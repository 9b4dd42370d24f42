"""Many prompts at once: batches of like lengths, and the texts that each prompt gets alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtfcli.errors import ConfigError
from dtfcli.generation import Sampling, generate, generate_many
from tests.conftest import Outcome
from tests.tiny import ARCHITECTURES, dense_model, routed_model, word_tokenizer

PROMPTS = ["a b c", "d", "e f g h i j k l m n o p", "b c", "w5 w6 w7 w8 w9 a a b", "z y x w", "q"]


@pytest.mark.parametrize("architecture", ["dense", *ARCHITECTURES])
def test_together_as_alone(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = dense_model() if architecture == "dense" else routed_model(architecture=architecture)
    tokenizer, sampling = word_tokenizer(), Sampling(max_new_tokens=5)
    alone = [generate(model, tokenizer, prompt, sampling).text for prompt in PROMPTS]
    shapes = []
    write = model.generate

    def watched(**given: Any) -> Any:
        shapes.append(tuple(given["input_ids"].shape))
        assert given["attention_mask"][:, -1].all()  # padding is on the left
        return write(**given)

    monkeypatch.setattr(model, "generate", watched)
    found = list(generate_many(model, tokenizer, PROMPTS, sampling, batch_size=3))
    assert [result.text for _, result in sorted(found, key=lambda item: item[0])] == alone
    assert all(result.prompt == PROMPTS[place] for place, result in found)
    assert shapes == [(3, 12), (3, 3), (1, 1)]


def test_nothing_is_written_if_one_prompt_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_model()
    monkeypatch.setattr(model, "generate", pytest.fail)
    with pytest.raises(ConfigError, match="600 tokens"):
        list(generate_many(model, word_tokenizer(), ["a", "a " * 600], Sampling(max_new_tokens=5)))


def test_a_file_of_prompts(dtf: Callable[..., Outcome], tmp_path: Path) -> None:
    routed_model().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    asked, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    asked.write_text("".join(json.dumps({"prompt": prompt, "id": 1}) + "\n" for prompt in PROMPTS))
    given = ["--prompts", str(asked), "--output", str(answers), "-n", "4", "--batch-size", "2", "--device", "cpu"]
    result = dtf("generate", str(tmp_path / "model"), *given)
    assert result.code == 0, result.stderr
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert {line["new_tokens"] for line in lines} == {4}
