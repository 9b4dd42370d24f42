"""Runs Transformers' own server with a model of ours, behind the gates of `access` and `requests`.

That server looks a model's class up by name among Transformers' own, and so finds no routed one, whatever code comes
with the model. Here it is the same server, with the same endpoints; the model and the tokenizer come from us,
and so do the two gates around it.
"""

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_serve_available

from dtfcli.errors import ConfigError
from dtfcli.models.stock import longest_text
from dtfcli.quiet import quiet_libraries
from dtfcli.serving.access import EVERYBODY, Access
from dtfcli.serving.batches import PAGE, RUNNER, Batches, paged_cache
from dtfcli.serving.requests import Limits, RequestGate

_SERVING = "transformers.cli.serving"
"""The package of the server."""
_POSITIONS = 2**15
"""Of a model whose configuration has no limit."""


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
    access: Access = EVERYBODY,
) -> None:
    """Answer requests until SIGINT or SIGTERM. Running answers finish, unless it comes again. Logs go to stderr.

    Args:
        name: the model's name for clients; requests for another are refused.
        model: dense or causally routed, in eval mode.
        tokenizer: the model's.
        host, port: checked by `require_server`.
        continuous_batching: many at once, with Transformers' paged cache; else one after another.
        access: who may ask.
    """
    from transformers.cli.serve import Serve

    positions = longest_text(model.config, _POSITIONS)
    gates: list[RequestGate] = []

    def build(stock: Any, *given: Any, **named: Any) -> Any:
        gates.append(RequestGate(stock(*given, **named), name, limits, access.origins))
        return access.around(gates[0])

    def one_model(stock: Any) -> Any:  # for every name that the server asks for
        return type(
            "OneModel", (stock,), {"_load_processor": lambda *_, **__: tokenizer, "_load_model": lambda *_, **__: model}
        )

    sizes, batches = {}, Batches(model) if continuous_batching else None
    if continuous_batching and model.device.type == "cpu":
        sizes = paged_cache(model, positions)
        positions = min(positions, sizes["cb_num_blocks"] * PAGE)
    limits = Limits(tokens=positions)
    server: Any = object.__new__(Serve)  # it runs inside of its constructor
    with ExitStack() as stack:
        stack.enter_context(_instead(f"{_SERVING}.model_manager", "ModelManager", one_model))
        stack.enter_context(_instead(f"{_SERVING}.utils", "GenerationState", partial(_within, positions, batches)))
        stack.enter_context(_instead(f"{_SERVING}.server", "build_server", lambda stock: partial(build, stock)))
        stack.enter_context(_instead("uvicorn", "Server", lambda stock: _ending(stock, gates)))
        if batches:
            stack.enter_context(_instead(*RUNNER, batches.runner))
            # Else its thread keeps the process.
            stack.callback(lambda: hasattr(server, "_generation_state") and server._generation_state.shutdown())
        stack.enter_context(quiet_libraries(verbose=True))
        server.__init__(force_model=name, continuous_batching=continuous_batching, host=host, port=port, **sizes)


@contextmanager
def _instead(module: str, name: str, ours: Callable[[Any], Any]) -> Iterator[None]:
    """What a module calls by a name is made from the stock one, for a while."""
    place = import_module(module)
    stock = getattr(place, name)
    setattr(place, name, ours(stock))
    try:
        yield
    finally:
        setattr(place, name, stock)


def _ending(stock: Any, gates: list[RequestGate]) -> Any:
    """Uvicorn's server, which answers 503 while the running answers finish, and ends at once by a second signal."""

    class Server(stock):
        def handle_exit(self, sig: int, frame: Any) -> None:
            self.force_exit = self.should_exit
            super().handle_exit(sig, frame)

        async def shutdown(self, sockets: Any = None) -> None:
            for gate in gates:
                gate.is_closing = True
                while gate.running and not self.force_exit:
                    await asyncio.sleep(0.05)
            await super().shutdown(sockets)

    return Server


def _within(positions: int, batches: Batches | None, stock: Any) -> Any:
    """The server's state of generation, in which a text ends at the model's positions, or with its request."""

    class Within(stock):
        def get_manager(self, *given: Any, **named: Any) -> Any:
            manager = super().get_manager(*given, **named)
            ours: dict[str, Any] = {"generate_streaming": _streamed, "generate_non_streaming": _whole}
            if batches and hasattr(manager, "_cb"):
                manager.init_cb = partial(batches.open, MethodType(type(manager).init_cb, manager))
                ours = dict.fromkeys(ours, partial(_batched, batches))
            for name, function in ours.items():
                setattr(manager, name, partial(function, MethodType(getattr(type(manager), name), manager), positions))
            return manager

    return Within


def _batched(batches: Batches, stock: Any, positions: int, *given: Any, request_id: str, **named: Any) -> Any:
    _fit(positions, *given)
    _, _, inputs, config = given
    batches.enter(stock.__self__._cb, request_id, len(inputs["input_ids"]), config)
    return stock(*given, request_id=request_id, **named)


def _streamed(stock: Any, positions: int, *given: Any, **named: Any) -> Any:
    _fit(positions, *given)
    return stock(*given, **named)


async def _whole(stock: Any, positions: int, *given: Any, **named: Any) -> Any:
    """As the stock method; if nobody waits any more, it computes no further token."""
    _fit(positions, *given)
    model, processor, inputs, config = given
    is_over = [False]
    inputs = {**inputs, "stopping_criteria": [lambda ids, *_, **__: torch.full((len(ids),), is_over[0])]}
    try:
        return await asyncio.shield(stock(model, processor, inputs, config, **named))
    except asyncio.CancelledError:
        is_over[0] = True
        raise


def _fit(positions: int, model: Any, processor: Any, inputs: Any, config: Any) -> None:
    """Refuse a prompt that leaves no room for a token; end the answer where the room ends."""
    from fastapi import HTTPException

    ids = inputs["input_ids"]
    length = len(ids) if isinstance(ids, list) else ids.shape[-1]
    if length >= positions:
        raise HTTPException(400, f"The prompt has {length} tokens; with the answer at most {positions} fit.")
    config.max_new_tokens = min(config.max_new_tokens, positions - length)
