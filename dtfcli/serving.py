"""Transformers' own server (`transformers serve`), OpenAI style, for every model that `dtf generate` opens.

That server looks a model's class up by name among Transformers' own, and so finds no routed one, whatever code comes
with the model. Here it is the same server, with the same endpoints; only the model and the tokenizer come from us.
"""

import errno
import os
import socket
from importlib import import_module
from typing import Any

import psutil
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_serve_available

from dtfcli.errors import ConfigError
from dtfcli.generation import dense_cache_bytes
from dtfcli.quiet import quiet_libraries

_MANAGER = "transformers.cli.serving.model_manager"
"""The server's file with the class that loads its models."""
_PAGE = 256
"""Tokens of a block of the paged cache, as Transformers has it."""


def require_server(host: str, port: int) -> None:
    """Raise a ConfigError, before a model is loaded, if packages are missing or the address cannot be listened on."""
    if not is_serve_available():
        raise ConfigError("dtf serve needs the packages of the server: pip install 'dtfcli[serve]'.")
    require_address(host, port)


def require_address(host: str, port: int) -> None:
    """Raise a ConfigError if nobody can listen on the address; port 0 stands for any free one."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: no such address; give localhost, or 0.0.0.0 for all networks.") from error
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                if os.name == "posix":  # as the server does: a port that is still closing is free
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            _explain(error, host, port)


def _explain(error: OSError, host: str, port: int) -> None:
    """Raise an error that the user can mend; an address family that this machine lacks is none."""
    if error.errno == errno.EADDRINUSE:
        raise ConfigError(f"--port {port}: another program listens there; choose another, or 0 for any free one.")
    if error.errno == errno.EACCES:
        raise ConfigError(f"--port {port}: not allowed for this user; choose one from 1024 on.")
    if error.errno == errno.EADDRNOTAVAIL and host not in ("localhost", "::"):
        raise ConfigError(f"--host {host}: not an address of this machine; give localhost, or 0.0.0.0 for all.")


def serve(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    host: str = "localhost",
    port: int = 8000,
    continuous_batching: bool = False,
) -> None:
    """Answer requests until SIGINT or SIGTERM. Logs go to stderr.

    Args:
        name: the model's name for clients; requests for another are refused.
        model: dense or causally routed, in eval mode.
        tokenizer: the model's.
        host, port: checked by `require_server`.
        continuous_batching: many at once, with Transformers' paged cache; else one after another.
    """
    from transformers.cli.serve import Serve

    manager: Any = import_module(_MANAGER)
    stock = manager.ModelManager
    loaded = {"_load_processor": lambda *_, **__: tokenizer, "_load_model": lambda *_, **__: model}
    manager.ModelManager = type("OneModel", (stock,), loaded)  # for every name that the server asks for
    sizes = _paged_cache(model) if continuous_batching and model.device.type == "cpu" else {}
    server: Any = object.__new__(Serve)  # it runs inside of its constructor
    try:
        with quiet_libraries(verbose=True):
            server.__init__(force_model=name, continuous_batching=continuous_batching, host=host, port=port, **sizes)
    finally:
        if continuous_batching and hasattr(server, "_generation_state"):
            server._generation_state.shutdown()  # else its thread keeps the process
        manager.ModelManager = stock


def _paged_cache(model: Any) -> dict[str, int]:
    """Sizes for a processor: eight texts of the model's positions, at most a quarter of the memory that is free.

    Transformers would take nine tenths of the machine's memory, whoever uses it.
    """
    texts = 8 * model.config.max_position_embeddings
    positions = min(texts, psutil.virtual_memory().available // 4 // dense_cache_bytes(model, 1))
    return {"cb_num_blocks": max(1, positions // _PAGE), "cb_max_batch_tokens": 512}
