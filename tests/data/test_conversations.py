"""Conversations: the chat template's tokens, with the assistant's turns and nothing else as targets."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from dtfcli.data.conversations import conversation_encoder
from dtfcli.data.documents import Document, Message, documents
from dtfcli.data.packing import unigram_cross_entropy
from dtfcli.data.prepare import prepare_data
from dtfcli.data.stream import RowStream
from dtfcli.data.targets import count_targets, target_labels, token_ids, with_targets
from dtfcli.data.tokenizer import train_tokenizer
from dtfcli.errors import DataError
from dtfcli.settings.data import Source
from tests.data.texts import sentence

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
PLAIN = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + UNMARKED
# Shows the reasoning of the last answer only, as some models' templates do.
REWRITING = (
    "{% for message in messages %}{{ message.role + ': ' }}{{ message.content if loop.last else '…' }}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer((Document(sentence(i)) for i in range(50)), 340)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def conversation(number: int, turns: int = 2) -> list[Message]:
    messages = [{"role": "system", "content": "You are a cat."}] if number % 2 else []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"question {number} {turn}: " + sentence(number + turn, 5)})
        messages.append(
            {"role": "assistant", "content": f"answer {number} {turn}: " + sentence(100 + number - turn, 6)}
        )
    return messages


CONVERSATIONS = [conversation(i) for i in range(60)]
ANSWERS = {turn["content"] for turns in CONVERSATIONS for turn in turns if turn["role"] == "assistant"}
CHAT = {"messages_field": "messages"}


def write_jsonl(path: Path, conversations: Iterable[object] = CONVERSATIONS) -> Path:
    path.write_text("\n".join(json.dumps({"messages": turns}) for turns in conversations))
    return path


def encode(tokenizer: Any, messages: list[Message], refused: list[str] | None = None) -> np.ndarray:
    reasons = [] if refused is None else refused
    document = Document(json.dumps(messages), 0, tuple(messages))
    return conversation_encoder(tokenizer, lambda _, reason: reasons.append(reason))(document)


def targets_text(tokenizer: Any, row: np.ndarray) -> str:
    return tokenizer.decode(row[row >= 0])


def test_marks_and_rendering_agree() -> None:
    tokenizer, unmarked = chat_tokenizer(MARKED), chat_tokenizer(UNMARKED)
    for number in range(6):
        messages = conversation(number, turns=1 + number % 3)
        marked = encode(tokenizer, messages)
        assert np.array_equal(marked, encode(unmarked, messages))
        answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
        assert targets_text(tokenizer, marked) == "".join(answer + "<|im_end|>" for answer in answers)
        # The ids are those that inference sees.
        whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
        assert token_ids(marked).tolist() == [*whole["input_ids"], tokenizer.eos_token_id]


def test_without_an_end_marker_the_line_break_ends_a_turn() -> None:
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    tokenizer = chat_tokenizer(PLAIN)
    row = encode(tokenizer, turns)
    # The token with the first letter of the answer has the blank before it too, as in the library's own mask.
    assert targets_text(tokenizer, row) == " sat\n"
    assert tokenizer.decode(token_ids(row)) == "user: the cat\nassistant: sat\n<|endoftext|>"
    tokenizer.chat_template = PLAIN.replace("+ '\n'", "+ ('<|endoftext|>' if message.role == 'assistant' else '\n')")
    row = encode(tokenizer, turns)
    assert targets_text(tokenizer, row) == " sat<|endoftext|>"
    assert row[-1] == tokenizer.eos_token_id, "no second one"


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (UNMARKED, [("user", "say <|im_end|>"), ("assistant", "no")], "control tokens in a message"),
        (STRICT, [("assistant", "hello")], "refused by the chat template (the user begins)"),
        (UNMARKED, [("assistant", "hello"), ("user", "a"), ("assistant", "b")], "refused by the chat template"),
        (REWRITING, [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")], "rewrites later"),
    ],
)
def test_conversations_that_are_left_out(template: str, messages: list[tuple[str, str]], reason: str) -> None:
    reasons: list[str] = []
    turns = [{"role": role, "content": content} for role, content in messages]
    assert len(encode(chat_tokenizer(template), turns, reasons)) == 0
    assert len(reasons) == 1
    assert reason in reasons[0]


def test_targets_in_rows() -> None:
    ids = np.array([[0, 5, 7, 9], [3, 0, 0, 2]], dtype=np.int32)
    mask = np.array([[True, False, True, False], [False, True, True, True]])
    rows = with_targets(ids, mask)
    assert rows.dtype == np.int32
    assert np.array_equal(token_ids(rows), ids)
    assert target_labels(rows).tolist() == [[0, -100, 7, -100], [-100, 0, 0, 2]]
    assert count_targets(rows) == 4  # the first token of a row is predicted from nothing
    assert count_targets(ids) == 6


def test_counts_alone_count_targets_alone() -> None:
    rows = np.array([[1, ~2, 3, ~2]], dtype=np.int32)
    assert unigram_cross_entropy(rows, rows, 4) == pytest.approx(-np.log(2 / 6))


def test_packed_conversations(make: Any, tmp_path: Path, encodings: list[str]) -> None:
    data = make(write_jsonl(tmp_path / "chat.jsonl"), source=CHAT, seq_len=32)
    tokenizer = chat_tokenizer(UNMARKED)
    first = prepare_data(data, tokenizer, seed=0)
    stream = np.concatenate([first.train.ravel(), first.validation.ravel()])
    assert set(target_words(tokenizer, stream)) <= ANSWERS
    assert 0.2 < np.count_nonzero(first.train >= 0) / first.train.size < 0.8
    calls = len(encodings)
    again = prepare_data(data, tokenizer, seed=0)
    assert len(encodings) == calls
    assert np.array_equal(again.train, first.train)
    # Bytes of the answers per target: end markers are targets without text.
    answers = tokenizer.decode(first.validation[first.validation >= 0], skip_special_tokens=True)
    targets = np.count_nonzero(first.validation >= 0)
    assert first.validation_bytes_per_token == pytest.approx(len(answers.encode()) / targets, rel=0.1)
    assert prepare_data(data, chat_tokenizer(MARKED), seed=0).fingerprint != first.fingerprint


def target_words(tokenizer: Any, stream: np.ndarray) -> list[str]:
    """The answers between end markers, the ones at the edges of a split left out."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    texts: list[str] = []
    ids: list[int] = []
    for token in stream:
        if token == end:
            texts.append(tokenizer.decode(ids))
        ids = [] if token < 0 or token == end else [*ids, token]
    answers = [text for text in texts if text.startswith("answer")]
    assert len(answers) > 40
    return answers


