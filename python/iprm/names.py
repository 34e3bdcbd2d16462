"""Names of modalities: which ones there may be, and the names of files, folders and pairs that are made from them."""

from __future__ import annotations

import hashlib
import itertools
import unicodedata
from collections.abc import Sequence

from iprm.errors import InputError
from iprm.streams import OBEYED

#: Names of heads beside those of the modalities, in `FusionOutput.logits_by` and in columns such as ``val_accuracy_mix``.
HEADS = ("mix", "fused")
#: Characters that a file name cannot have or that separate folders, and the character that introduces their codes.
QUOTED = {"%": "%25", "/": "%2F", "\\": "%5C", "\0": "%00"}
#: Most bytes of a file name: file systems allow 255, and names are extended, as of temporary files.
LONGEST = 200


def check_modality(name: object) -> str:
    """Returns the name of a modality: any text that a column of a table can be named by.

    Raises:
        InputError: the name is no text, is empty, has control characters (such as a line feed or a mark of writing direction),
            or is the name of another head.
    """
    if not isinstance(name, str):
        raise InputError(f"modality {name!r}: expected a name, got {type(name).__name__}")
    if not name.strip():
        raise InputError(f"modality {name!r}: expected a name, got an empty one")
    if not {"Cc", "Cs", "Zl", "Zp"}.isdisjoint(map(unicodedata.category, name)) or OBEYED.search(name):
        raise InputError(f"modality {name!r}: expected a name without control characters and line breaks")
    if name in HEADS:
        raise InputError(f"modality {name!r}: the name of a head of the fused prediction; expected another name")
    return str(name)


def file_name(name: str) -> str:
    """The name of a file or folder of a modality or method: characters that separate folders are percent-encoded, and the end
    of a name beyond `LONGEST` bytes is replaced by a digest."""
    name = "".join(QUOTED.get(character, character) for character in name)
    if len(name.encode()) <= LONGEST:
        return name
    return name.encode()[: LONGEST - 17].decode(errors="ignore") + "~" + hashlib.sha256(name.encode()).hexdigest()[:16]


def pair_names(modalities: Sequence[str]) -> list[str]:
    """The names of all pairs of modalities, in the order of `itertools.combinations`: ``<a>_<b>``.

    If two names, or two names followed by ``_<modality>``, would be equal, as of ("a", "b_c") and ("a_b", "c"), every
    underscore within a modality's name is written ``%5F``, and every percent sign ``%25``.
    """
    plain = _joined(modalities)
    extended = [f"{name}_{m}" for name, pair in zip(plain, itertools.combinations(modalities, 2), strict=True) for m in pair]
    if len({*plain, *extended}) == len(plain) + len(extended):
        return plain
    return _joined([escaped(name) for name in modalities])


def possible_names(*modalities: str) -> tuple[str, str]:
    """The two names of a pair, or of a pair and one of the two, that `pair_names` chooses from: plain and escaped."""
    return "_".join(modalities), "_".join(map(escaped, modalities))


def escaped(name: str) -> str:
    """The name of a modality within that of a pair, if the plain names could be confused: see `pair_names`."""
    return name.replace("%", "%25").replace("_", "%5F")


def _joined(names: Sequence[str]) -> list[str]:
    return [f"{a}_{b}" for a, b in itertools.combinations(names, 2)]
