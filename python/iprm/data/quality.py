"""Data quality checks: complete for `iprm check`, cheap ones before every run.

Rows are identical if their bytes are equal. `scan` defines missing rows.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from iprm.encoders.description import Input, flat
from iprm.errors import InputError

from .column_stats import Scan, joint_digests, scan
from .split import SPLITS, Split

Splits = Mapping[str, Split]
#: Largest number of names listed in a message; further names are counted.
MOST_NAMES = 10

log = logging.getLogger(__name__)


class Finding(NamedTuple):
    """A finding: a problem, which affects training or its evaluation, or a remark."""

    problem: bool
    what: str


@dataclass(frozen=True)
class Report:
    """scans: modality -> split -> Scan; classes: (C,) all labels; counts: split -> (C,) rows per label."""

    scans: dict[str, dict[str, Scan]]
    classes: np.ndarray
    counts: dict[str, np.ndarray]
    findings: list[Finding]


def check(source: str, splits: Splits) -> Report:
    """Runs all checks on the splits of a dataset. `source` names the dataset in errors.

    Raises:
        InputError: see `check_structure`.
    """
    check_structure(source, splits)
    splits = {name: splits[name] for name in sorted(splits, key=SPLITS.index)}
    classes, counts = class_counts(splits)
    names = list(next(iter(splits.values())).inputs)
    scans = {m: {name: scan(split.inputs[m]) for name, split in splits.items()} for m in names}
    findings = [
        *_of_labels(classes, counts),
        *([] if names else [Finding(False, "inputs: made when they are asked for, and not read through")]),
        *(finding for modality, by_split in scans.items() for finding in _of_modality(modality, by_split, splits)),
        *_of_leakage(scans, splits),
    ]
    return Report(scans, classes, counts, sorted(findings, key=lambda finding: not finding.problem))


def check_at_start(source: str, splits: Splits) -> None:
    """Cheap checks before a run: labels, and modalities that are constant over all rows of a split.

    For a modality that varies, reading the first two rows usually suffices. Constant modalities are not detected in splits
    that are not in memory. Labels are counted once. The checks take 0.16 ms for the 1,797 rows of `digits`, 3 ms for 130,000
    (one Zen 4 core): below 0.1 % of an epoch. Each warning is logged once per process.

    Raises:
        InputError: a label is below 0; all training rows are of one of several classes; no modality varies in the training
            split; or see `check_structure`.
    """
    check_structure(source, splits)
    classes, counts = class_counts(splits)
    if classes[0] < 0:
        raise InputError(f"{source}: expected labels from 0 up, got {classes[0]}")
    taught = classes[counts["train"] > 0]
    if len(taught) == 1 < len(classes):
        raise InputError(f"{source}: all rows of train are of class {taught[0]}, one of {len(classes)}: nothing to learn")
    still = {name: [m for m, x in split.inputs.items() if split.in_memory and _is_still(x)] for name, split in splits.items()}
    if still["train"] and len(still["train"]) == len(splits["train"].inputs):
        raise InputError(f"{source}: every modality is the same in all rows of train: {', '.join(still['train'])}")
    for finding in _untaught(classes, counts):
        _warn_once(f"{source}: {finding.what}")
    for name, modalities in still.items():
        for modality in modalities:
            _warn_once(f"{source}: {_stillness(modality, name, _is_zero(splits[name].inputs[modality]))}")


@functools.cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


def _is_still(x: Input) -> bool:
    """Whether there are several rows, all equal in every tensor. Stops at the first chunk that differs."""
    if not isinstance(x, Tensor):
        return all(map(_is_still, x.values()))
    if len(x) < 2:
        return False
    edges = [0, 2, *range(64, len(x), 4096), len(x)]
    return all(bool((x[start:end] == x[:1]).all()) for start, end in itertools.pairwise(edges))


def _is_zero(x: Input) -> bool:
    """Whether every value of the first row is 0."""
    return not any(bool(part[0].any()) for part in flat({"": x}).values())


def check_structure(source: str, splits: Splits) -> None:
    """Checks that every split has rows, the same modalities with rows of the same shape, and one row of each per label. For a
    split that is not in memory, two rows are produced and checked.

    Raises:
        InputError: one of these does not hold.
    """
    like: Mapping[str, Tensor] = {}
    for name in sorted(splits, key=SPLITS.index):
        split = splits[name]
        if len(split.target) == 0:
            raise InputError(f"{source}: the {name} split is empty")
        made, labels = (split.inputs, len(split.target)) if split.in_memory else (split.first(), min(2, len(split.target)))
        inputs = flat(made)
        like = like or inputs
        if list(inputs) != list(like):
            raise InputError(f"{source}: {name} has the modalities {', '.join(inputs)}, train has {', '.join(like)}")
        for modality, x in inputs.items():
            where = f"{source}: modality {modality!r}"
            if len(x) != labels:
                raise InputError(f"{where}: {len(x)} rows in {name}, which has {labels} labels")
            if x.shape[1:] != like[modality].shape[1:]:
                there, here = tuple(like[modality].shape[1:]), tuple(x.shape[1:])
                raise InputError(f"{where}: rows of shape {here} in {name}, of {there} in train")


def class_counts(splits: Splits) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """All labels, and the number of rows per label in each split.  (C,), split -> (C,)"""
    found = {name: np.unique(split.target.numpy(), return_counts=True) for name, split in splits.items()}
    classes = np.unique(np.concatenate([labels for labels, _ in found.values()]))
    counts = {name: np.zeros(len(classes), np.int64) for name in splits}
    for name, (labels, count) in found.items():
        counts[name][np.searchsorted(classes, labels)] = count
    return classes, counts


# labels


def _of_labels(classes: np.ndarray, counts: Mapping[str, np.ndarray]) -> Iterator[Finding]:
    if classes[0] < 0:
        yield Finding(True, f"labels: expected from 0 up, got {classes[0]}")
    if len(classes) == 1:
        yield Finding(True, f"labels: all rows are of class {classes[0]}; expected at least 2 classes")
    yield from _untaught(classes, counts)
    taught = counts["train"] > 0
    for name, count in counts.items():
        absent = classes[taught & (count == 0)]
        if len(absent):
            yield Finding(True, f"labels: {name} has no rows of {_named('class', 'classes', absent)}, which train has")
    gaps = np.setdiff1d(np.arange(min(classes[-1], 2**20)), classes)
    if len(gaps):
        what = f"no split has rows of {_named('class', 'classes', gaps)}, the highest is {classes[-1]}"
        yield Finding(False, f"labels: {what}")


def _untaught(classes: np.ndarray, counts: Mapping[str, np.ndarray]) -> Iterator[Finding]:
    taught = counts["train"] > 0
    for name, count in counts.items():
        beyond = ~taught & (count > 0)
        if beyond.any():
            what = f"{_rows(count[beyond].sum())} of {name} with labels beyond those of train"
            yield Finding(True, f"labels: {what}, {_named('class', 'classes', classes[beyond])}: they cannot be learned")


# modalities


def _of_modality(modality: str, scans: Mapping[str, Scan], splits: Splits) -> Iterator[Finding]:
    for name, found in scans.items():
        rows = len(found.digest)
        still = rows > 1 and len(found.constant) == found.low.size
        if still:
            yield Finding(True, _stillness(modality, name, len(found.missing) == rows))
        if len(found.non_finite):
            what = f"{_rows(len(found.non_finite))} of {name} with a value that is not finite"
            first = _row(found.non_finite[0], splits[name], modality)
            yield Finding(True, f"modality {modality!r}: {what}, the first is {first}")
        if len(found.missing) and not still:
            what = f"missing (every value 0 or NaN) in {_rows(len(found.missing))} of {rows} of {name}"
            first = _row(found.missing[0], splits[name], modality)
            yield Finding(True, f"modality {modality!r}: {what}, the first is {first}")
    if len({found.dtype for found in scans.values()}) > 1:
        types = ", ".join(f"{found.dtype} in {name}" for name, found in scans.items())
        yield Finding(True, f"modality {modality!r}: expected one type, got {types}")
    constant = scans["train"].constant
    if 0 < len(constant) < scans["train"].low.size:
        width = scans["train"].low.size
        what = f"{_named('feature', 'features', constant)} of {width} without variance in train"
        yield Finding(False, f"modality {modality!r}: {what}")


def _stillness(modality: str, split: str, zero: bool) -> str:
    return f"modality {modality!r}: {'all zero' if zero else 'the same'} in all rows of {split}"


# leakage


def _of_leakage(scans: Mapping[str, Mapping[str, Scan]], splits: Splits) -> Iterator[Finding]:
    if not scans:
        yield from _of_origins(splits)
        return
    leading = next(iter(scans))  # whose source items are named in messages
    joint = {}
    for name in splits:
        parts = [by_split[name] for by_split in scans.values()]
        missing = functools.reduce(np.intersect1d, [part.missing for part in parts])
        joint[name] = (joint_digests([part.digest for part in parts]), missing)
    alone = {m: {name: (found.digest, found.missing) for name, found in by_split.items()} for m, by_split in scans.items()}
    whole: dict[tuple[str, str], np.ndarray] = {}  # rows shared in every modality, which are not reported again for each
    for modality, found in {"": joint, **alone}.items():
        where = f"modality {modality!r} alone" if modality else "every modality"
        for first, second in itertools.combinations(splits, 2):
            (digests, _), (others, missing) = found[first], found[second]
            rows = np.setdiff1d(np.flatnonzero(np.isin(others, digests)), missing)
            if modality:
                rows = np.setdiff1d(rows, whole[first, second])
            else:
                whole[first, second] = rows
            if len(rows):
                here = _row(rows[0], splits[second], modality or leading)
                there = _row(int((digests == others[rows[0]]).argmax()), splits[first], modality or leading)
                what = f"{_rows(len(rows))} of {second} identical to rows of {first} in {where}"
                yield Finding(True, f"leakage: {what}; {here} of {second} is {there} of {first}")
    yield from _of_origins(splits)
    for name, (digests, missing) in joint.items():
        _, first_rows, inverse = np.unique(digests, return_index=True, return_inverse=True)
        earlier = first_rows[inverse]
        repeated = np.setdiff1d(np.flatnonzero(earlier != np.arange(len(digests))), missing)
        if len(repeated):
            what = f"{_rows(len(repeated))} of {name} repeating an earlier one in every modality"
            here, there = (_row(row, splits[name], leading) for row in (repeated[0], earlier[repeated[0]]))
            yield Finding(False, f"duplicates: {what}; {here} is {there}")


def _of_origins(splits: Splits) -> Iterator[Finding]:
    for (first, one), (second, two) in itertools.combinations(splits.items(), 2):
        shared: dict[tuple[int, ...], list[str]] = {}
        for modality in sorted(one.origin.keys() & two.origin.keys()):
            both = np.intersect1d(one.origin[modality].numpy(), two.origin[modality].numpy())
            shared.setdefault(tuple(both), []).append(modality)
        for items, modalities in shared.items():
            if items:
                what = f"{_named('item', 'items', items)} of the source in both {first} and {second}"
                yield Finding(True, f"leakage: {what} ({', '.join(modalities)})")


# words


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def _row(row: int, split: Split, modality: str) -> str:
    """``row 3 (item 17)``: the index in the split, and in the source if known."""
    items = split.origin.get(modality)
    return f"row {row}" + ("" if items is None else f" (item {int(items[row])})")


def _named(one: str, several: str, which: Iterable[int]) -> str:
    """``class 3``, or ``2 classes (3, 7)``, or ``12 classes (0, 1, ... and 2 more)``."""
    names = [str(name) for name in which]
    if len(names) == 1:
        return f"{one} {names[0]}"
    more = f", and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{len(names)} {several} ({', '.join(names[:MOST_NAMES])}{more})"
