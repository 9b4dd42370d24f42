"""The two studies of docs/results.md, by `dtf compare`. A study that was stopped continues when it is started again.

python -m tools.studies small --novels FOLDER [--parallel N]      # about 90 minutes on two cores
python -m tools.studies adapted --novels FOLDER --model FILE.gguf [--steps N] [--seeds N] [--points "NAME;NAME"]

FOLDER holds train.parquet, and for `small` validation.parquet: books in a column `text`.

- `small` trains a parent of 7 M parameters on a quarter of the passages of the train books and four of five modules of
  the standard library. The study reads the other books and the fifth module, so the parent saw nothing that the study
  holds out. The reports are in `main/` (who chooses, and how many) and `keys/` (the same with keys of all tokens).
- `adapted` adapts SmolLM2-135M by LoRA on an eighth of the passages; nine of 30 layers route. With no steps, models are
  converted and fitted alone. The report is in `choosers-STEPS/`.
"""

import argparse
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from dtfcli.data.files import STDLIB, StdlibReader
from dtfcli.data.sources import SourceReport, Where
from dtfcli.runs.folder import FINAL_MODEL
from dtfcli.settings.data import Source

PASSAGE = 3000
"""Characters of a novel that are one document."""

COMMON = {
    "data.seq_len": 256,
    "training.micro_batch_size": 8,
    "training.tokens_per_update": 2048,
    "training.learning_rates.base": 5e-4,
}
PARENT = COMMON | {
    "run.name": "parent",
    "model.scratch.hidden_size": 256,
    "model.scratch.intermediate_size": 704,
    "model.scratch.num_hidden_layers": 8,
    "model.scratch.vocab_size": 4096,
    "data.validation_fraction": 0.01,
    "training.max_steps": 3000,
    "training.warmup_ratio": 0.03,
    "training.learning_rates.base": 3e-3,
}
SMALL = COMMON | {
    "data.validation_fraction": 0.1,
    "data.validation_blocks": 64,
    "training.max_steps": 75,
    "training.warmup_ratio": 0.05,
    "training.eval_every": 25,
    "model.gate": "straight_through",
    "training.learning_rates.prior": 1e-3,
    "training.learning_rates.router": 1e-2,
}
ADAPTED = COMMON | {
    "data.validation_fraction": 0.05,
    "data.validation_blocks": 48,
    "training.warmup_ratio": 0.1,
    "training.eval_every": 1000,  # at the end alone
    "training.calibration_tokens": 4096,
    "training.weight_decay": 0.0,
    "lora.enabled": "true",
    "lora.dropout": 0.0,
    "model.routed_part": "block",
    "model.kv_tokens": "all",
    "model.explore": 0.1,
    "model.routed_layers": "[7,9,11,13,15,17,19,21,23]",
    "model.capacity": 0.5,
}

IDENTITY = "model.bypass=identity"
GRADIENT = "training.learning_rates.router=1e-2"  # scores that follow the language model's gradient are slow at less
CHOOSERS = {  # the preset is the best recipe: each point says what it does otherwise
    "forecast error": "model=dtf",
    "dense": "model=dense",
    "mod": f"model=mod {GRADIENT} {IDENTITY}",
    "random": f"model=random {IDENTITY}",
    "thesis's score": f"model.score=surprise {GRADIENT} {IDENTITY}",
    "layerdrop, forecast": "model=layerdrop",
    "update size, forecast": "model.score=update_size",
    "update size": f"model.score=update_size {IDENTITY}",
    "layerdrop": f"model=layerdrop {IDENTITY}",
    "mod, forecast": f"model=mod {GRADIENT}",
    "random, forecast": "model=random",
    "thesis's score, forecast": f"model.score=surprise {GRADIENT}",
}


