"""Converts labels (numbers, booleans or words) to class indices; the labels become the names of the classes."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from iprm.errors import InputError
from iprm.streams import OBEYED

from .split import Split

#: Label of a row that is left out of losses and metrics, as in `torch.nn.functional.cross_entropy`.
UNLABELLED = -100
#: Most classes, each of which has a row in every head: more are a mistake, such as numbers of rows given as labels.
MOST_CLASSES = 2**20
#: Bytes of the longest words that are compared in numpy's arrays, where each takes as much as the longest.
LONG = 64
#: Most letters of a label, which names its class in tables and messages.
MOST_LETTERS = 1000
#: Characters that no name of a class has: those that a terminal obeys, and lone surrogates, which no file can hold.
UNPRINTABLE = re.compile(f"{OBEYED.pattern}|[\ud800-\udfff]")
#: Most names that are listed in a message.
MOST_NAMES = 10


class Labels(NamedTuple):
    """Class indices of N rows, and the names of the classes.

    codes: (N,) int64, indices into `names`, or `UNLABELLED`; names: one per class that occurs. Numbers are sorted by value and
    words alphabetically, except words that are all whole numbers, which are sorted by value.
    """

    codes: np.ndarray
    names: tuple[str, ...]


def read_labels(place: str, y: np.ndarray) -> Labels:
    """Converts labels to indices of the classes that occur.

    Args:
        place: where the labels are, such as "features.npz: y", for messages.
        y: (N,) or (N, 1) whole numbers of any type, booleans, or words. A label of -100 is no class: see `UNLABELLED`.

    Raises:
        InputError: the labels are of another shape or type, or a label is missing, a number that is not whole, or a word that
            cannot be printed; the message names its row.
    """
    kinds = _kinds(place, _one_column(place, y))
    found, codes = np.unique(kinds, return_inverse=True)
    if len(found) > MOST_CLASSES + 1:  # one may be `UNLABELLED`
        raise InputError(f"{place}: expected at most {MOST_CLASSES} classes, got {len(found)}")
    keys = [key.decode() if isinstance(key, bytes) else key for key in found.tolist()]
    if isinstance(keys[0], str) and all(_is_whole(key) for key in keys) and len({int(key) for key in keys}) == len(keys):
        order = np.argsort([float(key) for key in keys], kind="stable")
    else:
        order = np.arange(len(keys))
    named = [str(int(key)) if isinstance(key, float) else str(key) for key in (keys[place] for place in order)]
    names = tuple(name for name in named if name != str(UNLABELLED))
    index = {name: code for code, name in enumerate(names)} | {str(UNLABELLED): UNLABELLED}
    if len(names) > MOST_CLASSES:
        raise InputError(f"{place}: expected at most {MOST_CLASSES} classes, got {len(names)}")
    table = np.empty(len(keys), np.int64)
    table[order] = [index[name] for name in named]
    return Labels(table[codes.reshape(-1)], names)


def _one_column(place: str, y: np.ndarray) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        return y[:, 0]
    if y.ndim == 2 and len(y) and y.dtype.kind in "biuf" and bool(((y != 0).sum(1) == 1).all()):
        raise InputError(f"{place}: expected shape (N,), got one-hot labels {y.shape}; save y.argmax(axis=1)")
    if y.ndim != 1:
        raise InputError(f"{place}: expected shape (N,) of one label per row, got {y.shape}")
    return y


def _kinds(place: str, y: np.ndarray) -> np.ndarray:
    """Labels (N,) of one kind: integers, whole floating-point numbers, booleans, or words.

    Raises:
        InputError: see `read_labels`.
    """
    if y.dtype == object:
        y = _of_one_type(place, y)
    if len(y) == 0:
        raise InputError(f"{place}: there are no rows")
    if y.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            broken = ~np.isfinite(y) | (y != np.trunc(y))
        if broken.any():
            row = int(broken.argmax())
            _refuse(place, row, y[row].item(), missing=bool(np.isnan(y[row])))
        y = y.astype(np.float64)
    elif y.dtype.kind in "USO":
        y = _text(place, y)
    elif y.dtype.kind not in "biu":
        advice = "; save y.astype(str)" if y.dtype.kind == "M" else ""
        raise InputError(f"{place}: expected labels, whole numbers or words, got {y.dtype}{advice}")
    return y


def _text(place: str, y: np.ndarray) -> np.ndarray:
    """Words as an array of text, or of objects if they are long; none is empty."""
    objects = y.dtype.kind == "O" or y.dtype.itemsize > LONG
    text = np.empty(len(y), object) if objects else y
    step = max(1, 2**20 // y.dtype.itemsize)
    try:
        for first in range(0, len(y), step):
            words = [w.decode() if isinstance(w, bytes) else w for w in y[first : first + step].tolist()]
            for row, word in enumerate(words, first):
                if not word.strip():
                    _refuse(place, row, "", missing=True)
                if UNPRINTABLE.search(word):
                    _refuse(place, row, word, missing=False)
                if len(word) > MOST_LETTERS:
                    raise InputError(f"{place}: row {row} has a label of {len(word)} letters; expected at most {MOST_LETTERS}")
            if objects:
                text[first : first + step] = words
        return np.char.decode(y, "utf-8") if text.dtype.kind == "S" else text
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: a label is not UTF-8: {error}") from error


def _of_one_type(place: str, y: np.ndarray) -> np.ndarray:
    """Objects as words, booleans, integers or floating-point numbers; words stay objects, whose lengths may differ widely."""
    left_out = np.array([not isinstance(label, (str, bytes)) and label == UNLABELLED for label in y], bool)
    kinds = {type(label) for label in y[~left_out]}
    if not kinds:
        return y.astype(np.int64)
    if left_out.any() and kinds in ({str}, {bool}):
        y = np.array([str(label) for label in np.where(left_out, UNLABELLED, y)], dtype=object)
        kinds = {str}
    elif left_out.any() and kinds == {bytes}:
        y = np.where(left_out, str(UNLABELLED).encode(), y)
    for kind in (str, bool, int, float):
        if kinds <= ({int, float} if kind is float else {kind}):
            try:
                return y if kind is str else y.astype(kind)
            except OverflowError as error:
                raise InputError(f"{place}: a label is beyond 64 bits") from error
    if kinds == {bytes}:
        return y
    row = next((row for row, label in enumerate(y) if label is None or label != label), None)
    if row is not None:
        _refuse(place, row, y[row], missing=True)
    raise InputError(f"{place}: expected labels of one kind, got {', '.join(sorted(kind.__name__ for kind in kinds))}")


def _refuse(place: str, row: int, label: Any, *, missing: bool) -> None:
    advice = (
        f"label it, leave it out, or save {UNLABELLED} for it" if missing else "classes are whole numbers or printable words"
    )
    what = "no label" if missing else "the label"
    raise InputError(f"{place}: row {row} has {what} {label!r}; {advice}")


def _is_whole(word: str) -> bool:
    return word.removeprefix("-").isdecimal() and len(word) < 16


def with_classes(source: str, splits: Mapping[str, Split], known: Sequence[str] | None = None) -> dict[str, Split]:
    """The splits with class indices as targets, and with the names of the classes.

    Splits that name their classes keep their targets. Otherwise the labels that occur in any split are the classes.

    Args:
        source: name of the dataset, for messages.
        splits: as a dataset has read them.
        known: names of the classes of a trained model; the targets are then indices into these.

    Raises:
        InputError: a target is no label, or beyond the names; or a label is not among `known`.
    """
    targets = {name: split.target.numpy() for name, split in splits.items() if len(split.target)}
    given = {split.classes for split in splits.values()}
    names = given.pop() if len(given) == 1 else None
    if given:
        raise InputError(f"{source}: expected splits with the same classes")
    if not targets:
        return dict(splits)
    if names is None:
        joined = np.concatenate([_kinds(f"{source}: labels of {name}", target) for name, target in targets.items()])
        codes, names = read_labels(f"{source}: labels", joined)
        targets = dict(zip(targets, np.split(codes, np.cumsum([len(target) for target in targets.values()])[:-1]), strict=True))
    for name, target in targets.items():
        beyond = (target != UNLABELLED) & ((target < 0) | (target >= len(names)))
        if beyond.any():
            row = int(beyond.argmax())
            raise InputError(f"{source}: row {row} of {name} has class {target[row]}, and {len(names)} classes are named")
    if known is not None and tuple(known) != names:
        targets, names = _among(source, targets, names, tuple(known)), tuple(known)
    return {name: _with(split, targets.get(name), names) for name, split in splits.items()}


def _among(
    source: str, targets: Mapping[str, np.ndarray], names: tuple[str, ...], known: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Targets as indices into `known` instead of `names`."""
    occurring = set().union(*(np.unique(target).tolist() for target in targets.values())) - {UNLABELLED}
    index = {name: code for code, name in enumerate(known)}
    foreign = [names[code] for code in sorted(occurring) if names[code] not in index]
    if foreign:
        what = f"labels that are no class of the model: {listed(foreign)}"
        raise InputError(f"{source}: {what}; its classes are {listed(known)}")
    table = np.array([index.get(name, UNLABELLED) for name in names])
    return {name: np.where(target < 0, UNLABELLED, table[target]) for name, target in targets.items()}


def _with(split: Split, target: np.ndarray | None, names: tuple[str, ...]) -> Split:
    """A copy of the split, of whatever subclass, with another target and the names of the classes."""
    found = copy.copy(split)
    vars(found).pop("digest", None)  # computed of the former target
    object.__setattr__(found, "classes", names)
    if target is not None and (split.target.dtype != torch.int64 or not np.array_equal(target, split.target.numpy())):
        object.__setattr__(found, "target", torch.from_numpy(target.astype(np.int64)))
    return found


def listed(names: Sequence[Any] | np.ndarray) -> str:
    """``3, 7``, or with many names ``0, 1, ..., and 2 more``."""
    more = f", and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(map(str, names[:MOST_NAMES])) + more
