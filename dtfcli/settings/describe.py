"""A pydantic schema in words: the type and the meaning of each dotted key, and the mistakes in it.

Used to translate pydantic's errors into lines of the form `training.max_steps = "many": expected a whole
number.`, to suggest the key that was meant, and to print the settings reference.
"""

import json
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dtfcli.errors import did_you_mean
from dtfcli.models import configuration_fields

STRUCK: dict[str, tuple[Any, str]] = {
    **{f"model.{name}": struck for name, struck in configuration_fields.STRUCK.items()},
    "model.flops_share": (
        None,
        "list layers in model.routed_layers; `dtf inspect-routing MODEL --sensitivity` measures what each one costs",
    ),
    "distill.hidden_weight": (0, "it won nothing beside the divergence"),
    "training.router_warmup_steps": (0, "it made models worse; all parameters are trained from the first step"),
}
"""Settings that earlier versions had: the value that meant nothing, and the remedy for every other."""

_COMPARISONS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def _variants(annotation: Any) -> list[Any]:
    """The members of a union, without None and without Annotated's metadata."""
    if get_origin(annotation) is Annotated:
        return _variants(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [v for member in get_args(annotation) for v in _variants(member)]
    return [] if annotation is type(None) else [annotation]


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def annotation_at(schema: type[BaseModel], parts: Sequence[str | int]) -> Any:
    """The annotation of a nested key, or None where the schema has no such key."""
    current: Any = schema
    for part in parts:
        variants = _variants(current)
        group = next((v for v in variants if _is_group(v)), None)
        items = next((v for v in variants if get_origin(v) is list), None)
        if group is not None and part in group.model_fields:
            current = group.model_fields[part].annotation
        elif items is not None and isinstance(part, int):
            current = get_args(items)[0]
        else:
            return None
    return current


def wants_text(schema: type[BaseModel], parts: Sequence[str | int]) -> bool:
    """Whether nothing but text (or a choice among words) fits at a key."""
    variants = _variants(annotation_at(schema, parts))
    return bool(variants) and all(v is str or get_origin(v) is Literal for v in variants)


def describe_type(annotation: Any) -> str:
    """An annotation in words: `float | list[float]` → "a number or a list of numbers"."""
    phrases = list(dict.fromkeys(_describe_variant(variant) for variant in _variants(annotation)))
    return " or ".join(phrase for phrase in phrases if phrase != "a whole number" or "a number" not in phrases)


def _describe_variant(variant: Any) -> str:
    if get_origin(variant) is Literal:
        return "one of " + ", ".join(map(str, get_args(variant)))
    if get_origin(variant) is list:
        item = describe_type(get_args(variant)[0])
        return f"a list of {item.removeprefix('a ')}s"
    if _is_group(variant):
        return "a table"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(variant, "a value")


def walk(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf key of the schema, dotted, with its field; items of a list are written `key[].name`."""
    for name, field in schema.model_fields.items():
        key = prefix + name
        variants = _variants(field.annotation)
        group = next((v for v in variants if _is_group(v)), None)
        if group is not None:
            yield from walk(group, f"{key}.")
            continue
        yield key, field
        for variant in variants:
            if get_origin(variant) is list and _is_group(get_args(variant)[0]):
                yield from walk(get_args(variant)[0], f"{key}[].")


def show_value(value: Any) -> str:
    """A value as the user could have typed it, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def show_key(parts: Sequence[str | int]) -> str:
    """A nested key in writing: ("data", "sources", 0, "path") → "data.sources[0].path"."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")


def _unknown(schema: type[BaseModel], parts: Sequence[str | int]) -> str:
    """The hint for an unknown key: a sibling of a similar name, else the same name in another group."""
    name = str(parts[-1])
    group = next((v for v in _variants(annotation_at(schema, parts[:-1])) if _is_group(v)), schema)
    hint = did_you_mean(name, group.model_fields)
    parent = show_key(parts[:-1])
    if hint and parent:
        hint = hint.replace(" '", f" '{parent}.")
    if not hint:
        keys = [key for key, _ in walk(schema) if "[]" not in key]
        same = [key for key in keys if key.rsplit(".", 1)[-1] == name]
        hint = f" Did you mean '{same[0]}'?" if same else did_you_mean(show_key(parts), keys)
    return hint or f" Known: {', '.join(group.model_fields)}."


def _example(schema: type[BaseModel], key: Sequence[str | int]) -> str:
    groups = [v for v in _variants(annotation_at(schema, key[:-1])) if _is_group(v)]
    field = groups[0].model_fields.get(key[-1]) if groups else None
    return f" Write for example {show_key(key)}='{field.examples[0]}'." if field and field.examples else ""


def _real_key(schema: type[BaseModel], location: Sequence[str | int]) -> tuple[str | int, ...]:
    """Cut the names of union members, which pydantic adds, off a location."""
    for length in range(len(location), 0, -1):
        if annotation_at(schema, location[:length]) is not None:
            return tuple(location[:length])
    return tuple(location[:1])


@dataclass(frozen=True)
class Problem:
    """One mistake in the settings.

    Attributes:
        key: where it is.
        text: the line for the user, key included.
        known: whether the schema has this key.
        crosses: whether a check across several keys found it.
    """

    key: tuple[str | int, ...]
    text: str
    known: bool = True
    crosses: bool = False


def problems(
    schema: type[BaseModel], error: ValidationError, origin: Callable[[str], str] = lambda key: ""
) -> list[Problem]:
    """Translate pydantic's errors, one line for each key.

    Args:
        schema: the settings class.
        error: raised by its validation.
        origin: says where a key came from, such as " (in my.toml)".
    """
    by_key: dict[str, Problem] = {}
    for details in error.errors():
        problem = _translate(schema, details, origin)
        by_key.setdefault(show_key(problem.key), problem)
    return list(by_key.values())


def _translate(schema: type[BaseModel], details: ErrorDetails, origin: Callable[[str], str]) -> Problem:
    location, kind, context = details["loc"], details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        name = show_key(location)
        if name in STRUCK:
            line = f"{name}{origin(name)}: this setting is gone, since {STRUCK[name][1]}. Leave it out."
            return Problem(tuple(location), line, known=False)
        return Problem(tuple(location), f"{name}: unknown key{origin(name)}.{_unknown(schema, location)}", known=False)
    if kind == "value_error":
        # Our validators raise "name = value: remedy"; pydantic knows the group, or the field itself.
        message = str(context["error"])
        field = message.partition(" = ")[0]
        crosses = not location or location[-1] != field
        parents = location if crosses else location[:-1]
        key = (*parents, *field.split("."))
        head, _, remedy = message.partition(": ")
        prefix = show_key(parents) + "." if parents else ""
        return Problem(key, f"{prefix}{head}{origin(show_key(key))}: {remedy}.", crosses=crosses)

    key = _real_key(schema, location)
    name, annotation = show_key(key), annotation_at(schema, key)
    head = f"{name} = {show_value(details['input'])}{origin(name)}"
    if kind == "missing":
        line = f"{show_key(location)}: missing{origin(name)}. Expected {describe_type(annotation)}."
        return Problem(tuple(location), line)
    if kind in _COMPARISONS:
        bound, words = _COMPARISONS[kind]
        return Problem(key, f"{head}: must be {words} {context[bound]:g}.")
    if kind in ("too_short", "string_too_short"):
        return Problem(key, f"{head}: must not be empty.{_example(schema, key)}")
    if kind == "finite_number":
        return Problem(key, f"{head}: must be a finite number.")
    hint = _example(schema, key)
    choices = [str(c) for v in _variants(annotation) if get_origin(v) is Literal for c in get_args(v)]
    if choices and isinstance(details["input"], str):
        hint = did_you_mean(details["input"], choices)
    return Problem(key, f"{head}: expected {describe_type(annotation)}.{hint}")


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
