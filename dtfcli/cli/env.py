"""`dtf env`: versions and devices for a bug report."""

import os
import platform
import sys
from typing import Any

from dtfcli.cli import options

LIBRARIES = (
    *("torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors", "huggingface_hub", "datasets"),
    *("lm-eval", "pydantic-settings", "typer", "rich", "gguf", "flash-attn", "liger-kernel"),
)


def env(json: options.Json = False) -> None:
    """Print versions, devices and threads, for bug reports.

    \b
    Examples:
      dtf env
      dtf env --json
    """
    from dtfcli.cli import render

    report = _report()
    if json:
        render.emit_json(report)
        return
    versions = [(name, version or "not installed") for name, version in report["libraries"].items()]
    devices = [("device", device) for device in report["devices"]]
    rows = [("dtf", report["dtf"]), ("python", report["python"]), ("platform", report["platform"]), *devices]
    rows.append(("threads", f"{report['threads']} of {report['cores']} cores"))
    render.out.print(render.table(["", ""], [*rows, *versions]), soft_wrap=True)


def _report() -> dict[str, Any]:
    import torch

    import dtfcli

    return {
        "dtf": dtfcli.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "executable": sys.executable,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": ["cpu", *_accelerators()],
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def _version(library: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _accelerators() -> list[str]:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return []
    names = [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    if accelerator.type == "cuda":
        names = [f"{name} {torch.cuda.get_device_name(i)}" for i, name in enumerate(names)]
    return names
