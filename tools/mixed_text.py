"""Text of several kinds for conversion and recovery, with no item of a benchmark in it.

python -m tools.mixed_text OUT [--benchmarks FOLDER] [--novels FILE.parquet] [--articles FILE.parquet] [--chat MODEL]

Novels and articles have a column `text`. Questions and sentences are the training splits of ARC and WinoGrande, twelve
in a document. Conversations are written by a chat model after nothing but the beginning of a user's turn ("Magpie", Xu
et al. 2024, arXiv:2406.08464): text of the kind that this model is for, without any data. What shares thirteen words in
a row with an item that is scored is left out; OUT-dropped.json counts it.
"""

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet
import torch

from dtfcli.loading.load import load_model_and_tokenizer, open_source

WORDS = 13
TOGETHER = 12
"""Questions in a document."""
BATCH, LENGTH = 64, 320
"""Conversations that are written together, and their tokens."""
SCORED = {
    "Rowan/hellaswag": "*validation*",
    "allenai/ai2_arc": "*/test*",
    "allenai/sciq": "*validation*",
    "allenai/winogrande": "*/validation*",
}


def main() -> None:
    """Write a file of each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--benchmarks", type=Path, help="a folder of data sets, OWNER/NAME/…; without it, no questions")
    parser.add_argument("--novels", type=Path)
    parser.add_argument("--articles", type=Path)
    parser.add_argument("--most-novels", type=int, default=60)
    parser.add_argument("--most-articles", type=int)
    parser.add_argument("--most-sentences", type=int, default=3600)
    parser.add_argument("--chat", help="a chat model")
    parser.add_argument("--most-conversations", type=int, default=320)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    kinds, scored = dict[str, list[str]](), set[str]()
    if args.benchmarks is not None:
        found = args.benchmarks
        scored = {gram for name, files in SCORED.items() for row in rows(found / name, files) for gram in grams(row)}
        questions = [answered(row) for row in rows(found / "allenai/ai2_arc", "*/train*")]
        sentences = [completed(row) for row in rows(found / "allenai/winogrande", "*/train*")]
        kinds = {"questions": [each for each in questions if each], "sentences": sentences[: args.most_sentences]}
    for name, file, most in (
        ("novels", args.novels, args.most_novels),
        ("articles", args.articles, args.most_articles),
    ):
        if file is not None:
            kinds[name] = pyarrow.parquet.read_table(file)["text"].to_pylist()[:most]
    if args.chat is not None:
        kinds["conversations"] = conversations(args.chat, args.most_conversations)
    dropped = {}
    for name, texts in kinds.items():
        clean = [text for text in texts if scored.isdisjoint(grams(text))]
        dropped[name] = {"kept": len(clean), "dropped": len(texts) - len(clean)}
        if name in ("questions", "sentences"):
            random.Random(0).shuffle(clean)
            clean = ["\n\n".join(clean[start : start + TOGETHER]) for start in range(0, len(clean), TOGETHER)]
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in clean), "utf-8")
    (args.out.parent / f"{args.out.name}-dropped.json").write_text(json.dumps(dropped, indent=1) + "\n", "utf-8")


def rows(folder: Path, files: str) -> Iterator[dict[str, Any]]:
    """The rows of some Parquet files of a data set."""
    for path in sorted(folder.glob(f"{files}.parquet")):
        yield from pyarrow.parquet.read_table(path).to_pylist()


def answered(row: dict[str, Any]) -> str:
    """A question of ARC with its answer; empty if it has none."""
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    if row["answerKey"] not in labels:
        return ""
    return f"Question: {row['question']}\nAnswer: {texts[labels.index(row['answerKey'])]}"


def completed(row: dict[str, Any]) -> str:
    """A sentence of WinoGrande with the right name in it."""
    return str(row["sentence"]).replace("_", row[f"option{row['answer']}"])


@torch.inference_mode()
def conversations(name: str, most: int) -> list[str]:
    """Text that a chat model writes after the beginning of a user's turn."""
    loaded = load_model_and_tokenizer(open_source(name), dtype="bfloat16")
    model, tokenizer = cast(tuple[Any, Any], loaded)
    begin = tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False).split("\0")[0]
    ids = tokenizer(begin, add_special_tokens=False, return_tensors="pt").input_ids.expand(BATCH, -1)
    torch.manual_seed(0)
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 50, "eos_token_id": None, "pad_token_id": 0}
    written: list[str] = []
    while len(written) < most:
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, **sampling)
        written += tokenizer.batch_decode(rows)
    return written[:most]


def grams(of: Any) -> set[str]:
    """Every thirteen words in a row, in lower case, of a text or of all texts of a row."""
    if not isinstance(of, str):
        return {gram for text in _texts(of) for gram in grams(text)}
    words = re.findall(r"[a-z0-9]+", of.lower())
    return {" ".join(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)}


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in parts for text in _texts(part)]


if __name__ == "__main__":
    main()
