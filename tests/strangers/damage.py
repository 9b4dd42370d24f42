"""What strangers' files look like: documents and bytes, damaged in the ways that readers meet or fear.

Everything draws from a `random.Random`, so that Hypothesis can shrink a case and a plain seed can repeat it.
"""

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

Damage = Callable[[Random, Path], str]
"""Damages a file in place; returns what was done, for the report of a failure."""

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


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON document, its own, (), included."""
    paths = [path]
    if isinstance(document, dict):
        children: Any = document.items()
    elif isinstance(document, list):
        children = enumerate(document[:20])
    else:
        return paths
    for key, value in children:
        paths += places(value, (*path, key))
    return paths


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
    elif kind == "wrap":
        parent[path[-1]] = [parent[path[-1]]]
    else:
        parent[path[-1]] = value
    return document, f"{'.'.join(map(str, path))}: {kind} {str(value)[:40]!r}"


def damage_json(rng: Random, path: Path) -> str:
    """One to three values of a JSON file changed; sometimes its depth, its encoding, or any of its bytes."""
    kind = rng.choice(("values",) * 6 + ("depth", "encoding", "bytes", "bytes"))
    if kind == "bytes":
        return damage_bytes(rng, path)
    text = path.read_text("utf-8")
    if kind == "depth":
        opened = rng.choice(("[", '{"a":'))
        path.write_text(opened * DEEP if rng.random() < 0.5 else '{"a":' * DEEP + "1" + "}" * DEEP)
        return f"{DEEP} × {opened}"
    if kind == "encoding":
        name = rng.choice(ENCODINGS)
        path.write_bytes(text.replace("a", "ä", 1).encode(name, "replace"))
        return f"as {name}"
    document, changes = json.loads(text), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document, change = changed(rng, document, VALUES if path.name in SIZES else HUGE)
        changes.append(change)
    path.write_text(json.dumps(document))
    return "; ".join(changes)


def damage_lines(rng: Random, path: Path) -> str:
    """One line of a file of JSON lines changed, as `damage_json` would, or any of its bytes."""
    if rng.random() < 0.4:
        return damage_bytes(rng, path)
    lines = path.read_text("utf-8").splitlines()
    number = rng.randrange(len(lines))
    record, told = changed(rng, json.loads(lines[number]))
    lines[number] = json.dumps(record)
    path.write_text("\n".join(lines) + "\n")
    return f"line {number + 1}: {told}"


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
        size = struct.pack("<Q", rng.choice((2**60, 2**63, 2**64 - 1, 2**31, 10**12, 0)))
        place = rng.choice((0, 4, 8, 16, 24, place))
        data[place : place + 8] = size
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


def any_of(*damages: Damage) -> Damage:
    """One of these; now and then another thing in the file's place."""

    def damage(rng: Random, path: Path) -> str:
        chosen = displace if rng.random() < 0.1 else rng.choice(damages)
        return f"{path.name}: {chosen(rng, path)}"

    return damage


def fresh_copy(folder: Path, target: Path) -> Path:
    """A copy of a healthy folder, in place of what an earlier case left."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(folder, target))
