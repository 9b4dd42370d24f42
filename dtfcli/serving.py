"""Transformers' own server (`transformers serve`), OpenAI style, for every model that `dtf generate` opens.

That server looks a model's class up by name among Transformers' own, and so finds no routed one, whatever code comes
with the model. Here it is the same server, with the same endpoints; only the model and the tokenizer come from us.
"""

import errno
import os
import socket
from importlib import import_module
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_serve_available

from dtfcli.errors import ConfigError
from dtfcli.generation import require_causal
from dtfcli.quiet import quiet_libraries

_MANAGER = "transformers.cli.serving.model_manager"
"""Where the server keeps what loads its models."""


def require_server(host: str, port: int) -> None:
    """Look whether a server can start here, before a model is loaded.

    Args:
        host, port: where it is to listen; port 0 stands for any free one.

    Raises:
        ConfigError: packages are missing, the address is not one of this machine, or the port is taken.
    """
    if not is_serve_available():
        raise ConfigError("dtf serve needs the packages of the server: pip install 'dtfcli[serve]'.")
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
    """Raise what the user can mend; an address family that this machine lacks is none of it."""
    if error.errno == errno.EADDRINUSE:
        raise ConfigError(f"--port {port}: another program listens there; choose another, or 0 for any free one.")
    if error.errno == errno.EACCES:
        raise ConfigError(f"--port {port}: not allowed for this user; choose one from 1024 on.")
    if error.errno == errno.EADDRNOTAVAIL and host not in ("localhost", "::"):
        raise ConfigError(f"--host {host}: not an address of this machine; give localhost, or 0.0.0.0 for all.")


def require_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Look whether a model can answer; returns what its user should know.

    Raises:
        ConfigError: `topk` routing.
    """
    require_causal(model)
    if tokenizer.chat_template:
        return []
    return ["the tokenizer has no chat template: /v1/completions answers, chats and responses do not"]


def serve(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, host: str = "localhost", port: int = 8000
) -> None:
    """Answer requests until the process is told to stop (SIGINT, SIGTERM). Logs go to stderr.

    Requests are computed one after another, in the order in which they came.

    Args:
        name: what clients call the model; requests for another are refused.
        model: dense or routed, in eval mode, as `require_model` wants it.
        tokenizer: the model's.
        host, port: where to listen, as `require_server` wants it.
    """
    from transformers.cli.serve import Serve

    manager = import_module(_MANAGER)
    stock = manager.ModelManager
    manager.ModelManager = _manager_of(stock, model, tokenizer)  # type: ignore[attr-defined]
    try:
        with quiet_libraries(verbose=True):
            Serve(force_model=name, host=host, port=port)
    finally:
        manager.ModelManager = stock  # type: ignore[attr-defined]


def _manager_of(stock: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> type:
    """The class that loads the server's models, with one that is loaded already."""

    class OneModel(stock):
        """Gives the server this one model, whatever name it asks for."""

        def _load_processor(self, *_: Any, **__: Any) -> PreTrainedTokenizerBase:
            return tokenizer

        def _load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
            return model

    return OneModel
