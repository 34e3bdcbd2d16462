"""The command `iprm compare`: the report of a small comparison, that its runs repeat, and how models are selected."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import multiprocessing
import os
import re
import signal
import statistics
from pathlib import Path

import numpy as np
import pytest
from command import iprm
from feature_files import arrays, save, without
from iprm.compare import run as experiment
from iprm.compare import sweep as compare
from iprm.compare.run import Settings, run
from iprm.data.datasets.features import Features
from iprm.training.finite import NonFiniteError
from iprm.training.lightning import quiet_lightning
from training import classifier, fit

FILES = ("summary.md", "runs.csv", "history.csv", "plot.png", "settings.json")
METHODS = ("sum", "iprm")
SEEDS = (0, 1)
EPOCHS = (0, 1)
ARGUMENTS = ("compare", "--data", "features", "--path", "features.npz", "--set", "batch_size=10", "--model", "feature_dim=8")


def comparison(folder: Path, jobs: int) -> Path:
    """Two methods, two seeds, two epochs.  -> the report"""
    save(folder, arrays())
    size = ("--methods", "sum,iprm", "--seeds", "2", "--epochs", "2", "--jobs", str(jobs))
    code, out, err = iprm(folder, *ARGUMENTS, *size, "--model", "learning_rate=5e-2", "--output", "report")
    assert (code, err) == (0, "")
    assert "features: 2 seeds, 2 epochs" in out
    assert out.splitlines()[-1] == "report: report"
    return folder / "report"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_seconds(runs: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name != "seconds_per_epoch"} for row in runs]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return comparison(tmp_path_factory.mktemp("compare"), jobs=1)


# the report


def test_the_report_is_five_files(report):
    assert sorted(file.name for file in report.iterdir()) == sorted(FILES)


def test_runs_are_a_row_a_method_and_seed_with_test_metrics(report):
    runs = rows(report / "runs.csv")
    assert [(row["method"], int(row["seed"])) for row in runs] == [(method, seed) for method in METHODS for seed in SEEDS]
    for row in runs:
        assert all(0 <= float(row[f"test_{name}"]) <= 1 for name in ("accuracy", "map", "macro_f1", "accuracy_audio"))
        assert float(row["seconds_per_epoch"]) > 0
        assert (row["weight"] != "") == (row["method"] == "iprm")


def test_the_summary_is_the_mean_and_deviation_of_the_runs(report):
    runs = rows(report / "runs.csv")
    title, _, head, _, *lines = (report / "summary.md").read_text(encoding="utf-8").splitlines()
    assert title == "# features: 2 seeds, 2 epochs"
    names = ["method", "accuracy", "mAP", "macro-F1", "audio head", "text head", "λ", "s/epoch"]
    assert [cell.strip() for cell in head.strip("|").split("|")] == names
    for line, method in zip(lines, METHODS, strict=True):
        cells = dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        assert cells["method"] == method
        for name, column in (("accuracy", "test_accuracy"), ("mAP", "test_map"), ("text head", "test_accuracy_text")):
            values = [100 * float(row[column]) for row in runs if row["method"] == method]
            assert cells[name] == f"{statistics.fmean(values):.1f} ±{statistics.stdev(values):.1f}"


def test_the_history_is_a_row_an_epoch_and_holds_no_test_metric(report):
    history = rows(report / "history.csv")
    places = [(row["method"], int(row["seed"]), int(row["epoch"])) for row in history]
    assert places == [(method, seed, epoch) for method in METHODS for seed in SEEDS for epoch in EPOCHS]
    assert not [name for name in history[0] if name.startswith("test")]
    assert all(float(row["train_loss"]) > 0 and float(row["val_loss"]) > 0 for row in history)
    strength = [float(row["strength_audio"]) + float(row["strength_text"]) for row in history if row["method"] == "iprm"]
    assert strength == pytest.approx([1] * len(strength))


def test_the_run_reported_best_is_best_on_validation(report):
    history = rows(report / "history.csv")
    for row in rows(report / "runs.csv"):
        course = [float(e["val_accuracy"]) for e in history if (e["method"], e["seed"]) == (row["method"], row["seed"])]
        assert int(row["best_epoch"]) == course.index(max(course))


def test_the_settings_are_enough_to_run_it_again(report):
    settings = json.loads((report / "settings.json").read_text(encoding="utf-8"))
    assert settings["data_options"] == {"path": "features.npz", "batch_size": 10}
    assert settings["model_options"] == {"learning_rate": 0.05, "feature_dim": 8}
    assert (settings["methods"], settings["seeds"], settings["epochs"]) == (list(METHODS), list(SEEDS), len(EPOCHS))
    data = Features(str(report.parent / "features.npz"), seed=1)
    assert settings["splits"]["1"] == data.describe()
    assert settings["versions"].keys() >= {"python", "torch", "iprm-kernels"}
    assert settings["backends"]["reference"].startswith("reference: serves any")


def test_the_plot_is_a_picture(report):
    picture = (report / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(picture[16:20], "big") == 11 * 150, "pixels wide"


def test_two_processes_find_what_one_finds(tmp_path):
    reports = []
    for jobs in (1, 2):
        (tmp_path / str(jobs)).mkdir()
        reports.append(comparison(tmp_path / str(jobs), jobs))
    one, two = ([without_seconds(rows(report / name)) for name in ("runs.csv", "history.csv")] for report in reports)
    assert one == two
    assert sorted(file.name for file in reports[1].iterdir()) == sorted(FILES)


# a run


def settings_for(path: str, epochs: int = 2, **model) -> Settings:
    return Settings("features", {"path": path, "batch_size": 10}, {"feature_dim": 8, "decay": 1.0} | model, epochs, "cpu")


def outcome(result):
    return result.test, result.history, result.best_epoch


def test_a_seed_gives_the_same_run_again_and_another_seed_another(features):
    one, same, other = (outcome(run(settings_for(features), "iprm", seed)) for seed in (1, 1, 2))
    assert one == same
    assert one[1] != other[1]


def test_the_model_tested_is_the_one_that_was_best_on_validation(tmp_path, features):
    result = run(settings_for(features, epochs=6, learning_rate=0.3), "sum", 0)
    assert result.best_epoch < 5, "so that the last is another"
    data = Features(features, batch_size=10)
    model = classifier(data, "sum", learning_rate=0.3, decay=1.0)
    runner = fit(tmp_path, data, model, epochs=result.best_epoch + 1)
    with quiet_lightning():
        (expected,) = runner.test(model, datamodule=data, verbose=False)
    assert {f"test_{name}": value for name, value in result.test.items()} == expected


def test_the_test_split_is_read_once_and_decides_nothing(features, tmp_path, monkeypatch):
    asked = []
    loader = Features.test_dataloader
    monkeypatch.setattr(Features, "test_dataloader", lambda self: asked.append(1) or loader(self))
    split = np.array(["train", "val", "test"])[np.minimum(np.arange(60) // 20, 2)]
    original = arrays() | {"split": split}
    relabelled = original | {"y": np.where(split == "test", (original["y"] + 1) % 3, original["y"])}
    found = [run(settings_for(save(tmp_path, content), learning_rate=0.1), "iprm", 0) for content in (original, relabelled)]
    assert len(asked) == len(found)
    assert found[0].history == found[1].history
    assert found[0].best_epoch == found[1].best_epoch
    assert found[0].test["accuracy"] != found[1].test["accuracy"]


def test_every_epoch_is_told_of_and_timed(features):
    told = []
    result = run(settings_for(features, epochs=3), "sum", 0, lambda: told.append(1))
    assert len(told) == len(result.history) == 3
    assert result.seconds_per_epoch > 0


def test_all_methods_share_the_data_of_a_seed(features, monkeypatch):
    digests = []
    make = experiment.make_data
    monkeypatch.setattr(experiment, "make_data", lambda *a, **k: digests.append((data := make(*a, **k)).describe()) or data)
    list(compare.compare(settings_for(features, epochs=1), METHODS, SEEDS, jobs=1))
    first, second = digests[:2], digests[2:]
    assert first[0] == first[1] != second[0] == second[1]


def test_a_run_that_meets_nan_is_named_and_ends_the_comparison(tmp_path, features):
    code, out, err = iprm(tmp_path, *ARGUMENTS, "--methods", "sum", "--jobs", "1", "--model", "learning_rate=1e30")
    assert code == 1
    assert err.startswith("iprm: stopped at training step ")
    assert err.endswith("(method 'sum', seed 0)\n")
    assert "report" not in out


# a comparison that is ended early


def interrupted() -> None:
    raise KeyboardInterrupt


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def failed() -> None:
    raise NonFiniteError("training step 3")


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [(failed, 1, "iprm: stopped at training step 3\n"), (interrupted, 130, "iprm: interrupted\n"), (terminated, 143, "")],
)
def test_the_runs_that_are_finished_are_reported(tmp_path, features, monkeypatch, end, code, message):
    monkeypatch.setattr(compare, "run", lambda *given: run(*given) if given[1:3] != ("iprm", 1) else end())
    before = signal.getsignal(signal.SIGTERM)
    size = ("--methods", "iprm,sum", "--seeds", "2", "--epochs", "1", "--jobs", "1", "--output", "report")
    found = iprm(tmp_path, *ARGUMENTS, *size)
    assert (found.code, found.err) == (code, f"iprm: 2 of 4 runs are finished; a report of these: report\n{message}")
    assert [(row["method"], row["seed"]) for row in rows(tmp_path / "report/runs.csv")] == [("iprm", "0"), ("sum", "0")]
    title = (tmp_path / "report/summary.md").read_text(encoding="utf-8").splitlines()[0]
    assert title == "# features: 2 seeds, 1 epochs; 2 of 4 runs"
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == sorted(FILES)
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_ends_the_processes_of_a_comparison_and_the_runs_that_are_finished_are_reported(
    tmp_path, features, monkeypatch
):
    """In the third of three runs, two at a time, or late in the second."""
    epochs = itertools.count(1)

    @contextlib.contextmanager
    def progress(_):
        yield lambda: terminated() if next(epochs) == 80 else None

    monkeypatch.setattr(compare, "_progress", progress)
    size = ("--methods", "sum", "--seeds", "3", "--epochs", "30", "--jobs", "2", "--output", "report")
    code, _, err = iprm(tmp_path, *ARGUMENTS, *size)
    assert code == 143
    assert multiprocessing.active_children() == []
    (finished,) = re.fullmatch(r"iprm: ([12]) of 3 runs are finished; a report of these: report\n", err).groups()
    assert len(rows(tmp_path / "report/runs.csv")) == int(finished)


# before any training


def test_the_methods_compared_are_each_modality_alone_the_baselines_and_iprm(features):
    methods, modalities, _ = compare.check(settings_for(features), None, [0])
    assert methods == ["unimodal-audio", "unimodal-text", "concat", "sum", "weight", "joint", "iprm"]
    assert modalities == ("audio", "text")


BAD = {
    "no dataset": (("compare",), "the following arguments are required: data"),
    "an unknown dataset": (("compare", "--data", "digts"), "unknown dataset 'digts': did you mean 'digits'?"),
    "an unknown option": ((*ARGUMENTS, "--epoches", "3"), "unknown option --epoches: did you mean --epochs?"),
    "an unknown method": ((*ARGUMENTS, "--methods", "sum,conct"), "got 'conct'; did you mean 'concat'?"),
    "no method": ((*ARGUMENTS, "--methods", ","), "no methods were named"),
    "an unknown dataset option": ((*ARGUMENTS, "--set", "batchsize=3"), "'batchsize': did you mean 'batch_size'?"),
    "an unknown model option": ((*ARGUMENTS, "--model", "learning_rte=1"), "'learning_rte': did you mean 'learning_rate'?"),
    "a word for a number": ((*ARGUMENTS, "--model", "learning_rate=fast"), "learning_rate: Expected a float. Got value: fast"),
    "a broken mapping": (
        (*ARGUMENTS, "--model", "encoders={a"),
        "encoders: Does not validate against any of",
    ),
    "a number out of range": ((*ARGUMENTS, "--model", "momentum=2"), "momentum: expected a number from 0 to 1, got 2"),
    "an option without value": ((*ARGUMENTS, "--set", "batch_size"), "expected KEY=VALUE, got 'batch_size'"),
    "a batch of one row": (
        (*ARGUMENTS, "--set", "batch_size=1"),
        "batch_size: expected at least 2 to train encoders that normalise",
    ),
    "a seed": ((*ARGUMENTS, "--set", "seed=3"), "seed: a comparison gives every run its own; choose their number by --seeds"),
    "no seeds": ((*ARGUMENTS, "--seeds", "0"), "argument --seeds: expected a whole number from 1 up, got 0"),
    "no epochs": ((*ARGUMENTS, "--epochs", "few"), "argument --epochs: expected a whole number from 1 up, got few"),
    "no path": (("compare", "--data", "features"), "dataset 'features' needs the option 'path'"),
    "no file": (("compare", "--data", "features", "--path", "no.npz"), "no.npz: there is no such file"),
    "no labels": (("compare", "--data", "features", "--path", "unlabelled/features.npz"), "there is no array 'y' of labels"),
    "a report in place of a file": ((*ARGUMENTS, "--output", "features.npz"), "File exists: 'features.npz'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_told_before_any_training(tmp_path, features, monkeypatch, arguments, message):
    (tmp_path / "unlabelled").mkdir()
    save(tmp_path / "unlabelled", without("y"))
    monkeypatch.setattr(compare, "run", lambda *_: pytest.fail("a run began"))
    code, out, err = iprm(tmp_path, *arguments, *(() if "--jobs" in arguments else ("--jobs", "1")))
    assert (code, out) == (2, "")
    assert err.startswith("iprm: ")
    assert message in err
    assert "Traceback" not in err
