"""The frontier of docs/results.md: what each saving costs, converted and recovered, by `dtf convert` and `dtf eval`.

python -m tools.frontier MODEL OUT --text TEXT [--also TEXT] [--recover 1M] [--savings 10 20 30] [--kinds dtf layerdrop]
                         [--seeds 42 43] [--data-dir BENCHMARKS --limit 500]

A row that is there already is not made again, so a stopped frontier continues when it is started again. OUT gets a
folder for each row, frontier.json, frontier.md and frontier.svg.

- TEXT is fitted, recovered and measured (other documents); texts of `--also` are measured alone.
- `layerdrop` leaves out whole MLPs, the cheapest by the survey, and has the same forecasts and recovery.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dtfcli.conversion.dial import saved_share
from dtfcli.conversion.measure import compare
from dtfcli.conversion.text import Rows, read_text
from dtfcli.loading.devices import compute_dtype
from dtfcli.loading.load import load_model, load_tokenizer

TASKS = {"hellaswag": 0.25, "arc_easy": 0.25, "arc_challenge": 0.25, "sciq": 0.25, "winogrande": 0.5}
"""Benchmarks, and what guessing scores."""
MEASURED = 48
"""Rows of another text."""
NAMES = {"dtf": "tokens skip MLPs", "layerdrop": "whole MLPs left out", "random": "random tokens skip MLPs"}
STYLES = {10: "--", 20: "-", 30: "-."}
COLORS = {"dtf": "#1f4e9c", "layerdrop": "#d9822b", "random": "#6a655c"}


def main() -> None:
    """Make what is missing, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--also", nargs="*", default=[])
    parser.add_argument("--recover", help="tokens; without it rows are converted alone")
    parser.add_argument("--savings", type=int, nargs="+", default=[10, 20, 30], help="in percent of the FLOPs")
    parser.add_argument("--kinds", nargs="+", default=["dtf", "layerdrop"], choices=list(COLORS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--data-dir")
    parser.add_argument("--limit", default="500")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in args.seeds:
        for saving in args.savings:
            for kind in args.kinds:
                folder = args.out / f"{kind}-{saving}-s{seed}{'' if args.recover is None else '-' + args.recover}"
                convert(args, folder, kind, saving, seed)
                rows.append(row_of(args, folder, kind, saving, seed))
    if args.data_dir:
        for row, accuracy in zip(rows, accuracies(args, [row["folder"] for row in rows]), strict=True):
            row["accuracy"] = accuracy
    for row in rows:
        row["folder"] = Path(row["folder"]).name
    (args.out / "frontier.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    (args.out / "frontier.md").write_text(table(rows), "utf-8")
    draw(rows, args.out / "frontier.svg")
    sys.stdout.write(table(rows))


def dtf(*command: str) -> None:
    """Run a command, with its progress on stderr."""
    subprocess.run([sys.executable, "-m", "dtfcli", *command], check=True, stdout=subprocess.DEVNULL)


def convert(args: argparse.Namespace, folder: Path, kind: str, saving: int, seed: int) -> None:
    """A row's model."""
    if not folder.exists():
        recover = [] if args.recover is None else ["--recover", args.recover]
        options = ["--to", kind, "--save", f"{saving}%", "--seed", str(seed), "--text", args.text]
        dtf("convert", args.model, "-o", str(folder), *options, *recover)


def row_of(args: argparse.Namespace, folder: Path, kind: str, saving: int, seed: int) -> dict[str, Any]:
    """What was measured of a row's model, on the text that it was made for and on the other."""
    report = json.loads((folder / "report.json").read_text("utf-8"))
    file = folder / "also.json"
    if not file.exists():
        file.write_text(
            json.dumps({Path(text).stem: measured(args.model, folder, text) for text in args.also}), "utf-8"
        )
    return {
        "kind": kind,
        "saving": saving,
        "seed": seed,
        "recovered": report["text"]["recover_tokens"],
        "chosen": report["chosen"],
        "before": report["before"],
        "dial": report["dial"],
        "also": json.loads(file.read_text("utf-8")),
        "weights_bytes": report["weights_bytes"],
        "added_bytes": report["added_bytes"],
        "cpu_seconds": report["total"]["cpu_seconds"],
        "folder": str(folder),
    }


def measured(dense_name: str, folder: Path, text: str) -> dict[str, float | None]:
    """A row's model next to dense on another text."""
    dense = load_model(dense_name)
    model: Any = load_model(folder)
    rows = read_text(text, load_tokenizer(folder), model.config, 42).fit  # all of this text is new to the model
    rows = Rows(rows.ids[:MEASURED], rows.units[:MEASURED])
    dtype = compute_dtype("auto", dense.device)
    found = compare(dense, model, rows, {model.capacity: len(rows.ids)}, dtype, lambda share: None)[0]
    each = found[model.capacity]
    values = {"loss_gap": each.gap.value, "stderr": each.gap.stderr, "agreement": each.agreement, "kl": each.kl}
    return values | {"saving": saved_share(model, each.routed_share), "tokens": each.tokens}


def accuracies(args: argparse.Namespace, folders: list[str]) -> list[dict[str, Any]]:
    """What each model keeps of dense's accuracy above chance: by benchmark and their mean, with standard errors.

    All models in one `dtf eval`: it takes differences item by item, and continues after a kill.
    """
    file = args.out / "scores.json"
    if not file.exists():
        options = ["--tasks", ",".join(TASKS), "--limit", args.limit, "--data-dir", args.data_dir]
        dtf("eval", args.model, *folders, *options, "--output", str(file))
    found = json.loads(file.read_text("utf-8"))
    dense = {task: score["metrics"]["acc"]["value"] for task, score in found["models"][0]["results"].items()}
    return [kept(dense, [each for each in found["comparison"] if each["model"] == folder]) for folder in folders]


def kept(dense: dict[str, float], differences: list[dict[str, Any]]) -> dict[str, Any]:
    """The share of dense's accuracy above chance that is left, where dense is above chance by 0.05."""
    above = {task: accuracy - TASKS[task] for task, accuracy in dense.items() if accuracy - TASKS[task] > 0.05}
    shares = {
        each["task"]: {"kept": 1 + each["value"] / above[each["task"]], "stderr": each["stderr"] / above[each["task"]]}
        for each in differences
        if each["metric"] == "acc" and each["task"] in above
    }
    values, errors = zip(*(each.values() for each in shares.values()), strict=True)
    return shares | {"mean": {"kept": sum(values) / len(values), "stderr": math.hypot(*errors) / len(values)}}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    heads = [
        "saved",
        "made of",
        "nats above dense",
        "likeliest token",
        "KL",
        *(f"{text}: nats" for text in rows[0]["also"]),
        "kept",
        "prefill",
    ]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        chosen = row["chosen"]
        name = f"{row['kind']}, seed {row['seed']}" + (f", {row['recovered']:,} tokens" if row["recovered"] else "")
        lines.append(
            [
                f"{row['saving']} %",
                name,
                f"{chosen['loss_gap']:+.3f} ± {chosen['stderr'] or math.nan:.3f}",
                f"{chosen['agreement']:.3f}",
                f"{chosen['kl']:.3f}",
                *(f"{each['loss_gap']:+.3f} ± {each['stderr'] or math.nan:.3f}" for each in row["also"].values()),
                "{kept:.2f} ± {stderr:.2f}".format(**row["accuracy"]["mean"]) if "accuracy" in row else "",
                f"{chosen['prefill_time']:.3f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss gap against saving: each model's dial, and its own point with an error bar; hollow: before the recovery."""
    with rc_context({"svg.hashsalt": "dtf", "svg.fonttype": "path"}):
        figure = Figure(figsize=(7, 3.8), layout="constrained")
        axis = figure.subplots()
        for row in rows:
            name, color = NAMES[row["kind"]], COLORS[row["kind"]]
            name += f", recovered for a saving of {row['saving']} %" if row["recovered"] else ""
            style = STYLES[row["saving"]]
            points = sorted((point["saving"], point["loss_gap"]) for point in row["dial"])
            axis.plot(*zip(*points, strict=True), style, color=color, label=name, lw=1.5)
            for when, face in (("before", "white"), ("chosen", color)):
                if (point := row[when]) is not None:
                    axis.errorbar(
                        1 - point["flop_ratio"],
                        point["loss_gap"],
                        point["stderr"],
                        fmt="o",
                        color=color,
                        mfc=face,
                        capsize=3,
                    )
        axis.axhline(0, color="#6a655c", lw=0.8)
        axis.set(
            xlabel="share of a forward pass's FLOPs left out",
            ylabel="nats above dense",
            xlim=(0, 0.32),
            ylim=(-0.06, 0.55),
        )
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
