"""How a report draws: colours that everybody can tell apart, and the ticks of an axis."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from iprm.report.charts import COLOURS
from iprm.report.svg import ticks

# colours

STYLE = resources.files("iprm.report").joinpath("style.css").read_text(encoding="utf-8")
LIGHT_SCHEME, DARK_SCHEME = (
    {name: [int(value[k : k + 2], 16) / 255 for k in (0, 2, 4)] for name, value in re.findall(r"--([\w-]+): #(\w{6})\b", block)}
    for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
)
PALETTE = [f"c{k}" for k in range(COLOURS)]

#: From linear RGB to what is seen with each kind of dichromacy: Machado, Oliveira, Fernandes, "A Physiologically-based Model
#: for Simulation of Color Vision Deficiency", IEEE TVCG 2009, severity 1.
VISIONS = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # of linear sRGB


def linear(colour: Sequence[float]) -> np.ndarray:
    c = np.array(colour)
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """That of WCAG 2.2."""
    low, high = sorted(float(XYZ[1] @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(colour: Sequence[float], vision: str) -> np.ndarray:
    """CIELAB of a colour as it is seen."""
    t = XYZ @ np.clip(np.array(VISIONS[vision]) @ linear(colour), 0, 1) / XYZ.sum(1)
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("scheme", [LIGHT_SCHEME, DARK_SCHEME], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_what_is_behind_them(scheme):
    for text, behind in (("ink", "page"), ("ink", "card"), ("ink", "notice"), ("soft", "page"), ("soft", "card")):
        assert contrast(scheme[text], scheme[behind]) >= 4.5, (text, behind)
    for line in PALETTE:
        assert contrast(scheme[line], scheme["card"]) >= 3, line


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("scheme", [LIGHT_SCHEME, DARK_SCHEME], ids=["light", "dark"])
def test_colours_differ_whoever_sees_them(scheme, vision):
    for one, other in itertools.combinations(PALETTE, 2):
        assert np.linalg.norm(lab(scheme[one], vision) - lab(scheme[other], vision)) >= 20, (one, other)


# axes


@given(st.floats(-1e9, 1e9, allow_subnormal=False), st.floats(0, 1e9, allow_subnormal=False), st.integers(2, 9), st.booleans())
def test_ticks_are_few_distinct_and_enclose_the_values(low: float, span: float, count: int, whole: bool) -> None:
    high = low + span
    marks: Sequence[float] = ticks(low, high, count, whole)
    slack = 1e-6 * max(abs(low), abs(high), 1e-9)
    assert 2 <= len(marks) <= 2 * count + 2
    assert all(a < b for a, b in itertools.pairwise(marks))
    assert marks[0] <= low + slack
    assert marks[-1] >= high - slack
    assert not whole or all(t == int(t) for t in marks)
