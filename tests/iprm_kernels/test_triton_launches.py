"""The host path of the Triton operators, forward and backward, by Triton's own binder, compiler and launcher on a libcuda that
launches nothing: it binds and launches without an error, and with a known number of launches and of compiled variants."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import warm_cache

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET is set: nothing is launched", allow_module_level=True)

HOST_PATH = Path(__file__).parents[1] / "support/host_path.py"
Sizes = list[tuple[str, int, int, list[int]]]  # dtype, width, classes and batches

#: Launches of our kernels and, beside them, of torch's, forward and backward. A change must be intended.
LAUNCHES = {
    "normalize": {"float32": (2, 0), "bfloat16": (2, 0)},
    "geodesic_mixup": {"float32": (2, 0), "bfloat16": (2, 0)},
    "batch_kl": {"float32": (2, 2), "bfloat16": (2, 2)},  # torch adds the rows' KLs
    "strength_weights": {"float32": (2, 0), "bfloat16": (2, 5)},  # torch converts the few numbers
    "average_strength": {"float32": (1, 0), "bfloat16": (1, 0)},
    "probe_rebalance": {"float32": (5, 4), "bfloat16": (5, 4)},  # the products of the head, which is the caller's
    "head step, 2 modalities": {"float32": (6, 0), "bfloat16": (6, 0)},
    "head step, 3 modalities": {"float32": (11, 28), "bfloat16": (7, 1)},  # in float32 torch computes the products backward
}
BATCHES = [64, 63, 1, 65, 128]
#: Number of kernels that the JIT compiles at each batch size and has not compiled for an earlier one. Operators that are not
#: listed compile none after the first size. The steps of two and of three modalities share some kernels.
VARIANTS = {
    "float32": {
        "probe_rebalance": [2, 0, 0, 1, 0],
        "head step, 2 modalities": [6, 0, 0, 2, 0],
        "head step, 3 modalities": [9, 0, 1, 0, 0],
    },
    "bfloat16": {
        "probe_rebalance": [2, 0, 0, 1, 0],
        "head step, 2 modalities": [6, 0, 1, 2, 0],
        "head step, 3 modalities": [7, 0, 2, 0, 0],
    },
}
#: A loose bound on the median time of the host path, products of torch included; of the head step it takes about 1 ms. It fails
#: if something compiles in every step.
MOST_MICROSECONDS = 100_000

EVERYDAY: Sizes = [("float32", 512, 6, [64]), ("bfloat16", 512, 6, [64])]
#: One row; rows without vector loads; products by torch; types of which the default tier has none.
FURTHER: list[Sizes] = [
    [("float32", 511, 31, [1, 4097])],
    [("bfloat16", 1024, 200, [65])],
    [("float16", 512, 31, [64]), ("float64", 31, 6, [64])],
]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's cache, empty at the start of the session."""
    return tmp_path_factory.mktemp("triton")


def environment(**own: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **own}


def host_path(cache: Path, folder: Path, what: str, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """What host_path.py prints: by "dtype width classes batch" and by operator."""
    command = [sys.executable, str(HOST_PATH), str(folder), what, json.dumps(sizes)]
    done = subprocess.run(command, env=environment(TRITON_CACHE_DIR=str(cache)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("sizes", [EVERYDAY, *(pytest.param(sizes, marks=pytest.mark.grid) for sizes in FURTHER)], ids=str)
def test_every_launch_binds_and_is_the_one_that_was_compiled_ahead_of_time(
    sizes: Sizes, cache: Path, tmp_path: Path, record_property: Any
) -> None:
    for case, operators in host_path(cache, tmp_path, "launches", sizes).items():
        assert operators.keys() == LAUNCHES.keys()
        for name, found in operators.items():
            assert found["received"] == found["recorded"], f"{name}, {case}"
            assert not found["compiled otherwise"], f"{name}, {case}"
            assert all(programs > 0 for _, programs, _ in found["received"]), f"{name}, {case}"
            record_property(f"host µs, {name}, {case}", round(found["host µs"]))
            print(f"{name}, {case}: {len(found['received'])} launches, host path {found['host µs']:.0f} µs")
            assert found["host µs"] < MOST_MICROSECONDS
            if sizes == EVERYDAY:
                wanted = LAUNCHES[name][case.split()[0]]
                assert (len(found["received"]), len(found["torch"])) == wanted, f"{name}, {case}: {found}"


def test_a_change_of_the_batch_size_compiles_known_variants(cache: Path, tmp_path: Path) -> None:
    for dtype in VARIANTS:
        found = host_path(cache, tmp_path, "variants", [(dtype, 512, 6, BATCHES)])
        for name in LAUNCHES:
            variants = [operators[name] for operators in found.values()]
            wanted = VARIANTS[dtype].get(name, [variants[0], 0, 0, 0, 0])
            assert variants == wanted, f"{name}, {dtype}: {variants} by batch size {BATCHES}"


@pytest.mark.slow
def test_a_cache_filled_without_a_gpu_serves_after_it_was_moved(tmp_path: Path) -> None:
    """Triton's cache holds absolute paths, and finds nothing after a move alone."""

    def filled(folder: Path) -> tuple[int, int]:
        program = f"import pathlib, warm_cache; print(warm_cache.fill(pathlib.Path({str(folder)!r}), [(2, 3, 2)]))"
        done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True)
        return tuple(map(int, re.findall(r"\d+", done.stdout)))

    first, second = tmp_path / "first", tmp_path / "second"
    compiled, found = filled(first)
    assert compiled > 20
    assert found == 0
    first.rename(second)
    assert warm_cache.moved(second) == compiled
    assert filled(second) == (0, compiled)
