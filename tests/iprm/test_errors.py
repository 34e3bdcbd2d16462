"""The closest name to one that does not exist."""

from __future__ import annotations

import pytest
from iprm.errors import closest, unknown

KNOWN = ("digits", "av-digits", "features")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("digts", "digits"), ("DIGITS", "digits"), ("av_digits", "av-digits"), ("feature", "features"), ("xyz", None), ("", None)],
)
def test_the_closest_is_found_whatever_the_case_and_the_dashes_or_else_none(name, meant):
    assert closest(name, KNOWN) == meant


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digts", "unknown dataset 'digts': did you mean 'digits'? (known: av-digits, digits, features)"),
        ("xyz", "unknown dataset 'xyz': (known: av-digits, digits, features)"),
    ],
)
def test_the_message_names_what_is_known(name, message):
    assert unknown("dataset", name, iter(KNOWN)) == message
