"""Nearly opposite features, in every type: the angle comes from ‖x̂ + ŷ‖, because a cosine near -1 has lost it."""

from __future__ import annotations

import antipode
import cases
import pytest
import torch
from places import Place


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("width", [7, 100, pytest.param(9000, marks=pytest.mark.grid)])
@pytest.mark.parametrize("angle", antipode.ANGLES)
def test_geodesic_mixup(place: Place, angle: float, width: int, dtype: torch.dtype) -> None:
    antipode.assert_mixup(angle, width, dtype, place.device)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("width", [7, 100])
@pytest.mark.parametrize("angle", antipode.ANGLES[:3])
def test_the_head_step(place: Place, angle: float, width: int, dtype: torch.dtype) -> None:
    antipode.assert_head_step(angle, width, dtype, place.device)
