"""`dtf inspect-routing`: which tokens enter which layers, and why."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtfcli.cli import options

if TYPE_CHECKING:
    from dtfcli.inspection.comparison import Comparison
    from dtfcli.inspection.corpus import Corpus, CorpusRouting
    from dtfcli.inspection.sensitivity import Sensitivity
    from dtfcli.inspection.statistics import Summary
    from dtfcli.inspection.text import Against, TextRouting

SAMPLE = '''def factorial(n):
    """Return n!, the product 1 * 2 * ... * n."""
    if n < 0:
        raise ValueError("n must not be negative")
    return 1 if n == 0 else n * factorial(n - 1)
'''


Text = Annotated[
    str | None,
    typer.Argument(metavar="[TEXT]", help="Text to route; a short program by default.", show_default=False),
]
File = Annotated[
    Path | None,
    typer.Option(
        "--file",
        help="Read the text from this file. A .jsonl or .parquet file or a folder is summed up over its documents.",
        show_default=False,
    ),
]
Html = Annotated[
    Path | None,
    typer.Option("--html", help="Write a page that needs no network to this .html file.", show_default=False),
]
Png = Annotated[Path | None, typer.Option("--png", help="Draw a figure into this .png file.", show_default=False)]
Output = Annotated[
    Path | None, typer.Option("--output", help="Write everything as JSON to this file.", show_default=False)
]
Compare = Annotated[
    str | None,
    typer.Option(
        "--compare",
        metavar="MODEL",
        help="Compare with a second model, routed or dense, with the same tokenizer.",
        show_default=False,
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", help="Documents of a corpus to read.", metavar="N", show_default=False)
]
Oracle = Annotated[
    bool,
    typer.Option(
        "--against-oracle",
        help="Compare the router with the tokens that each layer would change most, and with the loss if those were "
        "routed.",
    ),
]
SensitivityOption = Annotated[
    bool,
    typer.Option(
        "--sensitivity",
        help="Measure instead what each layer of the model, dense or routed, costs to leave out, and print the order "
        "that model.layer_order takes.",
    ),
]
TextField = Annotated[str, typer.Option("--text-field", help="Column or key of a corpus that holds the text.")]


def inspect_routing(
    model: options.Model,
    text: Text = None,
    file: File = None,
    html: Html = None,
    png: Png = None,
    output: Output = None,
    compare: Compare = None,
    against_oracle: Oracle = False,
    sensitivity: SensitivityOption = False,
    limit: Limit = None,
    text_field: TextField = "text",
    routing: options.Routing = "auto",
    capacity: options.Capacity = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attn_implementation: options.AttnImplementation = "sdpa",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Show which tokens a routed model spends its layers on, and why.

    The text appears colored by depth (how many routed layers took each token), then as a heat map, a row for each
    routed layer and a column for each token, then in tables: by layer, token class, frequency, position and loss, and
    how far the causal mode and the training rule agree. A corpus is summed up in constant memory.

    \b
    Examples:
      dtf inspect-routing outputs/2026-01-31/quickstart
      dtf inspect-routing MODEL "The cat sat on the mat." --capacity 0.25
      dtf inspect-routing MODEL --file module.py --html routing.html --png routing.png
      dtf inspect-routing MODEL --file novels.parquet --limit 100 --output routing.json
      dtf inspect-routing MODEL --file page.txt --compare OTHER_MODEL
      dtf inspect-routing MODEL --file novels.parquet --limit 20 --against-oracle
      dtf inspect-routing DENSE_MODEL --file novels.parquet --limit 20 --sensitivity
    """
    from dtfcli.cli import render

    is_corpus = _check_input(text, file, compare, limit, text_field)
    _check_targets(html, png, output)
    if sensitivity:
        _refuse_with_sensitivity(compare, against_oracle, html, png)
    loading = options.Loading(routing, capacity, device, dtype, attn_implementation, revision, trust_remote_code)
    against: list[Against] = ["mode", "oracle"] if against_oracle else ["mode"]
    what = _corpus(file, limit, text_field) if is_corpus else _content(text, file)
    found: _Found | _FoundSensitivity
    if sensitivity:
        found = _leave_out(model, loading, what)
    elif isinstance(what, str):
        python = what == SAMPLE or (file is not None and file.suffix.lower() == ".py")
        found = _route_text(model, loading, what, python, compare, against)
    else:
        found = _route_corpus(model, loading, what, against)
    found.write(output, html, png)
    if json:
        render.emit_json(found.document())
    else:
        found.show()


