"""What a stage works with: its deadline, its device, and the JSON that is written whenever something is known."""

import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ERROR_LINES = 25
"""Of a traceback or of a process's output: the end says what went wrong."""


class OutOfTime(Exception):
    """A measurement was given up because its stage's time was over."""


@dataclass
class Job:
    """One stage at work.

    Attributes:
        name: of the stage, and of its file.
        out: folder of the results.
        data: folder of what `--pack` put together; may be missing.
        seconds: that the stage may take.
        rehearse: toy sizes on the CPU.
        found: what its JSON says; `errors` among it, a list of tracebacks.
    """

    name: str
    out: Path
    data: Path
    seconds: float
    rehearse: bool = False
    clock: Callable[[], float] = time.monotonic
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._began = self.clock()
        self.found = {"stage": self.name, "rehearsal": self.rehearse, "complete": False, "errors": [], **self.found}

    def left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.seconds - (self.clock() - self._began)

    def check(self, *_: Any) -> None:
        """Stop what is measured once the time is over; takes what a progress callback is given.

        Raises:
            OutOfTime: it is.
        """
        if self.left() <= 0:
            raise OutOfTime(f"the stage's {self.seconds:.0f} seconds are over")

    def write(self, **values: Any) -> None:
        """Add to the JSON, and replace the file."""
        self.found |= values
        self.found["seconds"] = round(self.clock() - self._began, 2)
        write_json(self.out / f"{self.name}.json", self.found)

    def failed(self, what: str = "") -> None:
        """Note the exception at hand."""
        lines = traceback.format_exc().splitlines()[-ERROR_LINES:]
        self.found["errors"].append("\n".join([*filter(None, [what]), *lines]))
        self.write()

    def device(self) -> "torch.device":
        """Where to measure.

        Raises:
            RuntimeError: there is no GPU, and this is no rehearsal.
        """
        import torch

        if self.rehearse:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} finds no GPU here; --rehearse runs on the CPU")
        return torch.device("cuda")


def run_stage(stage: Callable[[Job], None], job: Job) -> None:
    """Run a stage to its end, whatever happens in it; its JSON says how it went."""
    job.write()
    try:
        stage(job)
    except OutOfTime as error:
        job.found["stopped"] = str(error)
    except Exception:
        job.failed()
    job.write(complete=True)


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Replace a file as a whole: what is killed leaves the last state, not half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(values, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(partial, file)


def read_json(file: Path) -> dict[str, Any]:
    """What a stage wrote; nothing where it wrote nothing."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
