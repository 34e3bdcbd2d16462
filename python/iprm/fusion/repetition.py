"""Training passes of a module whose state moves once per step: which pass is new, and which repeats an earlier one.

Two kinds of repetition are recognised.

1. Recomputation inside a backward pass, by activation checkpointing of any kind. Only a pass under saved-tensor hooks
   (``use_reentrant=False``) or without gradients (``use_reentrant=True``, and autograd functions that work like it) can be
   recomputed, so only these are remembered. The pass that is being recomputed is found by the memory of its features; where
   encoders are recomputed too and their features have moved, by the memory of its target and by the values of its features.
2. A pass outside of a backward pass, not remembered for the first kind, on the very feature tensors of the last one, none of
   which was modified in between, nor the parameters or λ: ``torch.func.functional_call`` twice, for example. The measured KL
   must be equal as well, because not every modification counts as one: fused optimisers and those that write to ``.data``
   do not change the version of a parameter. The first such modification that is noticed ends this kind for the module.

In doubt a pass is new: λ that moves twice in a step is a smaller fault than λ that stops moving.

Limits. Features that a second pass of the encoders has computed anew, outside of a backward pass, are of a new step. Passes of
bit-identical features in different tensors that are pending at the same time are told apart by their order alone, newest
first; gradients of such passes are wrong if their backward passes run in another order. More than `PENDING` passes between a
pass and its backward pass are too many. Compiled code does not run this: of a compiled module, only the last pass can be
recomputed, and nothing of the second kind is recognised. In a run of several processes the second kind is not recognised
either, because processes that disagreed would call different collectives.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from .heads import PLAIN_TENSORS

#: Passes remembered for recomputation. Each keeps λ, KL and a number per modality.
PENDING = 256


class Pass:
    """One pass: the λ it probed with, the pairs it drew, and what identifies it."""

    __slots__ = (
        *("weight", "drawn", "features", "versions", "target", "kl", "rows", "sums", "recomputed"),
        *("buffer", "module_versions"),
    )

    def __init__(self, weight: Tensor, drawn: list[int], features: Sequence[Tensor], target: Tensor | None) -> None:
        self.weight, self.drawn = weight, drawn
        self.features = [weakref.ref(x) for x in features]
        self.versions = _versions(features)
        self.target = None if target is None else weakref.ref(target)
        self.kl: Tensor | None = None  # (P, 2) or (2P,), once measured
        self.rows = len(features[0])
        self.sums: list[Tensor] | None = None  # see `_sums`, if the pass may be recomputed
        self.recomputed = False
        # of the module after the pass: λ, and the versions of λ and the parameters
        self.buffer: Tensor | None = None
        self.module_versions: list[int] | None = None
        if may_be_recomputed() and not in_backward():
            self.sums = _sums(features)

    def of_tensors(self, features: Sequence[Tensor]) -> bool:
        """Whether these are the very tensors of the pass, unmodified."""
        for reference, x in zip(self.features, features, strict=True):
            if reference() is not x:
                return False
        return self.versions is not None and self.versions == _versions(features)

    def of_memory(self, features: Sequence[Tensor]) -> bool:
        """Whether these tensors, or those that they were detached from, are the features of the pass, unmodified."""
        alive = all(_same_memory(reference(), x) for reference, x in zip(self.features, features, strict=True))
        return alive and self.versions is not None and self.versions == _versions(features)

    def of_target(self, target: Tensor | None) -> bool:
        return target is not None and self.target is not None and _same_memory(self.target(), target)


class History:
    """The passes of one module, newest last. Copied and pickled without them: they belong to graphs of the original."""

    def __init__(self) -> None:
        self.last: Pass | None = None
        self._versions_tell = True  # no modification was noticed yet that versions do not show
        self._pending: deque[Pass] = deque(maxlen=PENDING)

    def __reduce__(self) -> tuple[type[History], tuple[()]]:
        return History, ()

    def recomputed(self, features: Sequence[Tensor], target: Tensor | None) -> Pass | None:
        """The pass that a pass inside a backward pass recomputes; None if none is remembered.

        No device is synchronised unless several passes qualify.
        """
        first = features[0]
        pending = [own for own in reversed(self._pending) if own.rows == len(first)]
        pending = [own for own in pending if own.weight.device == first.device and len(own.features) == len(features)]
        if not pending:
            return None
        sums = _sums(features)  # also if not needed: selective checkpointing counts the operators of both passes
        exact = [own for own in pending if own.of_memory(features)]
        found = exact or [own for own in pending if own.of_target(target)] or pending
        if len(found) > 1 and not exact and not capturing(first):
            distances = [sum(float((a - b).abs()) for a, b in zip(own.sums or (), sums, strict=True)) for own in found]
            found = [own for own, distance in zip(found, distances, strict=True) if not distance > min(distances)]
        chosen = next((own for own in found if not own.recomputed), found[0])
        chosen.recomputed = True
        return chosen

    def repeated(self, features: Sequence[Tensor], buffer: Tensor, parameters: Sequence[Tensor]) -> Pass | None:
        """The last pass, if a pass on these features and parameters with this λ is that pass again."""
        last = self.last if self._versions_tell and not may_be_recomputed() else None
        if not all(type(x) in PLAIN_TENSORS and not x.is_meta for x in features):  # the values of others cannot be compared
            return None
        if last is None or last.buffer is not buffer or len(last.features) != len(features) or not last.of_tensors(features):
            return None
        versions = _versions([buffer, *parameters])
        return last if versions is not None and last.module_versions == versions and not capturing(features[0]) else None

    def measured(self, own: Pass, kl: Tensor, buffer: Tensor, parameters: Sequence[Tensor]) -> None:
        """Completes a new pass, after λ has moved."""
        own.kl = kl
        own.buffer, own.module_versions = buffer, _versions([buffer, *parameters])
        self.last = own
        if own.sums is not None:
            self._pending.append(own)

    def refute(self) -> None:
        """The parameters of a pass taken for a repetition were modified, and their versions did not change."""
        self.last, self._versions_tell = None, False


def in_backward() -> bool:
    """Whether this code runs inside a backward pass, where a pass is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def may_be_recomputed() -> bool:
    """Whether a later backward pass may recompute what runs now."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which holds every pass that it captures as a new one."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _versions(tensors: Sequence[Tensor]) -> list[int] | None:
    """Counts of modifications in place; None for inference tensors, which do not count them."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return None


def _same_memory(own: Tensor | None, other: Tensor) -> bool:
    if own is other:
        return True
    return (
        own is not None and own.shape == other.shape and own.stride() == other.stride() and own.data_ptr() == other.data_ptr()
    )


@torch.no_grad()
def _sums(features: Sequence[Tensor]) -> list[Tensor]:
    """One number per modality, Σ_ij u_i v_j x_ij with irregular u and v, by which passes of other features differ."""
    found = []
    for x in features:
        rows, columns = (
            torch.arange(1, size + 1, device=x.device, dtype=torch.float32).mul(0.618034).frac() for size in x.shape
        )
        found.append(torch.mv(x.detach(), columns.to(x.dtype)).float().nan_to_num().dot(rows))
    return found
