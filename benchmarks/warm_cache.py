"""Triton kernels for sm_90 compiled without a GPU, and carried to a machine with one.

usage: warm_cache.py fill FOLDER     compiles the kernels of short_run.py into FOLDER
       warm_cache.py moved FOLDER    makes a folder that was copied to another path a cache again; Triton keeps absolute paths

The other machine finds a kernel (TRITON_CACHE_DIR=FOLDER) only if its Triton, its ptxas and the sources of the kernels are the
same: fill the folder with the wheel of that machine. Otherwise the folder does no harm.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def fill(folder: Path, shapes: Sequence[tuple[int, int, int]] | None = None) -> tuple[int, int]:
    """shapes: those of short_run.py if None.  -> kernels that were compiled, and that were found in the folder"""
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    sys.path.insert(0, str(ROOT / "tests/support"))
    import short_run
    import stand_in
    from triton import knobs

    import iprm_kernels as ik

    found: list[bool] = []
    knobs.compilation.listener = lambda cache_hit, **_: found.append(cache_hit)
    with tempfile.TemporaryDirectory() as temporary:
        stand_in.install(Path(temporary))
        with ik.use_backend("triton"):
            for shape, dtype in itertools.product(shapes or short_run.SHAPES, short_run.DTYPES):
                short_run.step(*shape, dtype, pair_only=False, device="cpu")
    return len(found) - sum(found), sum(found)


def moved(folder: Path) -> int:
    """-> the number of kernels in the folder"""
    groups = list(folder.glob("*/__grp__*.json"))
    for group in groups:
        content: dict[str, Any] = json.loads(group.read_text())
        content["child_paths"] = {name: str(group.parent.resolve() / name) for name in content["child_paths"]}
        group.write_text(json.dumps(content))
    return len(groups)


if __name__ == "__main__":
    what, folder = sys.argv[1:]
    if what == "moved":
        print(f"{moved(Path(folder))} kernels in {folder}")
    else:
        begin = time.perf_counter()
        compiled, found = fill(Path(folder).resolve())
        print(f"{compiled} kernels compiled, {found} found in {folder}, {time.perf_counter() - begin:.1f} s")
