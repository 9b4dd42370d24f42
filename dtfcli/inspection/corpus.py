"""Routing over the documents of a file or folder: read one at a time, added up, and forgotten."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dtfcli.data.documents import documents
from dtfcli.inspection.statistics import RoutingStatistics, Summary
from dtfcli.inspection.text import Inspected, inspect_text, inspected
from dtfcli.settings.data import Source

OnDocument = Callable[[int, float | None], None]
_OPTIONS = {"path": "--file", "text_field": "--text-field"}


@dataclass(frozen=True)
class Corpus:
    """Documents to read.

    Attributes:
        file: .jsonl or .parquet, a document in each row, or a folder of texts.
        limit: documents to read; None: all.
        text_field: column or key that holds the text.
    """

    file: Path
    limit: int | None = None
    text_field: str = "text"


@dataclass(frozen=True)
class CorpusRouting(Inspected):
    """The routing of all documents of a corpus; `cut_documents` are longer than the model's positions."""

    file: str
    cut_documents: int
    summary: Summary

    def to_dict(self) -> dict[str, Any]:
        """Everything but the sums, for JSON."""
        return self.heading() | {"file": self.file, "cut_documents": self.cut_documents}


def inspect_corpus(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    *,
    name: str = "",
    oracle: bool = False,
    on_document: OnDocument | None = None,
) -> CorpusRouting:
    """Run the documents of a corpus through a routed model.

    Args:
        model, tokenizer, name, oracle: as for `inspect_text`.
        corpus: the documents.
        on_document: as for `read`.

    Raises:
        DataError: the file cannot be read, or holds no document.
        ConfigError: as `inspect_text`.
    """
    statistics, cut = RoutingStatistics(), 0
    for text in read(corpus, on_document):
        report = inspect_text(model, tokenizer, text, name=name, oracle=oracle)
        statistics.add(report)
        cut += len(report.windows) > 1
    return CorpusRouting(
        **vars(inspected(model, name)), file=str(corpus.file), cut_documents=cut, summary=statistics.result()
    )


def read(corpus: Corpus, on_document: OnDocument | None = None) -> Iterator[str]:
    """The texts of a corpus, one at a time.

    Args:
        corpus: names the documents.
        on_document: called after each text with the number of texts and the share of the work, if it is known.

    Raises:
        DataError: the file cannot be read, or holds no document.
    """
    share = 0.0

    def on_progress(message: str, fraction: float | None) -> None:
        nonlocal share
        share = fraction or share

    source = Source(path=str(corpus.file), text_field=corpus.text_field)
    texts = documents([source], seed=0, max_documents=corpus.limit, options=_OPTIONS, on_progress=on_progress)
    for count, document in enumerate(texts, 1):
        yield document.text
        if on_document is not None:
            on_document(count, share)
