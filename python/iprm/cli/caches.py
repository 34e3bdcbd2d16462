"""Temporary cache folders for matplotlib, torch and Triton, used where their own cannot be written."""

from __future__ import annotations

import atexit
import getpass
import os
import shutil
import sys
import tempfile
from pathlib import Path


def provide_caches() -> None:
    """Replaces every cache folder that cannot be written by a temporary one, which is deleted when this process ends, and
    reports this on standard error. In many containers, the home folder is missing or read-only.

    Where the user has no name, LOGNAME is set, because torch reads the name to choose its cache folder.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # no such user; ImportError without the module pwd, before Python 3.13
        user = os.environ["LOGNAME"] = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "user"
    lacking = {variable: folder for variable, folder in _folders(user).items() if not _writable(folder)}
    if not lacking:
        return
    folders = ", ".join(lacking.values())
    print(f"iprm: caches in {folders} cannot be written; temporary ones are used and deleted at the end", file=sys.stderr)
    own = tempfile.mkdtemp(prefix="iprm-caches-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    for variable in lacking:
        os.environ[variable] = str(Path(own, variable))


def _folders(user: str) -> dict[str, str]:
    """Environment variable -> the cache folder that it names, or else the folder that the package uses without it."""
    given = os.environ
    without = {
        "MPLCONFIGDIR": f"{given.get('XDG_CONFIG_HOME') or '~/.config'}/matplotlib",
        "TRITON_CACHE_DIR": f"{given.get('TRITON_HOME') or '~'}/.triton/cache",
        "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{user}",
    }
    return {variable: os.path.expanduser(given.get(variable) or folder) for variable, folder in without.items()}


def _writable(folder: str) -> bool:
    """Whether the folder exists or can be created, and can be written."""
    if folder.startswith("~"):  # there is no home
        return False
    path = Path(folder).absolute()
    existing = next(place for place in (path, *path.parents) if os.path.exists(place))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
