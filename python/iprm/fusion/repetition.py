"""Training passes of a module whose state moves once per step: which pass is new, and which repeats an earlier one.

Two kinds of repetition are recognised.

1. Recomputation inside a backward pass, by activation checkpointing of any kind. Only a pass under saved-tensor hooks
   (``use_reentrant=False``) or without gradients (``use_reentrant=True``, and autograd functions that work like it) can be
   recomputed, so only these are remembered. The pass that is being recomputed is found by the memory of its features; where
   encoders are recomputed too and their features have moved, by the memory of its target and by the values of its features.
2. A pass outside of a backward pass on the very feature tensors of the last one, none of which was modified in between, nor
   the parameters or λ: ``torch.func.functional_call`` twice, for example. Where the pass cannot be recomputed later, the
   measured KL must be equal as well, which notices parameters modified through ``.data``, whose version does not change.

Limits: passes of bit-identical features in different tensors that are pending at the same time are told apart by their order
alone, newest first. More than `PENDING` passes between a pass and its backward pass are too many. Compiled code does not run
this: of a compiled module, only the last pass can be recomputed, and nothing of the second kind is recognised. In a run of
several processes the second kind is not recognised either: processes that disagreed would wait for each other's collectives.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

#: Passes remembered for recomputation. Each keeps λ, KL and B numbers per modality.
PENDING = 256


class Pass:
    """One pass: the λ it probed with, the pairs it drew, and what identifies it."""

    __slots__ = (
        *("weight", "drawn", "features", "versions", "target", "kl", "sums", "recomputed"),
        *("buffer", "buffer_version", "parameter_versions"),
    )

    def __init__(self, weight: Tensor, drawn: list[int], features: Sequence[Tensor], target: Tensor | None) -> None:
        self.weight, self.drawn = weight, drawn
        self.features = [weakref.ref(x) for x in features]
        self.versions = _versions(features)
        self.target = None if target is None else weakref.ref(target)
        self.kl: Tensor | None = None  # (P, 2), once measured
        self.sums: list[Tensor] | None = None  # of each row of the features, if the pass may be recomputed
        self.recomputed = False
        # of the module after the pass
        self.buffer: Tensor | None = None
        self.buffer_version = 0
        self.parameter_versions: list[int] | None = None

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
        self._pending: deque[Pass] = deque(maxlen=PENDING)

    def __reduce__(self) -> tuple[type[History], tuple[()]]:
        return History, ()

    def recomputed(self, features: Sequence[Tensor], target: Tensor | None) -> Pass | None:
        """The pass that a pass inside a backward pass recomputes; None if none is remembered.

        No device is synchronised unless several passes qualify.
        """
        first = features[0]
        pending = [own for own in reversed(self._pending) if own.sums and own.sums[0].shape == first.shape[:1]]
        pending = [own for own in pending if own.weight.device == first.device and len(own.features) == len(features)]
        if not pending:
            return None
        sums = _row_sums(features)  # also if not needed: selective checkpointing counts the operators of both passes
        exact = [own for own in pending if own.of_memory(features)]
        found = exact or [own for own in pending if own.of_target(target)] or pending
        if len(found) > 1 and not exact and not capturing(first):
            found = [own for own in found if own.sums and all(map(torch.equal, own.sums, sums))] or found
        chosen = next((own for own in found if not own.recomputed), found[0])
        chosen.recomputed = True
        return chosen

    def repeated(self, features: Sequence[Tensor], buffer: Tensor, parameters: Sequence[Tensor]) -> Pass | None:
        """The last pass, if a pass on these features and parameters with this λ is that pass again."""
        last = self.last
        if last is None or last.buffer is not buffer or len(last.features) != len(features) or not last.of_tensors(features):
            return None
        unmodified = last.buffer_version == buffer._version and last.parameter_versions == _versions(parameters)
        return last if unmodified and last.parameter_versions is not None and not capturing(features[0]) else None

    def measured(self, own: Pass, kl: Tensor, buffer: Tensor, parameters: Sequence[Tensor]) -> None:
        """Completes a new pass, after λ has moved."""
        own.kl = kl
        own.buffer, own.parameter_versions = buffer, _versions(parameters)
        own.buffer_version = 0 if own.parameter_versions is None else buffer._version
        self.last = own

    def remember(self, own: Pass, features: Sequence[Tensor]) -> None:
        """Remembers a pass that may be recomputed."""
        if own.sums is None:
            own.sums = _row_sums(features)
            self._pending.append(own)
        own.recomputed = False


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
def _row_sums(features: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().sum(1).nan_to_num() for x in features]