@dataclass(frozen=True)
class _Found:
    """What a model did with a text or a corpus, and in which ways it can be looked at."""

    report: "TextRouting | CorpusRouting"
    summary: "Summary"
    comparison: "Comparison | None" = None

    def document(self) -> dict[str, Any]:
        """Everything, for JSON."""
        agreement, oracle = self.summary.agreement, self.summary.oracle
        document = self.report.to_dict() | {
            "summary": replace(self.summary, oracle=None),
            "agreement": None if agreement is None else agreement.to_dict(),
        }
        if oracle is not None:
            document["oracle"] = oracle.to_dict()
        return document if self.comparison is None else document | {"comparison": self.comparison.to_dict()}

    def write(self, output: Path | None, html: Path | None, png: Path | None) -> None:
        """Write the files that were asked for."""
        from dtfcli.cli import render
        from dtfcli.inspection.figure import draw_figure
        from dtfcli.inspection.page import render_page

        if output is not None:
            render.write_json(self.document(), output)
            render.note(f"everything in {output}")
        if html is not None:
            html.write_text(render_page(self.report, self.summary, self.comparison), "utf-8")
            render.note(f"page in {html}")
        if png is not None:
            draw_figure(self.report, self.summary, png)
            render.note(f"figure in {png}")

    def show(self) -> None:
        """Print it."""
        from dtfcli.cli import inspect_view
        from dtfcli.inspection.text import TextRouting

        if isinstance(self.report, TextRouting):
            inspect_view.show_text(self.report, self.summary, self.comparison)
        else:
            inspect_view.show_corpus(self.report)


@dataclass(frozen=True)
class _FoundSensitivity:
    """What each layer costs to leave out."""

    report: "Sensitivity"

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return self.report.to_dict()

    def write(self, output: Path | None, html: Path | None, png: Path | None) -> None:
        """Write the JSON file, if one was asked for."""
        from dtfcli.cli import render

        if output is not None:
            render.write_json(self.document(), output)
            render.note(f"everything in {output}")

    def show(self) -> None:
        """Print it."""
        from dtfcli.cli import inspect_view

        inspect_view.show_sensitivity(self.report)


def _leave_out(model: str, loading: options.Loading, what: "str | Corpus") -> _FoundSensitivity:
    """Measure what each layer costs to leave out, on a text or a corpus."""
    from dtfcli.cli import inspect_view
    from dtfcli.inspection.corpus import read
    from dtfcli.inspection.sensitivity import sensitivity

    loaded, tokenizer = loading.open(model)
    limit = 1 if isinstance(what, str) else what.limit
    with inspect_view.progress(limit) as on_document:
        texts = [what] if isinstance(what, str) else read(what, on_document)
        return _FoundSensitivity(sensitivity(loaded, tokenizer, texts, name=model))


def _refuse_with_sensitivity(compare: str | None, against_oracle: bool, html: Path | None, png: Path | None) -> None:
    from dtfcli.errors import ConfigError

    given = {"--compare": compare, "--against-oracle": against_oracle, "--html": html, "--png": png}
    for option, value in given.items():
        if value:
            raise ConfigError(f"{option}: --sensitivity leaves out layers and routes nothing; ask for one of the two.")


def _route_corpus(model: str, loading: options.Loading, corpus: "Corpus", against: "Collection[Against]") -> _Found:
    """Add up what the model does with every document of a file or folder."""
    from dtfcli.cli import inspect_view, render
    from dtfcli.inspection.corpus import inspect_corpus
    from dtfcli.inspection.text import require_routed

    loaded, tokenizer = loading.open(model)
    require_routed(loaded, model)
    with inspect_view.progress(corpus.limit) as on_document:
        report = inspect_corpus(loaded, tokenizer, corpus, name=model, against=against, on_document=on_document)
    if report.cut_documents:
        render.note(f"{report.cut_documents} documents are longer than the model's positions: cut into windows.")
    return _Found(report, report.summary)


