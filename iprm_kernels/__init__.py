"""Fused operators for probe-and-rebalance multimodal learning, behind `torch.library`."""

from . import arguments, autocast, collectives
from .average import average_strength
from .backends import BackendStatus, BackendUnavailableError, OperatorStatus, backends, decompositions, use_backend
from .divergence import batch_kl, strength_weights
from .extension import build_info
from .geodesic import geodesic_mixup, normalize
from .head import PairsResult, StepResult, linear_probe_rebalance, linear_probe_rebalance_pairs
from .probe_rebalance import ProbeResult, probe_rebalance
from .verify.run import Verification, verify_backends

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "BackendUnavailableError",
    "OperatorStatus",
    "PairsResult",
    "ProbeResult",
    "StepResult",
    "Verification",
    "__version__",
    "arguments",
    "autocast",
    "average_strength",
    "backends",
    "batch_kl",
    "build_info",
    "collectives",
    "decompositions",
    "geodesic_mixup",
    "linear_probe_rebalance",
    "linear_probe_rebalance_pairs",
    "normalize",
    "probe_rebalance",
    "strength_weights",
    "use_backend",
    "verify_backends",
]
