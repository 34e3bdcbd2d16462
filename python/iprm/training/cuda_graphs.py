"""A training step of fixed shapes as CUDA graphs: one for the forward pass, one for the backward pass."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from iprm.distributed import world_size
from iprm.encoders.description import Input, each, flat, nested
from iprm.fusion.model import FusionModel
from iprm.fusion.output import FusionOutput

log = logging.getLogger(__name__)


class GraphedStep:
    """Replays `FusionModel.with_features` in training mode from a CUDA graph that is captured at the first step.

    The graph holds the shapes of the first step: the last, smaller batch of an epoch runs without a graph. If no graph can
    be captured, steps run eagerly, and the reason is logged once.

    Args:
        model: its parameters and buffers must keep their addresses, which the graph refers to.
    """

    def __init__(self, model: FusionModel) -> None:
        self.model = model
        self.accumulates = False  # whether gradients are accumulated over batches
        self._graphed: _Flat | None = None
        self._shapes: Any = None
        self._told: set[str] = set()

    def __call__(self, inputs: Mapping[str, Input], target: Tensor) -> tuple[dict[str, Tensor], FusionOutput]:
        obstacle = self._obstacle(target)
        if not obstacle and self._graphed is None:
            self._capture(inputs, target)
        if not obstacle and self._shapes != _shapes(inputs, target):
            obstacle = "this batch has another shape than the one captured"
        if obstacle:
            if obstacle not in self._told:
                self._told.add(obstacle)
                log.warning("cuda_graph: %s; such steps run without a graph", obstacle)
            return self.model.with_features(inputs, target)
        assert self._graphed is not None
        return self._graphed.unpacked(self._graphed(*flat(inputs).values(), target))

    def _obstacle(self, target: Tensor) -> str:
        """Why this step cannot run as a graph; "" if it can."""
        if target.device.type != "cuda":
            return f"a graph needs a GPU, and the batch is on {target.device.type!r}"
        if torch.is_autocast_enabled("cuda"):
            return "mixed precision casts weights anew every step, which a captured graph would not; use precision 32-true"
        if self.accumulates:
            return "gradients are accumulated over batches, and a replay overwrites those of the previous batch"
        if world_size() > 1:
            return "a step of several processes communicates between its launches"
        if any(getattr(module, "sampling", None) == "random" for module in self.model.modules()):
            return "pairs='random' draws on the host"
        return ""

    def _capture(self, inputs: Mapping[str, Input], target: Tensor) -> None:
        # the warm-up calls update buffers (λ, batch statistics), so they are restored afterwards
        kept = [buffer.clone() for buffer in self.model.buffers()]
        tensors = flat(inputs)
        graphed = _Flat(self.model, {modality: each(lambda _: None, x) for modality, x in inputs.items()})
        samples = tuple(x.detach().clone() for x in (*tensors.values(), target))
        torch.cuda.make_graphed_callables(graphed, samples)  # from here on, a call to it launches the graph
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), kept, strict=True):
                buffer.copy_(value)
        self._graphed, self._shapes = graphed, _shapes(inputs, target)


class _Flat(nn.Module):
    """The step with tensors as its only arguments and results, as a graph requires. `like` has the structure of the inputs."""

    def __init__(self, model: FusionModel, like: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.like = model, like
        self._spec: Any = None
        self._absent: list[int] = []

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        *inputs, target = tensors
        result = self.model.with_features(nested(dict(zip(flat(self.like), inputs, strict=True)), self.like), target)
        leaves, self._spec = torch.utils._pytree.tree_flatten(result)
        self._absent = [place for place, leaf in enumerate(leaves) if leaf is None]
        return tuple(leaf for leaf in leaves if leaf is not None)

    def unpacked(self, leaves: tuple[Tensor, ...]) -> Any:
        """What the module would have returned."""
        whole: list[Tensor | None] = list(leaves)
        for place in self._absent:
            whole.insert(place, None)
        return torch.utils._pytree.tree_unflatten(whole, self._spec)


def _shapes(inputs: Mapping[str, Input], target: Tensor) -> Any:
    return {name: (x.shape, x.dtype) for name, x in {**flat(inputs), "": target}.items()}
