"""`iprm predict --input`: predictions of new samples in files, from a checkpoint alone."""

from __future__ import annotations

import csv
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import CLASSES, TWO, checkpoint, inputs_of
from command import Outcome, iprm
from iprm.inference import export
from iprm.inference.model import load_inference

ROWS = 23
SHAPES = TWO


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def samples() -> dict[str, np.ndarray]:
    return {modality: x.numpy() for modality, x in inputs_of(SHAPES, ROWS).items()}


def arrays(samples: dict[str, np.ndarray], rows: slice | int = slice(None)) -> dict[str, np.ndarray]:
    return {f"x_{modality}": x[rows] for modality, x in samples.items()}


def predict(folder: Path, model, *options: str, path: str = "new") -> Outcome:
    return iprm(folder, "predict", "--ckpt_path", str(model[0]), "--input", path, *options)


def written(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as content:
        return list(csv.DictReader(content))


def probabilities(rows: list[dict[str, str]]) -> torch.Tensor:
    return torch.tensor([[float(row[f"p_{k}"]) for k in range(CLASSES)] for row in rows])


def expected(model, samples) -> torch.Tensor:
    with torch.no_grad():
        return model[1]({modality: torch.from_numpy(x) for modality, x in samples.items()}).logits.softmax(1)


# layouts of sample files


def one_sample_a_file(folder: Path, samples) -> list[tuple[str, int]]:
    for row in range(ROWS):
        np.savez(folder / f"{row:03}.npz", **arrays(samples, row))
    return [(f"{row:03}.npz", 0) for row in range(ROWS)]


def several_a_file(folder: Path, samples) -> list[tuple[str, int]]:
    np.savez(folder / "a.npz", **arrays(samples, slice(0, 4)))
    np.savez_compressed(folder / "b.npz", **arrays(samples, slice(4, 22)))
    np.savez(folder / "c.npz", **arrays(samples, 22))
    return [*(("a.npz", row) for row in range(4)), *(("b.npz", row) for row in range(18)), ("c.npz", 0)]


def a_file_a_modality(folder: Path, samples) -> list[tuple[str, int]]:
    for modality, x in samples.items():
        np.save(folder / f"{modality}.npy", x)
    return [("new", row) for row in range(ROWS)]


def columns_first(folder: Path, samples) -> list[tuple[str, int]]:
    np.savez(folder / "a.npz", **{name: np.asfortranarray(x) for name, x in arrays(samples).items()})
    return [("a.npz", row) for row in range(ROWS)]


def columns_first_a_file_a_modality(folder: Path, samples) -> list[tuple[str, int]]:
    return a_file_a_modality(folder, {modality: np.asfortranarray(x) for modality, x in samples.items()})


def other_byte_order_and_width(folder: Path, samples) -> list[tuple[str, int]]:
    np.savez(folder / "a.npz", **{name: x.astype(">f8") for name, x in arrays(samples).items()})
    return [("a.npz", row) for row in range(ROWS)]


def beside_others(folder: Path, samples) -> list[tuple[str, int]]:
    np.savez(folder / "a.npz", **arrays(samples), y=np.zeros(3), x_smell=np.array([None]))
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.npz").write_text("x")
    return [("a.npz", row) for row in range(ROWS)]


WAYS = (
    one_sample_a_file,
    several_a_file,
    a_file_a_modality,
    columns_first,
    columns_first_a_file_a_modality,
    other_byte_order_and_width,
    beside_others,
)


@pytest.mark.parametrize("batch_size", ["1", "5", "256"])
@pytest.mark.parametrize("write", WAYS)
def test_every_sample_gets_the_models_own_prediction_under_its_file_and_row(tmp_path, model, samples, write, batch_size):
    (tmp_path / "new").mkdir()
    places = write(tmp_path / "new", samples)
    code, out, err = predict(tmp_path, model, "--output", "made/here.csv", "--batch_size", batch_size)
    assert (code, out, err) == (0, f"predictions: made/here.csv ({ROWS} rows)\n", "")
    rows = written(tmp_path / "made/here.csv")
    assert list(rows[0]) == ["file", "row", "prediction", *(f"p_{k}" for k in range(CLASSES))]
    assert [(row["file"], int(row["row"])) for row in rows] == places
    own = expected(model, samples)
    torch.testing.assert_close(probabilities(rows), own, rtol=0, atol=2e-6)
    assert [int(row["prediction"]) for row in rows] == own.argmax(1).tolist()
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["here.csv"]


def test_the_exported_model_predicts_the_same(tmp_path, model, samples):
    (tmp_path / "new").mkdir()
    several_a_file(tmp_path / "new", samples)
    predict(tmp_path, model)
    export.export(load_inference(model[0]), tmp_path)
    module = torch.export.load(tmp_path / "model.pt2").module()
    output = module({modality: torch.from_numpy(x) for modality, x in samples.items()})
    rows = written(tmp_path / "predictions.csv")
    torch.testing.assert_close(probabilities(rows), output["probabilities"], rtol=0, atol=2e-6)


def test_a_file_of_the_dataset_features_is_predicted_as_iprm_predict_predicts_it(tmp_path, features):
    run = ("--config", "features", "--data.path", "features.npz")
    iprm(tmp_path, "fit", *run, "--trainer.max_epochs", "1", "--trainer.default_root_dir", "here")
    (path,) = tmp_path.rglob("checkpoints/*.ckpt")
    iprm(tmp_path, "predict", *run, "--ckpt_path", str(path), "--output", "split.csv")
    iprm(tmp_path, "predict", "--ckpt_path", str(path), "--input", "features.npz", "--output", "all.csv")
    whole = {tuple(row.values())[2:] for row in written(tmp_path / "all.csv")}
    split = [tuple(row.values())[2:] for row in written(tmp_path / "split.csv")]
    assert len(whole) == 60
    assert len(split) == 15
    for prediction, *own in split:
        distance = min(
            max(abs(float(a) - float(b)) for a, b in zip(own, other, strict=True)) for k, *other in whole if k == prediction
        )
        assert distance < 2e-6


def test_a_model_of_one_modality_needs_no_other(tmp_path, samples):
    model = checkpoint(tmp_path, method="unimodal-sound")
    (tmp_path / "new").mkdir()
    np.save(tmp_path / "new/sound.npy", samples["sound"])
    assert predict(tmp_path, model).code == 0
    torch.testing.assert_close(
        probabilities(written(tmp_path / "predictions.csv")), expected(model, samples), rtol=0, atol=2e-6
    )


def test_memory_holds_a_batch_and_not_the_npy_files(tmp_path, model):
    rows = 12_000
    (tmp_path / "new").mkdir()
    for modality, shape in SHAPES.items():
        np.save(tmp_path / f"new/{modality}.npy", np.ones((rows, *shape), np.float64))
    samples = rows * (144 + 6) * 8
    tracemalloc.start()
    assert predict(tmp_path, model, "--batch_size", "200").code == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < samples / 4, "numpy's arrays; torch's are of a batch as well"


def test_help_explains_the_files_wherever_it_stands(tmp_path):
    code, out, _ = iprm(tmp_path, "predict", "--input", "--help")
    assert code == 0
    assert "<modality>.npy" in out
    assert iprm(tmp_path, "predict", "--help", "--input", "x").out == out
    assert "--input FOLDER" in iprm(tmp_path, "predict", "--help").out


# files that cannot be used


def refused(folder: Path, model, *options: str, path: str = "new") -> str:
    before = sorted(folder.rglob("*"))
    code, out, err = predict(folder, model, *options, path=path)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert sorted(folder.rglob("*")) == before, "nothing was written"
    return err.removeprefix("iprm: ").rstrip("\n")


def changed(samples, modality: str, row: int, value: float) -> dict[str, np.ndarray]:
    content = {name: x.astype(np.float64) for name, x in samples.items()}
    content[modality][row].flat[2] = value
    return content


IN_ARCHIVES = {
    "a modality too few": (
        lambda s: {"x_image": s["image"], "y": s["sound"]},
        "new/b.npz: there is no array 'x_sound' of modality 'sound'; the file has x_image, y",
    ),
    "a modality by almost its name": (
        lambda s: {"x_image": s["image"], "x_sounds": s["sound"]},
        "there is no array 'x_sound' of modality 'sound'; the file has x_image, x_sounds (did you mean 'x_sounds' to be it?)",
    ),
    "another shape": (
        lambda s: arrays(s) | {"x_sound": s["sound"][:, :5]},
        "new/b.npz: array 'x_sound': expected shape (6,) of one sample or (N, 6) of several, got (23, 5)",
    ),
    "a number": (lambda s: arrays(s) | {"x_sound": np.float32(3)}, "array 'x_sound': expected shape (6,) of one sample or"),
    "other lengths": (
        lambda s: arrays(s) | {"x_sound": s["sound"][:9]},
        "new/b.npz: array 'x_sound': expected as many samples as x_image has, 23, got 9",
    ),
    "no rows": (lambda s: arrays(s, slice(0)), "array 'x_image': there are no rows, its shape is (0, 1, 12, 12)"),
    "words": (lambda s: arrays(s) | {"x_sound": np.full((23, 6), "a")}, "array 'x_sound': expected numbers, got <U1"),
    "objects": (
        lambda s: arrays(s) | {"x_sound": np.full((23, 6), None)},
        "array 'x_sound' cannot be read without running",
    ),
    "a NaN": (
        lambda s: arrays(changed(s, "sound", 20, np.nan)),
        "new/b.npz: array 'x_sound': row 20 has a value that is not finite in float32; nothing was written",
    ),
    "beyond float32": (lambda s: arrays(changed(s, "image", 3, 1e300)), "new/b.npz: array 'x_image': row 3 has a value that"),
}


@pytest.mark.parametrize(("content", "message"), IN_ARCHIVES.values(), ids=IN_ARCHIVES.keys())
def test_an_archive_that_cannot_be_used_is_named_with_its_array_and_nothing_is_written(
    tmp_path, model, samples, content, message
):
    (tmp_path / "new").mkdir()
    np.savez(tmp_path / "new/a.npz", **arrays(samples))
    np.savez(tmp_path / "new/b.npz", **content(samples))
    assert message in refused(tmp_path, model, "--batch_size", "8")


IN_FOLDERS = {
    "a modality too few": (
        lambda s: {"image": s["image"], "x_sound": s["sound"]},
        "new: there is no file 'sound.npy' of modality 'sound'; the folder has image.npy, x_sound.npy (did you mean "
        "'x_sound.npy' to be it?)",
    ),
    "another shape": (lambda s: s | {"sound": s["sound"][:, :5]}, "new/sound.npy: expected shape (6,) of one sample or (N, 6)"),
    "other lengths": (
        lambda s: s | {"sound": s["sound"][:9]},
        "new/sound.npy: expected as many samples as image.npy has, 23, got 9",
    ),
    "objects": (lambda s: s | {"sound": np.full((23, 6), None)}, "new/sound.npy cannot be read: it is of objects"),
    "a NaN": (lambda s: changed(s, "sound", 20, np.nan), "new/sound.npy: row 20 has a value that is not finite in float32"),
}


@pytest.mark.parametrize(("content", "message"), IN_FOLDERS.values(), ids=IN_FOLDERS.keys())
def test_a_file_of_a_modality_that_cannot_be_used_is_named_and_nothing_is_written(tmp_path, model, samples, content, message):
    (tmp_path / "new").mkdir()
    for name, x in content(samples).items():
        np.save(tmp_path / f"new/{name}.npy", x)
    assert message in refused(tmp_path, model, "--batch_size", "8")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def flip(file: Path) -> None:
    """Flips one bit in the middle of the values of an archive, so that its checksum does not match."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def unbalance(file: Path) -> None:
    """A header for which numpy's parser raises an error of its own."""
    file.write_bytes(file.read_bytes().replace(b"(23,", b"((3,", 1))


def mix_keys(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b" 'shape'", b"b'shape'", 1))


