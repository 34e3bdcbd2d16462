"""Labels as people have them: gaps, words, floating-point numbers and others become classes, which keep their names."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from command import iprm
from feature_files import arrays, save
from iprm.data import make_data
from iprm.data.labels import read_labels
from iprm.data.module import MultimodalData
from iprm.data.split import Split
from iprm.errors import InputError
from iprm.training.checkpoint import read_checkpoint
from iprm.training.classifier import FusionClassifier

Y = np.arange(60) % 3
WORDS = np.array(["whale", "cat", "dog"])
LABELS = {
    "numbers from 0": (Y, ("0", "1", "2")),
    "a gap": (np.array([0, 1, 100_000])[Y], ("0", "1", "100000")),
    "years": (Y + 2019, ("2019", "2020", "2021")),
    "negative numbers": (Y - 1, ("-1", "0", "1")),
    "beyond int64": (Y.astype(np.uint64) + np.uint64(2**63), tuple(str(2**63 + k) for k in range(3))),
    "big-endian": ((Y + 7).astype(">i4"), ("7", "8", "9")),
    "bytes": (Y.astype(np.uint8), ("0", "1", "2")),
    "whole floats": (Y * 10.0, ("0", "10", "20")),
    "a column": (Y[:, None] + 5, ("5", "6", "7")),
    "booleans": (Y == 1, ("False", "True")),
    "words": (WORDS[Y], ("cat", "dog", "whale")),
    "words of bytes": (np.char.encode(WORDS, "utf-8")[Y], ("cat", "dog", "whale")),
    "words of objects": (WORDS[Y].astype(object), ("cat", "dog", "whale")),
    "np.str_ in objects": (np.array([np.str_(word) for word in WORDS[Y]], dtype=object), ("cat", "dog", "whale")),
    "numbers in objects": (np.array([int(k) for k in Y], dtype=object), ("0", "1", "2")),
    "numpy's numbers in objects": (np.array(list(Y + 3), dtype=object), ("3", "4", "5")),
    "numbers in words": (np.array(["9", "10", "2"])[Y], ("2", "9", "10")),
    "words of all scripts": (np.array(["猫", "пёс", "a b, c"])[Y], ("a b, c", "пёс", "猫")),
}


@pytest.mark.parametrize(("y", "names"), LABELS.values(), ids=LABELS.keys())
def test_labels_of_any_kind_are_indices_of_named_classes(tmp_path, y, names):
    data = make_data("features", path=save(tmp_path, arrays() | {"y": y}))
    assert data.classes == names
    assert data.num_classes == len(names)
    for split in data.splits.values():
        rows = split.origin["text"].numpy()
        plain = [label.decode() if isinstance(label, bytes) else label for label in y.reshape(-1)[rows].tolist()]
        shown = [str(int(label)) if isinstance(label, float) else str(label) for label in plain]
        assert [names[k] for k in split.target.tolist()] == shown
        assert split.target.dtype == torch.int64


@pytest.mark.parametrize("type_", ["i1", "i2", "i8", "u1", "u8", ">i8", "f2", "f4", ">f8", "g", "?"])
def test_the_type_of_numbers_does_not_change_the_classes(type_):
    labels = read_labels("y", (Y % 2).astype(type_))
    assert labels.codes.tolist() == (Y % 2).tolist()
    assert labels.names == (("False", "True") if type_ == "?" else ("0", "1"))


def changed(row: int, label: object, dtype: object = None) -> np.ndarray:
    y = np.array(Y.tolist(), dtype=dtype)
    y[row] = label
    return y


REFUSED = {
    "NaN": (changed(4, np.nan, float), "y: row 4 has no label nan; label it, leave it out, or save -100 for it"),
    "None": (changed(4, None, object), "y: row 4 has no label None"),
    "an empty word": (changed(4, "", "U5"), "y: row 4 has no label ''"),
    "a fraction": (changed(4, 0.5, float), "y: row 4 has the label 0.5; classes are whole numbers or printable words"),
    "a lone surrogate": (changed(4, "caf\udce9", object).astype(str), r"y: row 4 has the label 'caf\\udce9'; classes are"),
    "an escape sequence": (changed(4, "\x1b[31m", "U8"), r"y: row 4 has the label '\\x1b\[31m'"),
    "infinity": (changed(4, np.inf, float), "y: row 4 has the label inf"),
    "words and numbers": (changed(4, "cat", object), "y: expected labels of one kind, got int, str"),
    "one-hot": (np.eye(3)[Y], r"y: expected shape \(N,\), got one-hot labels \(60, 3\); save y.argmax\(axis=1\)"),
    "one-hot booleans": (np.eye(3, dtype=bool)[Y], r"got one-hot labels \(60, 3\); save y.argmax"),
    "several labels a row": (np.ones((60, 3), int), r"y: expected shape \(N,\) of one label per row, got \(60, 3\)"),
    "a single number": (np.array(3), r"y: expected shape \(N,\) of one label per row, got \(\)"),
    "dates": (np.zeros(60, "M8[D]"), r"y: expected labels, whole numbers or words, got datetime64\[D\]; save y.astype\(str\)"),
    "complex numbers": (np.zeros(60, complex), "y: expected labels, whole numbers or words, got complex128"),
    "no label at all": (np.full(60, -100), "y: every row has the label -100"),
    **{f"all {label}": (np.full(60, label), f"all rows are of class {label}; ") for label in (0, 5, 2**40, "cat", -1)},
}


if hasattr(np.dtypes, "StringDType"):  # numpy 2
    REFUSED["words of any length"] = (Y.astype("T"), r"array 'y' is of StringDType; save y.astype\(str\)")


@pytest.mark.filterwarnings("ignore:Custom dtypes are saved as python objects")
@pytest.mark.parametrize(("y", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_labels_that_cannot_be_classes_are_refused_by_row_with_what_to_do(tmp_path, y, message):
    with pytest.raises(InputError, match=message):
        _ = make_data("features", path=save(tmp_path, arrays() | {"y": y})).splits


def test_rows_labelled_minus_100_are_left_out(tmp_path, caplog):
    y = np.where(np.arange(60) < 20, -100, Y)
    content = arrays() | {"y": y}
    content["x_text"] = np.where(np.arange(60)[:, None] < 20, np.nan, content["x_text"])  # there was nothing to label
    data = make_data("features", path=save(tmp_path, content))
    assert data.classes == ("0", "1", "2")
    assert sum(map(len, data.splits.values())) == 40
    assert min(int(split.origin["text"].min()) for split in data.splits.values()) >= 20
    assert "20 of 60 rows have the label -100 and are left out" in caplog.text


@pytest.mark.parametrize(
    "words", [WORDS, np.char.encode(WORDS, "utf-8"), np.array([True, False, True])], ids=["words", "bytes", "booleans"]
)
def test_minus_100_beside_words_marks_a_row_without_a_label(words):
    y = words[Y].astype(object)
    y[:20] = -100
    labels = read_labels("y", y)
    assert labels.names == (("False", "True") if words.dtype == bool else ("cat", "dog", "whale"))
    assert labels.codes[:20].tolist() == [-100] * 20
    assert labels.codes[20:].min() == 0


def test_a_given_split_may_be_of_words_in_objects_or_bytes(tmp_path):
    given = np.array(["train", "val", "test"])[np.arange(60) // 20]
    for split in (given.astype(object), np.char.encode(given, "ascii"), np.arange(60.0)[:, None] // 20):
        data = make_data("features", path=save(tmp_path, arrays() | {"split": split}))
        assert [len(part) for part in data.splits.values()] == [20, 20, 20]


class Mine(MultimodalData):
    """Labels as the class attribute says."""

    labels = torch.tensor([0, 1, 100_000]).repeat(4)

    def read(self) -> dict[str, Split]:
        x = torch.arange(24.0).reshape(12, 2)
        return {name: Split({"a": x, "b": -x}, self.labels, {}) for name in ("train", "val", "test")}


def test_the_labels_of_a_users_own_dataset_are_named_as_well():
    data = Mine()
    assert (data.classes, data.num_classes) == (("0", "1", "100000"), 3)
    assert data.splits["val"].target.tolist() == [0, 1, 2] * 4
    for labels, classes in ((torch.tensor([-1, 1]), ("-1", "1")), (torch.tensor([False, True]), ("False", "True"))):
        data = type("Other", (Mine,), {"labels": labels.repeat(6)})()
        assert data.classes == classes


def test_the_names_of_classes_are_part_of_the_digest():
    one, other = (type("Other", (Mine,), {"labels": Mine.labels + shift})() for shift in (0, 1))
    assert one.splits["train"].target.equal(other.splits["train"].target)
    assert one.describe() != other.describe()


# a run on such labels


def run(folder: Path, *arguments: str) -> str:
    code, out, err = iprm(folder, *arguments)
    assert code == 0, err
    return out


FEATURES = ("--config", "features", "--data.path", "features.npz")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of one epoch on the classes cat, dog and 'sperm whale'."""
    folder = tmp_path_factory.mktemp("words")
    save(folder, arrays() | {"y": np.array(["sperm whale", "cat", "dog"])[Y]})
    run(folder, "fit", *FEATURES, "--trainer.max_epochs", "1", "--trainer.default_root_dir", "here")
    return folder


