"""What IPRM costs in training at scale, as arithmetic: its all-reduce, the wait for the slowest rank, and its share of a step.

Nothing here is measured. Every parameter says where it is from; "assumed" where nobody has published it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

GPUS_PER_NODE = 8
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)

# the all-reduce


class Links(NamedTuple):
    """Latencies of a collective in microseconds: of its launch, of a hop within a node, of a hop between nodes."""

    base: float
    intra: float
    inter: float
    source: str


#: NCCL's own constants of its low-latency protocol, by which it chooses an algorithm: src/graph/tuning.cc at commit b647562.
TREE = Links(6.8, 0.6, 5.0, "NCCL, src/graph/tuning.cc: baseLat, hwLat of Tree/LL over NVLink and network")
RING = Links(6.6, 0.6, 2.7, "NCCL, src/graph/tuning.cc: baseLat, hwLat of Ring/LL over NVLink and network")
#: What NCCL adds to each step of a ring that leaves a node: 1 on Intel hosts, 2 on AMD's (`getNetOverhead`).
RING_OVERHEAD = 2.0
#: β of that protocol between more than two nodes, in bytes a microsecond (`llMaxBws`: 19 GB/s); γ, a float32 addition in a
#: kernel that is running already: assumed.
BYTES_PER_MICROSECOND, MICROSECONDS_PER_ADDITION = 19_000.0, 0.001

#: Small all-reduces on two nodes of eight GPUs, in microseconds, as nccl-tests printed them: launch included.
PUBLISHED = {
    "InfiniBand NDR, H20": (47.6, "github.com/NVIDIA/nccl/issues/1244, 8 bytes"),
    "EFA, B200 (p6)": (50.6, "github.com/dstackai/dstack/pull/3961, 8 bytes"),
    "network not named, H100": (61.6, "github.com/NVIDIA/nccl/issues/1453, 128 bytes"),
}


def message_bytes(pairs: int) -> int:
    """ω of P pairs takes the two KL sums of each, and the count of rows: 2P + 1 float32."""
    return 4 * (2 * pairs + 1)


def tree_latency(ranks: int, links: Links = TREE, pairs: int = 1, gpus: int = GPUS_PER_NODE) -> float:
    """Microseconds of an all-reduce by a tree over nodes, a chain within each: up and down again."""
    nodes, within = _layout(ranks, gpus)
    hops = 2 * (within - 1 + _floor_log2(nodes))
    latency = links.base + 2 * ((within - 1) * links.intra + _floor_log2(nodes) * links.inter)
    return latency + hops * _transfer(message_bytes(pairs))


def ring_latency(ranks: int, links: Links = RING, pairs: int = 1, gpus: int = GPUS_PER_NODE) -> float:
    """Microseconds of an all-reduce by a ring of all ranks: 2(N-1) steps of a chunk each, 2 a node of which leave it."""
    nodes, _ = _layout(ranks, gpus)
    steps = 2 * (ranks - 1)
    leaving = 2 * nodes if nodes > 1 else 0
    within = max(links.intra, RING_OVERHEAD) if nodes > 1 else links.intra
    chunk = max(4.0, message_bytes(pairs) / ranks)
    return links.base + (steps - leaving) * within + leaving * links.inter + steps * _transfer(chunk)


def fitted(two_nodes: float, source: str) -> Links:
    """The tree's links with the latency between nodes that a measurement on two nodes of eight implies."""
    rest = tree_latency(2 * GPUS_PER_NODE, TREE._replace(inter=0.0))
    return TREE._replace(inter=(two_nodes - rest) / 2, source=f"fitted to {two_nodes} µs on two nodes: {source}")


