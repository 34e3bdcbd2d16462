"""Object arrays of plain values, such as labels that pandas holds as words, read without running code of the file.

numpy pickles such arrays, and unpickling calls whatever the file names. Here the stream is interpreted with stand-ins for the
four names that an array of plain values needs; any other name is refused, and nothing of numpy is called.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np

#: Most steps of a stream of pickle, per element and in all, which take 10 s. A scalar of numpy takes 12 steps, a word 3.
MOST_STEPS = (16, 10**7)
#: Bytes of the longest element. Python's pickle copies each several times.
LONGEST = 2**20
#: Objects that may be elements.
PLAIN = (str, bytes, bool, int, float, type(None))
_SCALAR = re.compile(r"(?P<kind>[USbiufO])(?P<size>\d+)")


class _State:
    """Stands in for an array or a dtype: keeps the arguments that it is made with, and its state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Callable:
    """Stands in for a function that a file may call. A file cannot change it."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it is no array")


def _scalar(dtype: Any, content: Any) -> Any:
    """A plain value for a scalar of numpy: text, a number or a boolean."""
    match = _SCALAR.fullmatch(dtype.arguments[0])
    kind, order = (match["kind"], dtype.state[1]) if match else ("", "")
    if not isinstance(content, bytes) or order not in ("<", ">", "|", "="):
        raise ValueError("an element is no plain value")
    if kind == "U":
        return content.decode("utf-32-be" if order == ">" else "utf-32-le").rstrip("\0")
    if kind == "S":
        return content.rstrip(b"\0")
    if kind in "biuf" and len(content) == int(dtype.arguments[0][1:]) <= 8:
        return np.frombuffer(content, f"{order}{dtype.arguments[0]}")[0].item()
    raise ValueError(f"an element is of {dtype.arguments[0]!r}")


#: (module, name) that a file may name -> its stand-in. numpy 2 renamed the module.
_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _Callable(_State),
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Callable(_State) for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Callable(_scalar) for core in ("core", "_core")},
}


# Python's own unpickler: that of C allocates the size of an index that the file states
class _Reader(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise ValueError(f"it names {module}.{name}")
        return _STAND_INS[module, name]


class _Stream(io.BytesIO):
    """Refuses reads of more than `LONGEST` bytes."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LONGEST:
            raise ValueError(f"an element has more than {LONGEST} bytes")
        return super().read(size)

    def readline(self, size: int | None = -1) -> bytes:
        return super().readline(LONGEST)


#: Steps that hash what a file holds: the hash of tuples within tuples, each twice in the next, takes 2ⁿ steps of n levels.
_HASH = (pickle.DICT, pickle.SETITEM, pickle.SETITEMS, pickle.ADDITEMS, pickle.FROZENSET)


class _Steps(dict):
    """The functions of the steps of a stream, of which each step looks up one; raises ValueError after `most`, and for a dict
    or a set, which no array of plain values has."""

    def __init__(self, most: int) -> None:
        super().__init__(pickle._Unpickler.dispatch)
        self.refused = frozenset(code[0] for code in _HASH)
        self.left = most

    def __getitem__(self, step: int) -> Any:
        self.left -= 1
        if step in self.refused:
            raise ValueError("it has a dict or a set")
        if self.left < 0:
            raise ValueError("its stream has more steps than its elements need")
        return super().__getitem__(step)


def read_plain_objects(content: bytes | memoryview, shape: tuple[int, ...]) -> np.ndarray:
    """An array of objects, each an instance of `PLAIN`, from the content of an .npy file after its header.

    Raises:
        Exception: the content is broken, of another shape, has other objects, or takes more than `MOST_STEPS`.
    """
    each, most = MOST_STEPS
    reader = _Reader(_Stream(content))
    reader.dispatch = _Steps(min(most, 1000 + each * math.prod(shape)))  # type: ignore[misc]
    found = reader.load()
    if not isinstance(found, _State) or not isinstance(found.state, tuple) or len(found.state) != 5:
        raise ValueError("it is no array")
    _, stored, _, by_columns, elements = found.state
    if stored != shape or not isinstance(elements, list) or len(elements) != math.prod(shape):
        raise ValueError("it is no array of the shape in its header")
    other = next((type(element).__name__ for element in elements if type(element) not in PLAIN), None)
    if other is not None:
        raise ValueError(f"an element is of {other}")
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape, order="F" if by_columns else "C")