def main() -> None:
    """Write the texts, train what is compared, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["small", "adapted"])
    parser.add_argument("--novels", type=Path, required=True, help="folder of the Parquet files")
    parser.add_argument("--output", type=Path, help="folder of everything; named after the study unless given")
    parser.add_argument("--parallel", default="2", help="small: runs at once")
    parser.add_argument("--model", type=Path, help="adapted: SmolLM2-135M, a .gguf file")
    parser.add_argument("--seeds", default="3", help="adapted: seeds of each run, their number or a list")
    parser.add_argument("--points", help="adapted: names of some points, separated by semicolons")
    parser.add_argument("--steps", type=int, default=50, help="adapted: updates of 2,048 tokens")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes: does every step work?")
    options = parser.parse_args()
    output = options.output or Path(f"{options.study}-study")
    if options.study == "small":
        compare_small(options.novels, output, options.parallel, options.rehearse)
    else:
        chosen = options.points.split(";") if options.points else list(CHOOSERS)
        steps = 2 if options.rehearse else options.steps
        compare_adapted(
            options.novels, output, options.model, {name: CHOOSERS[name] for name in chosen}, steps, options.seeds
        )


def compare_small(novels: Path, output: Path, parallel: str, rehearse: bool) -> None:
    """The small study: a parent, then two grids that share their runs."""
    documents = small_documents(novels)
    parent_text, text = (
        write_text(output / "texts" / f"{name}.parquet", documents[name]) for name in ("parent", "study")
    )
    toy = {"training.max_steps": 4, "data.validation_blocks": 8} if rehearse else {}
    parent = train_parent(output, parent_text, PARENT | toy)
    common = [*overrides(SMALL | toy, parent, text), "--seeds", "2" if rehearse else "5", "--parallel", parallel]
    common += ["--against", "random", "--against", "layerdrop"]
    who = ["--vary", "model=dtf,mod,random,layerdrop,dense"]
    compare(output, "main", ["quickstart", *who, "--vary", "model.capacity=0.25,0.5", *common])
    keys = ["--vary", "model.kv_tokens=routed,all", "model.capacity=0.25", "--no-bench"]
    compare(output, "keys", ["quickstart", *who, *keys, *common])


def compare_adapted(novels: Path, output: Path, model: Path, points: Mapping[str, str], steps: int, seeds: str) -> None:
    """The study of SmolLM2-135M."""
    documents = (text for text in passages(novels / "train.parquet", "\n") if is_chosen(text, 8))
    text = write_text(output / "novels.parquet", documents)
    arguments = overrides(ADAPTED | {"training.max_steps": steps}, model, text)
    arguments += [item for name, choice in points.items() for item in ("--point", f"{name}: {choice}")]
    compare(output, f"choosers-{steps}", ["dtf-smollm2-135m", *arguments, "--seeds", seeds, "--no-bench"])


def small_documents(novels: Path) -> dict[str, Iterator[str]]:
    """Documents of the parent and of the study, which share none."""
    modules = [text for _, text in StdlibReader(Where(), Source(path=STDLIB)).texts(SourceReport(STDLIB))]

    def parent() -> Iterator[str]:
        yield from (text for text in passages(novels / "train.parquet", "\n\n") if is_chosen(text, 4))
        yield from (text for text in modules if not is_chosen(text, 5))

    def study() -> Iterator[str]:
        yield from passages(novels / "validation.parquet", "\n")
        yield from (text for text in modules if is_chosen(text, 5))

    return {"parent": parent(), "study": study()}


def write_text(file: Path, documents: Iterable[str]) -> Path:
    """A Parquet file of documents, unless it is there."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": list(documents)}), file)
    return file


def overrides(values: Mapping[str, Any], base: Path | None, text: Path) -> list[str]:
    """Settings of a run, as arguments."""
    where = [f"model.base={base.resolve() if base else ''}", f'data.sources=[{{path = "{text.resolve()}"}}]']
    return [*where, *(f"{key}={value}" for key, value in values.items())]


def train_parent(output: Path, text: Path, values: Mapping[str, Any]) -> Path:
    """Train the parent, or continue; returns its model."""
    runs = sorted(output.glob("parent/*/parent"))
    if not runs:
        _dtf(
            "train", "quickstart", "model=dense", f"run.output_dir={output / 'parent'}", *overrides(values, None, text)
        )
    elif not (runs[-1] / FINAL_MODEL).is_dir():
        _dtf("train", "--resume", str(runs[-1]))
    return sorted(output.glob("parent/*/parent"))[-1] / FINAL_MODEL


def compare(output: Path, name: str, arguments: list[str]) -> None:
    """Run one comparison; runs are shared in `study/`, each report gets a folder of its own."""
    _dtf("compare", *arguments, "--output", str(output / "study"))
    (output / name).mkdir(exist_ok=True)
    for file in (output / "study").glob("report.*"):
        file.replace(output / name / file.name)


def _dtf(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dtfcli", *arguments], check=True)


def is_chosen(text: str, parts: int) -> bool:
    """Whether a document is of the one among `parts` parts that is set aside; follows from its content alone."""
    return zlib.crc32(text.encode()) % parts == 0


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
