"""Statistics of one modality of one split in one pass over chunks: missing, non-finite and constant values, row digests.

A row is called missing if every value of it is 0 or NaN, the usual fill values where there was nothing to extract features
from.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iprm.encoders.description import Input

#: Size of a chunk, so that numpy's intermediate arrays fit in a core's cache.
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Scan:
    """Result of `scan`.

    shape: of one row, as text; missing, non_finite: indices of such rows; digest: (N,) uint64, equal for rows with equal bytes
    (different rows collide with probability 2⁻⁶⁴), valid within this process only; still: (D,) bool, whether a feature has the
    same value in all rows, ignoring NaN.
    """

    shape: str
    dtype: str
    missing: np.ndarray
    non_finite: np.ndarray
    digest: np.ndarray
    still: np.ndarray

    @property
    def constant(self) -> np.ndarray:
        """Indices, in a flattened row, of features with the same value in all rows."""
        return np.flatnonzero(self.still)


def scan(x: Input) -> Scan:
    """Scans a modality once, in chunks.  (N, ...), or a dict of such tensors

    For a dict, a row is missing if it is missing in every tensor, and non-finite if it is non-finite in any tensor; its
    features are those of all tensors, in order.
    """
    if not isinstance(x, Tensor):
        return _joined({name: scan(part) for name, part in x.items()})
    rows, width = len(x), int(np.prod(x.shape[1:]))
    step = max(1, CHUNK_BYTES // max(1, width * x.element_size()))
    missing, non_finite, digest = np.zeros(rows, bool), np.zeros(rows, bool), np.zeros(rows, np.uint64)
    ends: tuple[np.ndarray, np.ndarray] | None = None  # minimum and maximum, in the type of the values
    for start in range(0, rows, step):
        part = slice(start, start + step)
        # numpy lacks bfloat16; float32 represents every one of its values
        values = (x[part].float() if x.dtype == torch.bfloat16 else x[part]).numpy().reshape(-1, width)
        not_a_number = np.isnan(values)
        missing[part] = ((values == 0) | not_a_number).all(axis=1)
        non_finite[part] = ~np.isfinite(values).all(axis=1)
        digest[part] = row_digests(values)
        lowest, highest = np.fmin.reduce(values), np.fmax.reduce(values)
        ends = ends or (lowest, highest)
        np.fmin(ends[0], lowest, out=ends[0])
        np.fmax(ends[1], highest, out=ends[1])
    still = np.zeros(width, bool) if ends is None else ends[0] == ends[1]
    dtype = str(x.dtype).removeprefix("torch.")
    shape = "x".join(map(str, x.shape[1:]))
    return Scan(shape, dtype, np.flatnonzero(missing), np.flatnonzero(non_finite), digest, still)


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
        still=np.concatenate([part.still for part in parts]),
    )


def row_digests(values: np.ndarray) -> np.ndarray:
    """Python's hash of the bytes of each row, valid within one process.  (N, D) -> (N,) uint64"""
    rows = np.ascontiguousarray(values).view(np.uint8)
    return np.fromiter(map(hash, map(np.ndarray.tobytes, rows)), np.int64, len(rows)).view(np.uint64)


def joint_digests(digests: Sequence[np.ndarray]) -> np.ndarray:
    """Combines the digests of each row in several modalities into one.  (N,) each -> (N,)"""
    return row_digests(np.stack(digests, axis=1))
