"""ResNet-18 for images or several frames, randomly initialised, built from the layers of the package transformers."""

from __future__ import annotations

from torch import Tensor, nn

from iprm.errors import InputError

from .description import Description, InputSpec


class ResNet18(nn.Module):
    """(B, C, H, W) -> (B, 512). For frames (B, T, C, H, W), the mean of the features of all frames, (B, 512).

    He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385, with `channels` inputs of the first convolution.
    Features are taken after global average pooling. Their width is 512, as in published work on audio-visual learning; the
    model's `feature_dim` does not change it.
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
    """`ResNet18` for an input (C, H, W) or frames (T, C, H, W)."""
    if not isinstance(description, InputSpec) or description.kind not in ("image", "frames"):
        raise InputError(f"resnet18 expects an input (C, H, W) or (T, C, H, W), got {description}")
    return ResNet18(description.shape[-3])
