"""The ablation of docs/results.md: SmolLM2-135M adapted on novels, one thing at a time, by `dtf compare`.

python -m tools.ablation --novels FOLDER --model FILE.gguf [--steps N] [--output DIR] [--seeds N] [--only STUDY]

FOLDER holds train.parquet, books in a column `text`; an eighth of their passages is used. Nine of 30 layers route (7,
9, … 23) and the backbone learns by LoRA. Started again, it goes on where it was stopped: a run takes minutes, the whole
many hours. Each study is one report in DIR, named by its updates; with none, models are converted and fitted alone.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tools.small_study import is_chosen, passages

COMMON = {
    "data.seq_len": 256,
    "data.validation_fraction": 0.05,
    "data.validation_blocks": 48,
    "training.micro_batch_size": 8,
    "training.tokens_per_update": 2048,
    "training.warmup_ratio": 0.1,
    "training.eval_every": 1000,  # at the end alone
    "training.calibration_tokens": 4096,
    "training.weight_decay": 0.0,
    "training.learning_rates.base": 5e-4,
    "lora.enabled": "true",
    "lora.dropout": 0.0,
    "model.routed_layers": "[7,9,11,13,15,17,19,21,23]",
    "model.capacity": 0.5,
}

FAST = "training.learning_rates.forecast=1e-2 training.learning_rates.router=1e-2"
IDENTITY = "model.bypass=identity"
GRADIENT = "training.learning_rates.router=1e-2"  # scores that follow the language model's gradient are slow at less
STUDIES: dict[str, dict[str, str]] = {
    "choosers": {  # the preset is the best recipe: each point says what it does otherwise
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
    },
    "details": {
        "forecast error": "model=dtf",
        "not fitted": "training.fit_tokens=0",
        "not fitted, fast": f"training.fit_tokens=0 {FAST}",
        "fast": FAST,
        "slow": "training.learning_rates.forecast=1e-3 training.learning_rates.router=1e-3",
        "nothing explored": "model.explore=0.0",
        "all explored": "model.explore=1.0",
        "keys of routed tokens": "model.kv_tokens=routed",
        "network in the forecast": "model.forecast_factor=0.25",
        "hidden units in the score": "model.score_factor=0.125",
        "weak forecast loss": "model.forecast_loss_weight=1",
        "no forecast loss": "model.forecast_loss_weight=0.0",
        "distilled": "distill.enabled=true",
        "one budget": "model.budget=model",
        "by threshold at the end": "training.threshold_fraction=0.3",
        "γ annealed": "training.capacity_schedule=cosine",
        "MLP": "model.routed_part=mlp",
        "attention": "model.routed_part=attention",
    },
}


def main() -> None:
    """Write the text, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--novels", type=Path, required=True, help="folder of train.parquet")
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M, a .gguf file")
    parser.add_argument("--output", type=Path, default=Path("ablation"), help="folder of everything")
    parser.add_argument("--seeds", default="3", help="seeds of each run: their number, or a list")
    parser.add_argument("--only", choices=list(STUDIES), help="one of the studies")
    parser.add_argument("--points", help="names of some points of it, separated by semicolons")
    parser.add_argument("--steps", type=int, default=150, help="updates of 2,048 tokens; 0: convert and fit alone")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes: does every step work?")
    options = parser.parse_args()
    text = write_text(options.novels, options.output / "novels.parquet")
    values = COMMON | {"training.max_steps": 2 if options.rehearse else options.steps}
    values |= {"data.validation_blocks": 4} if options.rehearse else {}
    for name in [options.only] if options.only else STUDIES:
        points = STUDIES[name]
        if options.points:
            points = {point: points[point] for point in options.points.split(";")}
        arguments = [f"model.base={options.model.resolve()}", f'data.sources=[{{path = "{text.resolve()}"}}]']
        arguments += [f"{key}={value}" for key, value in values.items()]
        arguments += [item for point, choice in points.items() for item in ("--point", f"{point}: {choice}")]
        report = f"{name}-{values['training.max_steps']}"
        compare(options.output, report, [*arguments, "--seeds", options.seeds, "--no-bench"])


def write_text(novels: Path, file: Path) -> Path:
    """An eighth of the passages, as a Parquet file."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        documents = [text for text in passages(novels / "train.parquet", "\n") if is_chosen(text, 8)]
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), file)
    return file


def compare(output: Path, name: str, arguments: list[str]) -> None:
    """Run one study; its report gets a folder of its own."""
    command = [sys.executable, "-m", "dtfcli", "compare", "dtf-smollm2-135m", *arguments, "--output"]
    subprocess.run([*command, str(output / "study")], check=True)
    (output / name).mkdir(exist_ok=True)
    for file in (output / "study").glob("report.*"):
        file.replace(output / name / file.name)


if __name__ == "__main__":
    main()