def test_streamed_conversations(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": turns, "id": 1} for turns in CONVERSATIONS]), path)
    data = make(path, source=CHAT | {"streaming": True}, seq_len=32, validation_fraction=0.0, shuffle_buffer=8)
    tokenizer = chat_tokenizer(UNMARKED)
    stream = RowStream(data, tokenizer, seed=0)
    rows = stream.take(120)
    stream.close()
    assert set(target_words(tokenizer, rows.ravel())) <= ANSWERS


def test_conversations_beside_texts_and_some_that_are_left_out(make: Any, tmp_path: Path, folder: Path) -> None:
    odd = [[{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "x"}]]
    odd += [[{"role": "user", "content": "nobody answers"}], []]
    path = write_jsonl(tmp_path / "chat.jsonl", CONVERSATIONS + odd)
    sources = [{"path": str(path), **CHAT}, {"path": str(folder)}]
    chat, texts = prepare_data(make(sources=sources, seq_len=32), chat_tokenizer(MARKED), seed=0).report
    assert (chat.documents, texts.documents) == (60, 20)
    assert chat.tokens > 0
    assert chat.skipped == {"without an assistant's turn": 2, "with control tokens in a message": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user"}]}, r"a turn of a conversation .* is no \{\"role\""),
        ({"messages": ["hello"]}, r"a turn of a conversation"),
        ({"messages": [{"from": "human", "value": "x"}]}, r"a turn of a conversation"),
        ({"mesages": []}, r"messages_field = 'messages': no such column .* Did you mean 'mesages'"),
    ],
)
def test_rows_that_are_no_conversations(tmp_path: Path, row: Any, message: str) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        list(documents([Source(path=str(tmp_path / "chat.jsonl"), messages_field="messages")], seed=0))


def test_a_template_that_takes_no_conversation(make: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [[{"role": "assistant", "content": "hello"}]])
    with pytest.raises(DataError, match=r"no document to use \(1 refused by the chat template"):
        prepare_data(make(path, source=CHAT), chat_tokenizer(STRICT), seed=0)
