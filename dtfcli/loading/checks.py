"""Looks at the files of a model before a library reads them: strangers make them, too.

The notable choices:

- What a configuration promises must fit what the weight files hold. A library builds what it is told to build, and
  notices afterwards that there is nothing to fill a billion layers with.
- No file may be a link that leads out of the model's folder, except into the Hub's cache, which is made of such links;
  no name in an index may lead out either.
- Code runs only if it was asked for: an attention kernel is code, and a configuration can name one on the Hub.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dtfcli.errors import CheckpointError, leads_out, read_json_object, reading
from dtfcli.loading.gguf_header import read_gguf_header

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GENERATION_CONFIG = "generation_config.json"
_READ = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".gguf", ".py"}
"""Endings of files that libraries look for in a model folder."""
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "block_count")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "embedding_length")
_BESIDE = ("intermediate_size", "n_inner", "feed_forward_length")
"""Sides of matrices in each layer, with the hidden size as the other side."""
_ROWS = ("vocab_size",)
_SIDES = (*_WIDTHS, *_BESIDE, *_ROWS, "num_attention_heads", "num_key_value_heads", "head_dim", "n_head")
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_MOST_LAYERS = 10_000
_LARGEST_SIDE = 2**28
_ENTRIES_PER_BYTE = 2
"""Of weights with four bits each, the smallest that safetensors hold."""
_AGAIN = "save or download the model again"
_NUMBER = (int, float)
_GENERATION: dict[tuple[type, ...], tuple[str, ...]] = {
    (int,): (
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences"),
        *("top_k", "no_repeat_ngram_size", "bos_token_id", "pad_token_id", "decoder_start_token_id"),
    ),
    _NUMBER: (
        *("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"),
        *("encoder_repetition_penalty", "length_penalty", "guidance_scale", "max_time", "top_h"),
    ),
    (int, list): ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id"),
    (list,): ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
    (bool,): ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "output_scores"),
    (str,): ("cache_implementation",),
}
"""Fields of a generation configuration by the kind of their values; each may be null."""


@dataclass(frozen=True)
class Stored:
    """What weight files hold: tensors, and entries of these, at most."""

    tensors: int
    entries: int


def check_files(path: Path) -> Stored | None:
    """Look at a model folder, adapter folder or `.gguf` file.

    Returns:
        What its weights are; None for pickles and adapters.

    Raises:
        CheckpointError: a file is damaged, or leads out of the folder, or promises what is not there.
    """
    if path.is_file():
        header = read_gguf_header(path)
        stored = Stored(header.tensors, header.entries)
        _check_sizes(path, header.numbers(), stored)
        return stored
    for file in sorted(path.iterdir()):
        if file.suffix in _READ:
            _check_place(path, file)
    weights = None
    if not (path / ADAPTER_CONFIG).is_file():
        weights = _stored(path)
    if (path / GENERATION_CONFIG).is_file():
        _check_generation(path / GENERATION_CONFIG)
    if (path / CONFIG).is_file():
        check_config(path / CONFIG, read_json_object(path / CONFIG, _AGAIN), weights)
    return weights


def check_config(place: Path | str, config: dict[str, Any], stored: Stored | None) -> None:
    """Check a configuration before anything is built from it.

    Args:
        place: the file, for messages.
        config: its content.
        stored: the weights that come with it; None: not known.

    Raises:
        CheckpointError: a size is absurd or larger than the weights, or an attention kernel of the Hub is named.
    """
    for name in _IMPLEMENTATIONS:
        if "/" in str(config.get(name)):
            raise CheckpointError(
                f"{place}: {name} = {config[name]!r} names code on the Hub, which is not run; take the entry out."
            )
    _check_sizes(place, config, stored)


def check_built_config(place: Path | str, config: Any, stored: Stored | None) -> None:
    """As `check_config`, with the defaults of the model's kind for what the file leaves out."""
    names = (*_LAYERS, *_SIDES)
    _check_sizes(place, {name: getattr(config, name, None) for name in names}, stored)


