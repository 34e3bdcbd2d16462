"""ResNet-18, randomly initialised, of images or of several frames. Its layers are those of the package transformers."""

from __future__ import annotations

from torch import Tensor, nn

from iprm.errors import InputError

from .description import Description, InputSpec


class ResNet18(nn.Module):
    """(B, C, H, W) -> (B, 512); of frames (B, T, C, H, W) the mean of the features of each, (B, 512).

    He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385, with a first convolution of `channels` inputs.
    Features are those after global average pooling, 512 wide as published work on audio-visual learning uses them: the model's
    `feature_dim` does not change their width.
    """

    feature_dim = 512

    def __init__(self, channels: int) -> None:
        super().__init__()
        try:
            from transformers import ResNetConfig, ResNetModel
        except ImportError as error:
            install = 'pip install "iprm-kernels[vision]"'
            raise InputError(f"resnet18 needs the package transformers: {install} ({error})") from error
        widths = [64, 128, 256, self.feature_dim]
        self.net = ResNetModel(
            ResNetConfig(num_channels=channels, embedding_size=64, hidden_sizes=widths, depths=[2] * 4, layer_type="basic")
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return self.net(x).pooler_output.flatten(1)
        return self.forward(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


def resnet18(description: Description, feature_dim: int) -> nn.Module:
    """`ResNet18` of an input (C, H, W), or of frames (T, C, H, W)."""
    if not isinstance(description, InputSpec) or description.kind not in ("image", "frames"):
        raise InputError(f"resnet18 expects an input (C, H, W) or (T, C, H, W), got {description}")
    return ResNet18(description.shape[-3])
