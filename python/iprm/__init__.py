"""Probe-and-rebalance multimodal learning: the fusion module, and the trainer built around it."""

from iprm_kernels import __version__

from .fusion import ProbeRebalance
from .output import FusionOutput

__all__ = ["FusionOutput", "ProbeRebalance", "__version__"]
