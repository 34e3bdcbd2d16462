"""One modality of one split, read once in chunks: what is missing, not finite or constant, and a digest of every row.

A row is called missing where every value of it is 0 or NaN: what features are filled with where there was nothing to extract
them from.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iprm.encoders.description import Input

#: Of a modality that is looked at together: what numpy computes with stays in a core's cache.
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Scan:
    """What `scan` found.

    shape: of a row, in words; missing, non_finite: the rows that are; digest: (N,) uint64, equal where the bytes of rows are
    (two that differ share one with probability 2⁻⁶⁴), of use in this process alone; low, high: (D,) extremes of every feature,
    NaN left aside.
    """

    shape: str
    dtype: str
    missing: np.ndarray
    non_finite: np.ndarray
    digest: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def constant(self) -> np.ndarray:
        """The features (their place in a flattened row) that have one value in all rows."""
        return np.flatnonzero(self.low == self.high)


def scan(x: Input) -> Scan:
    """Reads a modality once, in chunks.  (N, ...), or a dict of these

    A row of a dict of tensors is missing if it is in every tensor, and not finite if it is not in one; its features are those
    of all tensors, in their order.
    """
    if not isinstance(x, Tensor):
        return _joined({name: scan(part) for name, part in x.items()})
    rows, width = len(x), int(np.prod(x.shape[1:]))
    step = max(1, CHUNK_BYTES // max(1, width * x.element_size()))
    missing, non_finite, digest = np.zeros(rows, bool), np.zeros(rows, bool), np.zeros(rows, np.uint64)
    low = high = np.full(width, np.nan)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values = _numpy(x[part]).reshape(-1, width)
        not_a_number = np.isnan(values)
        missing[part] = ((values == 0) | not_a_number).all(axis=1)
        non_finite[part] = ~np.isfinite(values).all(axis=1)
        digest[part] = row_digests(values)
        low, high = np.fmin(low, np.fmin.reduce(values)), np.fmax(high, np.fmax.reduce(values))
    dtype = str(x.dtype).removeprefix("torch.")
    shape = "x".join(map(str, x.shape[1:]))
    return Scan(shape, dtype, np.flatnonzero(missing), np.flatnonzero(non_finite), digest, low, high)


def _joined(scans: Mapping[str, Scan]) -> Scan:
    parts = list(scans.values())

    def words(attribute: str) -> str:
        return ", ".join(f"{name} {getattr(part, attribute)}" for name, part in scans.items())

    return Scan(
        shape=words("shape"),
        dtype=words("dtype"),
        missing=functools.reduce(np.intersect1d, [part.missing for part in parts]),
        non_finite=functools.reduce(np.union1d, [part.non_finite for part in parts]),
        digest=joint_digests([part.digest for part in parts]),
        low=np.concatenate([part.low for part in parts]),
        high=np.concatenate([part.high for part in parts]),
    )


def _numpy(x: Tensor) -> np.ndarray:
    """The values; bfloat16, which numpy lacks, in float32, which represents every one of its values."""
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def row_digests(values: np.ndarray) -> np.ndarray:
    """Python's own hash of the bytes of each row, which holds within one process.  (N, D) -> (N,) uint64"""
    rows = np.ascontiguousarray(values).view(np.uint8)
    return np.fromiter(map(hash, map(np.ndarray.tobytes, rows)), np.int64, len(rows)).view(np.uint64)


def joint_digests(digests: Sequence[np.ndarray]) -> np.ndarray:
    """One digest of the digests of a row in several modalities.  (N,) each -> (N,)"""
    return row_digests(np.stack(digests, axis=1))
