"""The length that the header of a WAV file declares. libsndfile reads a truncated file without an error, as a shorter one."""

from __future__ import annotations

import struct
from pathlib import Path

#: First four bytes of a file -> byte order of its numbers.
ORDERS = {b"RIFF": "<", b"RF64": "<", b"BW64": "<", b"RIFX": ">"}
#: Most chunks that are looked at; a recording has about 5.
MOST_CHUNKS = 1000
#: Sizes of the data chunk with which a program that writes to a pipe says that it does not know the size.
UNKNOWN = (0, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF)


def declared_frames(file: Path) -> int | None:
    """The number of frames (samples per channel) that a WAV file's header declares.

    None for other formats, for a header that does not state the size or has more than `MOST_CHUNKS` before the data, and for
    compressed WAV, where bytes are no frames.
    """
    with file.open("rb") as content:
        order = ORDERS.get(content.read(4))
        if order is None or content.read(8)[4:] != b"WAVE":
            return None
        bytes_per_frame, long_size = 0, None  # the latter of RF64, whose data chunk has no room for it
        for _ in range(MOST_CHUNKS):
            if len(head := content.read(8)) < 8:
                return None
            name, size = head[:4], struct.unpack(f"{order}I", head[4:])[0]
            if name == b"data":
                size = long_size if size == 0xFFFFFFFF and long_size is not None else size
                return None if size in UNKNOWN or not bytes_per_frame else size // bytes_per_frame
            body = content.read(min(size, 64))
            if name == b"ds64" and len(body) >= 16:
                long_size = struct.unpack(f"{order}Q", body[8:16])[0]
            if name == b"fmt " and len(body) >= 16:
                kind, _, _, _, width, bits = struct.unpack(f"{order}HHIIHH", body[:16])
                bytes_per_frame = width if kind in (1, 3, 6, 7, 0xFFFE) and bits else 0
            content.seek(size - len(body) + size % 2, 1)
    return None
