"""The readable definition of every operator, in plain torch.

Nothing here is fast. Every other backend is tested against these functions in float64, and these against more digits and
numerical differentiation. All take 2-D features and return what the public operator returns, followed by the row
statistics that its backward pass wants.

Notation: x, y (B, D) features; x̂ = x / max(‖x‖, eps); c = ⟨x̂, ŷ⟩; h = (1 - c) / 2 = sin²(θ/2); w (B,) weight of x.
"""

from .average import average_strength
from .divergence import (
    EXCESS_SERIES_BELOW,
    EXCESS_SERIES_TERMS,
    batch_kl,
    batch_kl_backward,
    batch_kl_pair,
    excess,
    strength_weights,
    strength_weights_backward,
)
from .geodesic import (
    ANTIPODE_MARGIN,
    NEAR_ANTIPODE,
    SERIES_BELOW,
    SERIES_TERMS,
    geodesic_mixup,
    geodesic_mixup_backward,
    geodesic_remix,
    inverse_norm,
    live_inverse_norm,
    normalize,
    normalize_backward,
    slerp_weight,
    slerp_weight_dc,
    slerp_weight_ds,
)
from .head import head_backward, head_probe, head_rebalance

__all__ = [
    "ANTIPODE_MARGIN",
    "EXCESS_SERIES_BELOW",
    "EXCESS_SERIES_TERMS",
    "NEAR_ANTIPODE",
    "SERIES_BELOW",
    "SERIES_TERMS",
    "average_strength",
    "batch_kl",
    "batch_kl_backward",
    "batch_kl_pair",
    "excess",
    "geodesic_mixup",
    "geodesic_mixup_backward",
    "geodesic_remix",
    "head_backward",
    "head_probe",
    "head_rebalance",
    "inverse_norm",
    "live_inverse_norm",
    "normalize",
    "normalize_backward",
    "slerp_weight",
    "slerp_weight_dc",
    "slerp_weight_ds",
    "strength_weights",
    "strength_weights_backward",
]