def _route_text(
    model: str,
    loading: options.Loading,
    text: str,
    python: bool,
    compare: str | None,
    against: "Collection[Against]",
) -> _Found:
    """What the model does with one text, and what a second model does with the same tokens."""
    from dtfcli.cli import render
    from dtfcli.inspection.comparison import compare_routing
    from dtfcli.inspection.statistics import summarize
    from dtfcli.inspection.text import inspect_text, require_routed

    loaded, tokenizer = loading.open(model)
    require_routed(loaded, model)
    report = inspect_text(loaded, tokenizer, text, name=model, python=python, against=against)
    if len(report.windows) > 1:
        render.note(_cut_note(len(report.source), len(report.windows), loaded.config.max_position_embeddings))
    comparison = None
    if compare is not None:
        del loaded
        other, other_tokenizer = replace(loading, routing=None, capacity=None, revision=None).open(compare)
        second = inspect_text(other, other_tokenizer, text, name=compare, dense=True, against=())
        comparison = compare_routing(report, second)
    return _Found(report, summarize(report), comparison)


def _check_input(text: str | None, file: Path | None, compare: str | None, limit: int | None, text_field: str) -> bool:
    """Whether --file names documents to add up, rather than one text.

    Raises:
        ConfigError: options that contradict each other or that nothing would read.
    """
    from dtfcli.data.files import TABLE_SUFFIXES
    from dtfcli.data.sources import similar_path
    from dtfcli.errors import ConfigError

    if text is not None and file is not None:
        raise ConfigError("TEXT and --file: give one of them.")
    if file is not None and not file.exists():
        raise ConfigError(f"--file {file}: no such file or folder.{similar_path(file)}")
    corpus = file is not None and (file.is_dir() or file.suffix.lower() in TABLE_SUFFIXES)
    if not corpus:
        for option, given in (("--limit", limit is not None), ("--text-field", text_field != "text")):
            if given:
                raise ConfigError(
                    f"{option}: only a .jsonl or .parquet --file or a folder has documents; leave it out."
                )
    if corpus and compare is not None:
        raise ConfigError(f"--compare {compare}: two models are compared on one text; give a TEXT or a text --file.")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit}: at least 1 document.")
    if not text_field:
        raise ConfigError("--text-field '': name the column that holds the text.")
    return corpus


def _corpus(file: Path | None, limit: int | None, text_field: str) -> "Corpus":
    from dtfcli.inspection.corpus import Corpus

    assert file is not None, "`_check_input` found documents in it"
    return Corpus(file, limit, text_field)


def _content(text: str | None, file: Path | None) -> str:
    if file is not None:
        return _read(file)
    return SAMPLE if text is None else text


def _check_targets(html: Path | None, png: Path | None, output: Path | None) -> None:
    """Refuse, before anything is loaded, files that could not be written or would be overwritten."""
    for option, path, suffix in (("--html", html, ".html"), ("--png", png, ".png"), ("--output", output, "")):
        _check_target(option, path, suffix)
    _check_distinct([html, png, output])


def _check_target(option: str, path: Path | None, suffix: str) -> None:
    import os

    from dtfcli.errors import ConfigError

    if path is None:
        return
    if suffix and path.suffix.lower() != suffix:
        raise ConfigError(f"{option} {path}: name a {suffix} file.")
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder; name a file.")
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{option} {path}: exists already; name another file.")
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"{option} {path}: the folder {folder} does not exist; make it first.")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{option} {path}: no permission to write into {folder}; name another folder.")


def _check_distinct(paths: list[Path | None]) -> None:
    from dtfcli.errors import ConfigError

    given = [path.absolute() for path in paths if path is not None]
    for path in given:
        if given.count(path) > 1:
            raise ConfigError(f"{path} is named twice among --html, --png and --output; name different files.")


def _read(file: Path) -> str:
    from dtfcli.errors import ConfigError

    try:
        return file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {file}: cannot be read as UTF-8 text ({error}).") from error


def _cut_note(tokens: int, windows: int, size: int) -> str:
    return f"{tokens:,} tokens are more than the model's {size:,} positions: cut into {windows} windows, routed apart."
