"""Makes `import dtfcli` register the routed models with Transformers' Auto classes, without importing Transformers.

The command line imports this package too and must answer `--help` at once, while importing Transformers takes
seconds. So registration happens right after Transformers is imported, by whomever; or at once where it already
is. When our own model files are what imports Transformers, it waits until they are complete.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec


def _register() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto import configuration_auto

    from dtfcli.models.modeling_dynamic import MODELS

    for model in MODELS.values():
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
    configs: Any = configuration_auto.CONFIG_MAPPING
    configs._extra_content = _Registered(configs._extra_content, _routed_config)
    for auto in (AutoModel, AutoModelForCausalLM):
        models: Any = auto._model_mapping
        models._extra_content = _Registered(models._extra_content, partial(_routed_model, models))


class _Registered(dict[Any, Any]):
    """What is registered with an Auto class, and what `make` gives for other keys: classes with routed MLPs.

    They are made of stock classes, whichever those are, when they are asked for.
    """

    def __init__(self, registered: dict[Any, Any], make: Callable[[Any], Any]) -> None:
        super().__init__(registered)
        self.make = make

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self.make(key) is not None

    def __missing__(self, key: Any) -> Any:
        if (made := self.make(key)) is None:
            raise KeyError(key)
        self[key] = made
        return made


def _routed_config(model_type: Any) -> Any:
    """The configuration class of a model type such as "routed_llama"; None: the type is no such one."""
    from transformers.models.auto import configuration_auto, modeling_auto

    from dtfcli.models.configuration_routed_mlp import PREFIX, routed_config_class

    stock = str(model_type).removeprefix(PREFIX)
    if stock == model_type or stock not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    return routed_config_class(configuration_auto.CONFIG_MAPPING[stock])


def _routed_model(models: Any, config_class: Any) -> Any:
    """The model class of such a configuration class of ours, by the Auto class's `models`; None: it is no such one."""
    from dtfcli.models import configuration_routed_mlp, modeling_routed_mlp

    if getattr(config_class, "__module__", None) != configuration_routed_mlp.__name__:
        return None
    stock = models[config_class.stock]
    return modeling_routed_mlp.routed_classes(stock)


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
