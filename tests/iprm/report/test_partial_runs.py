"""`iprm report` of runs that are running, stopped or broken: it still writes a report, which states what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from html_page import Tags, card, figures, pictures, report, said
from iprm.compare.runs import label, read_runs
from run_folders import course, write_comparison, write_metrics, write_run, write_test


def without(name: str):
    return lambda run: (run / name).unlink()


def cut(run: Path) -> None:
    text = (run / "metrics.csv").read_text()
    lines = text.splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:5]) + lines[5][:20])


def rewritten(name: str, content: str):
    return lambda run: (run / name).write_text(content)


def recorded_otherwise(**values: object):
    def rewrite(run: Path) -> None:
        record = json.loads((run / "diagnostics.json").read_text())
        (run / "diagnostics.json").write_text(json.dumps(record | values))

    return rewrite


def no_checkpoint(run: Path) -> None:
    next((run / "checkpoints").iterdir()).unlink()


WANTING = {
    "no diagnostics": (without("diagnostics.json"), "No diagnostics.json, which is written at the end of training"),
    "no metrics": (without("metrics.csv"), "No metrics.csv: no epoch has ended yet."),
    "no config": (without("config.yaml"), "No config.yaml: method, seed and settings are not known."),
    "no checkpoint": (no_checkpoint, "No checkpoint in checkpoints/."),
    "a line that is being written": (cut, "The last line of metrics.csv is incomplete and left out."),
    "epochs to come": (cut, "2 of 5 epochs: still running, or stopped early."),
    "a header alone": (rewritten("metrics.csv", "epoch,step,val_loss\n"), "metrics.csv holds no epoch yet."),
    "an empty file": (rewritten("metrics.csv", ""), "metrics.csv holds no epoch yet."),
    "a config that is no YAML": (rewritten("config.yaml", "model: [\n"), "config.yaml cannot be read: "),
    "a config that is a list": (rewritten("config.yaml", "- 1\n"), "config.yaml cannot be read: AttributeError"),
    "half of the diagnostics": (rewritten("diagnostics.json", '{"num_cl'), "diagnostics.json cannot be read: JSONDecodeError"),
    "counts that do not add up": (
        recorded_otherwise(class_counts=[6, 6, 6, 7]),
        "diagnostics.json cannot be read: ValueError: confusion: its rows are expected to sum to class_counts",
    ),
    "counts below 0": (
        recorded_otherwise(class_counts=[6, 0, 0, 0], confusion={"target": [0, 0], "prediction": [0, 1], "count": [12, -6]}),
        "diagnostics.json cannot be read: ValueError: confusion: expected counts from 0 up",
    ),
    "another number of classes": (
        recorded_otherwise(num_classes=2),
        "diagnostics.json cannot be read: ValueError: expected 4 ",
    ),
    "angles without bins": (
        recorded_otherwise(angles=[{"pair": ["a", "b"], "counts": [], "mean": 1, "undirected": 0}]),
        "diagnostics.json cannot be read: ValueError: angles: expected one number of bins from 1 to 1000, got [0]",
    ),
    "unknown weights": (recorded_otherwise(weights={}), "diagnostics.json cannot be read: KeyError: 'from'"),
    "other diagnostics": (rewritten("diagnostics.json", "[]"), "diagnostics.json cannot be read: TypeError"),
}


@pytest.mark.parametrize(("harm", "word"), WANTING.values(), ids=WANTING.keys())
def test_a_report_says_what_is_missing_alone_and_beside_another_run(tmp_path, harm, word):
    run = write_run(tmp_path / "version_0")
    harm(run)
    assert any(missing.startswith(word) for missing in read_runs([run])[0].missing)
    for runs in ([run], [run, write_run(tmp_path / "version_1")]):
        assert word in Tags(report(tmp_path, *runs)).text


def test_a_whole_run_misses_nothing(tmp_path):
    run = write_run(tmp_path / "version_0")
    assert read_runs([run])[0].missing == []
    assert 'class="missing"' not in report(tmp_path, run)


def test_a_run_that_has_only_begun_gives_a_report(tmp_path):
    run = tmp_path / "version_0"
    run.mkdir()
    (run / "config.yaml").write_text("seed_everything: 3\nmodel: {method: iprm}\n")
    page = report(tmp_path, run)
    assert figures(page) == {"method": "iprm", "seed": "3", "best epoch": "–", "val accuracy": "–", "epochs": "0", "data": "–"}
    assert "No epoch yet." in page
    assert "Nothing recorded." in page


def test_one_epoch_is_drawn_as_dots(tmp_path):
    content = card(report(tmp_path, write_run(tmp_path / "version_0", epochs=1)), "Accuracy")
    (picture,) = pictures(content)
    assert len(list(picture.iter("use"))) == 8, "four heads, in validation and in training"


def test_pairs_have_their_names_without_diagnostics_and_in_whatever_order_the_columns_are(tmp_path):
    run = write_run(tmp_path / "version_0", modalities=("video", "audio", "text"))
    (run / "diagnostics.json").unlink()
    (read,) = read_runs([run])
    names = [label(measure, read.heads) for measure in read.measures]
    assert names[:3] == ["ω audio (audio × text)", "ω text (audio × text)", "ω audio (video × audio)"]
    assert names[-3:] == ["λ audio × text", "λ video × audio", "λ video × text"]


def test_an_epoch_that_is_not_validated_yet_is_drawn_of_training_alone(tmp_path):
    run = write_run(tmp_path / "version_0")
    write_metrics(run / "metrics.csv", [{"epoch": 0, "train_loss": 1.5}])
    assert said(card(report(tmp_path, run), "Loss")) == ("Loss", "loss: 1.500 in epoch 0")


def test_a_run_that_iprm_fit_did_not_start_is_known_by_what_a_logger_writes(tmp_path):
    run = write_run(tmp_path / "version_0")
    (run / "config.yaml").unlink()
    (run / "hparams.yaml").write_text("method: iprm-linear\nlearning_rate: 0.5\n")
    (read,) = read_runs([run])
    assert (read.method, read.settings["model.learning_rate"]) == ("iprm-linear", 0.5)
    assert read.missing == ["No config.yaml: only the model's settings are known."]


def test_of_a_continued_run_the_epochs_before_it_count(tmp_path):
    run = write_run(tmp_path / "version_0", epochs=5)
    write_metrics(run / "metrics.csv", course(("video", "audio"), 5, mixes=True)[6:])
    assert figures(report(tmp_path, run))["epochs"] == "5"
    assert read_runs([run])[0].missing == []


@pytest.mark.parametrize(
    "value", [1e308, *(pytest.param(value, marks=pytest.mark.grid) for value in (-1e308, 9.9e29, 5e-324, -3))]
)
@pytest.mark.parametrize("column", ["epoch", "val_accuracy", "train_loss", "weight", "k"])
def test_a_number_however_large_or_small_makes_a_page(tmp_path, column, value):
    run = write_run(tmp_path / "version_0")
    row = {"val_accuracy": 0.5, "train_loss": 1.0, "weight": 0.5, "k": 0.0}
    write_metrics(run / "metrics.csv", [{"epoch": 0, **row}, {"epoch": 1} | row | {column: value}])
    write_test(run, accuracy=value)
    assert "Over the epochs" in report(tmp_path, run, write_run(tmp_path / "version_1"))


def test_a_page_says_that_a_long_course_is_thinned(tmp_path):
    run = write_run(tmp_path / "version_0")
    rows = [{"epoch": epoch, "train_loss": epoch % 7, "val_accuracy": 0.5} for epoch in range(2000)]
    write_metrics(run / "metrics.csv", rows)
    page = report(tmp_path, run)
    assert "Thinned: the smallest and the largest value of each of 300 parts of 2000 epochs." in page
    assert len(page) < 100_000


HOSTILE = {
    "settings.json": '{"methods": [[1], {"a": 1}], "seeds": [null], "data": ["x"]}',
    "iprm/seed=0/test.json": '{"metrics": {"accuracy": 1e308, "map": {"a": 1}, "macro_f1": "x"}, "seconds_per_epoch": {}}',
    "iprm/seed=1/test.json": "[1]",
    "iprm/seed=0/failed.txt": "",
    "iprm/seed=1/config.yaml": "model: {method: [1, '$\\\\frac{']}\nseed_everything: {a: 1}\n",
}


@pytest.mark.parametrize("file", HOSTILE)
def test_a_comparison_with_a_file_that_holds_anything_makes_a_page(tmp_path, file):
    folder = write_comparison(tmp_path / "c")
    (folder / file).write_text(HOSTILE[file])
    assert "Over the epochs" in report(tmp_path, folder)


def test_a_value_that_is_not_finite_is_left_out_and_a_later_row_of_an_epoch_is_the_one_that_counts(tmp_path):
    run = write_run(tmp_path / "version_0")
    write_metrics(
        run / "metrics.csv",
        [{"epoch": 0, "val_loss": 1.0}, {"epoch": 1, "val_loss": float("nan")}, {"epoch": 0, "val_loss": 2.0}],
    )
    assert read_runs([run])[0].courses == {"val_loss": {0: 2.0}}
