"""The `features` dataset: splits of a valid file, and the error for every kind of invalid file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_files import arrays, changed, save, without
from iprm.data import make_data
from iprm.encoders.description import InputSpec
from iprm.errors import InputError


def test_features_are_served_unchanged_in_three_disjoint_stratified_splits(tmp_path):
    content = arrays()
    data = make_data("features", path=save(tmp_path, content), seed=3)
    assert data.inputs == {"audio": InputSpec((4,)), "text": InputSpec((6,))}
    assert data.num_classes == 3
    rows = {name: split.origin["audio"].numpy() for name, split in data.splits.items()}
    assert sorted(np.concatenate(list(rows.values()))) == list(range(60))
    assert {name: len(index) for name, index in rows.items()} == {"train": 39, "val": 6, "test": 15}
    for name, split in data.splits.items():
        np.testing.assert_array_equal(split.inputs["audio"].numpy(), content["x_audio"][rows[name]].astype(np.float32))
        assert torch.bincount(split.target).tolist() == [len(split) // 3] * 3


def test_a_batch_is_a_mapping_and_an_int64_target(tmp_path):
    inputs, target = next(iter(make_data("features", path=save(tmp_path, arrays()), batch_size=8).train_dataloader()))
    assert {modality: x.shape for modality, x in inputs.items()} == {"audio": (8, 4), "text": (8, 6)}
    assert target.dtype == torch.int64
    assert target.shape == (8,)


@pytest.mark.parametrize("names", [("train", "val", "test"), (0, 1, 2)], ids=["words", "numbers"])
def test_a_given_split_is_kept(tmp_path, names):
    given = np.array(names)[np.arange(60) // 20]  # each with every class
    data = make_data("features", path=save(tmp_path, arrays() | {"split": given}))
    for place, name in enumerate(("train", "val", "test")):
        assert data.splits[name].origin["text"].tolist() == list(range(20 * place, 20 * place + 20))


BAD = {
    "no labels": (without("y"), "no array 'y'.*x_audio, x_text"),
    "no features": ({"y": arrays()["y"]}, "no array 'x_<modality>'"),
    "lengths that differ": (arrays() | {"x_text": np.zeros((59, 6))}, "x_text: expected as many rows as y, 60, got 59"),
    "features of one dimension": (arrays() | {"x_text": np.zeros(60)}, r"x_text: expected shape \(N, D\).*\(60,\)"),
    "features of a text type": (arrays() | {"x_text": np.full((60, 2), "a")}, "x_text: expected numbers, got <U1"),
    "a NaN": (changed("x_text", 11, np.nan), "modality 'text': row 11 has a feature that is not finite"),
    "beyond float32": (changed("x_audio", 4, 1e300), "modality 'audio': row 4 has a feature that is not finite in float32"),
    "no rows": ({"x_a": np.zeros((0, 2)), "y": np.zeros(0, int)}, "the dataset is empty"),
    "an empty split": (arrays() | {"split": np.array(["train", "test"])[np.arange(60) % 2]}, "the val split is empty"),
    "a foreign split": (arrays() | {"split": np.full(60, "trian")}, "split: expected .*got 'trian' in row 0"),
    "a split too short": (arrays() | {"split": np.zeros(3, int)}, r"split: expected shape \(60,\).*\(3,\)"),
    "objects that are no plain values": (
        arrays() | {"y": np.array([{}] * 60)},
        "array 'y' cannot be read without running code.*dict",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_refused_by_what_is_wrong_with_it(tmp_path, content, message):
    path = save(tmp_path, content)
    with pytest.raises(InputError, match=message) as caught:
        _ = make_data("features", path=path).splits
    assert path in str(caught.value)


def test_a_file_that_is_no_archive_is_named(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"not a zip file")
    with pytest.raises(InputError, match=r"broken\.npz: not a readable"):
        _ = make_data("features", path=str(tmp_path / "broken.npz")).splits


def test_a_single_array_is_distinguished_from_an_archive(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"one\.npy: expected an \.npz of several arrays"):
        _ = make_data("features", path=str(tmp_path / "one.npy")).splits


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"/nowhere\.npz: there is no such file"):
        _ = make_data("features", path="/nowhere.npz").splits


NOT_NEEDED = {
    "names of files, of objects": {"filenames": np.array([Path(f"{row}.wav") for row in range(60)], dtype=object)},
    "settings": {"config": np.array({"rate": 8000}, dtype=object)},
    "an array of another length": {"classes": np.array(["cat", "dog", "owl"])},
}


@pytest.mark.parametrize("other", NOT_NEEDED.values(), ids=NOT_NEEDED.keys())
def test_an_array_that_is_not_needed_is_not_read(tmp_path, other):
    path = save(tmp_path, other | arrays())
    assert make_data("features", path=path).modalities == ("audio", "text")


def test_an_entry_that_is_no_array_and_a_broken_array_are_not_read_unless_needed(tmp_path):
    with zipfile.ZipFile(save(tmp_path, arrays()), "a") as file:
        file.writestr("notes.txt", "features of our encoders")
        file.writestr("old_features.npy", "no array")
    assert make_data("features", path=str(tmp_path / "features.npz")).modalities == ("audio", "text")


def test_memory_is_asked_for_what_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("iprm.data.npz.available_memory", lambda: 2**16)
    path = save(tmp_path, arrays() | {"raw_audio": np.zeros((60, 2**12), np.float32)})
    assert make_data("features", path=path).num_classes == 3
