"""`dtf demo`: a page in the browser, with a slider for γ."""

from pathlib import Path
from typing import Annotated

import typer

from dtfcli.cli import options
from dtfcli.cli.serve import ApiKey, Host, NoApiKey

Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port of the page; 0: any free one.")]


@options.opens_models("quantize")
def demo(
    model: options.Model,
    host: Host = "localhost",
    port: Port = 7860,
    api_key: ApiKey = None,
    no_api_key: NoApiKey = False,
    *,
    loading: options.Loading,
) -> None:
    """Open a page in the browser: a prompt, a slider for γ, and the continuation with the depth of each token.

    The page shows tokens a second and the share of the dense model's FLOPs, and on request the dense model's answer.
    It computes one answer at a time and loads nothing from the network. Ctrl-C ends it.

    \b
    Examples:
      dtf demo outputs/2026-01-31/converted
      dtf demo MODEL --capacity 0.5 --port 8080
      dtf push MODEL REPO --space OWNER/NAME   # the same page as a Space
    """
    from dtfcli.serving.access import hide_key, require_access

    hide_key(api_key)
    from dtfcli.demo.page import Demo, require_demo
    from dtfcli.generation import require_causal

    require_demo(host, port)
    require_access(host, api_key, no_api_key)
    loaded, tokenizer = loading.open(model)
    require_causal(loaded)
    name = Path(model).resolve().name if Path(model).exists() else model
    Demo(name, loaded, tokenizer, loading.capacity).serve(host, port, api_key)
