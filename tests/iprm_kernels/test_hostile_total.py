"""How many hostile examples a run has seen: `make fuzz` ends with this file."""

from __future__ import annotations

import hostile_results
import hypothesis
import pytest

#: By profile.
AT_LEAST = {"fuzz": 5_000, "weekly": 20_000}


def test_make_fuzz_has_seen_what_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
    profile = next((name for name in AT_LEAST if hypothesis.settings.default is hypothesis.settings.get_profile(name)), None)
    if profile is None:
        pytest.skip("for make fuzz")
    with capsys.disabled():
        print("", *(f"{count:6,} {name}" for name, count in hostile_results.EXAMPLES.items()), sep="\n")
        print(f"{hostile_results.EXAMPLES.total():6,} examples")
    assert hostile_results.EXAMPLES.total() >= AT_LEAST[profile]
