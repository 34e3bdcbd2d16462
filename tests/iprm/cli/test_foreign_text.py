"""Names in files of others: no terminal obeys them, none is taken for markup, and no spreadsheet computes one in a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from checkpoints import TWO, checkpoint, inputs_of
from command import iprm
from feature_files import arrays
from iprm.compare.table import _write_csv
from iprm.inference.predictions import write_predictions
from iprm.streams import cell, printable
from iprm.training.callbacks.csv_logger import RunLog

ESCAPE = "\x1b]0;owned\x07\x1b[31m"
OBEYED = f"{ESCAPE}\x9b2J\r\b\u202e\u2066"


def check_plain(text: str) -> None:
    assert not set(text) & (set(OBEYED) - set("]0;owned[31m2J")), repr(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (ESCAPE, r"\x1b]0;owned\x07\x1b[31m"),
        ("\x9b2J\r\b\x7f", r"\x9b2J\r\x08\x7f"),
        ("\u202eevil\u2066\u200f\u2028", r"\u202eevil\u2066\u200f\u2028"),
        ("two\nlines", "two\nlines"),
        ("naïve 模态 \N{FAMILY} e\u0301", "naïve 模态 \N{FAMILY} e\u0301"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_its_escape_sequence(text, shown, monkeypatch):
    assert printable(text) == shown
    assert printable(text, keep="") == shown.replace("\n", r"\n")


FOLDER = f"a{OBEYED}\nb"


@pytest.mark.parametrize(
    "arguments",
    [
        ("fit", "--data", "features", "--data.path", FOLDER),
        ("fit", "--config", f"{FOLDER}.yaml"),
        ("resume", FOLDER),
        ("report", FOLDER),
        ("export", "--ckpt_path", FOLDER, "--output", "new"),
        (FOLDER,),
        ("fit", f"--{FOLDER}", "1"),
    ],
)
def test_an_error_is_one_line_of_plain_text(tmp_path, arguments):
    code, out, err = iprm(tmp_path, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    check_plain(err.rstrip("\n"))


def test_an_error_does_not_quote_megabytes(tmp_path):
    assert len(iprm(tmp_path, "fit", "--config", "x" * 10**6).err) < 5000


def test_arrays_of_any_name_are_refused_or_checked_in_plain_text(tmp_path):
    for name in (f"x_a{ESCAPE}", "x_a\u202e"):
        np.savez(tmp_path / "names.npz", **arrays(), **{name: np.zeros((39, 3), np.float32)})
        code, out, err = iprm(tmp_path, "check", "features", "--path", "names.npz")
        assert (code, out) == (2, "")
        check_plain(err)


def test_labels_that_a_terminal_would_obey_are_refused_in_plain_text(tmp_path):
    content = arrays()
    content["y"] = np.array([f"{OBEYED}{label}" for label in content["y"]])
    np.savez(tmp_path / "classes.npz", **content)
    code, out, err = iprm(tmp_path, "check", "features", "--path", "classes.npz")
    assert code == 2
    assert "classes are whole numbers or printable words" in err
    check_plain((out + err).replace("\n", ""))


def test_a_name_like_markup_is_shown_as_it_is(tmp_path):
    content = arrays()
    content["x_a[/b]:smile:"] = content.pop(next(name for name in content if name.startswith("x_")))
    np.savez(tmp_path / "features.npz", **content)
    options = ("--trainer.max_epochs", "1")
    code, out, err = iprm(tmp_path, "fit", "--data", "features", "--data.path", "features.npz", *options)
    assert code == 0, err
    best = next(tmp_path.rglob("best-*.ckpt"))
    code, out, err = iprm(tmp_path, "test", "--config", "runs/fit/version_0/config.yaml", "--ckpt_path", str(best))
    assert (code, "test_accuracy_a[/b]:smile:" in out) == (0, True), out + err


def test_a_report_names_foreign_runs_in_plain_text(tmp_path):
    run = tmp_path / "theirs" / f"a{ESCAPE}" / "version_0"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("epoch,step,val_accuracy\n0,1,0.5\n")
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"method": ESCAPE}}))
    code, out, err = iprm(tmp_path, "report", "theirs")
    check_plain((out + err).replace("\n", ""))
    assert code in (0, 2)


FORMULAS = ["=1+2", "+1+2", "-1+2", "@SUM(A1)", "\t=1", "\r=1", "=cmd|'/c calc'!A0", "＝1+2"]


def test_what_a_spreadsheet_would_compute_follows_an_apostrophe():
    assert [cell(text) for text in FORMULAS] == [f"'{text}" for text in FORMULAS]
    unchanged = ["-1", "+5", "-1e-3", "-inf", "a=1", "", "a@b", 3, -2.5, None]
    assert [cell(value) for value in unchanged] == unchanged


def cells(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return [text for row in csv.reader(file) for text in row]


def check_computed(path: Path, *names: str) -> None:
    """No cell is a formula; the names are there."""
    found = cells(path)
    assert not [text for text in found if cell(text) != text]
    assert {f"'{name}" for name in names} <= set(found)


def test_no_csv_file_has_a_formula(tmp_path):
    path, _ = checkpoint(tmp_path, classes=["=1+2", "@a", "-b", "-1", "c"])
    (tmp_path / "new").mkdir()
    np.savez(tmp_path / "new/=1+2.npz", **{f"x_{name}": x.numpy() for name, x in inputs_of(TWO, 40).items()})
    code, _, err = iprm(tmp_path, "predict", "--ckpt_path", str(path), "--input", "new", "--output", "p.csv")
    assert code == 0, err
    check_computed(tmp_path / "p.csv", "=1+2.npz")

    log = RunLog(tmp_path / "log")
    log.log_metrics({"=1+2": -0.5, "epoch": 0}, 0)
    log.finalize("success")
    check_computed(next(tmp_path.rglob("metrics.csv")), "=1+2")

    _write_csv(tmp_path / "runs.csv", [{"method": "=1+2", "@seed": -1}, {"method": "sum"}])
    check_computed(tmp_path / "runs.csv", "=1+2", "@seed")
    write_predictions(tmp_path / "q.csv", [{"probability": torch.eye(2), "target": torch.tensor([0, -100])}], ["=1+2", "b"])
    check_computed(tmp_path / "q.csv", "=1+2")
