"""Checks the pickle of a checkpoint before torch reads it: tensors and plain values alone, of bounded size.

`torch.load(weights_only=True)` runs no code of a file. With torch 2.13 a file of a few bytes can still take all memory (a
tensor larger than its storage, which torch enlarges; ``bytearray(10**11)``; text that is encoded as hexadecimal again and
again) or all time (the hash of a tuple that holds one tuple twice, forty levels deep). Here the same stream is interpreted
first, with stand-ins for the few functions that tensors and plain values need.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch

#: Reads from the stream, one to three per value: 4 s of a core. The state of 10^4 epochs with a dozen metrics takes 2 million.
MOST_READS = 8_000_000
#: Lists, dicts and tuples, the values that take many times more memory than bytes of the file.
MOST_CONTAINERS = 1_000_000
#: Levels of lists, dicts and tuples within each other. States of Lightning have 9.
MOST_LEVELS = 64
#: Integers that can be keys of a dict. Python's hash of larger ones can be made equal by choice.
MOST_KEY = 2**32

_OPCODES = (
    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.BINPERSID),
    *(pickle.NONE, pickle.NEWFALSE, pickle.NEWTRUE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINFLOAT, pickle.BINUNICODE, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_TUPLE, pickle.TUPLE),
    *(pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT),
)
_CONTAINERS = (
    *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.REDUCE),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
)
#: Bytes per element of each type of storage.
_ITEMSIZES = {"Bool": 1, "Byte": 1, "Char": 1, "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4}
_ITEMSIZES |= {"Long": 8, "Double": 8, "ComplexFloat": 8, "ComplexDouble": 16}


def check_pickle(content: bytes, storages: Mapping[str, int]) -> None:
    """Checks that the pickle of an archive of torch holds tensors and plain values alone: text, numbers, booleans, None, dtypes
    and devices, in lists, tuples, sets and dicts.

    Args:
        content: the pickle.
        storages: the size in bytes of each storage of the archive, by key.

    Raises:
        ValueError: it holds anything else; a tensor has more elements than its storage; or values are nested, shared or so many
            that reading them could take minutes or memory many times the size of the file.
        Exception: the stream is broken.
    """
    reader = _Reader(content, storages)
    _check_tree([reader.load(), *reader.attached], len(content))


class _StorageType(NamedTuple):
    itemsize: int


class _Storage(NamedTuple):
    key: str
    itemsize: int
    nbytes: int


class _Tensor(NamedTuple):
    nbytes: int


class _Stream(io.BytesIO):
    """Counts reads."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.left = MOST_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"its pickle has more than {MOST_READS} parts")
        return super().read(size)


