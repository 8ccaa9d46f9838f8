"""torch.compile of a whole model."""

from collections.abc import Callable

import torch

from models.moe import ExpertKernel, MoE
from models.transformer import Output, Transformer

# Kernels whose matmuls have the shapes of the experts' loads, read on the host.
SHAPED_BY_LOAD = (ExpertKernel.auto, ExpertKernel.loop, ExpertKernel.padded)


def compile_transformer(model: Transformer, backend: str = "inductor") -> Callable[..., Output]:
    """`torch.compile(model)`, with the routed experts left out where their shapes change from batch to batch.

    The layout of tokens by expert of the kernels `loop` and `padded` is made of Python numbers that depend on the
    data. Compiled, each new load of an expert is a new graph: on a tiny model Dynamo reaches its limit of 8 per
    function within five steps, each of them seconds long, and then runs that function as it is, which is what is
    asked of it here from the beginning. The model itself is changed in that its MoE layers stay out of later graphs
    too. The other kernels are compiled with the rest.

    Args:
        model: with its weights on their device; they are shared with what is returned.
        backend: of torch.compile.

    Returns:
        A function with the arguments of `Transformer.forward`.
    """
    for module in model.modules():
        if isinstance(module, MoE) and module.experts.kernel in SHAPED_BY_LOAD:
            # On the instance: as a decorator it would import the compiler in every process, for about a second.
            module.routed = torch.compiler.disable(module.routed)  # type: ignore[method-assign]
    return torch.compile(model, backend=backend)
