"""Strangers' files: documents and bytes, damaged in the ways that readers meet or fear, and pickles that run code.

Everything draws from a `random.Random`, so that a plain seed can repeat a case.
"""

import copy
import json
import os
import pickle
import struct
from pathlib import Path
from random import Random
from typing import Any

import torch

DEEP = 100_000
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 0.5, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "γ", "../../outside", "/etc/hostname", "\ud800", "10", "null", "dynamic_llama", "a" * 5000, "a\nb"),
    *([], {}, [[]], [None], [-1], {"a": None}, {"x": {"y": [1]}}, [0] * 300),
)
HUGE = (*VALUES, 10**9, 10**12, 2**31, 2**60, 2**63, 10**30, -(2**63), [10**9])
"""Also for files that size nothing: a configuration with a billion layers is built as it says."""
SIZES = ("config.json", "adapter_config.json", "generation_config.json")
ENCODINGS = ("utf-16", "utf-32", "latin-1", "utf-8-sig", "utf-16-be")


class Runs:
    """Its pickle runs code where it is opened: it leaves a mark."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def write_pickle(path: Path, marker: Path, plain: bool = False) -> None:
    """A file that runs code where it is opened, as `torch.save` or (plain) as `pickle` writes it."""
    content = {"x": Runs(marker)}
    if plain:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON document, its own, (), included."""
    children: Any = document.items() if isinstance(document, dict) else ()
    children = enumerate(document[:20]) if isinstance(document, list) else children
    return [path, *(place for key, value in children for place in places(value, (*path, key)))]


def changed(rng: Random, document: Any, values: tuple[Any, ...] = HUGE) -> tuple[Any, str]:
    """A document with one value of another kind, missing, under another name or in more brackets."""
    document = copy.deepcopy(document)
    path = rng.choice(places(document))
    value = rng.choice(values)
    if not path:
        return value, f"the whole is {str(value)[:40]!r}"
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    kind = rng.choice(("value", "value", "value", "delete", "rename", "wrap"))
    if kind == "delete":
        del parent[path[-1]]
    elif kind == "rename" and isinstance(parent, dict):
        parent[f"{path[-1]}_"] = parent.pop(path[-1])
    else:
        parent[path[-1]] = [parent[path[-1]]] if kind == "wrap" else value
    return document, f"{'.'.join(map(str, path))}: {kind} {str(value)[:40]!r}"


def damage_json(rng: Random, path: Path) -> str:
    """One to three values of a JSON file, or of one of its lines; sometimes its depth, its encoding, or any bytes."""
    kind = rng.choice(("values",) * 6 + ("depth", "encoding", "bytes", "bytes"))
    if kind == "bytes":
        return damage_bytes(rng, path)
    if path.suffix == ".jsonl" and kind == "depth":
        kind = "values"  # pyarrow, with which `datasets` reads benchmarks, crashes at such a line
    documents = path.read_text("utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
    number = rng.randrange(len(documents))
    encoding, changes = "utf-8", []
    if kind == "depth":
        opened = rng.choice(("[", '{"a":'))
        documents[number] = opened * DEEP if rng.random() < 0.5 else '{"a":' * DEEP + "1" + "}" * DEEP
        changes.append(f"{DEEP} × {opened}")
    elif kind == "encoding":
        encoding = rng.choice(ENCODINGS)
        documents[number] = documents[number].replace("a", "ä", 1)
    else:
        document = json.loads(documents[number])
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            document, change = changed(rng, document, VALUES if path.name in SIZES else HUGE)
            changes.append(change)
        documents[number] = json.dumps(document)
    path.write_bytes("\n".join(documents).encode(encoding, "replace"))
    return f"document {number + 1} in {encoding}: {'; '.join(changes)}"


def damage_bytes(rng: Random, path: Path) -> str:
    """A file cut anywhere, with flipped bits, with bytes put in or left out, empty, or nothing but zeros."""
    data = bytearray(path.read_bytes())
    # Most formats begin with what matters most.
    place = rng.randrange(min(len(data), 400)) if rng.random() < 0.6 else rng.randrange(len(data))
    kind = rng.choice(("cut", "cut", "flip", "flip", "number", "shift", "empty", "zeros", "encoding"))
    if kind == "cut":
        data = data[:place]
    elif kind == "flip":
        for _ in range(rng.choice((1, 1, 8))):
            data[min(len(data) - 1, place + rng.randrange(64))] ^= 1 << rng.randrange(8)
    elif kind == "number":
        place = rng.choice((0, 4, 8, 16, 24, place))
        data[place : place + 8] = struct.pack("<Q", rng.choice((2**60, 2**63, 2**64 - 1, 2**31, 10**12, 0)))
    elif kind == "shift":
        data[place : place + rng.choice((0, 1, 8, 100))] = rng.randbytes(rng.choice((1, 3, 8)))
    elif kind == "encoding":
        data = bytearray(bytes(data).decode("latin-1").encode(rng.choice(ENCODINGS), "replace"))
    else:
        data = bytearray() if kind == "empty" else bytearray(len(data))
    path.write_bytes(bytes(data))
    return f"{kind} at byte {place}"


def displace(rng: Random, path: Path) -> str:
    """Something else where a file should be: nothing, a folder, or a link that leads astray or out of the folder."""
    kind = rng.choice(("missing", "folder", "dangling link", "link to itself", "link out"))
    outside = path.parent.parent / "outside.txt"
    outside.write_text("SECRET of somebody else")
    path.unlink()
    if kind == "folder":
        path.mkdir()
        (path / "x").write_text("x")
    elif kind != "missing":
        os.symlink({"dangling link": "nowhere", "link to itself": path.name, "link out": outside}[kind], path)
    return kind


def damage(rng: Random, path: Path) -> str:
    """Damage a file in place, as its ending suggests; returns what changed, for the report of a failure."""
    by_ending = damage_json if path.suffix in (".json", ".jsonl") else damage_bytes
    return f"{path.name}: {(displace if rng.random() < 0.1 else by_ending)(rng, path)}"
