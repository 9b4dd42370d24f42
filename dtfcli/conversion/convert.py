"""The conversion: open, route, read, fit, recover if asked, measure, save."""

import importlib.metadata
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from dtfcli.conversion.dial import LEAST, SAVINGS, capacity_for, saved_share
from dtfcli.conversion.measure import Compared, compare, decoding_times
from dtfcli.conversion.recover import Recovery
from dtfcli.conversion.report import ConversionReport, Part, Point, write_report
from dtfcli.conversion.text import ConversionText, open_text, read_text
from dtfcli.cost.peak import reset_resident_peak, resident
from dtfcli.data.documents import OnProgress
from dtfcli.errors import CheckpointError, ConfigError, DTFError
from dtfcli.loading.devices import compute_dtype
from dtfcli.loading.load import explained_load_errors, load_model_and_tokenizer
from dtfcli.loading.quantization import weight_bytes
from dtfcli.loading.source import ModelSource
from dtfcli.models.configuration_fields import resolve_routed_layers
from dtfcli.models.conversion import convert, route_mlps, unfit_layers
from dtfcli.models.mlp_fitting import fit_routing
from dtfcli.models.mlp_survey import rank_layers
from dtfcli.models.modeling_routed_mlp import decoder_layers
from dtfcli.models.pretrained import cast_weights
from dtfcli.quiet import quiet_libraries
from dtfcli.runs.files import is_writable, nearest, replaced_folder
from dtfcli.runs.folder import BEST_MODEL, FINAL_MODEL, MERGED_MODEL

Kind = Literal["dtf", "mod", "random", "layerdrop"]
DEFAULT_SAVING = 0.10
DIAL_TOKENS = 1024
"""Each point of the dial is measured on so many; the chosen one on all."""
_CALIBRATION_TOKENS = 8192
_LEAST_SAVING = 0.01
_MOST_TRIES = 4
_NEAR = 0.1
"""Two γ that one fit serves."""


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """What to make.

    Attributes:
        to: dtf, or a control: random and layerdrop, which route MLPs too; or mod, whole blocks, not trained yet.
        save: share of a forward pass's FLOPs to leave out.
        capacity: γ, instead.
        max_loss: instead, the largest saving whose loss gap stays below it, nats per token.
        text: see `read_text`.
        recover: tokens that the converted model learns from afterwards; 0: none.
        seed: of documents, places in them, and random numbers.
        loading: device, dtype and attn_implementation of `load_model`.
    """

    to: Kind = "dtf"
    save: float | None = None
    capacity: float | None = None
    max_loss: float | None = None
    text: str | None = None
    recover: int = 0
    seed: int = 42
    loading: Mapping[str, Any]


def convert_model(
    source: ModelSource, folder: Path, options: ConversionOptions, on_progress: OnProgress
) -> ConversionReport:
    """Convert a dense model, and write it and a report to a folder.

    Raises:
        ConfigError, CheckpointError, DataError: the model cannot be routed, the saving cannot be reached, the text is
            too short, or the folder is not free.
        DTFError: the folder cannot be written, or the model computes no finite numbers.
    """
    _check_folder(folder)
    asked = asdict(options) | {
        "model": name_of(source),
        "loading": {name: str(x) for name, x in options.loading.items()},
    }
    recovery = Recovery(folder, asked) if options.recover else None
    costs = _Costs(on_progress)
    if options.text is not None:
        open_text(options.text)  # a wrong name is said before the model is opened
    with costs.part("Opening the model"):
        dense, tokenizer, saved_dtype = _open(source, options)
        torch.manual_seed(options.seed)
        model, stays_dense = route(dense, options)
        _check_space(folder, model)
    with costs.part("Reading text"):
        text = read_text(options.text, tokenizer, dense.config, options.seed, options.recover)
    dial = _Dial(dense, model, text, costs)
    dial.keep(chosen_capacity(model, options))
    before = None
    if recovery is None:
        chosen, points = _fitted_and_measured(model, text, dial, options)
    else:
        with costs.part("Fitting"):
            _fit(model, text, dial.dtype, on_progress)
        before = dial.measure_chosen()
        with costs.part("Recovering"):
            model = dial.model = recovery.recover(model, tokenizer, text.excerpts, options.recover, on_progress)
        with costs.part("Fitting scores again"):  # to text of the kind that is measured
            _fit(model, text, dial.dtype, on_progress, forecasts=False)
        chosen, points = dial.measure(options)
    results = _Results(before, chosen, points)
    report = _report(source, options, dial, results, stays_dense)
    with costs.part("Saving"), quiet_libraries(), replaced_folder(folder, "choose another folder") as partial:
        if saved_dtype not in (None, model.dtype):
            cast_weights(model, saved_dtype)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_report(report, partial)
    if recovery is not None:
        recovery.remove()
    return report