def weight_names(folder: Path) -> list[str]:
    """The safetensors files of a model folder, without shards of an earlier save; empty: it has none.

    Raises:
        CheckpointError: the index is damaged, or names files outside its folder.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not index.is_file():
        return []
    mapping = read_json_object(index, _AGAIN).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise CheckpointError(f"{index}: its weight_map does not name the file of each weight; {_AGAIN}.")
    names = sorted(set(mapping.values()))
    for name in names:
        if Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{index}: names files outside its folder ({name!r}); {_AGAIN}.")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: has no {name}, which {INDEX} names; copy it there.")
    return names


def _check_place(folder: Path, file: Path) -> None:
    """Refuse a link that leads nowhere or out of the folder."""
    with reading(file, "put the file itself there"):
        outside = leads_out(folder, file)
    if outside:
        raise CheckpointError(f"{file}: a link out of its folder, which is not followed; copy the file there.")


def _stored(folder: Path) -> Stored | None:
    tensors, size = 0, 0
    for name in weight_names(folder):
        with _opened(folder / name) as keys:
            tensors += len(keys.keys())
        size += (folder / name).stat().st_size
    return Stored(tensors, _ENTRIES_PER_BYTE * size) if tensors else None


def _opened(path: Path) -> Any:
    with reading(path, _AGAIN, also=(SafetensorError,), what="not a safetensors file"):
        return safe_open(path, "pt")


def check_ranks(folder: Path) -> None:
    """Refuse adapters whose configuration asks for more than the file of their weights holds.

    Raises:
        CheckpointError: it does, or one of the two files is damaged.
    """
    path = folder / ADAPTER_CONFIG
    config = read_json_object(path, "save the adapter again")
    with _opened(folder / ADAPTER_WEIGHTS) as file:
        ranks = [file.get_slice(name).get_shape()[:1] for name in file.keys() if "lora_A" in name]  # noqa: SIM118
    largest = max((rank for shape in ranks for rank in shape), default=0)
    patterns = config.get("rank_pattern")
    asked = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else [])]
    for rank in asked:
        if rank is not None and (not isinstance(rank, int) or not 0 < rank <= largest):
            raise CheckpointError(
                f"{path}: r or rank_pattern asks for rank {str(rank)[:40]}, the weights have {largest}; "
                "save the adapter again."
            )
    if not isinstance(config.get("target_modules"), (list, str)):
        raise CheckpointError(f"{path}: target_modules names no modules; save the adapter again.")


def _check_generation(path: Path) -> None:
    config = read_json_object(path, "delete it, or save the model again")
    for kinds, names in _GENERATION.items():
        for name in names:
            if name in config and config[name] is not None and not _is_of(config[name], kinds):
                raise CheckpointError(
                    f"{path}: {name} = {str(config[name])[:40]!r}: of the wrong kind or size; delete the entry."
                )


def _is_of(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, list):
        return list in kinds and all(_is_of(item, (int, list)) for item in value)
    if isinstance(value, _NUMBER):
        return isinstance(value, kinds) and math.isfinite(value) and abs(value) < 2**63
    return isinstance(value, kinds)


def _found(config: dict[str, Any], names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    return ((name, config[name]) for name in names if config.get(name) is not None)


def _check_sizes(place: Path | str, config: dict[str, Any], stored: Stored | None) -> None:
    """Refuse sizes that the weights cannot have."""
    for name, value in (*_found(config, _LAYERS), *_found(config, _SIDES)):
        if isinstance(value, list) and all(isinstance(item, int) for item in value):
            continue  # some models list a width for each layer
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(f"{place}: {name} = {str(value)[:40]!r}: not a whole number; {_AGAIN}.")
        most = _LARGEST_SIDE if name in _SIDES else min(_MOST_LAYERS, stored.tensors if stored else _MOST_LAYERS)
        if value > most:
            raise CheckpointError(
                f"{place}: {name} = {value}: more than the weights can have, at most {most}; {_AGAIN}."
            )
    if stored is None:
        return

    def largest(names: tuple[str, ...], default: int) -> int:
        return max((value for _, value in _found(config, names) if isinstance(value, int)), default=default)

    width, layers = largest(_WIDTHS, 1), largest(_LAYERS, 1)
    for names, times in ((_ROWS, 1), (_BESIDE, layers), (_WIDTHS, 1)):
        entries = width * largest(names, 1) * times
        if entries > stored.entries:
            shown = ", ".join(f"{name} = {value}" for name, value in _found(config, (*_WIDTHS, *names, *_LAYERS)))
            raise CheckpointError(
                f"{place}: {shown}: {entries} weights, but the files hold at most {stored.entries}; {_AGAIN}."
            )
