"""Sources on this machine: what is read, what is skipped, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtfcli.data import files
from dtfcli.data.documents import documents
from dtfcli.data.prepare import prepare_data
from dtfcli.data.sources import SourceReport, Where
from dtfcli.errors import ConfigError, DataError
from tests.data.texts import sentence, source, texts_of


def test_folder_gives_every_supported_file_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "1.md").write_text("md")
    (tmp_path / "a.TXT").write_text("txt")
    (tmp_path / "c.py").write_text("py")
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    pq.write_table(pa.table({"text": ["three", "four"]}), tmp_path / "e.parquet")
    (tmp_path / "skip.csv").write_text("csv")
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert texts_of(source(tmp_path)) == ["txt", "md", "py", "one", "two", "three", "four"]


def test_text_is_kept_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_bytes("\ufeffeins\r\n  zwei \t\n".encode())
    (tmp_path / "b.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')  # a lone surrogate is no text
    read = list(documents([source("~/a.txt"), source("~/b.jsonl")], seed=0))
    assert [document.text for document in read] == ["eins\r\n  zwei \t\n", "a\ufffdb \U0001f600"]
    assert [document.source for document in read] == [0, 1]


@pytest.mark.parametrize("column", ["article", "content", "support"])
def test_other_text_field_is_read_when_there_is_one(tmp_path: Path, column: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": 3, column: "one"}))
    pq.write_table(pa.table({"id": [1], column: pa.array(["two"]).dictionary_encode()}), tmp_path / "b.parquet")
    assert texts_of(source(tmp_path)) == texts_of(source(tmp_path, text_field=column)) == ["one", "two"]


@pytest.mark.parametrize(
    ("columns", "field", "expected"),
    [
        ({"article": "x", "content": "y"}, "text", ["no column 'text'", "sources[0].text_field", "article, content"]),
        ({"question": "x"}, "text", ["no column 'text'", "question"]),
        ({"title": "x", "body": "y"}, "bdy", ["'bdy'", "title, body", "Did you mean 'body'?"]),
        ({"text": 3}, "text", ["'text' holds no strings", "columns: text"]),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_unclear_text_field_lists_the_columns(
    tmp_path: Path, kind: str, columns: dict[str, Any], field: str, expected: list[str]
) -> None:
    file = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        file.write_text(json.dumps(columns))
    else:
        pq.write_table(pa.table({name: [value] for name, value in columns.items()}), file)
    with pytest.raises(DataError) as error:
        texts_of(source(file, text_field=field))
    assert all(part in str(error.value) for part in [*expected, str(file)])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "broken JSON"),
        (b'["text"]', "expected an object"),
        (b'{"other": "x"}', "'text' is missing"),
        (b'{"text": 5}', "'text' is not a string (int)"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 200_000, "broken JSON"),
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "broken JSON"),
    ],
)
def test_broken_jsonl_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        texts_of(source(tmp_path))
    assert f"{file}, line 3" in str(error.value)
    assert reason in str(error.value)


def test_rows_without_text_are_counted(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = [sentence(i) for i in range(10)]
    pq.write_table(pa.table({"text": [*rows, None, "  \n"]}), tmp_path / "a.parquet")
    report = prepare_data(make(tmp_path / "a.parquet"), tokenizer, seed=0).report[0]
    assert report.documents == 10
    assert report.skipped == {"without text": 2}
    assert report.bytes == sum(len(row.encode()) for row in rows)


@pytest.mark.parametrize("content", [b"not parquet at all", b"PAR1" + b"\0" * 100 + b"PAR1", b"", None])
def test_damaged_parquet_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [sentence(i) for i in range(200)]}), file, compression="zstd")
    whole = file.read_bytes()
    file.write_bytes(whole[:200] + b"\x7f" * 200 + whole[400:] if content is None else content)
    (tmp_path / "b.txt").write_text("fine")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        texts_of(source(tmp_path))


BAD_FILES = {"empty": b" \n", "binary": b"GIF\0\1", "not UTF-8": b"caf\xe9 au lait"}


@pytest.mark.parametrize(("reason", "content"), BAD_FILES.items())
def test_unusable_file_alone_is_an_error(tmp_path: Path, reason: str, content: bytes) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"sources\[0\].path = .*a\.txt': the file is {reason}; "):
        texts_of(source(file))
    with pytest.raises(DataError, match=rf"no document to use \(1 {reason}\)"):
        texts_of(source(tmp_path))


def test_unusable_files_among_others_are_counted(folder: Path, make: Any, tokenizer: Any) -> None:
    for i, content in enumerate(BAD_FILES.values()):
        (folder / f"bad{i}.txt").write_bytes(content)
    (folder / "empty.jsonl").write_text("\n")
    result = prepare_data(make(folder), tokenizer, seed=0)
    assert result.report[0].skipped == {"empty": 2, "binary": 1, "not UTF-8": 1}
    assert result.documents == (18, 2)


def test_unreadable_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == "03.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert len(texts_of(source(folder))) == 19
    with pytest.raises(DataError, match=r"03\.txt': the file is unreadable; Permission denied"):
        texts_of(source(folder / "03.txt"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tetxs", "Did you mean '{}/texts'?"),
        ("texts/00.tx", "Did you mean '{}/texts/00.txt'?"),
        ("text/00.txt", "Did you mean '{}/texts'?"),
        ("unlike/anything.txt", "Name an existing folder or file, a Hub data set (owner/name) or 'python-stdlib'."),
    ],
)
def test_missing_path_suggests_what_lies_beside(folder: Path, name: str, hint: str) -> None:
    with pytest.raises(DataError) as error:
        texts_of(source(f"{folder.parent}/{name}"))
    assert f"data.sources[0].path = '{folder.parent}/{name}': no such file or folder." in str(error.value)
    assert hint.format(folder.parent) in str(error.value)


@pytest.mark.parametrize("name", ["./texts", "a/b/c", "corpus.txt", "C:\\texts", "nul\0l", "x" * 300 + ".txt"])
def test_what_looks_like_a_path_never_asks_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(DataError, match=r"data\.sources\[0\]\.path"):
        texts_of(source(name))


def test_misspelled_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    with pytest.raises(DataError, match=f"Did you mean '{folder.parent.name}/texts'"):  # of one slash, as on the Hub
        texts_of(source(f"{folder.parent.name}/text"))
    with pytest.raises(DataError, match="Did you mean 'python-stdlib'"):
        texts_of(source("python_stdlib"))


def test_special_file_and_unknown_ending(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, message in {
        os.devnull: "neither a file nor a folder",
        tmp_path / "a.csv": r"ending in '\.csv' are not read, only \.txt \.md \.py \.jsonl \.parquet",
        tmp_path: r"beneath this folder \(found: \.csv\)",
        tmp_path / "empty": "it is empty",
    }.items():
        with pytest.raises(DataError, match=message):
            texts_of(source(path))


@pytest.mark.parametrize(
    ("path", "setting"),
    [
        ("texts", {"name": "en"}),
        ("texts", {"text_field": "body"}),
        ("texts/00.txt", {"split": "validation"}),
        ("texts/00.txt", {"text_field": "body"}),
        ("python-stdlib", {"name": "3.11"}),
        ("python-stdlib", {"split": "test"}),
        ("python-stdlib", {"text_field": "body"}),
        ("texts", {"messages_field": "messages"}),
        ("texts/00.txt", {"messages_field": "messages"}),
        ("python-stdlib", {"messages_field": "messages"}),
    ],
)
def test_setting_that_a_local_source_does_not_read(folder: Path, path: str, setting: dict[str, Any]) -> None:
    path = path if path == "python-stdlib" else str(folder.parent / path)
    with pytest.raises(ConfigError, match=rf"data\.sources\[0\]\.{next(iter(setting))} = .* is not read"):
        texts_of(source(path, **setting))


def test_folder_laid_out_by_split(tmp_path: Path, make: Any, tokenizer: Any) -> None:
    (tmp_path / "validation").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test", "validation/0000", "training_notes"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {i} {sentence(i)}"}}\n' for i in range(5)))
    found = {text.split()[0] for text in texts_of(source(tmp_path))}
    assert found == {"train-00000-of-00002", "train-00001-of-00002", "training_notes"}
    assert {text.split()[0] for text in texts_of(source(tmp_path, split="dev"))} == {"validation/0000"}
    report = prepare_data(make(tmp_path), tokenizer, seed=0).report[0]
    assert report.skipped == {"of split 'test'": 1, "of split 'validation'": 1}
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"split = 'test': .* no files of this split \(splits found: train, validation\)"
    ):
        texts_of(source(tmp_path, split="test"))


def test_stdlib_has_sources_and_topics_but_no_tests_or_tables() -> None:
    report = SourceReport("python-stdlib")
    reader = files.StdlibReader(Where(), source("python-stdlib"))
    texts = [text for _, text in reader.texts(report) if text]
    names = {file.relative_to(reader.root).as_posix() for file in reader.files}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any({"test", "tests", "idle_test", "site-packages"} & set(name.split("/")[:-1]) for name in names)
    assert not any("decoding_table" in text[:4000] and "charmap" in text for text in texts if len(text) > 10_000)
    assert report.skipped["generated table"] > 30
    assert sum(len(text) for text in texts) > 5e6
    assert any(text.startswith('The "assert" statement') for text in texts)


def test_stdlib_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match="no sources of its standard library"):
        texts_of(source("python-stdlib"))


def test_ratio_keeps_the_same_documents_in_any_order(tmp_path: Path) -> None:
    rows = [sentence(i, 5) for i in range(400)]
    for name, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in order))

    def kept(name: str, ratio: float, seed: int = 0) -> set[str]:
        return set(texts_of(source(tmp_path / f"{name}.jsonl", ratio=ratio), seed=seed))

    assert 160 < len(kept("a", 0.5)) < 240
    assert kept("a", 0.5) == kept("b", 0.5)
    assert kept("a", 0.2) < kept("a", 0.5)
    assert kept("a", 0.5, seed=1) != kept("a", 0.5)
    with pytest.raises(DataError, match=r"beyond ratio=1e-09.*raise the ratio"):
        kept("a", 1e-9)


def test_max_documents_are_taken_in_turns(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "two.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    pair = [source(folder), source(tmp_path / "two.jsonl")]
    found = [document.source for document in documents(pair, seed=0, max_documents=7)]
    assert found == [0, 1, 0, 1, 0, 0, 0]
    assert len(texts_of(*pair, max_documents=100)) == 22


def test_progress_rises_to_one(folder: Path) -> None:
    shares: list[Any] = []
    pair = source(folder), source(folder / "00.txt")
    texts_of(*pair, on_progress=lambda message, share: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) > 10
