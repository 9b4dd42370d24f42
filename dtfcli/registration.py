"""Makes `import dtfcli` register the routed models with Transformers' Auto classes, without importing Transformers.

The command line imports this package too and must answer `--help` at once, while importing Transformers takes
seconds. So registration happens right after Transformers is imported, by whomever; or at once where it already
is. When our own model files are what imports Transformers, it waits until they are complete.
"""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec


def _register() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from dtfcli.models.modeling_dynamic import MODELS

    for model in MODELS.values():
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)


class _AfterImport:
    """A finder that registers once Transformers is there and none of the modules it watches is half imported."""

    def __init__(self) -> None:
        self.running = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> "ModuleSpec | None":
        """Let the other finders find a module that matters, and watch it run."""
        if fullname != "transformers" and not fullname.startswith("dtfcli.models."):
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader)
        return spec

    def _watch(self, loader: "Loader") -> None:
        run_module = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self.running += 1
            try:
                run_module(module)
            finally:
                self.running -= 1
            if not self.running and "transformers" in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one module's own loader


def register_auto_classes() -> None:
    """Register now if Transformers is imported, else as soon as it is."""
    if "transformers" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())
