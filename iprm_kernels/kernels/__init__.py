"""The Triton backend: launchers in the calling convention of `iprm_kernels.backends`.

One vocabulary in every kernel::

    p_x        pointer to the first element of x            i_rows     program index
    x_row      row stride of x, in elements                 o_rows     offsets, int64
    x_col      column stride of x, in elements              m_rows     mask
    b_x        values of a block, (BLOCK_B, BLOCK_D)        r_norm     one value a row, (BLOCK_B,)

Constants that specialise a kernel are in capitals. Addresses are computed in int64, arithmetic is float64 for float64
tensors and float32 for all others, and loads and stores are in the tensor's own type. A gradient pointer that is None is
neither computed nor stored. Rows are always the first dimension of the grid, the only one that holds more than 65,535.
"""

from .average import average_strength
from .divergence import batch_kl, batch_kl_backward, batch_kl_pair, strength_weights, strength_weights_backward
from .geodesic import geodesic_mixup, geodesic_mixup_backward, geodesic_remix, normalize, normalize_backward
from .head import head_pairs_backward, head_pairs_forward, serves

__all__ = [
    "average_strength",
    "batch_kl",
    "batch_kl_backward",
    "batch_kl_pair",
    "geodesic_mixup",
    "geodesic_mixup_backward",
    "geodesic_remix",
    "head_pairs_backward",
    "head_pairs_forward",
    "normalize",
    "normalize_backward",
    "serves",
    "strength_weights",
    "strength_weights_backward",
]
