"""The base class of every group of settings, and the kinds of numbers."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dtfcli.settings import describe


def whole(value: Any) -> Any:
    """Let 1e6 stand for 1000000 where a whole number is wanted."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def require(condition: bool, name: str, value: Any, remedy: str) -> None:
    """Raise ValueError, worded as all mistakes in settings are, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} = {describe.show_value(value)}: {remedy}")


Count = Annotated[int, BeforeValidator(whole), Field(ge=1)]
Rate = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Group(BaseModel):
    """A group of settings: unknown keys are refused, values are not bent into shape, nothing changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
