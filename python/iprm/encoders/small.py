"""Small encoders of one tensor: convolutional network, perceptron, linear map, identity."""

from __future__ import annotations

import math

from torch import Tensor, nn

from iprm.errors import InputError

from .description import Description, InputSpec

CHANNELS = 64
FEWEST_CHANNELS = 8
SMALLEST_SIDE = 6


class Encoder(nn.Sequential):
    """Sequential layers; the last linear layer determines the feature width.

    A subclass, because `Module.compile` skips code of torch.nn and would compile nothing of a plain Sequential.
    """

    @property
    def feature_dim(self) -> int:
        return next(layer.out_features for layer in reversed(list(self)) if isinstance(layer, nn.Linear))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def auto(description: Description, feature_dim: int) -> nn.Module:
    """`cnn` for an image, `mlp` for any other floating-point tensor.

    Raises:
        InputError: the input is a dict of tensors, or of integers.
    """
    if not isinstance(description, InputSpec) or not description.floating:
        raise InputError(f"there is no default for {_named(description)}; give a name, or the import path of your own class")
    return (cnn if description.kind == "image" else mlp)(description, feature_dim)


def identity(description: Description, feature_dim: int) -> nn.Module:
    """Returns the input, (B, D) -> (B, D); ignores `feature_dim`."""
    if len(_shape("identity", description)) != 1:
        raise InputError(f"identity expects an input (D,), got {description}")
    return nn.Identity()


def linear(description: Description, feature_dim: int) -> Encoder:
    """One linear map of the flattened input, (B, ...) -> (B, feature_dim)."""
    return Encoder(nn.Flatten(), nn.Linear(math.prod(_shape("linear", description)), feature_dim))


def mlp(description: Description, feature_dim: int) -> Encoder:
    """Two layers on the flattened input, (B, ...) -> (B, feature_dim)."""
    width = math.prod(_shape("mlp", description))
    return Encoder(nn.Flatten(), *_layer(nn.Linear(width, feature_dim)), nn.Linear(feature_dim, feature_dim), nn.ReLU())


def cnn(description: Description, feature_dim: int) -> Encoder:
    """Convolutions, global max pooling, and a linear layer.  (B, C, H, W) -> (B, feature_dim)

    All but the first and the last convolution halve the image, until its smaller side is 6 or less. Channels double up to
    CHANNELS at the last convolution, so that all convolutions cost about the same.
    """
    shape = _shape("cnn", description)
    if len(shape) != 3:
        raise InputError(f"cnn expects an input (C, H, W), got {description}")
    channels, height, width = shape
    halvings = max(1, math.ceil(math.log2(min(height, width) / SMALLEST_SIDE)))
    layers: list[nn.Module] = []
    for index in range(halvings + 2):
        out = max(CHANNELS >> (halvings + 1 - index), FEWEST_CHANNELS)
        layers += [*_layer(nn.Conv2d(channels, out, 3, padding=1, bias=False))]
        if 0 < index <= halvings:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        channels = out
    return Encoder(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), *_layer(nn.Linear(channels, feature_dim)))


def _layer(linear: nn.Linear | nn.Conv2d) -> tuple[nn.Module, ...]:
    """A linear or convolutional layer, batch norm, ReLU."""
    norm = nn.BatchNorm2d(linear.out_channels) if isinstance(linear, nn.Conv2d) else nn.BatchNorm1d(linear.out_features)
    return linear, norm, nn.ReLU()


def _shape(name: str, description: Description) -> tuple[int, ...]:
    """The shape of one row.

    Raises:
        InputError: the input is not one tensor of floating numbers.
    """
    if not isinstance(description, InputSpec) or not description.floating:
        raise InputError(f"{name} expects one tensor of floating numbers, got {_named(description)}")
    return description.shape


def _named(description: Description) -> str:
    if isinstance(description, InputSpec):
        return f"{description.kind} {description}"
    return f"a dict of tensors ({', '.join(description)})"
