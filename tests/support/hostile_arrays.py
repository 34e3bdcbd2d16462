"""Hostile members of .npz files, by what their headers declare, and archives of them."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
from feature_files import arrays


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def declared(shape: str, dtype: str = "'<f4'", content: bytes = b"\0" * 64) -> bytes:
    """An .npy whose header declares more data than the file holds."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return path


def twice(path: Path, name: str, content: bytes) -> Path:
    """An archive with two members of one name, of which zipfile reads the last."""
    with warnings.catch_warnings(), zipfile.ZipFile(archive(path, whole()), "a") as file:
        warnings.simplefilter("ignore")
        file.writestr(name, content)
    return path


def whole() -> dict[str, bytes]:
    return {f"{name}.npy": npy(array) for name, array in arrays().items()}


DECLARED = {
    "2**60 rows": declared("(1152921504606846976, 4)"),
    "2**34 rows": declared("(17179869184, 4)"),
    "a size beyond 64 bits": declared(f"({2**62}, {2**62})"),
    "a size beyond any integer": declared(f"({10**400},)"),
    "negative rows": declared("(-1, 4)"),
    "rows of half": declared("(0.5, 4)"),
    "rows of a string": declared("('60', 4)"),
    "an item of 2 GB": declared("(60, 4)", "'|V2147483647'"),
    "letters of 4 GB": declared("(60,)", "'<U1000000000'"),
    "objects": declared("(60, 4)", "'|O'", b"\x80\x04cos\nsystem\n"),
    "an unknown type": declared("(60, 4)", "'<z9'"),
    "a type of code": declared("(60, 4)", "__import__('os').system('touch canary')"),
    "a type of depth": declared("(60, 4)", "[" * 1000 + "]" * 1000),
    "a long header": declared("(60, 4)" + " " * 60_000),
    "a later format": b"\x93NUMPY\x09\x00" + b"\0" * 100,
    "no array": b"no array at all",
    "nothing": b"",
}


def text(letter: int, order: str = "<") -> bytes:
    """60 words of one letter, which may be none of Unicode."""
    return declared("(60,)", f"'{order}U1'", struct.pack(f"{order}I", letter) * 60)


NOT_A_LETTER = "is broken: it has the letter 0x7fffffff, which is none of Unicode"
#: Arrays that hold all that they declare: the member, its content, and the message with which it is refused.
CONTENTS: dict[str, tuple[str, bytes, str]] = {
    "labels of no letters": ("y.npy", text(2**31 - 1), NOT_A_LETTER),
    "labels of no letters, big-endian": ("y.npy", text(2**31 - 1, ">"), NOT_A_LETTER),
    "a split of no letters": ("split.npy", text(2**31 - 1), NOT_A_LETTER),
    "labels of half letters": ("y.npy", text(0xD800), "y: row 0 has the label"),
    "a split of half letters": ("split.npy", text(0xD800), r"got '\ud800' in row 0"),
    "a split of fields": ("split.npy", npy(np.zeros(60, [("a", "<i4")])), "split: expected words or whole numbers, got [('a'"),
    "a split of complex numbers": ("split.npy", npy(np.zeros(60, complex)), "split: expected words or whole numbers"),
    "a split of durations": ("split.npy", npy(np.zeros(60, "<m8[s]")), "split: expected words or whole numbers"),
    "labels of fields": ("y.npy", npy(np.zeros(60, [("a", "<U1")])), "y: expected labels, whole numbers or words"),
    "features of durations": ("x_audio.npy", npy(np.zeros((60, 4), "<m8[s]")), "x_audio: expected numbers, got timedelta64"),
    "features of dates": ("x_audio.npy", npy(np.zeros((60, 4), "<M8[s]")), "x_audio: expected numbers, got datetime64"),
    "features of fields": ("x_audio.npy", npy(np.zeros((60, 4), [("a", "<f4")])), "x_audio: expected numbers, got [('a'"),
}
