"""Hostile recordings, by what is hostile in them: what writes one, and the message with which it is refused, if it is."""

from __future__ import annotations

import struct
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 8000


def flac(path: Path) -> None:
    soundfile.write(path, np.zeros(2**23, np.int16), RATE, format="FLAC")


def flac_that_declares(path: Path) -> None:
    """2^36 - 1 samples, in the 36 bits of the header."""
    soundfile.write(path, np.zeros(9000, np.int16), RATE, format="FLAC")
    content = bytearray(path.read_bytes())
    content[21] |= 15
    content[22:26] = b"\xff" * 4
    path.write_bytes(content)


def wav(path: Path, samples: int = 9000, channels: int = 1) -> bytearray:
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, RATE, 0, "NONE", ""))
        file.writeframes(b"\1\0" * samples * channels)
    return bytearray(path.read_bytes())


def changed(change: Callable[[bytearray], bytes | bytearray]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(wav(path))) and None


def sparse(path: Path) -> None:
    """A data chunk of 2 GB of silence, none of which is on the disk."""
    content = wav(path)
    content[4:8], content[40:44] = struct.pack("<I", 2**31 + 36), struct.pack("<I", 2**31)
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(2**31 + 44)


def rf64(path: Path) -> None:
    soundfile.write(path, np.full(9000, 0.1), RATE, format="RF64")
    content = bytearray(path.read_bytes())
    place = content.index(b"ds64")
    content[place + 16 : place + 24] = struct.pack("<Q", 2**36)
    path.write_bytes(content)


RECORDINGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a FLAC of silence": (flac, "expected a WAV file, got FLAC"),
    "a FLAC that declares 2**36 samples": (flac_that_declares, ""),
    "an Ogg": (lambda path: soundfile.write(path, np.zeros(9000), RATE, format="OGG"), "expected a WAV file, got OGG"),
    "an AIFF": (lambda path: soundfile.write(path, np.zeros(9000), RATE, format="AIFF"), "expected a WAV file, got AIFF"),
    "raw zeros": (lambda path: path.write_bytes(b"\0" * 9000), "not a readable recording"),
    "a long recording": (lambda path: wav(path, 2**24) and None, ""),
    "2 GB of silence": (sparse, ""),
    "an RF64 of 2**36 bytes": (rf64, "truncated: its header declares 34359738368 frames"),
    "a WAV of 4 GB": (changed(lambda wav: wav[:40] + b"\xf0\xff\xff\xff" + wav[44:]), "truncated"),
    "no channels": (changed(lambda wav: wav[:22] + b"\0\0" + wav[24:]), "not a readable recording"),
    "65,535 channels": (changed(lambda wav: wav[:22] + b"\xff\xff" + wav[24:]), "not a readable recording"),
    "another rate": (changed(lambda wav: wav[:24] + struct.pack("<I", 2**31 - 1) + wav[28:]), "samples a second"),
    "a million empty chunks": (changed(lambda wav: wav[:36] + b"junk\0\0\0\0" * 10**6 + wav[36:]), ""),
}

#: Names of recordings, and whether the file is one.
NAMES: dict[str, tuple[bytes, bool]] = {
    "a speaker that is not UTF-8": (b"0_b\xff_9.wav", True),
    "an index of 18 digits": (b"0_bob_" + b"9" * 18 + b".wav", True),
    "an index beyond 64 bits": (b"0_bob_" + b"9" * 23 + b".wav", False),
    "an index of 230 digits": (b"0_bob_" + b"9" * 230 + b".wav", False),
    "digits of another script": ("٣_bob_٣.wav".encode(), True),
    "escape sequences": (b"0_b\x1b[31m_9.wav", True),
}
