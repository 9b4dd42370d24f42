"""`dtf serve`: Transformers' OpenAI-style server with a dense or routed model."""

from typing import Annotated

import typer

from dtfcli.cli import options
from dtfcli.errors import ConfigError
from dtfcli.settings.sources import API_KEY

Host = Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0: reachable from other machines.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: any free one.")]
ContinuousBatching = Annotated[
    bool, typer.Option("--continuous-batching", help="Answer many requests at once. Not with routed blocks.")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", metavar="K", envvar=API_KEY, help="Answer only requests with this key.", show_default=False
    ),
]
NoApiKey = Annotated[bool, typer.Option("--no-api-key", help="Let everybody in who reaches the address.")]
CorsOrigin = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin",
        metavar="URL",
        help="Let scripts of this web page ask, such as https://me.example; give it again for more.",
        show_default=False,
    ),
]


@options.opens_models("quantize")
def serve(
    model: options.Model,
    host: Host = "localhost",
    port: Port = 8000,
    continuous_batching: ContinuousBatching = False,
    api_key: ApiKey = None,
    no_api_key: NoApiKey = False,
    cors_origin: CorsOrigin = None,
    *,
    loading: options.Loading,
) -> None:
    """Serve a model to OpenAI clients: chat completions, completions and responses, streamed or whole.

    It is the server of `transformers serve`, which cannot open routed models by itself. Ctrl-C ends it.

    \b
    Examples:
      dtf serve outputs/2026-01-31/quickstart
      DTF_API_KEY=… dtf serve MODEL --host 0.0.0.0 --port 8080
      dtf serve MODEL --capacity 0.25      # route fewer tokens
    """
    from dtfcli.serving.access import Access, hide_key, require_access

    hide_key(api_key)
    from dtfcli.cli import render
    from dtfcli.generation import require_causal
    from dtfcli.models.modeling_routed_mlp import RoutedCausalLM
    from dtfcli.models.pretrained import is_routed
    from dtfcli.serving import server

    server.require_server(host, port)
    require_access(host, api_key, no_api_key)
    loaded, tokenizer = loading.open(model)
    if continuous_batching and is_routed(loaded) and not isinstance(loaded, RoutedCausalLM):
        raise ConfigError(
            "--continuous-batching: its paged cache holds every token in every layer, a routed block only those it "
            "routed. Leave it out, or serve a model with routed MLPs or a dense one."
        )
    require_causal(loaded)
    if not tokenizer.chat_template:
        render.warn(f"{model}: no chat template: /v1/completions answers, chats and responses do not.")
    render.note(f"clients call the model {model}")
    access = Access(api_key, tuple(cors_origin or ()))
    server.serve(model, loaded, tokenizer, host=host, port=port, continuous_batching=continuous_batching, access=access)
