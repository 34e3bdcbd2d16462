"""Division of rows into splits: fractions of all rows, classes as even as whole rows allow."""

from __future__ import annotations

import time

import numpy as np
import pytest
from feature_files import save
from hypothesis import given
from hypothesis import strategies as st
from iprm.data import make_data
from iprm.data.apportion import apportioned
from iprm.data.split import stratified
from iprm.errors import InputError

FRACTIONS = {"test": 0.25, "val": 0.1}


def counts(labels: np.ndarray, fractions: dict[str, float] = FRACTIONS, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of every class in every split, after checking that each row is in one split."""
    parts = stratified(labels, fractions, np.random.default_rng(seed))
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(labels)))
    assert all((np.diff(rows) > 0).all() for rows in parts.values())
    return {name: np.bincount(labels[rows], minlength=labels.max() + 1) for name, rows in parts.items()}


@pytest.mark.parametrize(
    ("classes", "rows", "expected"),
    [(100, 4, (100, 40, 260)), (50, 3, (37, 15, 98)), (60, 2, (30, 12, 78)), (10, 178, (445, 178, 1157)), (3, 7, (5, 2, 14))],
)
def test_small_classes_give_their_rows_in_turn(classes, rows, expected):
    found = counts(np.tile(np.arange(classes), rows))
    assert tuple(found[name].sum() for name in ("test", "val", "train")) == pytest.approx(expected, abs=1)
    assert sum(found[name].sum() for name in found) == classes * rows
    assert found["train"].min() >= 1
    for name, fraction in {**FRACTIONS, "train": 0.65}.items():
        assert abs(found[name].sum() - fraction * classes * rows) < 1
        assert abs(found[name] - fraction * rows).max() < 1


@pytest.mark.parametrize(("classes", "rows"), [(100, 4), (50, 3), (60, 2)])
def test_a_file_of_small_classes_needs_no_split(tmp_path, classes, rows):
    y = np.repeat(np.arange(classes), rows)
    x = np.random.default_rng(0).normal(size=(2, len(y), 5))
    splits = make_data("features", path=save(tmp_path, {"x_a": x[0], "x_b": x[1], "y": y})).splits
    assert len(splits["val"]) == round(0.1 * len(y))
    assert np.unique(splits["train"].target).tolist() == list(range(classes))


def test_one_row_per_class_is_refused_with_what_to_do(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 5))
    path = save(tmp_path, {"x_a": x, "x_b": -x, "y": np.arange(60)})
    message = (
        r"features\.npz: test and val need 21 of 60 rows, and train at least one row of each of 60 classes, 60 of them with "
        r"one row: give more rows per class, leave out classes with one row, lower .* or divide the rows yourself, .* 'split'"
    )
    with pytest.raises(InputError, match=message):
        _ = make_data("features", path=path).splits


def test_a_class_of_one_row_is_learned_and_the_others_make_up_for_it():
    found = counts(np.concatenate([np.repeat([0, 1], 50), np.arange(2, 22)]))
    assert found["train"].min() >= 1
    assert {name: int(rows.sum()) for name, rows in found.items()} == {"test": 30, "val": 12, "train": 78}
    assert abs(found["test"][0] - found["test"][1]) <= 1


@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    test=st.floats(0.01, 0.5),
    val=st.floats(0.01, 0.45),
    seed=st.integers(0, 99),
)
def test_totals_are_exact_and_classes_are_even_for_any_sizes(rows, test, val, seed):
    labels = np.repeat(np.arange(len(rows)), rows)
    fractions = {"test": test, "val": val}
    try:
        found = counts(labels, fractions, seed)
    except InputError:
        assert sum(fractions.values()) * len(labels) > len(labels) - len(rows) - 2
        return
    assert found["train"].min() >= 1
    for name, fraction in fractions.items():
        assert abs(found[name].sum() - fraction * len(labels)) < 1
    if min(rows) * (1 - test - val) >= 1:  # no class is too small for its share
        for name, own in found.items():
            share = own.sum() / len(labels)
            assert abs(own - share * np.array(rows)).max() < 1 + 1e-6, name
    again = counts(labels, fractions, seed)
    assert all(np.array_equal(found[name], again[name]) for name in found)


def test_large_classes_differ_from_their_share_by_less_than_a_row():
    rng = np.random.default_rng(1)
    sizes = rng.integers(100, 3000, 12)
    for name, found in counts(np.repeat(np.arange(12), sizes)).items():
        fraction = FRACTIONS.get(name, 0.65)
        assert abs(found - fraction * sizes).max() < 1.01


def test_thousands_of_classes_take_no_time():
    labels = np.random.default_rng(0).integers(0, 10_000, 60_000)
    labels = np.concatenate([labels, np.arange(10_000)])
    found = counts(labels)
    assert {name: int(rows.sum()) for name, rows in found.items()} == {"test": 17_500, "val": 7_000, "train": 45_500}


def test_divisions_are_those_of_one_permutation_per_class():
    """The same seed gives the rows that it always gave."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels = 3 * rng.integers(0, rng.integers(1, 30), 200) - 7
        generator = np.random.default_rng(seed)
        classes, rows = np.unique(labels, return_counts=True)
        shuffled = [generator.permutation(np.flatnonzero(labels == k)) for k in classes]
        held = [50, 20]
        for own, counts in zip(shuffled, apportioned(rows, held, generator), strict=True):
            parts = np.split(own, np.cumsum(counts))
            found = stratified(labels, FRACTIONS, np.random.default_rng(seed))
            assert all(np.isin(part, found[name]).all() for name, part in zip(("test", "val", "train"), parts, strict=True))


@pytest.mark.slow
def test_a_million_rows_of_10000_classes_are_divided_with_one_sort():
    """0.3 s on one Zen 4 core, and 1.1 s with an array per class and split."""
    labels = np.random.default_rng(0).integers(0, 10_000, 10**6)
    begun = time.process_time()
    stratified(labels, FRACTIONS, np.random.default_rng(0))
    assert time.process_time() - begun < 5
