"""The small study of docs/results.md: a parent of 7 M parameters, then two grids of `dtf compare`. About 90 minutes.

python -m tools.small_study --novels FOLDER [--output DIR] [--rehearse]

FOLDER holds train.parquet and validation.parquet, books in a column `text`. The parent reads a quarter of the passages
of the train books and four of five modules of the standard library; the study reads the other books and the fifth
module, so nothing that it holds out was seen by the parent. Started again, it goes on where it was stopped. The
reports are written to `main/` (who chooses, and how many) and `keys/` (the same routers with keys of all tokens).
"""

import argparse
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from dtfcli.data.files import STDLIB, StdlibReader
from dtfcli.data.sources import SourceReport
from dtfcli.runs.folder import FINAL_MODEL
from dtfcli.settings.data import Source

PASSAGE = 3000
"""Characters of a novel that are one document."""

PARENT = """
[run]
name = "parent"
[model]
architecture = "dense"
base = ""
[model.scratch]
family = "llama"
hidden_size = 256
intermediate_size = 704
num_hidden_layers = 8
num_attention_heads = 4
num_key_value_heads = 2
vocab_size = 4096
max_position_embeddings = 512
[data]
seq_len = 256
validation_fraction = 0.01
[training]
max_steps = 3000
micro_batch_size = 8
tokens_per_update = 2048
weight_decay = 0.1
warmup_ratio = 0.03
[training.learning_rates]
base = 3e-3
"""

STUDY = {
    "data.seq_len": 256,
    "data.validation_fraction": 0.1,
    "data.validation_blocks": 64,
    "training.max_steps": 75,
    "training.micro_batch_size": 8,
    "training.tokens_per_update": 2048,
    "training.warmup_ratio": 0.05,
    "training.eval_every": 25,
    "model.gate": "straight_through",
    "training.learning_rates.base": 5e-4,
    "training.learning_rates.prior": 1e-3,
    "training.learning_rates.router": 1e-2,
}


def main() -> None:
    """Write the texts, train the parent, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--novels", type=Path, required=True, help="folder of train.parquet and validation.parquet")
    parser.add_argument("--output", type=Path, default=Path("small-study"), help="folder of everything")
    parser.add_argument("--parallel", type=int, default=2, help="runs at once")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes: does every step work?")
    options = parser.parse_args()
    texts = write_texts(options.novels, options.output / "texts")
    parent = train_parent(options.output, texts["parent"], ["training.max_steps=4"] * options.rehearse)
    values = STUDY | ({"training.max_steps": 4, "data.validation_blocks": 8} if options.rehearse else {})
    common = [f"model.base={parent}", f'data.sources=[{{path = "{texts["study"]}"}}]']
    common += [f"{key}={value}" for key, value in values.items()]
    common += ["--seeds", "2" if options.rehearse else "5", "--parallel", str(options.parallel)]
    common += ["--against", "random", "--against", "layerdrop"]
    who = ["--vary", "model=dtf,mod,random,layerdrop,dense"]
    compare(options.output, "main", [*who, "--vary", "model.capacity=0.25,0.5", *common])
    keys = ["--vary", "model.kv_tokens=routed,all", "model.capacity=0.25", "--no-bench"]
    compare(options.output, "keys", [*who, *keys, *common])


def write_texts(novels: Path, folder: Path) -> dict[str, Path]:
    """Documents of the parent and of the study, as two Parquet files that share none."""
    files = {name: folder / f"{name}.parquet" for name in ("parent", "study")}
    if all(file.is_file() for file in files.values()):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    documents = {
        "parent": [text for text in passages(novels / "train.parquet", "\n\n") if is_chosen(text, 4)],
        "study": list(passages(novels / "validation.parquet", "\n")),
    }
    for text in _modules():
        documents["study" if is_chosen(text, 5) else "parent"].append(text)
    for name, file in files.items():
        pyarrow.parquet.write_table(pyarrow.table({"text": documents[name]}), file)
    return files


def train_parent(output: Path, text: Path, overrides: Iterable[str] = ()) -> Path:
    """Train the parent, or go on with it; returns its model."""
    config = output / "parent.toml"
    config.write_text(PARENT, "utf-8")
    runs = sorted(output.glob("parent/*/parent"))
    if not runs:
        where = (f"run.output_dir={output / 'parent'}", f'data.sources=[{{path = "{text}"}}]')
        _dtf("train", "--config", str(config), *where, *overrides)
    elif not (runs[-1] / FINAL_MODEL).is_dir():
        _dtf("train", "--resume", str(runs[-1]))
    return sorted(output.glob("parent/*/parent"))[-1] / FINAL_MODEL


def compare(output: Path, name: str, arguments: list[str]) -> None:
    """Run a grid; grids share their runs in `study/`, each report gets a folder of its own."""
    _dtf("compare", "quickstart", *arguments, "--output", str(output / "study"))
    (output / name).mkdir(exist_ok=True)
    for file in (output / "study").glob("report.*"):
        file.replace(output / name / file.name)


def _dtf(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dtfcli", *arguments], check=True)


def is_chosen(text: str, parts: int) -> bool:
    """Whether a document is of the one among `parts` parts that is set aside; follows from its content alone."""
    return zlib.crc32(text.encode()) % parts == 0


def _modules() -> Iterator[str]:
    source = Source(path=STDLIB)
    for _, text in StdlibReader("source", source).texts(SourceReport(STDLIB)):
        yield text


def passages(file: Path, separator: str) -> Iterator[str]:
    """Parts of each book between separators, put together to passages; a book without separators stays whole."""
    for book in pyarrow.parquet.read_table(file, columns=["text"])["text"].to_pylist():
        passage = ""
        for paragraph in book.split(separator):
            passage += paragraph + separator
            if len(passage) >= PASSAGE:
                yield passage
                passage = ""
        if passage.strip():
            yield passage


if __name__ == "__main__":
    main()
