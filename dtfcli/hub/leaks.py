"""Finds secrets, local paths and pickles in files before they are published.

This is the second net. The first, `runs.public.without_local_traces`, cleans the JSON files that libraries write. Here
`find_leaks` reads every file as it would be uploaded.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

_SECRETS = {
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}",
    "a Weights & Biases key": r"\bwandb_v1_\w{20,}|(?i:wandb)[\w .-]{0,20}[\"'=: ]{1,4}[0-9a-f]{40}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "an OpenAI-style key": r"\bsk-[A-Za-z0-9_-]{24,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_SECRET_VARIABLE = re.compile(r"(TOKEN|API_?KEY|SECRET|PASSWORD)$")

_ROOTS = "home|Users|root|tmp|mnt|media|var|opt|srv|data|workspace|work|scratch|private|content|kaggle|nfs|Volumes"
_ABSOLUTE = re.compile(rf"(?<![\w./:~-])/(?:{_ROOTS})/[\w.~@+-]+|\b[A-Za-z]:\\+(?:Users|\w+\\)|file://|(?<![\w.])~/\w")

# Pickles; zip archives (torch.save), NumPy, HDF5 and gzip files.
_FOREIGN_STARTS = (
    *(b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
    b"PK\x03\x04",
    b"\x93NUMPY",
    b"\x89HDF",
    b"\x1f\x8b",
)
_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST_HEADER = 100 << 20


def find_leaks(name: str, content: bytes | Path, places: tuple[Path, ...] = ()) -> list[str]:
    """Name everything in a file that must not be published.

    Args:
        name: of the file in the repository; its suffix determines the expected format.
        content: the bytes, or the path of the file; of weights the path.
        places: paths that must not appear, besides the home, working and temporary folder.
    """
    suffix = Path(name).suffix
    if suffix == ".safetensors" and isinstance(content, Path):
        header = _safetensors_header(content)
        return (
            ["content that is not a safetensors file (a pickle?)"] if header is None else [*_leaks_in(header, places)]
        )
    data = content if isinstance(content, bytes) else content.read_bytes()
    if data.startswith(_FOREIGN_STARTS):
        return ["a pickle or an archive"]
    if suffix == ".png":
        if not data.startswith(_PNG):
            return ["content that is not a .png file"]
        return list(_leaks_in(_without_pixels(data).decode("latin-1"), places))
    if suffix == ".model":  # of sentencepiece, binary
        return list(_leaks_in(data.decode("latin-1"), places))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return ["bytes that are not text"]
    return list(_leaks_in(text, places, _text_with_paths(name, text)))


def _without_pixels(png: bytes) -> bytes:
    """A PNG file without its pixels (IDAT chunks): compressed bytes look like anything, now and then like a path."""
    kept, place = [png[:8]], 8
    while place + 8 <= len(png):
        length, kind = int.from_bytes(png[place : place + 4], "big"), png[place + 4 : place + 8]
        end = place + 12 + length  # length, kind, data, checksum
        if kind != b"IDAT":
            kept.append(png[place:end])
        place = end
    return b" ".join([*kept, png[place:]])


def _leaks_in(text: str, places: tuple[Path, ...], text_with_paths: str | None = None) -> Iterator[str]:
    """Secrets in the text, and paths in the part of the text that can hold paths."""
    for kind, pattern in _SECRETS.items():
        if re.search(pattern, text):
            yield kind
    for variable, secret in _known_secrets():
        if secret in text:
            yield f"the value of {variable}"
    where = text if text_with_paths is None else text_with_paths
    for place in (Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *places):
        spelled = str(place)
        if len(spelled) > 1 and re.search(rf"(?<![\w.:/]){re.escape(spelled)}(?![\w-])", where):
            yield f"the path {spelled}"
            return
    if match := _ABSOLUTE.search(where):
        yield f"the path {match.group()}"


def _known_secrets() -> Iterator[tuple[str, str]]:
    """Secrets of this process: the Hub's token, and environment variables named as a token, key or password."""
    from huggingface_hub import get_token

    if token := get_token():
        yield "your Hugging Face token", token
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= 16 and "/" not in value:
            yield name, value


def _text_with_paths(name: str, text: str) -> str:
    """The text without the vocabulary, where "/tmp/x" can be an ordinary entry."""
    if Path(name).name not in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"):
        return text
    if name != "tokenizer.json":
        return ""
    try:
        document = json.loads(text)
        return json.dumps({key: item for key, item in document.items() if key not in ("model", "added_tokens")})
    except (ValueError, AttributeError):
        return text


def _safetensors_header(path: Path) -> str | None:
    """The JSON header of a safetensors file; None if it has none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _LARGEST_HEADER))
    try:
        json.loads(header)
        return header.decode("utf-8")
    except ValueError:
        return None