# Python's own unpickler: that of C allocates the size of an index that the file states, and its operations cannot be restricted
class _Reader(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES}

    def __init__(self, content: bytes, storages: Mapping[str, int]) -> None:
        super().__init__(_Stream(content))
        self._sizes, self._size = storages, sum(storages.values())
        self._storages: dict[str, _Storage] = {}
        self._tensors: set[Any] = set()
        self._bytes, self._containers = 0, 0
        self.attached: list[Any] = []  # the versions of modules that the state of a module has as an attribute

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module == "torch" and name.endswith("Storage") and (size := _ITEMSIZES.get(name.removesuffix("Storage"))):
            return _StorageType(size)
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _StorageType(1)
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return self._tensor_v2 if name.endswith("2") else self._tensor_v3
        raise ValueError(f"it names {module}.{name}, which is no tensor or plain value")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType(size), str(key), str(), int(numel)):
                storage = _Storage(key, size, numel * size)
            case _:
                raise ValueError("it refers to a storage in an unknown way")
        if storage.nbytes != self._sizes.get(key) or self._storages.setdefault(key, storage) != storage:
            raise ValueError(f"its storage {key} is not of the size or type that it declares")
        return storage

    def _tensor_v2(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
    ) -> _Tensor:
        if type(storage) is not _Storage:
            raise ValueError("a tensor has no storage")
        return self._tensor(storage, storage.itemsize, offset, size, stride, grad, hooks, metadata)

    def _tensor_v3(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
    ) -> _Tensor:
        if type(storage) is not _Storage or storage.itemsize != 1 or not isinstance(dtype, torch.dtype):
            raise ValueError("a tensor has no storage")
        return self._tensor(storage, dtype.itemsize, offset, size, stride, grad, hooks, metadata)

    def _tensor(
        self, storage: _Storage, itemsize: int, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, metadata: Any
    ) -> _Tensor:
        numbers = [offset, *size, *stride] if type(size) is type(stride) is tuple and len(size) == len(stride) <= 64 else [None]
        if not all(type(number) is int and 0 <= number < 2**62 for number in numbers) or type(grad) is not bool:
            raise ValueError("a tensor has no shape")
        if hooks or (metadata and not (isinstance(metadata, dict) and metadata.keys() <= {"conj", "neg"})):
            raise ValueError("a tensor has hooks or metadata")
        numel, last = math.prod(size), offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if numel and max(last + 1, numel) * itemsize > storage.nbytes:
            raise ValueError(f"a tensor of shape {size} has more elements than its storage")
        if (place := (storage.key, offset, size, stride)) not in self._tensors:
            self._tensors.add(place)
            self._bytes += numel * itemsize
        if self._bytes > 2 * self._size:
            raise ValueError("its tensors share storages, and take more than twice their size")
        return _Tensor(numel * itemsize)

    def load_build(self) -> None:
        state = self.stack.pop()  # type: ignore[attr-defined]
        if type(self.stack[-1]) is not OrderedDict or type(state) is not dict or not state.keys() <= {"_metadata"}:  # type: ignore[attr-defined]
            raise ValueError("it changes the attributes of an object")
        self.attached.append(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())  # type: ignore[attr-defined]

    def _set(self, items: list[Any]) -> None:
        into = self.stack[-1]  # type: ignore[attr-defined]
        if type(into) not in (dict, OrderedDict):
            raise ValueError("it sets an item of what is no dict")
        _check_keys(items[::2])
        into.update(zip(items[::2], items[1::2], strict=True))

    def load_append(self) -> None:
        value = self.stack.pop()  # type: ignore[attr-defined]
        self._list().append(value)

    def load_appends(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        self._list().extend(items)

    def _list(self) -> list[Any]:
        if type(self.stack[-1]) is not list:  # type: ignore[attr-defined]
            raise ValueError("it appends to what is no list")
        return self.stack[-1]  # type: ignore[attr-defined]


def _counted(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def counted(reader: _Reader) -> None:
        reader._containers += 1
        if reader._containers > MOST_CONTAINERS:
            raise ValueError(f"it holds more than {MOST_CONTAINERS} lists, dicts, tuples and tensors")
        load(reader)

    return counted


_OWN = {"BUILD": _Reader.load_build, "SETITEM": _Reader.load_setitem, "SETITEMS": _Reader.load_setitems}
_OWN |= {"APPEND": _Reader.load_append, "APPENDS": _Reader.load_appends}
_Reader.dispatch |= {getattr(pickle, name)[0]: load for name, load in _OWN.items()}
_Reader.dispatch |= {code[0]: _counted(_Reader.dispatch[code[0]]) for code in _CONTAINERS}


def _check_keys(keys: Collection[Any]) -> None:
    """Raises ValueError unless every key is text, a boolean, None, or an integer up to `MOST_KEY`."""
    for key in keys:
        if type(key) is not str and not (key is None or (isinstance(key, int) and abs(key) <= MOST_KEY)):
            raise ValueError("a key of a dict, or an element of a set, is neither text nor a small integer")


def _refused(*arguments: Any) -> NoReturn:
    raise ValueError("it calls a function with arguments that no plain value has")


def _ordered_dict(*arguments: Any) -> Any:
    return _refused() if arguments else OrderedDict()


def _counter(content: Any) -> Any:
    return dict(content) if type(content) is dict else _refused()


def _set(items: Any) -> Any:
    if type(items) is not list:
        _refused()
    _check_keys(items)
    return tuple(items)


def _encoded(text: Any = "", codec: Any = "latin1") -> Any:
    """Bytes are stored as text with the same code points."""
    return text.encode("latin1") if type(text) is str and codec in ("latin1", "latin-1") else _refused()


def _bytearray(content: Any = b"") -> Any:
    return content if type(content) is bytes else _refused()


def _atom(*arguments: Any) -> Any:
    """A device, a layout or a complex number."""
    return None if all(type(argument) in (str, int, float) for argument in arguments) else _refused()


def _size(sizes: Any) -> Any:
    return sizes if type(sizes) is tuple and all(type(size) is int for size in sizes) else _refused()


def _parameter(data: Any, grad: Any, hooks: Any) -> Any:
    return data if type(data) is _Tensor and type(grad) is bool and not hooks else _refused()


#: (module, name) -> its stand-in, which the stream can call but not change (`load_build`). In protocol 2 the names are those of
#: Python 2, of which `_Unpickler` translates some.
_FUNCTIONS = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "Counter"): _counter,
    ("_codecs", "encode"): _encoded,
    ("torch", "Size"): _size,
    ("torch", "device"): _atom,
    ("torch.serialization", "_get_layout"): _atom,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{(module, "set"): _set for module in ("builtins", "__builtin__")},
    **{(module, "complex"): _atom for module in ("builtins", "__builtin__")},
    **{(module, "bytearray"): _bytearray for module in ("builtins", "__builtin__")},
}


def _check_tree(root: Any, most: int) -> None:
    """Raises ValueError if the value, written as a tree without sharing, has more than `most` values, or too many levels."""
    found: dict[int, tuple[int, int]] = {}  # values and levels, by identity; of a container that is being counted: 0

    def count(value: Any) -> tuple[int, int]:
        if type(value) not in (list, tuple, dict, OrderedDict):
            return 1, 0
        if id(value) in found:
            if not found[id(value)][0]:
                raise ValueError("it holds a list or dict that contains itself")
            return found[id(value)]
        found[id(value)] = 0, 0
        values, levels = 1, 0
        for part in value.values() if isinstance(value, dict) else value:
            below = count(part)
            values, levels = values + below[0], max(levels, below[1])
        if values > most or levels >= MOST_LEVELS:
            raise ValueError(
                f"its values are nested in more than {MOST_LEVELS} levels, or shared so that they unfold without end"
            )
        found[id(value)] = values, levels + 1
        return found[id(value)]

    try:
        count(root)
    except RecursionError:
        raise ValueError(f"its values are nested in more than {MOST_LEVELS} levels") from None
