"""The command `iprm` without root's right to read and write every file; the tests may run as root."""

from __future__ import annotations

import ctypes
import os
import pickle
from pathlib import Path

from command import Outcome, iprm

#: Version of the interface of capset(2) with two words per set of capabilities.
VERSION = 0x20080522


def without_rights(folder: Path, *arguments: str) -> Outcome:
    """Exit code and output of `iprm ARGUMENTS`, called in `folder` by a process without capabilities."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(VERSION, 0), (ctypes.c_uint32 * 6)())
            os.write(writable, pickle.dumps(tuple(iprm(folder, *arguments))))
        finally:
            os._exit(0)
    os.close(writable)
    with open(readable, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    return Outcome(*pickle.loads(content))
