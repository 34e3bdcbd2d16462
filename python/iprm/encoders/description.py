"""Descriptions of inputs: shape and dtype of one row of each modality, a tensor or a dict of tensors (token ids and mask)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from iprm.errors import InputError, plain_values
from iprm.names import check_modality

T = TypeVar("T")
#: The input of one modality in a batch: (B, ...), or name -> (B, ...).
Input: TypeAlias = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class InputSpec:
    """Shape of one row, without the batch dimension, and the name of its torch dtype."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", plain_values(tuple(self.shape)))
        if not all(isinstance(size, int) and size >= 0 for size in self.shape):
            raise InputError(f"shape of an input: expected whole numbers from 0 up, got {self.shape!r}")
        if not isinstance(getattr(torch, str(self.dtype), None), torch.dtype):
            raise InputError(f"dtype of an input: expected the name of a torch type, such as float32, got {self.dtype!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def floating(self) -> bool:
        return self.torch_dtype.is_floating_point

    @property
    def kind(self) -> str:
        """vector (D,), sequence (T, D), image (C, H, W), frames (T, C, H, W), tokens (T,) of integers; tensor for any other."""
        if not self.floating:
            return "tokens" if len(self.shape) == 1 else "tensor"
        return {1: "vector", 2: "sequence", 3: "image", 4: "frames"}.get(len(self.shape), "tensor")

    def zeros(self, rows: int, device: torch.device | None = None) -> Tensor:
        """Zeros (rows, *shape) of this dtype; a floating one in torch's default dtype, that of new parameters."""
        return torch.zeros(rows, *self.shape, dtype=None if self.floating else self.torch_dtype, device=device)

    def __str__(self) -> str:
        return str(self.shape) if self.floating else f"{self.shape} of {self.dtype}"


Description: TypeAlias = InputSpec | dict[str, InputSpec]


def described(inputs: Mapping[str, Input]) -> dict[str, Description]:
    """The description of the inputs of a batch: modality -> (B, ...) or name -> (B, ...).

    Raises:
        InputError: a modality cannot have its name.
    """

    def spec(x: Tensor) -> InputSpec:
        return InputSpec(tuple(x.shape[1:]), str(x.dtype).removeprefix("torch."))

    return descriptions({modality: each(spec, x) for modality, x in inputs.items()})


def plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Descriptions as plain values for YAML and checkpoints, in the given order: ``{"shape": [1, 8, 8], "dtype": "float32"}``
    for a tensor, name -> the same for a dict of tensors.

    Args:
        inputs: modality -> description, its plain form, or the shape of one row, with dtype float32.

    Raises:
        InputError: a value is not a description; a modality cannot have its name (see `check_modality`); a tensor of a dict has
            a name with characters other than letters, digits and underscores; or two tensors have the same label.
    """

    def values(spec: InputSpec) -> dict[str, Any]:
        return asdict(spec) | {"shape": list(spec.shape)}

    return {modality: each(values, description) for modality, description in descriptions(inputs).items()}


def descriptions(inputs: Mapping[str, Any]) -> dict[str, Description]:
    """Converts descriptions in any form that `plain` accepts to `InputSpec`. Raises the errors of `plain`."""
    if not isinstance(inputs, Mapping):
        raise InputError(f"inputs: expected a mapping of modalities to descriptions, got {inputs!r}")
    found = {check_modality(modality): _description(modality, value) for modality, value in inputs.items()}
    for modality, description in found.items():
        for name in description if isinstance(description, Mapping) else ():
            if (label := f"{modality}.{name}") in found:
                raise InputError(f"modality {label!r}: the tensor {name!r} of the modality {modality!r} has the same label")
    return found


def _description(modality: str, value: Any) -> Description:
    if isinstance(value, Mapping) and not isinstance(value.get("shape"), (list, tuple)):
        for name in value:
            if not str(name).isidentifier():
                raise InputError(f"modality {modality!r}: expected names of letters, digits and underscores, got {name!r}")
        if not value:
            raise InputError(f"modality {modality!r}: expected at least one tensor, got an empty dict")
        return {name: _spec(f"{modality}.{name}", part) for name, part in value.items()}
    return _spec(modality, value)


def _spec(label: str, value: Any) -> InputSpec:
    if isinstance(value, InputSpec):
        return value
    if isinstance(value, (list, tuple)):
        return InputSpec(tuple(value))
    if isinstance(value, Mapping) and isinstance(value.get("shape"), (list, tuple)) and set(value) <= {"shape", "dtype"}:
        return InputSpec(tuple(value["shape"]), value.get("dtype", "float32"))
    raise InputError(f"input {label!r}: expected an InputSpec, or a mapping of shape and dtype, got {value!r}")


def each(function: Callable[[Any], Any], value: Any) -> Any:
    """Applies `function` to a tensor, or to every tensor of a dict."""
    return {name: function(part) for name, part in value.items()} if isinstance(value, Mapping) else function(value)


def flat(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors (or their descriptions) of all modalities by label: ``image``, ``text.ids``, ``text.mask``."""
    labelled: dict[str, Any] = {}
    for modality, value in inputs.items():
        if isinstance(value, Mapping):
            labelled.update({f"{modality}.{name}": part for name, part in value.items()})
        else:
            labelled[modality] = value
    return labelled


def nested(labelled: Mapping[str, T], like: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `flat`: values by label, in the structure of `like`, modality -> anything or name -> anything."""
    return {
        modality: {name: labelled[f"{modality}.{name}"] for name in value} if isinstance(value, Mapping) else labelled[modality]
        for modality, value in like.items()
    }
