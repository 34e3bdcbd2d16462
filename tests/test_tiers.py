"""What the default tier of the tests holds. The files of the ahead-of-time compilations have such a test of their own."""

from __future__ import annotations

import re

import pytest
from tiers import SLOW_INTERPRETED, collected


def test_the_default_tier_interprets_every_test_of_the_triton_kernels_in_every_type() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")

    def covered(*options: str) -> set[tuple[str, str]]:
        """Test functions, and the dtype of each of their cases."""
        nodes = collected("tests/iprm_kernels", "-k", "triton", *options, TRITON_INTERPRET="1")
        return {(node.partition("[")[0], "".join(re.findall(r"torch\.\w+\d", node))) for node in nodes}

    default, whole = covered(), covered("-m", "")
    assert {node.rpartition("::")[2] for node, _ in whole - default} <= set(SLOW_INTERPRETED)
    assert len(default) > 100


@pytest.mark.slow
def test_plain_pytest_runs_the_default_tier() -> None:
    whole = collected("tests/iprm_kernels/test_isa.py", "-m", "")
    default, rest = (collected("tests/iprm_kernels/test_isa.py", *options) for options in ((), ("-m", "grid or slow")))
    assert sorted(default + rest) == sorted(whole)
    assert default