def _layout(ranks: int, gpus: int) -> tuple[int, int]:
    """Nodes, and ranks on each."""
    if ranks % min(ranks, gpus):
        raise ValueError(f"ranks: expected whole nodes of {gpus}, got {ranks}")
    return max(1, ranks // gpus), min(ranks, gpus)


def _floor_log2(value: int) -> int:
    return value.bit_length() - 1


def _transfer(size: float) -> float:
    return size / BYTES_PER_MICROSECOND + size / 4 * MICROSECONDS_PER_ADDITION


#: name -> links of a tree
NETWORKS = {
    "NCCL's constants": TREE,
    **{name: fitted(*published) for name, published in PUBLISHED.items()},
    "TCP": TREE._replace(inter=50.0, source="assumed: 50 µs a hop"),
}

# the wait for the slowest rank


def second_wait(
    ranks: int,
    variations: Sequence[float],
    *,
    forward: float = 1 / 3,
    correlation: float = 0.0,
    trials: int = 2000,
    seed: int = 0,
) -> list[float]:
    """How much longer a mean step is when ranks wait for each other after forward too, and not after backward alone::

        E[max_i a_i + max_i b_i] / E[max_i (a_i + b_i)] - 1

    with a rank's forward time a_i and backward time b_i lognormal, of means `forward` and 1 - `forward`.

    Args:
        ranks: N.
        variations: coefficients of variation, of a_i and b_i alike.
        forward: forward's part of a step.
        correlation: of log a_i and log b_i. 0: each phase is slowed by chance of its own; 1: a rank is as slow in both.
        trials: steps simulated.
        seed: of the random numbers, the same for all variations.
    """
    rng = np.random.default_rng(seed)
    own, other = rng.standard_normal((2, trials, ranks))
    second = correlation * own + math.sqrt(1 - correlation**2) * other
    found = []
    for variation in variations:
        sigma = math.sqrt(math.log1p(variation**2))
        a = forward * np.exp(sigma * own - sigma**2 / 2)
        b = (1 - forward) * np.exp(sigma * second - sigma**2 / 2)
        found.append(float((a.max(1) + b.max(1)).mean() / (a + b).max(1).mean() - 1))
    return found


# the head step's share


class Machine(NamedTuple):
    """A GPU's data sheet."""

    flops: float  # a second, dense bfloat16
    bandwidth: float  # bytes a second
    launch: float  # seconds a kernel takes at least
    source: str


H100 = Machine(989e12, 3.35e12, 3e-6, "NVIDIA H100 SXM data sheet (989 TFLOP/s bf16 dense, 3.35 TB/s); 3 µs a launch assumed")
#: Parts of the peaks that are reached: assumed. Encoders of this size reach 30 to 50 % in practice.
ENCODER_EFFICIENCY, HEAD_FLOPS_EFFICIENCY, HEAD_BANDWIDTH_EFFICIENCY = 0.4, 0.4, 0.8
#: Patches or frames of one sample that pass through the encoders' parameters: assumed, a ViT's 196 at 224 pixels.
TOKENS = 196
SHAPES = ((64, 512, 31), (1024, 512, 31), (8192, 1024, 1000))
PARAMETERS = (1e6, 1e7, 1e8, 1e9)
PRODUCTS = {"iprm": 10, "sum": 6}  # of size BCD, forward and backward: see NOTES.md
LAUNCHES = 7  # of Triton's head step
#: Further kernels of a step of several processes: the count of rows, the message, and this process's share of the means.
GROUP_LAUNCHES = 22


def head_flops(batch: int, width: int, classes: int, method: str = "iprm") -> float:
    """2 a multiply-add."""
    return 2.0 * PRODUCTS[method] * batch * width * classes


def head_bytes(batch: int, width: int, classes: int, method: str = "iprm") -> float:
    """bfloat16 features: 2BD read forward, 2BD read and 2BD written backward, by either. float32 rows: 5BC written forward, 3BC
    written and read backward; of sum fusion the logits and their gradient, written and read."""
    rows = 11 if method == "iprm" else 4
    return 2.0 * 6 * batch * width + 4.0 * rows * batch * classes


def head_streaming(batch: int, width: int, classes: int, method: str = "iprm", machine: Machine = H100) -> float:
    """Seconds of arithmetic or of memory, whichever is longer."""
    arithmetic = head_flops(batch, width, classes, method) / (machine.flops * HEAD_FLOPS_EFFICIENCY)
    memory = head_bytes(batch, width, classes, method) / (machine.bandwidth * HEAD_BANDWIDTH_EFFICIENCY)
    return max(arithmetic, memory)


def head_seconds(batch: int, width: int, classes: int, machine: Machine = H100) -> float:
    """Of the head step, with its launches."""
    return head_streaming(batch, width, classes, machine=machine) + LAUNCHES * machine.launch


def encoder_seconds(batch: int, parameters: float, tokens: int = TOKENS, machine: Machine = H100) -> float:
    """6 operations a parameter and token: forward, and backward twice that."""
    return 6.0 * parameters * tokens * batch / (machine.flops * ENCODER_EFFICIENCY)


def head_share(shape: tuple[int, int, int], parameters: float) -> float:
    """The head step's part of a step, encoders and heads."""
    head = head_seconds(*shape)
    return head / (head + encoder_seconds(shape[0], parameters))


def beyond_sum(shape: tuple[int, int, int], parameters: float) -> float:
    """What the head step takes more than sum fusion, over a step of sum fusion: launches left aside, of which it has fewer."""
    ours, theirs = (head_streaming(*shape, method) for method in ("iprm", "sum"))
    return (ours - theirs) / (theirs + encoder_seconds(shape[0], parameters))


def added_by_processes(shape: tuple[int, int, int], parameters: float, microseconds: float) -> float:
    """What an all-reduce that nothing hides, and the kernels around it, add to a step, over the step without them."""
    added = 1e-6 * microseconds + GROUP_LAUNCHES * H100.launch
    return added / (head_seconds(*shape) + encoder_seconds(shape[0], parameters))