class _Results(NamedTuple):
    """The measured points."""

    before: Point | None
    chosen: Point
    dial: list[Point]


def _report(
    source: ModelSource, options: ConversionOptions, dial: "_Dial", results: _Results, stays_dense: dict[int, str]
) -> ConversionReport:
    model, text = dial.model, dial.text
    remarks = [text.remark, "" if options.to != "mod" or options.recover else _UNTRAINED]
    if source.kind == "gguf":
        kind = str(model.dtype).removeprefix("torch.")
        remarks.append(
            f"The folder has {weight_bytes(model) / 1e6:,.0f} MB: weights of a .gguf file are saved in {kind}."
        )
    return ConversionReport(
        model=name_of(source),
        to=options.to,
        chosen=results.chosen,
        before=results.before,
        dial=results.dial,
        out_of_reach=[saving for saving in SAVINGS if capacity_for(model, saving) is None],
        largest_saving=saved_share(model, LEAST),
        dense_loss=dial.dense_loss,
        routed_layers=list(model.config.layer_capacities()),
        stays_dense=stays_dense,
        text={
            "name": text.name,
            "documents": text.documents,
            "fit_tokens": text.fit.tokens,
            "measure_tokens": text.measure.tokens,
            "recover_tokens": options.recover,
        },
        seed=options.seed,
        weights_bytes=weight_bytes(dial.dense),
        added_bytes=weight_bytes(model) - weight_bytes(dial.dense),
        precision=str(dial.dtype).removeprefix("torch."),
        parts=dial.costs.parts,
        remarks=[remark for remark in remarks if remark],
        versions={name: importlib.metadata.version(name) for name in ("dtfcli", "torch", "transformers")},
    )


def _fitted_and_measured(
    model: Any, text: ConversionText, dial: "_Dial", options: ConversionOptions
) -> tuple[Point, list[Point]]:
    """Fit and measure; once more at the γ that `max_loss` leads to, if it is another one: a fit is for its own γ."""
    for part in ("Fitting", "Fitting again"):
        capacity = dial.capacity
        with dial.costs.part(part):
            _fit(model, text, dial.dtype, dial.costs.on_progress)
        measured = dial.measure(options)
        if abs(dial.capacity - capacity) < _NEAR or model.config.routed_part != "mlp":
            break
    return measured


_UNTRAINED = "Mixture-of-Depths needs training: its router is random until `dtf train` has trained it."


