"""What the default tier of the tests holds. The files of the ahead-of-time compilations have such a test of their own."""

from __future__ import annotations

import re

import pytest
from tiers import SLOW_INTERPRETED, collected, interpreter_obstacle


def test_the_default_tier_interprets_every_test_of_the_triton_kernels_in_every_type() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")

    def covered(*options: str) -> set[tuple[str, str]]:
        """Test functions, and the dtype of each of their cases."""
        nodes = collected("tests/iprm_kernels", "-k", "triton", *options, TRITON_INTERPRET="1")
        return {(node.partition("[")[0], "".join(re.findall(r"torch\.\w+\d", node))) for node in nodes}

    default, whole = covered(), covered("-m", "")
    assert {node.rpartition("::")[2] for node, _ in whole - default} <= set(SLOW_INTERPRETED)
    assert len(default) > 100


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [("3.6.0", "2.4.6", True), ("3.6.0", "2.5.2", False), ("3.7.1", "2.5.2", True), ("3.10.0", "2.10.0", True)],
)
def test_the_interpreter_is_skipped_where_numpy_is_too_new_for_it(triton: str, numpy: str, works: bool) -> None:
    assert (interpreter_obstacle(triton, numpy) == "") == works


@pytest.mark.slow
def test_plain_pytest_runs_the_default_tier() -> None:
    whole = collected("tests/iprm_kernels/test_isa.py", "-m", "")
    default, rest = (collected("tests/iprm_kernels/test_isa.py", *options) for options in ((), ("-m", "grid or slow")))
    assert sorted(default + rest) == sorted(whole)
    assert default
