"""Conversations to tokens: the tokenizer's chat template, with the assistant's turns as targets.

Notable choices:

- A template that marks what is generated ({% generation %}) decides itself what the targets are. Without such marks a
  turn is what rendering adds to the conversation before it and the prompt for it: its text and its end marker.
- A control token written inside a message is not text that a user meant: such conversations are left out, and counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from dtfcli.data.documents import ASSISTANT, Document
from dtfcli.data.targets import with_targets
from dtfcli.errors import DataError
from dtfcli.settings.data import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Refused(Exception):
    """A conversation that cannot be trained on, and why, in a few words."""


def check_template(sources: list[Source], tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise unless conversations among the sources can be rendered by the tokenizer (None: one trained on the data).

    Raises:
        DataError: The tokenizer has no chat template, or gives no offsets.
    """
    for index, source in enumerate(sources):
        if not source.messages_field:
            continue
        where = f"data.sources[{index}].messages_field = '{source.messages_field}'"
        if tokenizer is None or not tokenizer.chat_template:
            name = "trained on the data" if tokenizer is None else f"'{tokenizer.name_or_path}'"
            raise DataError(
                f"{where}: the tokenizer {name} has no chat template; set data.tokenizer to one that has "
                "(of an instruction-tuned model), or train on a text_field."
            )
        if not tokenizer.is_fast:
            raise DataError(f"{where}: the tokenizer '{tokenizer.name_or_path}' gives no offsets; take a fast one.")


def conversation_encoder(
    tokenizer: PreTrainedTokenizerBase, on_refused: Callable[[Document, str], None]
) -> Callable[[Document], np.ndarray]:
    """A function from a document with messages to its tokens, int32 [n], with targets (`targets.with_targets`).

    An end-of-text token follows, unless the template wrote one. It is not a target. Of a conversation that the template
    does not take, or that holds a control token in a message, nothing is left (n = 0), and `on_refused` hears why.
    """
    marks = bool(_GENERATION.search(str(tokenizer.chat_template)))
    control = [token for token in tokenizer.all_special_tokens if token]
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    control += [token.content for token in added if token.content.startswith("<") and token.content.endswith(">")]

    def encode(document: Document) -> np.ndarray:
        turns = list(document.messages)
        try:
            if any(token in turn["content"] for turn in turns for token in control):
                raise Refused("with control tokens in a message")
            ids, is_target = (_by_marks if marks else _by_rendering)(tokenizer, turns)
            if not is_target.any():
                raise Refused(f"without an {ASSISTANT}'s turn that the template shows")
        except Refused as problem:
            on_refused(document, str(problem))
            return np.zeros(0, dtype=np.int32)
        if ids[-1] != tokenizer.eos_token_id:
            ids, is_target = np.append(ids, tokenizer.eos_token_id), np.append(is_target, False)
        return with_targets(ids, is_target)

    return encode


def _by_marks(tokenizer: Any, turns: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and targets of a template with {% generation %} marks."""
    with _refusals():
        encoded = tokenizer.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, padding=False, truncation=False
        )
    return np.array(encoded["input_ids"]), np.array(encoded["assistant_masks"], dtype=bool)


def _by_rendering(tokenizer: Any, turns: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and targets of any template: what each assistant's turn adds to the rendered prompt for it."""

    def render(upto: int, prompt: bool = False) -> str:
        with _refusals():
            return tokenizer.apply_chat_template(turns[:upto], tokenize=False, add_generation_prompt=prompt)

    whole = render(len(turns))
    spans = []
    for place, turn in enumerate(turns):
        if turn["role"] != ASSISTANT:
            continue
        before, after = render(place, prompt=True), render(place + 1)
        # Some templates render a turn in another way once others follow it: then the earlier text is not a prefix.
        if not (whole.startswith(before) and whole.startswith(after) and len(before) <= len(after)):
            raise Refused("whose turns the chat template rewrites later")
        spans.append((len(before), _without_blank_tail(whole, len(before), len(after), turn["content"])))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, padding=False, truncation=False)
    offsets = np.array(encoded["offset_mapping"]).reshape(-1, 2)
    is_target = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        is_target |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return np.array(encoded["input_ids"]), is_target


def _without_blank_tail(text: str, start: int, end: int, content: str) -> int:
    """The end of a turn without the blanks that follow its end marker; without a marker the blanks are the marker."""
    trimmed = start + len(text[start:end].rstrip())
    at = text.find(content.strip(), start, end)
    return trimmed if at >= 0 and trimmed > at + len(content.strip()) else end


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what a template raises (roles in a wrong order, unknown ones, no turn at all) into `Refused`."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, TypeError, ValueError, IndexError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise Refused(f"refused by the chat template ({reason[:60]})") from error