class _Costs:
    """Processor time and memory of each part, and what is going on."""

    def __init__(self, on_progress: OnProgress) -> None:
        self.on_progress = on_progress
        self.parts = [Part("Starting", time.process_time(), None)]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Note a part when it ends."""
        self.on_progress(name, None)
        counts, began = reset_resident_peak(), time.process_time()
        yield
        self.parts.append(Part(name, time.process_time() - began, resident("VmHWM") if counts else None))


def _check_folder(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"-o {folder}: exists and is no folder; name another.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"-o {folder}: exists and is not empty; name another folder.")
    if not is_writable(parent := nearest(folder.absolute().parent)):
        raise ConfigError(f"-o {folder}: {parent} cannot be written to; name another folder.")


def _check_space(folder: Path, model: Any) -> None:
    needed, free = weight_bytes(model), shutil.disk_usage(nearest(folder.absolute().parent)).free
    if needed > free:
        raise DTFError(
            f"-o {folder}: the model takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; free some space, or "
            "choose another folder."
        )


def _open(source: ModelSource, options: ConversionOptions) -> tuple[Any, Any, torch.dtype | None]:
    """The dense model, its tokenizer, and the precision to save in (None: as it is)."""
    with explained_load_errors(source):  # around both: a GGUF file is parsed once
        config = source.configuration
        check_dense(source, config)
        dense, tokenizer = load_model_and_tokenizer(source, **options.loading)
    if not type(dense).__module__.startswith("transformers."):
        raise CheckpointError(
            f"{source.path}: its class {type(dense).__name__} is not of Transformers, so a converted folder could not "
            "be opened; convert a model of Transformers."
        )
    plain = source.kind == "gguf" or source.is_adapter or options.loading.get("dtype", "auto") != "auto"
    return dense, tokenizer, None if plain else getattr(config, "dtype", None)


def check_dense(source: ModelSource, config: Any) -> None:
    """CheckpointError if its layers route already."""
    if hasattr(config, "layer_capacities"):
        raise CheckpointError(
            f"{source.path}: is routed already; convert the dense model that it was made from, or what "
            "dtfcli.to_dense(model) returns."
        )


def route(dense: Any, options: ConversionOptions) -> tuple[Any, dict[int, str]]:
    """The routed model, not fitted, and the layers that should route and cannot, with the reason.

    Raises:
        ConfigError: it cannot be routed at all.
    """
    layers = dense.config.num_hidden_layers
    wanted = resolve_routed_layers("inner", 0, layers)
    if not wanted:
        raise ConfigError(f"{layers} layers are too few: the first three and the last stay dense; give a deeper model.")
    try:
        if options.to == "mod":
            return convert(dense, "mod"), {}
        model: Any = route_mlps(dense, capacity=0.5, architecture=options.to)
    except ValueError as error:
        raise ConfigError(f"{type(dense).__name__} cannot be converted: {error}.") from error
    unfit = unfit_layers(decoder_layers(dense), dense.config.hidden_size)
    return model, {layer: unfit[layer] for layer in wanted if layer not in model.routed_layers}


def _fit(
    model: Any, text: ConversionText, dtype: torch.dtype, on_progress: OnProgress, *, forecasts: bool = True
) -> None:
    """Scores and thresholds, and forecasts if they are not to stay; of a model that routes blocks thresholds alone."""
    with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        if model.config.routed_part != "mlp":
            rows = text.fit.ids[: max(1, _CALIBRATION_TOKENS // text.fit.ids.shape[1])]
            model.calibrate([{"input_ids": part} for part in rows.split(8)])
            return
        try:
            if model.config.architecture == "layerdrop" and forecasts:  # an honest control leaves out the cheapest
                model.config.layer_order = rank_layers(model, [{"input_ids": text.fit.ids}])
                model.set_routing()
            fit_routing(
                model,
                [{"input_ids": text.fit.ids}],
                lambda done, layers: on_progress("Fitting", done / layers),
                forecasts=forecasts,
            )
        except ValueError as error:
            raise DTFError(f"{error}.") from error


def chosen_capacity(model: Any, options: ConversionOptions) -> float:
    """γ of the fit; with `max_loss` the γ of the usual saving, until losses are measured.

    Raises:
        ConfigError: the saving is out of reach.
    """
    saving = DEFAULT_SAVING if options.save is None else options.save
    if capacity := options.capacity or capacity_for(model, saving):
        return capacity
    most = saved_share(model, LEAST)
    if options.save is not None:
        raise ConfigError(f"--save {saving:.1%}: at most {most:.1%} can be saved in this model; ask for less.")
    return capacity_for(model, most / 2) or LEAST


class _Dial:
    """Measures points, and chooses one."""

    def __init__(self, dense: Any, model: Any, text: ConversionText, costs: _Costs) -> None:
        self.dense, self.model, self.text, self.rows, self.costs = dense, model, text, text.measure, costs
        self.length = self.rows.ids.shape[1]
        self.dtype = compute_dtype("auto", dense.device)
        self.dense_loss = float("nan")
        self.capacity = 1.0

    def keep(self, capacity: float) -> None:
        """Make it the model's own γ."""
        self.capacity = self.model.config.capacity = capacity
        self.model.set_routing("threshold")

    def measure_chosen(self) -> Point:
        """The chosen point on all rows."""
        found = self._compare({self.capacity: len(self.rows.ids)})
        times = self._times([self.capacity])
        return self._point(self.capacity, found[self.capacity], times[self.capacity])

    def measure(self, options: ConversionOptions) -> tuple[Point, list[Point]]:
        """The chosen point on all rows, and the dial on some.

        Raises:
            ConfigError: every saving costs more than `max_loss`.
        """
        dial = [capacity_for(self.model, saving) for saving in SAVINGS]
        few = {capacity: -(-DIAL_TOKENS // self.length) for capacity in dial if capacity is not None}
        searching = options.max_loss is not None
        found = self._compare(few | ({} if searching else {self.capacity: len(self.rows.ids)}))
        if options.max_loss is not None:
            found |= self._search(options.max_loss, {capacity: found[capacity] for capacity in few})
        times = self._times(list(found))
        points = {capacity: self._point(capacity, each, times[capacity]) for capacity, each in found.items()}
        return points[self.capacity], [points[capacity] for capacity in few]

    def _compare(self, capacities: Mapping[float, int]) -> dict[float, Compared]:
        name = "Measuring"
        with self.costs.part(name):
            found, self.dense_loss = compare(
                self.dense,
                self.model,
                self.rows,
                capacities,
                self.dtype,
                lambda share: self.costs.on_progress(name, share),
            )
        return found

    def _times(self, capacities: list[float]) -> dict[float, float]:
        name = "Timing decoded tokens"
        with self.costs.part(name):
            return decoding_times(
                self.dense, self.model, self.rows, capacities, lambda share: self.costs.on_progress(name, share)
            )

    def _search(self, most: float, dial: Mapping[float, Compared]) -> dict[float, Compared]:
        """The largest saving whose gap over all rows is at most `most`, by trying: gaps grow like a power of it."""
        reach, power = saved_share(self.model, LEAST), 2.0
        known = [(saved_share(self.model, capacity), each.gap.value) for capacity, each in dial.items()]
        saving, gap = min(
            ((saving, gap) for saving, gap in known if gap > 0 and saving > 0),
            key=lambda point: abs(math.log(point[1] / most)),
            default=(reach, most),
        )
        low, high, best = 0.0, float("inf"), dict[float, Compared]()
        for attempt in range(_MOST_TRIES + 1):
            next_saving = saving * (0.95 * most / max(gap, most / 9)) ** (1 / power)
            next_saving = max(_LEAST_SAVING, min(next_saving if low < next_saving < high else (low + high) / 2, reach))
            next_saving = next_saving if attempt < _MOST_TRIES else _LEAST_SAVING
            capacity = capacity_for(self.model, next_saving) or LEAST
            found = self._compare({capacity: len(self.rows.ids)})
            before, (saving, gap) = (saving, gap), (next_saving, found[capacity].gap.value)
            low, high, best = (saving, high, found) if gap <= most else (low, saving, best)
            if gap > most and saving <= _LEAST_SAVING:
                raise ConfigError(
                    f"--max-loss {most:g}: leaving out {saving:.0%} of the FLOPs costs {gap:.4f} nats; allow more."
                )
            if best and (low >= reach or 0.9 * most < gap <= most or attempt >= _MOST_TRIES - 1):
                break
            if gap > 0 and before[1] > 0 and saving != before[0]:
                power = min(4.0, max(0.7, math.log(gap / before[1]) / math.log(saving / before[0])))
        self.keep(next(iter(best)))
        return best

    def _point(self, capacity: float, each: Compared, token_time: float) -> Point:
        return Point(
            saving=0.0 if capacity == 1.0 else saved_share(self.model, capacity),
            capacity=capacity,
            tokens=each.tokens,
            loss_gap=each.gap.value,
            stderr=each.gap.stderr,
            agreement=each.agreement,
            kl=each.kl,
            routed_share=each.routed_share,
            flop_ratio=1.0 - saved_share(self.model, each.routed_share),
            prefill_time=each.prefill_time,
            token_time=token_time,
        )


def name_of(source: ModelSource) -> str:
    """For people; of a model on this machine without its place, of a run's model the run's name."""
    if source.kind == "hub":
        return source.path
    path = Path(source.path).resolve()
    in_run = path.name in (FINAL_MODEL, BEST_MODEL, MERGED_MODEL)
    return (path.parent if in_run else path).name.removesuffix(".gguf")