def checkpoint(folder: Path) -> str:
    (path,) = folder.rglob("checkpoints/*.ckpt")
    return str(path)


def test_checkpoint_predictions_and_diagnostics_have_the_names(trained):
    names = ["cat", "dog", "sperm whale"]
    assert read_checkpoint(checkpoint(trained))["hyper_parameters"]["classes"] == names
    run(trained, "predict", *FEATURES, "--ckpt_path", checkpoint(trained), "--output", "split.csv")
    run(trained, "predict", "--ckpt_path", checkpoint(trained), "--input", "features.npz", "--output", "all.csv")
    for file in ("split.csv", "all.csv"):
        with (trained / file).open(newline="") as content:
            rows = list(csv.DictReader(content))
        assert [name for name in rows[0] if name.startswith("p_")] == ["p_cat", "p_dog", "p_sperm whale"]
        assert {row["prediction"] for row in rows} <= set(names)
        assert all(max(names, key=lambda name: float(row[f"p_{name}"])) == row["prediction"] for row in rows)
        assert {row.get("target", "cat") for row in rows} <= set(names)
    diagnostics = json.loads(next(trained.rglob("diagnostics.json")).read_text())
    assert diagnostics["classes"] == names


def test_the_report_has_the_names(trained):
    run(trained, "report", "here", "--output", "report.html")
    page = (trained / "report.html").read_text()
    for name in ("cat", "dog", "sperm whale"):
        assert f">{name}</text>" in page


