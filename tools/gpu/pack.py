"""What has to travel to a machine that reaches nothing: wheels, the model in parts, and some text.

Two calls carry it, each at most 64 MiB with the repository: `first/` and `second/`. The model is cut in as many parts;
all else is in `second/`, which works on its own, with random weights, should the machine of the first call be gone.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

PACKAGES = (
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions"),
    *("pydantic-settings", "python-dotenv", "tomlkit", "gguf"),
)
"""What dtf imports for `bench` and `train` on a .jsonl text and is not on the GPU machine, with all that it needs.

`datasets`, lm-eval, pyarrow and prompt_toolkit are imported by those commands alone that read the Hub, evaluate, read
Parquet and chat.
"""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
PYTHON = "3.12"
MODEL, TEXT = "model.gguf", "text.jsonl"
FOLDERS = ("first", "second")
LIMIT = 60 * 2**20
"""Bytes of a folder: the repository travels with it, and both together may have 64 MiB."""
EIGHTH = 8
"""One of this many parts of the novels travels."""

COMMANDS = """\
First call, carrying {carry}/first:

    mkdir -p ~/gpu_pack && cp {carry}/first/{model}.part* ~/gpu_pack/

Second call, while that machine is still held, carrying {carry}/second, with a limit of ten minutes:

    mkdir -p ~/gpu_pack && cp {carry}/second/{model}* {carry}/second/{text} ~/gpu_pack/
    (cd ~/gpu_pack && cat {model}.part* > {model} && sha256sum --check {model}.sha256 || rm {model})
    python3 -m pip install -q --no-index --no-deps --upgrade --target ~/site {carry}/second/wheels/*.whl
    PYTHONPATH=~/site python3 -m tools.gpu --minutes 8 --data ~/gpu_pack --out "$OUT"
"""


def pack(
    folder: Path,
    *,
    novels: Path | None,
    model: Path | None,
    download: Callable[[Iterable[str], Path], None] | None = None,
) -> str:
    """Fill the folder and check its sizes.

    Args:
        folder: to fill; its `first` and `second` are replaced.
        novels: folder of train.parquet; None: no text.
        model: a .gguf file; None: no model.
        download: fetches wheels of requirements into a folder.

    Returns:
        The sizes, and the commands to run there.

    Raises:
        SystemExit: a part is over `LIMIT`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")  # a working tree may travel with all that git does not ignore
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    first, second = (folder / name for name in FOLDERS)
    (download or download_wheels)([f"{name}=={version(name)}" for name in PACKAGES], second / "wheels")
    if model is not None:
        cut(model, [first, second])
    if novels is not None:
        write_text(novels, second / TEXT)
    sizes = {name: folder_size(folder / name) for name in FOLDERS}
    lines = [f"{folder / name}: {size / 2**20:.1f} MiB" for name, size in sizes.items()]
    too_large = [name for name, size in sizes.items() if size > LIMIT]
    if too_large:
        raise SystemExit("\n".join([*lines, f"more than {LIMIT / 2**20:.0f} MiB: {', '.join(too_large)}"]))
    carry = Path(os.path.relpath(folder)).as_posix()
    return "\n".join(lines) + "\n\n" + COMMANDS.format(carry=carry, model=MODEL, text=TEXT)


def download_wheels(requirements: Iterable[str], folder: Path) -> None:
    """Fetch wheels for the GPU machine's Python, with the registry that pip is set up for."""
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [item for name in PLATFORMS for item in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp", *platforms, "--dest", str(folder)]
    subprocess.run([*command, *requirements], check=True)


def cut(file: Path, folders: list[Path]) -> None:
    """Cut a file into equal parts, one in each folder, and write its hash beside the last.

    `cat` puts them together, in the order of their names.
    """
    content = file.read_bytes()
    size = -(-len(content) // len(folders))
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{MODEL}.part{number + 1}").write_bytes(content[number * size : (number + 1) * size])
    (folders[-1] / f"{MODEL}.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  {MODEL}\n")


def write_text(novels: Path, file: Path) -> None:
    """A part of the passages of the novels, as JSON lines: reading Parquet would take pyarrow there."""
    from tools.small_study import is_chosen, passages

    with file.open("w", encoding="utf-8") as lines:
        for text in passages(novels / "train.parquet", "\n"):
            if is_chosen(text, EIGHTH):
                lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def folder_size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
