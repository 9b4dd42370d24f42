"""What a conversion measured, and its files: report.json, report.md, report.png."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

JSON_FILE, MARKDOWN_FILE, FIGURE_FILE = "report.json", "report.md", "report.png"
COLUMNS = ("saved", "γ", "loss gap", "same", "KL", "routed", "prefill", "token")
"""Heads of `Point.cells`."""
LEGEND = (
    "saved: share of a forward pass's FLOPs that is left out; loss gap: nats per token above dense, ± standard error "
    "over documents; same: places of dense's likeliest token; KL: from dense, nats; routed: tokens that entered; "
    "prefill, token: measured time over dense, of a pass over rows and of a decoded token."
)


@dataclass(frozen=True)
class Point:
    """One setting of the dial.

    Attributes:
        saving: share of a forward pass's FLOPs left out at γ.
        capacity: γ.
        tokens: measured on.
        loss_gap, stderr: nats per token above dense; None: a single document.
        agreement: share of places where the likeliest token is dense's.
        kl: KL(dense ‖ routed), nats.
        routed_share: of tokens that entered, mean over routed layers.
        flop_ratio: over dense, at that share.
        prefill_time, token_time: measured, over dense.
    """

    saving: float
    capacity: float
    tokens: int
    loss_gap: float
    stderr: float | None
    agreement: float
    kl: float
    routed_share: float
    flop_ratio: float
    prefill_time: float
    token_time: float

    @property
    def gap(self) -> str:
        """The loss gap with its standard error."""
        return f"{self.loss_gap:+.4f}" + ("" if self.stderr is None else f" ± {self.stderr:.4f}")

    @property
    def cells(self) -> list[str]:
        """A line of a table."""
        shares = (self.agreement, self.kl, self.routed_share, self.prefill_time, self.token_time)
        numbers = [f"{share:.3f}" for share in shares]
        return [f"{self.saving:.1%}", f"{self.capacity:.3f}", self.gap, *numbers]


@dataclass(frozen=True)
class Part:
    """A part of the work: processor time in seconds, and the most memory held in bytes (None: not known here)."""

    name: str
    cpu_seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class ConversionReport:
    """The results of a conversion.

    Attributes:
        model: the dense model's name.
        to: dtf, mod, random or layerdrop.
        chosen: the point that the user got.
        before: the same before the recovery; None: there was none.
        dial: at each saving, as far as it can be reached.
        out_of_reach: savings of the dial that cannot.
        largest_saving: that can be reached.
        dense_loss: nats per token of the measured text.
        routed_layers: indices.
        stays_dense: layers whose MLP cannot route, with the reason.
        text: what was read.
        weights_bytes, added_bytes: of the dense model, and what routing adds.
        precision: of the computation.
        parts: of the work.
        remarks: what a reader should know.
        versions: of libraries.
    """

    model: str
    to: str
    chosen: Point
    before: Point | None
    dial: list[Point]
    out_of_reach: list[float]
    largest_saving: float
    dense_loss: float
    routed_layers: list[int]
    stays_dense: dict[int, str]
    text: dict[str, Any]
    seed: int
    weights_bytes: int
    added_bytes: int
    precision: str
    parts: list[Part]
    remarks: list[str]
    versions: dict[str, str]

    @property
    def sentence(self) -> str:
        """What the user got, and how to turn the dial."""
        point = self.chosen
        text = (
            f"At γ = {point.capacity:.3f} a forward pass does without {point.saving:.1%} of its FLOPs; the loss is "
            f"{point.gap} nats above dense, the likeliest token the same in {point.agreement:.0%} of places. "
            f"{self._recovered}Turn the dial with `--capacity γ` of `dtf generate`, `dtf serve` and `dtf eval`"
        )
        others = [other for other in self.dial if abs(other.saving - point.saving) > 0.02 and other.saving > 0]
        if others:
            text += f": γ = {others[-1].capacity:.3f} saves {others[-1].saving:.0%}, "
            text += "γ = 1 is the dense model" if self.before is None else "at γ = 1 every token enters"
        return text + "."

    @property
    def _recovered(self) -> str:
        if self.before is None:
            return ""
        tokens = self.text["recover_tokens"]
        return f"Before {tokens:,} tokens of recovery they were {self.before.gap} and {self.before.agreement:.0%}. "

    @property
    def notes(self) -> list[str]:
        """The remarks, and what stays dense or cannot be reached, a sentence each."""
        notes = list(self.remarks)
        if self.stays_dense:
            reason = next(iter(self.stays_dense.values()))
            layers = ", ".join(map(str, self.stays_dense))
            notes.append(f"Layers that stay dense: {layers} (layer {next(iter(self.stays_dense))}: {reason}).")
        if self.out_of_reach:
            shares = ", ".join(f"{saving:.0%}" for saving in self.out_of_reach)
            notes.append(f"Out of reach: {shares}. At most {self.largest_saving:.1%} can be saved.")
        return notes

    @property
    def rows(self) -> list[list[str]]:
        """Of the table: the dial with the chosen point in it, which is marked."""
        points = [point for point in self.dial if point.capacity != self.chosen.capacity]
        points = sorted([*points, self.chosen], key=lambda point: point.saving)
        return [[("→ " if point is self.chosen else "") + point.cells[0], *point.cells[1:]] for point in points]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        total = {
            "cpu_seconds": sum(part.cpu_seconds for part in self.parts),
            "peak_bytes": max((part.peak_bytes for part in self.parts if part.peak_bytes), default=None),
        }
        return asdict(self) | {"sentence": self.sentence, "total": total}

    def to_markdown(self) -> str:
        """The table and the sentences."""
        lines = [COLUMNS, ["---"] * len(COLUMNS), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        text = self.text
        measured = (
            f"Fitted to {text['fit_tokens']:,} tokens and measured on {text['measure_tokens']:,} others of "
            f"{text['name']} ({text['documents']:,} documents), in {self.precision}. "
            f"Other points than the chosen one are measured on {min(point.tokens for point in self.dial):,}. "
            f"Dense loss: {self.dense_loss:.4f}. "
            f"Routing adds {self.added_bytes / self.weights_bytes:.1%} to the weights."
        )
        return "\n\n".join([f"# {self.model}, converted", self.sentence, table, LEGEND, measured, *self.notes]) + "\n"


def write_report(report: ConversionReport, folder: Path) -> None:
    """Write the three files into a folder."""
    (folder / JSON_FILE).write_text(json.dumps(report.to_dict(), indent=1) + "\n", "utf-8")
    (folder / MARKDOWN_FILE).write_text(report.to_markdown(), "utf-8")
    draw_dial(report, folder / FIGURE_FILE)


def draw_dial(report: ConversionReport, path: Path) -> None:
    """Draw loss gap, agreement and time against the saving."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained", dpi=100)
    loss, same, time = figure.subplots(1, 3)
    figure.suptitle(f"{report.model}, converted", x=0.01, ha="left", fontweight="bold", fontsize=10, parse_math=False)
    chosen, savings = report.chosen, [100 * point.saving for point in report.dial]
    blue, orange, green = "#1f4e9c", "#d9822b", "#3d8c5a"
    loss.errorbar(
        savings, [p.loss_gap for p in report.dial], [p.stderr or 0 for p in report.dial], fmt="o-", color=blue
    )
    loss.errorbar([100 * chosen.saving], [chosen.loss_gap], [chosen.stderr or 0], fmt="D", color=orange, capsize=3)
    loss.set_ylabel("loss above dense, nats per token")
    loss.set_yscale("symlog", linthresh=0.05)
    same.plot(savings, [point.agreement for point in report.dial], "o-", color=blue)
    same.plot([100 * chosen.saving], [chosen.agreement], "D", color=orange, label="this model")
    same.set_ylabel("likeliest token as dense's")
    same.legend(fontsize=8)
    time.plot(savings, [1 - saving / 100 for saving in savings], ":", color="#6a655c", label="FLOPs")
    time.plot(savings, [point.prefill_time for point in report.dial], "o-", color=blue, label="prefill")
    time.plot(savings, [point.token_time for point in report.dial], "s-", color=green, label="decoded token")
    time.set_ylabel("measured time over dense")
    time.legend(fontsize=8)
    for axis in (loss, same, time):
        axis.set_xlabel("FLOPs saved, %")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
