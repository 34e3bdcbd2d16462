"""Base class of fusion modules: modalities and widths, input checks, projections, and the cross entropy of one prediction."""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iprm.distributed import process_group
from iprm.encoders.named_modules import NamedModules
from iprm.names import check_modality
from iprm_kernels.arguments import dense, labels
from iprm_kernels.collectives import joint_sums, weighted

from .heads import logits_of
from .output import FusionOutput

IGNORE_INDEX = -100  # default of torch.nn.functional.cross_entropy: a sample with this label enters no loss


class FusionModule(nn.Module, ABC):
    """Fuses the features of several modalities into one prediction.

    Args:
        feature_dim: width D of every modality's features, or a mapping modality -> width.
        num_classes: C, at least 2.
        modalities: names; their order is that of weights and pairs.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it, what was expected and what was given.
    """

    minimum_modalities = 2
    #: The operators of `iprm_kernels` that training and evaluation call.
    operators: tuple[str, ...] = ()

    def __init__(self, feature_dim: int | Mapping[str, int], num_classes: int, modalities: Sequence[str]) -> None:
        super().__init__()
        self.modalities = checked_modalities(modalities, self.minimum_modalities)
        self.widths = _checked_widths(feature_dim, self.modalities)
        classes = _integer(num_classes)
        if classes is None:
            raise TypeError(f"num_classes: expected an integer, got {num_classes!r}")
        if classes < 2:
            raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
        self.num_classes = classes

    @abstractmethod
    def forward(self, features: Mapping[str, Tensor], target: Tensor | None = None) -> FusionOutput:
        """Computes logits, and with a target the loss.

        If torch.distributed is initialised, the training loss is scaled by this process's share in the joint batch. Averaging
        losses and gradients over processes, as DistributedDataParallel does, then gives the values of one process with all
        rows, even if processes have different numbers of rows.

        Args:
            features: modality -> (B, D_modality), floating, in the dtype of the parameters unless autocast is on.
            target: (B,) integer class indices; -100 excludes a sample from the losses. None without labels.

        Raises:
            TypeError: features or target of a wrong type.
            ValueError: a modality missing or unknown, a wrong shape or device, or on the CPU a label outside [0, C). On a GPU,
                where checking would synchronise, and in a compiled module such a label makes the loss NaN.
        """

    def state_measures(self) -> dict[str, Tensor]:
        """name -> (): state of the module to log at the end of an epoch, in addition to `FusionOutput.measures`."""
        return {}

    def _project_to_smallest(self) -> int:
        """Creates a learned projection for each modality wider than the narrowest, and returns the narrowest width."""
        smallest = min(self.widths.values())
        self.projections = NamedModules(
            {name: nn.Linear(width, smallest) for name, width in self.widths.items() if width != smallest}
        )
        return smallest

    def _projected(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The features projected to the narrowest width.  (B, D_modality) each -> (B, D) each"""
        if not self.projections:
            return dict(features)
        return {name: self.projections[name](x) if name in self.projections else x for name, x in features.items()}

    def _logits(self, name: str, head: nn.Module, x: Tensor) -> Tensor:
        """Calls a head, whose name is for errors.  (B, D) -> (B, C)"""
        return logits_of(name, head, x, self.num_classes, self.training)

    def _with_losses(
        self, logits: Tensor, logits_by: dict[str, Tensor], target: Tensor | None, heads: Iterable[str]
    ) -> FusionOutput:
        """The output of these logits, with the sum of the cross entropies of `heads` as its loss. "fused" is `logits`."""
        if target is None:
            return FusionOutput(None, logits, logits_by)
        share = self._share(target)
        losses_by = {head: cross_entropy(logits_by.get(head, logits), target, share) for head in heads}
        losses = list(losses_by.values())
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        return FusionOutput(loss, logits, logits_by, losses_by=losses_by)

    def _share(self, target: Tensor) -> Tensor | None:
        """This process's share in the joint training loss, by an all-reduce; None in a single process and in evaluation."""
        group = process_group()
        if group is None or not self.training:
            return None
        nothing = torch.empty(0, dtype=torch.float64, device=target.device)
        return joint_sums(nothing, target, IGNORE_INDEX, group)[1]

    def _checked(self, features: Mapping[str, Tensor], target: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None]:
        """Checks features and target; returns the features in the order of `modalities`, and the target as int64."""
        if not isinstance(features, Mapping):
            raise TypeError(f"features: expected a mapping modality -> tensor, got {type(features).__name__}")
        if set(features) != set(self.modalities):
            got = ", ".join(map(str, features)) or "none"
            raise ValueError(f"features: expected the modalities {', '.join(self.modalities)}, got {got}")
        # None if all heads were replaced by modules without such parameters
        parameter = next((own for own in self.parameters() if own.is_floating_point()), None)
        for name, width in self.widths.items():
            _check_features(f"features[{name!r}]", features[name], width, parameter)
        ordered = {name: features[name] for name in self.modalities}
        first = self.modalities[0]
        rows = ordered[first].shape[0]  # len() would fix the batch size of a model that torch.export traces
        for name, x in ordered.items():
            if x.shape[0] != rows:
                expected = f"expected a batch of {rows}, as features[{first!r}] has"
                raise ValueError(f"features[{name!r}]: {expected}, got shape {tuple(x.shape)}")
        return ordered, None if target is None else self._checked_target(target, ordered[first])

    def _checked_target(self, target: Tensor, like: Tensor) -> Tensor:
        if not isinstance(target, Tensor):
            raise TypeError(f"target: expected a tensor (B,) of class indices, got {type(target).__name__}")
        dense("target", target)
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise TypeError(f"target: expected integer class indices, got {target.dtype}")
        if target.shape != like.shape[:1]:
            raise ValueError(f"target: expected shape {tuple(like.shape[:1])}, got {tuple(target.shape)}")
        if target.device != like.device:
            raise ValueError(f"target: expected the device of the features, {like.device}, got {target.device}")
        target = target.long()
        if not torch.compiler.is_compiling():
            labels(target, self.num_classes, IGNORE_INDEX)  # CPU only: it would synchronise a GPU, see cross_entropy
        return target

    def extra_repr(self) -> str:
        widths = ", ".join(f"{name}: {width}" for name, width in self.widths.items())
        return f"feature_dim={{{widths}}}, num_classes={self.num_classes}"


def cross_entropy(logits: Tensor, target: Tensor, share: Tensor | None = None) -> Tensor:
    """Mean cross entropy. A label out of range gives NaN, where PyTorch would abort the CUDA context.  (B, C), (B,) -> ()

    Computed in float32 for narrower logits, as under autocast. With `share`, the mean is scaled by this process's share in the
    mean over the rows of all processes: see `iprm_kernels.collectives.joint_sums`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wrong = _out_of_range(target, logits.shape[1])
    poison = torch.where(wrong, torch.nan, 1.0).to(logits.dtype)  # a factor, so that the row's gradient is NaN as well
    mean = F.cross_entropy(logits * poison[:, None], target.masked_fill(wrong, 0), ignore_index=IGNORE_INDEX)
    return mean if share is None else weighted(mean, share.to(mean.dtype))


def sum_logits(logits_by: Mapping[str, Tensor]) -> Tensor:
    """The sum of all logits, in two launches at most.  (B, C) each -> (B, C)"""
    first, *others = logits_by.values()
    if len(others) > 2:
        return torch.stack([first, *others]).sum(0)
    for logits in others:
        first = first + logits
    return first


def _integer(value: Any) -> int | None:
    """An integer of Python or numpy, such as ``y.max() + 1`` of an array, as an int; None for anything else."""
    if getattr(value, "ndim", None) == 0 and not isinstance(value, Tensor):
        value = value.item()
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def checked_modalities(modalities: Sequence[str], minimum: int) -> tuple[str, ...]:
    """Checks that modalities are at least `minimum` distinct, valid names; returns them as a tuple."""
    if not isinstance(modalities, Iterable) or isinstance(modalities, str) or not all(isinstance(m, str) for m in modalities):
        raise TypeError(f"modalities: expected a sequence of names, got {modalities!r}")
    names = tuple(map(check_modality, modalities))
    if len(names) < minimum:
        raise ValueError(f"modalities: expected at least {minimum}, got {len(names)}: {names}")
    if len(set(names)) != len(names):
        raise ValueError(f"modalities: expected different names, got {names}")
    return names


def _checked_widths(feature_dim: int | Mapping[str, int], modalities: tuple[str, ...]) -> dict[str, int]:
    if isinstance(feature_dim, Mapping):
        if set(feature_dim) != set(modalities):
            got = ", ".join(map(str, feature_dim)) or "none"
            raise ValueError(f"feature_dim: expected a width for each of {', '.join(modalities)}, got {got}")
        widths = {name: feature_dim[name] for name in modalities}
    else:
        widths = dict.fromkeys(modalities, feature_dim)
    checked = {}
    for name, given in widths.items():
        width = _integer(given)
        if width is None:
            raise TypeError(f"feature_dim: expected an integer width for {name!r}, got {given!r}")
        if width < 1:
            raise ValueError(f"feature_dim: expected a width of at least 1 for {name!r}, got {given}")
        checked[name] = width
    return checked


def _out_of_range(target: Tensor, classes: int) -> Tensor:
    return (target != IGNORE_INDEX) & ((target < 0) | (target >= classes))


def _check_features(name: str, x: Tensor, width: int, parameter: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor (B, {width}), got {type(x).__name__}")
    dense(name, x)
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"{name}: expected shape (B, {width}), got {tuple(x.shape)}")
    if parameter is not None and x.device != parameter.device:
        raise ValueError(f"{name}: expected the device of the parameters, {parameter.device}, got {x.device}")
    dtype = x.dtype if parameter is None else parameter.dtype
    if not x.is_floating_point() or (x.dtype != dtype and not torch.is_autocast_enabled(x.device.type)):
        raise TypeError(f"{name}: expected the dtype of the parameters, {dtype}, got {x.dtype}")
