"""`make sanitize` tests the operators that were built with the sanitizers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import iprm_kernels as ik

SANITIZED = "-fsanitize=address,undefined" in ik.build_info().get("flags", "")


def test_the_extension_is_that_of_build_sanitize() -> None:
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("for make sanitize")
    assert SANITIZED
    assert Path(ik.__file__).parents[1].name == "sanitize"
    assert ik.backends()["cpp"].default_for == ("cpu",)
