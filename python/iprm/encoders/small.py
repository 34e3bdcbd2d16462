"""Encoders: what turns the input of a modality into its features (B, D)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from iprm.errors import InputError, unknown

KINDS = ("auto", "cnn", "mlp", "linear", "identity")
CHANNELS = 64
FEWEST_CHANNELS = 8
SMALLEST_SIDE = 6


class Encoder(nn.Sequential):
    """Layers one after the other.

    `Module.compile` passes over the code of torch.nn, and would compile nothing of a plain Sequential.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def build_encoders(
    shapes: Mapping[str, Sequence[int]], feature_dim: int, kinds: Mapping[str, str]
) -> tuple[nn.ModuleDict, dict[str, int]]:
    """An encoder a modality.

    Args:
        shapes: modality -> shape of one input, (C, H, W) or (D,).
        feature_dim: width of the features. An identity encoder keeps the width of its input.
        kinds: modality -> "cnn", "mlp", "linear", "identity", or "auto" (also when absent): cnn for (C, H, W), mlp for (D,).

    Returns:
        The encoders and the width of each one's features, by modality.

    Raises:
        InputError: an unknown modality or kind (the closest is suggested), a kind that cannot take the shape, or no width.
    """
    if isinstance(feature_dim, bool) or not isinstance(feature_dim, int) or feature_dim < 1:
        raise InputError(f"feature_dim: expected a whole number from 1 up, got {feature_dim!r}")
    for modality in shapes:
        if not modality.isidentifier() or modality == "mix" or hasattr(nn.ModuleDict, modality):
            raise InputError(f"modality {modality!r}: expected a name of letters, digits and underscores that is not reserved")
    for modality in kinds:
        if modality not in shapes:
            raise InputError(unknown("modality in encoders", modality, shapes))
    encoders = {m: build_encoder(m, tuple(shape), feature_dim, kinds.get(m, "auto")) for m, shape in shapes.items()}
    widths = {m: shapes[m][0] if isinstance(encoder, nn.Identity) else feature_dim for m, encoder in encoders.items()}
    return nn.ModuleDict(encoders), widths


def build_encoder(modality: str, shape: tuple[int, ...], feature_dim: int, kind: str) -> nn.Module:
    """The encoder (B, *shape) -> (B, feature_dim) of one modality; see `build_encoders`."""
    if kind not in KINDS:
        raise InputError(unknown(f"encoder of modality {modality!r}", kind, KINDS))
    if kind == "auto":
        kind = "cnn" if len(shape) == 3 else "mlp"
    if kind == "cnn":
        if len(shape) != 3:
            raise InputError(f"encoder of modality {modality!r}: cnn expects an input (C, H, W), got {shape}")
        return cnn(shape, feature_dim)
    if kind == "identity":
        if len(shape) != 1:
            raise InputError(f"encoder of modality {modality!r}: identity expects an input (D,), got {shape}")
        return nn.Identity()
    width = math.prod(shape)
    if kind == "linear":
        return Encoder(nn.Flatten(), nn.Linear(width, feature_dim))
    return mlp(width, feature_dim)


def mlp(width: int, feature_dim: int) -> Encoder:
    """Two layers, (B, width) -> (B, feature_dim)."""
    return Encoder(nn.Flatten(), *_layer(nn.Linear(width, feature_dim)), nn.Linear(feature_dim, feature_dim), nn.ReLU())


def cnn(shape: tuple[int, ...], feature_dim: int) -> Encoder:
    """Convolutions, all but the first and last halving the image until a side is 6 or less; the maximum over the image, which
    makes little of where something is; a linear layer.  (B, C, H, W) -> (B, feature_dim)

    Channels double up to CHANNELS at the last, so that the convolutions cost about the same.
    """
    channels, height, width = shape
    halvings = max(1, math.ceil(math.log2(min(height, width) / SMALLEST_SIDE)))
    layers: list[nn.Module] = []
    for place in range(halvings + 2):
        out = max(CHANNELS >> (halvings + 1 - place), FEWEST_CHANNELS)
        layers += [*_layer(nn.Conv2d(channels, out, 3, padding=1, bias=False))]
        if 0 < place <= halvings:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        channels = out
    return Encoder(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), *_layer(nn.Linear(channels, feature_dim)))


def _layer(linear: nn.Linear | nn.Conv2d) -> tuple[nn.Module, ...]:
    """A linear map, normalised over the batch, rectified."""
    norm = nn.BatchNorm2d(linear.out_channels) if isinstance(linear, nn.Conv2d) else nn.BatchNorm1d(linear.out_features)
    return linear, norm, nn.ReLU()