DAMAGE = {
    "a header without its end": ("image.npy", unbalance, "new/image.npy cannot be read"),
    "a header of bytes and words": ("image.npy", mix_keys, "new/image.npy cannot be read"),
    "an archive cut off": ("a.npz", cut, "new/a.npz: not a readable .npz file"),
    "an archive with a flipped bit": ("a.npz", flip, "new/a.npz: array 'x_image' is broken: Bad CRC"),
    "an archive that is none": ("a.npz", lambda file: file.write_text("x"), "new/a.npz: not a readable .npz file"),
    "an array cut off": (
        "image.npy",
        cut,
        "new/image.npy cannot be read: shape (23, 1, 12, 12) of float32 takes 13248 bytes, got 13198",
    ),
    "an array that is none": ("image.npy", lambda file: file.write_text("x"), "new/image.npy cannot be read"),
    "an empty file": ("image.npy", lambda file: file.write_bytes(b""), "new/image.npy cannot be read"),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_broken_file_is_named_and_nothing_is_written(tmp_path, model, samples, name, damage, message):
    (tmp_path / "new").mkdir()
    if name.endswith("npz"):
        np.savez(tmp_path / "new/a.npz", **arrays(samples))
    else:
        a_file_a_modality(tmp_path / "new", samples)
    damage(tmp_path / "new" / name)
    assert message in refused(tmp_path, model)


def test_places_without_samples_are_named(tmp_path, model, samples):
    assert refused(tmp_path, model) == "new: there is no such file or folder"
    (tmp_path / "new").mkdir()
    assert refused(tmp_path, model) == "new: there are no .npz files here, and no .npy files"
    np.save(tmp_path / "new/image.npy", samples["image"])
    assert refused(tmp_path, model, path="new/image.npy").startswith("new/image.npy: expected an .npz file, or a folder of")
    np.savez(tmp_path / "new/a.npz", **arrays(samples))
    assert refused(tmp_path, model) == "new: expected .npz files or .npy files, got 1 of those and 1 of these"


def test_a_run_that_fails_leaves_the_predictions_of_the_last_one(tmp_path, model, samples):
    (tmp_path / "new").mkdir()
    np.savez(tmp_path / "new/a.npz", **arrays(samples))
    predict(tmp_path, model)
    before = (tmp_path / "predictions.csv").read_text()
    np.savez(tmp_path / "new/b.npz", **arrays(changed(samples, "sound", 1, np.inf)))
    refused(tmp_path, model)
    assert (tmp_path / "predictions.csv").read_text() == before


OPTIONS = {
    "no checkpoint": (("--ckpt_path", "no.ckpt"), "no.ckpt: there is no such checkpoint"),
    "a configuration": (("--config", "digits"), "unknown option --config"),
    "an option by almost its name": (("--batchsize", "3"), "unknown option --batchsize: did you mean --batch_size?"),
    "an empty batch": (("--batch_size", "0"), "expected a whole number from 1 up, got 0"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_an_option_that_cannot_be_is_named(tmp_path, model, options, message):
    assert message in refused(tmp_path, model, *options)