def test_data_of_some_of_the_classes_is_tested_by_their_names(trained, tmp_path):
    """Numbered by the classes that occur, 'dog' would be class 0."""
    content = arrays() | {"y": np.array(["sperm whale", "cat", "dog"])[Y]}
    others = {name: x[Y != 1] for name, x in content.items()}
    (tmp_path / "some").mkdir()
    save(tmp_path / "some", others)
    path = ("--data.path", str(tmp_path / "some/features.npz"))
    out = trained / "some.csv"
    run(trained, "predict", "--config", "features", *path, "--ckpt_path", checkpoint(trained), "--output", str(out))
    with out.open(newline="") as file:
        targets = {row["target"] for row in csv.DictReader(file)}
    assert targets == {"dog", "sperm whale"}
    content["y"] = np.array(["sperm whale", "cat", "owl"])[Y]
    save(tmp_path / "some", content)
    code, _, err = iprm(trained, "test", "--config", "features", *path, "--ckpt_path", checkpoint(trained))
    assert code == 2
    assert "labels that are no class of the model: owl; its classes are cat, dog, sperm whale" in err


def test_memory_of_a_run_grows_with_the_classes_that_occur(tmp_path):
    save(tmp_path, arrays() | {"y": np.array([0, 1, 100_000])[Y]})
    run(tmp_path, "fit", *FEATURES, "--trainer.max_epochs", "1", "--trainer.default_root_dir", "here")
    assert read_checkpoint(checkpoint(tmp_path))["state_dict"]["fusion.heads.text.weight"].shape[0] == 3


def test_classes_that_only_the_test_split_has_are_told_by_name(tmp_path, caplog):
    words = np.array(["cat", "dog", "whale"])[Y]
    split = np.repeat(["train", "val", "test"], [30, 12, 18])
    words[59] = "owl"
    data = make_data("features", path=save(tmp_path, arrays() | {"y": words, "split": split}))
    assert data.classes == ("cat", "dog", "owl", "whale")
    assert "1 row of test with labels beyond those of train, class owl: they cannot be learned" in caplog.text


class HalfLabelled(MultimodalData):
    """Eight labelled rows of 64 in training and validation."""

    def read(self) -> dict[str, Split]:
        rng = torch.Generator().manual_seed(0)
        y = torch.arange(64) % 3
        x = torch.randn(64, 4, generator=rng) + y[:, None]
        left_out = torch.arange(64) >= 8
        return {
            name: Split({"a": x, "b": -x}, y.where(~left_out, torch.tensor(-100)) if name != "test" else y, {})
            for name in ("train", "val", "test")
        }


def test_a_users_own_dataset_may_have_batches_without_any_label():
    data = HalfLabelled(batch_size=4)
    model = FusionClassifier(data.inputs, data.num_classes, feature_dim=8)
    trainer = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer.fit(model, datamodule=data)
    metrics = trainer.callback_metrics
    assert all(metrics[name].isfinite() for name in ("train_loss", "val_loss", "val_accuracy", "val_map", "val_macro_f1"))
