"""`dtf inspect-routing`: which tokens enter which layers, and why."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtfcli.cli import options
from dtfcli.errors import ConfigError

if TYPE_CHECKING:
    from dtfcli.cli.render import Steps
    from dtfcli.inspection.corpus import Corpus, CorpusRouting
    from dtfcli.inspection.sensitivity import Sensitivity
    from dtfcli.inspection.statistics import Summary
    from dtfcli.inspection.text import TextRouting

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
    options.new_file("--html", "Write a page that needs no network to this .html file.", ".html"),
]
Png = Annotated[Path | None, options.new_file("--png", "Draw a figure into this .png file.", ".png")]
Output = Annotated[Path | None, options.new_file("--output", "Write everything as JSON to this file.")]
Limit = Annotated[
    int | None, typer.Option("--limit", help="Documents of a corpus to read.", metavar="N", show_default=False)
]
Oracle = Annotated[
    bool,
    typer.Option(
        "--against-oracle",
        help="Measure the loss of each token that skips a layer and the error of its forecast; compare the router with "
        "the tokens that lose most, and with the loss if those were routed.",
    ),
]
SensitivityOption = Annotated[
    bool,
    typer.Option(
        "--sensitivity",
        help="Measure instead the loss without each layer of the model, dense or routed, and print the order that "
        "model.layer_order takes.",
    ),
]
TextField = Annotated[str, typer.Option("--text-field", help="Column or key of a corpus that holds the text.")]


@options.opens_models("quantize")
def inspect_routing(
    model: options.Model,
    text: Text = None,
    file: File = None,
    html: Html = None,
    png: Png = None,
    output: Output = None,
    against_oracle: Oracle = False,
    sensitivity: SensitivityOption = False,
    limit: Limit = None,
    text_field: TextField = "text",
    *,
    loading: options.Loading,
    json: options.Json = False,
) -> None:
    """Show which tokens a routed model spends its layers on, and why.

    The text appears colored by depth, the number of routed layers that computed each token. A heat map has a row for
    each routed layer and a column for each token. Tables show each layer's share of tokens, its threshold, and the
    router's predictions for tokens that enter and for tokens that take the forecast; then shares by kind of token, and
    the agreement of the causal mode with the training rule. A corpus is summed up in constant memory.

    \b
    Examples:
      dtf inspect-routing outputs/2026-01-31/quickstart
      dtf inspect-routing MODEL "The cat sat on the mat." --capacity 0.25
      dtf inspect-routing MODEL --file module.py --html routing.html
      dtf inspect-routing MODEL --file novels.parquet --output routing.json
      dtf inspect-routing MODEL --file novels.parquet --limit 20 --against-oracle
      dtf inspect-routing DENSE_MODEL --file novels.parquet --sensitivity
    """
    from dtfcli.cli import inspect_view, render

    material = _material(text, file, limit, text_field)
    if output is not None and output in (html, png):
        raise ConfigError(f"{output} is named twice among --html, --png and --output; name different files.")
    show: Callable[[], None]
    if sensitivity:
        for option, value in {"--against-oracle": against_oracle, "--html": html, "--png": png}.items():
            if value:
                raise ConfigError(f"{option}: --sensitivity leaves out layers and routes nothing; use one of the two.")
        costs = _leave_out_layers(model, loading, material)
        document, show = costs.to_dict(), partial(inspect_view.show_sensitivity, costs)
    else:
        report, summary = _route(model, loading, material, against_oracle)
        _write_drawings(report, summary, html, png)
        document, show = report.to_dict() | summary.to_dict(), partial(inspect_view.show, report, summary)
    if output is not None:
        render.write_json(document, output)
        render.note(f"everything in {output}")
    if json:
        render.emit_json(document)
    else:
        show()


def _material(text: str | None, file: Path | None, limit: int | None, text_field: str) -> "str | Corpus":
    """The text to route, or the documents to add up.

    Raises:
        ConfigError: options that contradict each other or that nothing would read, or a file that cannot be read.
    """
    from dtfcli.data.files import TABLE_SUFFIXES
    from dtfcli.data.sources import similar_path
    from dtfcli.inspection.corpus import Corpus

    if text is not None and file is not None:
        raise ConfigError("TEXT and --file: give one of them.")
    if file is not None and not file.exists():
        raise ConfigError(f"--file {file}: no such file or folder.{similar_path(file)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit}: at least 1 document.")
    if not text_field:
        raise ConfigError("--text-field '': name the column that holds the text.")
    if file is not None and (file.is_dir() or file.suffix.lower() in TABLE_SUFFIXES):
        return Corpus(file, limit, text_field)
    for option, given in (("--limit", limit is not None), ("--text-field", text_field != "text")):
        if given:
            raise ConfigError(f"{option}: only a .jsonl or .parquet --file or a folder has documents; leave it out.")
    if file is None:
        return SAMPLE if text is None else text
    try:
        return file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {file}: cannot be read as UTF-8 text ({error}).") from error


def _route(
    model: str, loading: options.Loading, material: "str | Corpus", oracle: bool
) -> "tuple[TextRouting | CorpusRouting, Summary]":
    """What the model does with a text, or in sum with every document of a corpus."""
    from dtfcli.cli import render

    with render.Steps() as show:
        from dtfcli.inspection.corpus import inspect_corpus
        from dtfcli.inspection.statistics import summarize
        from dtfcli.inspection.text import inspect_text, require_routed
        from dtfcli.models.stock import longest_text

        loaded, tokenizer = loading.open(model)
        require_routed(loaded, model)
        show("Routing")
        if isinstance(material, str):
            text = inspect_text(loaded, tokenizer, material, name=model, oracle=oracle)
        else:
            on_document = _on_document(show, "Routing", material)
            corpus = inspect_corpus(loaded, tokenizer, material, name=model, oracle=oracle, on_document=on_document)
    if isinstance(material, str):
        if len(text.windows) > 1:
            size = f"the model's {longest_text(loaded.config):,} positions"
            windows = f"{len(text.windows)} windows, each routed on its own"
            render.note(f"{len(text.source):,} tokens are more than {size}: cut into {windows}.")
        return text, summarize(text)
    if corpus.cut_documents:
        render.note(f"{corpus.cut_documents} documents are longer than the model's positions: cut into windows.")
    return corpus, corpus.summary


def _write_drawings(
    report: "TextRouting | CorpusRouting", summary: "Summary", html: Path | None, png: Path | None
) -> None:
    from dtfcli.cli import render
    from dtfcli.inspection.figure import draw_figure
    from dtfcli.inspection.page import render_page

    if html is not None:
        html.write_text(render_page(report, summary), "utf-8")
        render.note(f"page in {html}")
    if png is not None:
        draw_figure(report, summary, png)
        render.note(f"figure in {png}")


def _leave_out_layers(model: str, loading: options.Loading, material: "str | Corpus") -> "Sensitivity":
    """The cost of each layer, on a text or a corpus."""
    from dtfcli.cli import render

    with render.Steps() as show:
        from dtfcli.inspection.corpus import read
        from dtfcli.inspection.sensitivity import sensitivity

        loaded, tokenizer = loading.open(model)
        step = "Leaving out layers"
        show(step)
        texts = [material] if isinstance(material, str) else read(material, _on_document(show, step, material))
        return sensitivity(loaded, tokenizer, texts, name=model)


def _on_document(show: "Steps", step: str, corpus: "Corpus") -> Callable[[int, float | None], None]:
    """Shows a step of which so many documents, or such a share of the work, are done."""
    return lambda count, share: show(step, count / corpus.limit if corpus.limit else share)
