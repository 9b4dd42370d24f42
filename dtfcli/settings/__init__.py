"""The one schema of a run, and where its values come from.

In: a preset, a TOML file, DTF_… variables and KEY=VALUE overrides. Out: a validated `Settings`.
`schema` joins the groups, a file each: `run`, `model`, `data`, `training`, `after`. `sources` reads the places that a
value may come from, `resolve` merges them, `describe` puts types and problems in words. `Settings` and `load_settings`
are imported on first use: `dtf --help` lists presets without pydantic.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtfcli.settings.schema import Settings, load_settings

__all__ = ["Settings", "load_settings"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dtfcli.settings' has no attribute '{name}'")
    from dtfcli.settings import schema

    return getattr(schema, name)
