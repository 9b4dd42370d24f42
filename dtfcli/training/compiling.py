"""`training.compile`: torch.compile for each decoder layer by itself.

One layer is the unit that repeats: kinds of layers (dense, decision, routed) compile once each and serve all layers of
their kind, where the whole model would be compiled as one long graph. The loss walks over chunks in its own function
and needs no compiler.
"""

from typing import Any

import torch

from dtfcli.models.cache import CACHE_NAME
from dtfcli.models.modeling_routed_mlp import decoder_layers, routed_mlps
from dtfcli.models.static import StaticLayerCache


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Compile every decoder layer of a causal language model in place; parameter names stay as they are.

    A layer is compiled whole (`fullgraph`): a graph break would cost more than compiling gains. A routed MLP takes as
    many tokens as score high, so it stays as it is, and its layer is compiled around it. Shapes are known
    beforehand in training by `topk` at the model's own γ, and in decoding with a static cache. Everything else
    (evaluation, the causal modes, a γ that is still annealed) runs as before.

    Args:
        model: routed or stock, with the layers that `decoder_layers` finds.
        backend: of torch.compile.
    """
    layers = decoder_layers(model)
    # One for each kind of layer and number of routed tokens, all of the same code object; at most one a layer.
    limit: Any = torch._dynamo.config
    limit.recompile_limit = max(limit.recompile_limit, len(layers) + 1)
    for mlp in routed_mlps(model).values():
        mlp.forward = torch.compiler.disable(mlp.forward)  # type: ignore[method-assign]
    for layer in layers:
        _compile(layer, backend)


def _compile(layer: Any, backend: str) -> None:
    whole = not routed_mlps(layer)
    compiled = torch.compile(layer._call_impl, backend=backend, fullgraph=whole, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        static = layer.training and torch.is_grad_enabled()
        context = kwargs.get("context")
        if context is not None:  # a routed layer
            trained = context.config.layer_capacities()
            static = static and context.mode == "topk" and context.capacities == trained
        cache = kwargs.get(CACHE_NAME)
        static = static or (cache is not None and isinstance(cache.layers[0], StaticLayerCache))
        return compiled(*args, **kwargs) if static else layer._call_impl(*args, **kwargs)

    # The attribute that `nn.Module.compile` sets; it is neither saved nor copied with the module.
    layer._compiled_call_impl = call
