"""What must be known of each library as a whole: which of its classes are flow layers, how its models are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .registry import qualified

# The base classes of each library's layers: what derives from one and has no adapter is listed as kept.
LAYER_BASES = {
    "nflows.transforms.base.Transform": "nflows",
    "normflows.flows.base.Flow": "normflows",
    "FrEIA.modules.base.InvertibleModule": "FrEIA",
    "zuko.lazy.LazyTransform": "zuko",
}

# Layers of theirs that need no adapter, and why.
PLAIN = {
    "normflows.flows.affine.glow.GlowBlock": "a container: its layers are what is fused",
    "normflows.flows.base.Composite": "a container: its layers are what is fused",
    "normflows.flows.base.Reverse": "a container: its layer is what is fused",
    "zuko.lazy.LazyInverse": "a container: its layer is what is fused",
    "FrEIA.framework.sequence_inn.SequenceINN": "a container: its layers are what is fused",
    "FrEIA.framework.graph_inn.GraphINN": "a container: its layers are what is fused",
    "FrEIA.framework.reversible_graph_net.ReversibleGraphNet": "a container: its layers are what is fused",
    "FrEIA.framework.reversible_sequential_net.ReversibleSequential": "a container: its layers are what is fused",
    "FrEIA.modules.coupling_layers.NICECouplingBlock": "two additions: nothing to fuse",
    "FrEIA.modules.coupling_layers.GINCouplingBlock": "log-scales centred over the channels, which no kernel does",
    "FrEIA.modules.fixed_transforms.FixedLinearTransform": "one matrix product: nothing to fuse",
    "FrEIA.modules.graph_topology.Split": "a view: nothing to fuse",
    "FrEIA.modules.graph_topology.Concat": "one copy: nothing to fuse",
    "FrEIA.modules.reshapes.Flatten": "a view: nothing to fuse",
    "FrEIA.modules.reshapes.Reshape": "a view: nothing to fuse",
    "normflows.flows.reshape.Split": "views of its input: nothing to fuse",
    "normflows.flows.reshape.Merge": "one copy: nothing to fuse",
}


def _log_prob(model: Any, *inputs: Any) -> Any:
    return model.log_prob(*inputs)


def _zuko(model: Any, x: Any, context: Any = None) -> Any:
    return model(context).log_prob(x)


def _zuko_transform(model: Any, x: Any, context: Any = None) -> Any:
    return model(context).call_and_ladj(x)


# How a model is run on example inputs (the data first, then the context); anything else is called.
_ENTRIES: dict[str, Callable] = {
    "nflows.distributions.base.Distribution": _log_prob,
    "normflows.core.NormalizingFlow": _log_prob,
    "normflows.core.ConditionalNormalizingFlow": _log_prob,
    "normflows.core.ClassCondFlow": _log_prob,
    "normflows.core.MultiscaleFlow": _log_prob,
    "zuko.lazy.LazyDistribution": _zuko,
    "zuko.lazy.LazyTransform": _zuko_transform,
}


def library_of(module: nn.Module) -> str | None:
    """The library whose layer this is, or None."""
    return next((LAYER_BASES[q] for c in type(module).__mro__ if (q := qualified(c)) in LAYER_BASES), None)


def entry_of(model: nn.Module) -> Callable:
    """How this model is run: ``entry(model, *example_inputs)``."""
    return next((_ENTRIES[q] for c in type(model).__mro__ if (q := qualified(c)) in _ENTRIES), _called)


def _called(model: nn.Module, *inputs: Any) -> Any:
    return model(*inputs)
