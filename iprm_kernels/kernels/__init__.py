"""The Triton backend: launchers in the calling convention of `iprm_kernels.convention`.

One vocabulary in every kernel::

    p_x        pointer to the first element of x            i_rows     program index
    x_row      row stride of x, in elements                 o_rows     offsets, int64
    x_col      column stride of x, in elements              m_rows     mask
    b_x        values of a block, (BLOCK_B, BLOCK_D)        r_norm     one value per row, (BLOCK_B,)

Constants that specialise a kernel are in capitals. Addresses are computed in int64, arithmetic is float64 for float64
tensors and float32 for all others, and loads and stores are in the tensor's own type. A gradient whose pointer is None is
neither computed nor stored. Rows are always the first dimension of the grid, the only one that may exceed 65,535.
"""

from ..convention import Kernel
from .average import average_strength
from .divergence import batch_kl, batch_kl_backward, batch_kl_pair, strength_weights, strength_weights_backward
from .geodesic import geodesic_mixup, geodesic_mixup_backward, geodesic_remix, normalize, normalize_backward
from .head import LIMITS, head_backward, head_forward, refuses

SERVES = {
    "normalize": Kernel(normalize),
    "normalize_backward": Kernel(normalize_backward),
    "geodesic_mixup": Kernel(geodesic_mixup),
    "geodesic_mixup_backward": Kernel(geodesic_mixup_backward),
    "geodesic_remix": Kernel(geodesic_remix),
    "batch_kl": Kernel(batch_kl),
    "batch_kl_backward": Kernel(batch_kl_backward),
    "batch_kl_pair": Kernel(batch_kl_pair),
    "strength_weights": Kernel(strength_weights),
    "strength_weights_backward": Kernel(strength_weights_backward),
    "average_strength": Kernel(average_strength),
    "head_forward": Kernel(head_forward, refuses, LIMITS),
    "head_backward": Kernel(head_backward, refuses, LIMITS),
}
