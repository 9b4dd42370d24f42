"""The header of a GGUF file, read with a limit on everything that it counts.

A header says how many entries and tensors follow and how long each is. A library that believes it takes memory and
time without end, or leaves the file. Here no number is believed that the rest of the file cannot hold.
"""

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from dtfcli.errors import CheckpointError, reading

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Formats of `struct` by the numbers of GGUF's value types; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 8
_LONGEST_NAME = 2**16
_NUMBERS = ("block_count", "embedding_length", "feed_forward_length", "vocab_size")


@dataclass
class GgufHeader:
    """What a header says.

    Attributes:
        tensors: their number.
        entries: of all tensors together.
        values: metadata of one number or text.
    """

    tensors: int = 0
    entries: int = 0
    values: dict[str, Any] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """The model's sizes, without the name of its architecture in front."""
        prefix = f"{self.values.get('general.architecture')}."
        found = {name: self.values.get(prefix + name) for name in _NUMBERS}
        return {name: value for name, value in found.items() if value is not None}


class _Reader:
    """A file, read forward; asking for more than is left raises EOFError."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.left = file, size

    def read(self, count: int) -> bytes:
        self._room(count)
        self.left -= count
        return self._file.read(count)

    def skip(self, count: int) -> None:
        self._room(count)
        self._file.seek(count, 1)
        self.left -= count

    def unpack(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.read(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        length = self.unpack("Q")
        if length > _LONGEST_NAME:
            self.skip(length)
            return ""
        return self.read(length).decode("utf-8")

    def count(self, smallest: int) -> int:
        """A number of things of at least so many bytes each."""
        found = self.unpack("Q")
        self._room(found * smallest)
        return found

    def _room(self, count: int) -> None:
        if count > self.left:
            raise EOFError(f"{count} bytes are announced and {self.left} are left: it is cut off or damaged")


def read_gguf_header(path: Path) -> GgufHeader:
    """Read a header, and check that the tensors that it lists lie in the file.

    Raises:
        CheckpointError: it is damaged or cut off.
    """
    header = GgufHeader()
    with reading(path, "download the GGUF file again"), path.open("rb") as file:
        reader = _Reader(file, path.stat().st_size)
        if reader.read(4) != b"GGUF":
            raise CheckpointError(f"{path}: not a GGUF file (it does not start with GGUF); download it again.")
        reader.unpack("I")
        header.tensors = reader.count(24)
        for _ in range(reader.count(13)):
            name = reader.text()
            value = _read_value(reader, reader.unpack("I"))
            if value is not None:
                header.values[name] = value
        starts = []
        for _ in range(header.tensors):
            reader.text()
            dimensions = reader.unpack("I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor with {dimensions} dimensions")
            shape = [reader.unpack("Q") for _ in range(dimensions)]
            reader.unpack("I")
            starts.append(reader.unpack("Q"))
            header.entries += math.prod(shape)
        alignment = header.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            raise ValueError(f"general.alignment = {alignment}")
        # No format goes below one bit an entry.
        if max(starts, default=0) > reader.left or header.entries > 8 * reader.left:
            raise EOFError("its tensors reach beyond its end: it is cut off or damaged")
    return header


def _read_value(reader: _Reader, kind: int) -> Any:
    """A number or text; None for an array, which is passed over."""
    if kind in _SCALARS:
        return reader.unpack(_SCALARS[kind])
    if kind == _STRING:
        return reader.text()
    if kind != _ARRAY:
        raise ValueError(f"a value of the unknown type {kind}")
    inner = reader.unpack("I")
    if inner in _SCALARS:
        size = struct.calcsize(f"<{_SCALARS[inner]}")
        reader.skip(reader.count(size) * size)
    elif inner == _STRING:
        for _ in range(reader.count(8)):
            reader.skip(reader.unpack("Q"))
    else:
        raise ValueError(f"an array of the type {inner}")
    return None
