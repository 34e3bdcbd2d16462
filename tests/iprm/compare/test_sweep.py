"""The command `iprm compare`: its runs equal those of `iprm fit`, it resumes, and if one run fails, the others continue."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from command import Outcome, iprm, table
from feature_files import arrays, save, without
from forked import start, write_start_method
from iprm.cli import compare as command
from iprm.cli.main import main
from iprm.compare import run as compared
from iprm.compare import sweep
from iprm.data.datasets.digits import Digits
from iprm.data.datasets.features import Features
from iprm.training.finite import NonFiniteError
from run_contents import difference, leaves

FILES = {"summary.md", "runs.csv", "history.csv", "plot.png", "settings.json"}
METHODS = ("sum", "iprm")
SEEDS = (0, 1)
RUNS = [f"{method}/seed={seed}" for method in METHODS for seed in SEEDS]
ARGUMENTS = ("compare", "--data", "features", "--path", "features.npz", "--data.batch_size", "10", "--model.feature_dim", "8")


def compare(folder: Path, *arguments: str, jobs: int = 1, methods: str = "sum,iprm", epochs: int = 2) -> Outcome:
    """Two seeds, into the folder report."""
    size = ("--methods", methods, "--seeds", "2", "--epochs", str(epochs), "--jobs", str(jobs), "--output", "report")
    return iprm(folder, *ARGUMENTS, *size, *arguments)


def comparison(folder: Path, *arguments: str, **options) -> Path:
    """Runs a comparison without errors or failed runs, and returns its folder."""
    save(folder, arrays())
    code, out, err = compare(folder, *arguments, **options)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "report: report"
    return folder / "report"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(run: Path, states: str = "*") -> dict[str, object]:
    """The contents that must be bit-identical in two runs with the same settings; `states` is a pattern of names of states."""
    found: dict[str, object] = {"metrics": (run / "metrics.csv").read_text(), "config": (run / "config.yaml").read_text()}
    for path in sorted([*run.glob(f"states/{states}.ckpt"), *run.glob("checkpoints/*.ckpt")]):
        found |= {
            f"{path.name}{name}": leaf
            for name, leaf in leaves(torch.load(path, weights_only=True)).items()
            if "dirpath" not in name
        }
    return found


def metrics_of(run: Path) -> dict[str, float]:
    return json.loads((run / "test.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return comparison(tmp_path_factory.mktemp("compare"))


# the files of a comparison


def test_a_comparison_is_tables_a_plot_and_a_folder_for_each_run(report):
    assert {file.name for file in report.iterdir()} == {*FILES, *METHODS}
    picture = (report / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(picture[16:20], "big") == 11 * 150, "pixels wide"


def test_a_run_is_one_of_iprm_fit_to_the_bit_and_has_its_test_metrics(report, tmp_path):
    data = ("--data.path", str(report.parent / "features.npz"), "--data.batch_size", "10", "--data.seed", "1")
    size = ("--model.feature_dim", "8", "--trainer.max_epochs", "2", "--trainer.devices", "1", "--seed_everything", "1")
    assert iprm(tmp_path, "fit", "--config", "features", *data, *size).code == 0
    fit = tmp_path / "runs/features/fit/version_0"
    (tmp_path / "config").write_text((fit / "config.yaml").read_text().replace(f"{report.parent}/", ""))
    (tmp_path / "config").replace(fit / "config.yaml")
    ours = report / "iprm/seed=1"
    assert difference(contents(fit), contents(ours)) == []
    events = re.compile(r"events\.out\.tfevents.*")
    names = [{events.sub("events", str(path.relative_to(run))) for path in run.rglob("*")} for run in (fit, ours)]
    assert names[1] == names[0] | {"test.json"}
    (best,) = fit.absolute().glob("checkpoints/*.ckpt")
    out = iprm(report.parent, "test", "--config", str(ours / "config.yaml"), "--ckpt_path", str(best)).out
    assert table(out) == pytest.approx({f"test_{name}": value for name, value in metrics_of(ours).items()}, rel=1e-6)


def test_the_summary_is_the_mean_and_deviation_of_the_runs(report):
    runs = rows(report / "runs.csv")
    assert [(row["method"], row["seed"]) for row in runs] == [tuple(run.split("/seed=")) for run in RUNS]
    title, _, _, _, *lines = (report / "summary.md").read_text(encoding="utf-8").splitlines()
    assert title == "# features: 2 seeds, 2 epochs"
    for line, method in zip(lines, METHODS, strict=True):
        values = [100 * metrics_of(report / f"{method}/seed={seed}")["accuracy"] for seed in SEEDS]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:2] == [method, f"{statistics.fmean(values):.1f} ±{statistics.stdev(values):.1f}"]
        assert float(cells[-1]) > 0, "seconds"


def test_metrics_hold_no_test_metric(report):
    assert not [name for row in rows(report / "history.csv") for name in row if name.startswith("test")]
    assert not [name for run in RUNS for name in rows(report / run / "metrics.csv")[0] if name.startswith("test")]


def test_the_settings_are_enough_to_run_it_again(report):
    settings = json.loads((report / "settings.json").read_text(encoding="utf-8"))
    assert settings["settings"]["data"]["init_args"]["batch_size"] == 10
    assert settings["settings"]["model"]["feature_dim"] == 8
    assert (settings["methods"], settings["seeds"]) == (list(METHODS), list(SEEDS))
    data = Features(str(report.parent / "features.npz"), seed=1)
    assert json.loads((report / "sum/seed=1/test.json").read_text())["splits"] == data.describe()
    assert settings["versions"].keys() >= {"python", "torch", "iprm-kernels"}
    assert settings["backends"]["reference"].startswith("reference: serves any")


def test_two_processes_find_what_one_finds(report, tmp_path):
    two = comparison(tmp_path, jobs=2)
    assert [difference(contents(two / run), contents(report / run)) for run in RUNS] == [[]] * len(RUNS)
    assert [metrics_of(two / run) for run in RUNS] == [metrics_of(report / run) for run in RUNS]


def test_workers_of_a_loader_start_in_a_process_of_a_comparison_as_in_one_of_iprm_fit(tmp_path):
    jobs = [compared.Job("sum", seed, tmp_path / str(seed), {"trainer": {"max_epochs": 1}}) for seed in SEEDS]
    sweep.sweep(jobs, write_start_method, 2)
    assert {(job.folder / "start_method.txt").read_text() for job in jobs} == {multiprocessing.get_start_method()}


UNTOUCHED = """
import torch

def asked(*_):
    raise AssertionError("CUDA was asked")

torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = asked
import iprm.cli.compare
"""


@pytest.mark.slow
def test_what_the_processes_are_forked_from_has_not_initialised_cuda():
    """CUDA cannot be used after a fork of a process that has initialised it."""
    subprocess.run([sys.executable, "-c", UNTOUCHED], check=True)


def test_a_setting_of_fit_by_its_full_name_means_the_same_as_the_options(report, tmp_path):
    save(tmp_path, arrays())
    data = ("compare", "--data", "features", "--data.path", "features.npz", "--data.batch_size=10")
    size = ("--model.feature_dim", "8", "--trainer.max_epochs", "2", "--methods", "sum", "--seeds", "1", "--output", "report")
    assert iprm(tmp_path, *data, *size).code == 0
    assert difference(contents(tmp_path / "report/sum/seed=0"), contents(report / "sum/seed=0")) == []


def test_the_report_of_a_comparison_shows_its_table_and_every_run(report):
    assert iprm(report.parent, "report", "report").out == "report: report.html\n"
    page = (report.parent / "report.html").read_text(encoding="utf-8")
    assert "<h1>features: 2 seeds, 2 epochs</h1>" in page
    assert "Test accuracy by method" in page
    assert all(run in page for run in RUNS)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_comparison_is_shown_in_any_encoding(report, monkeypatch, encoding):
    raw = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
        patch.chdir(report.parent)
        size = ("--methods", "sum,iprm", "--seeds", "2", "--epochs", "2", "--jobs", "1", "--output", "report")
        assert main((*ARGUMENTS, *size)) == 0
        sys.stdout.flush()
        shown = raw.getvalue().decode(encoding)
    assert "lambda" in shown
    assert re.search(r"^iprm[ |]+\d+\.\d(\+-|±)\d+\.\d", shown, re.MULTILINE)


# data and selection


@pytest.mark.parametrize("dataset", [Features, Digits])
def test_the_data_of_a_seed_are_read_once(tmp_path, monkeypatch, dataset):
    read = []
    reader = dataset.read
    monkeypatch.setattr(dataset, "read", lambda self: read.append(self.seed) or reader(self))
    monkeypatch.setattr(compared, "_last_read", {})
    if dataset is Features:
        comparison(tmp_path, epochs=1)
    else:
        size = ("--methods", "sum,unimodal-strip", "--seeds", "2", "--epochs", "1", "--jobs", "1")
        assert iprm(tmp_path, "compare", "--data", "digits", *size).code == 0
    assert read == [0, 1]


def test_a_dataset_of_other_options_is_read_anew(tmp_path):
    path = save(tmp_path, arrays())
    one = compared.read_once(Features, path=path, seed=0)
    assert compared.read_once(Features, path=path, seed=0).splits is one.splits
    assert compared.read_once(Features, path=path, seed=1).splits is not one.splits


def test_the_test_split_decides_nothing(tmp_path):
    split = np.array(["train", "val", "test"])[np.minimum(np.arange(60) // 20, 2)]
    original = arrays() | {"split": split}
    relabelled = original | {"y": np.where(split == "test", (original["y"] + 1) % 3, original["y"])}
    found = []
    for name, content in (("original", original), ("relabelled", relabelled)):
        (tmp_path / name).mkdir()
        save(tmp_path / name, content)
        assert compare(tmp_path / name, methods="iprm").code == 0
        found.append(tmp_path / name / "report/iprm/seed=0")
    one, other = ({n: v for n, v in contents(run).items() if "digest" not in n} for run in found)
    assert difference(one, other) == []
    assert metrics_of(found[0])["accuracy"] != metrics_of(found[1])["accuracy"]


def test_every_epoch_is_counted_and_timed():
    ended: list[int] = []
    clock = compared.Clock(ended.append)
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    module = L.LightningModule()
    clock.on_validation_start(trainer, module)  # the check before training
    clock.on_train_start(trainer, module)
    for _ in range(2):
        clock.on_train_batch_start(trainer, module, None, 0)
        clock.on_train_batch_start(trainer, module, None, 1)
        clock.on_validation_start(trainer, module)
        clock.on_validation_end(trainer, module)
    assert (ended, len(clock.seconds)) == ([0, 1, 1], 2)


# a comparison that is interrupted and resumed


class Ended:
    """Calls `end` once, in the second epoch of the second run of iprm."""

    def __init__(self, monkeypatch, end) -> None:
        began = compared.Clock.on_train_batch_start
        self.end = end

        def begin(clock, trainer, module, batch, place):
            if (trainer.current_epoch, place, Path(trainer.log_dir).name) == (1, 1, "seed=1") and "iprm" in trainer.log_dir:
                end, self.end = self.end, None
                if end:
                    end()
            began(clock, trainer, module, batch, place)

        monkeypatch.setattr(compared.Clock, "on_train_batch_start", begin)


def interrupted() -> None:
    raise KeyboardInterrupt


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("end", "code", "message"), [(interrupted, 130, "iprm: interrupted\n"), (terminated, 143, "")])
def test_a_comparison_that_was_ended_continues_to_the_bit(report, tmp_path, monkeypatch, end, code, message):
    save(tmp_path, arrays())
    before = signal.getsignal(signal.SIGTERM)
    Ended(monkeypatch, end)
    found = compare(tmp_path)
    done = "iprm: 3 of 4 runs are finished; their report: report; to continue, repeat the command with --output report\n"
    assert (found.code, found.err) == (code, done + message)
    assert signal.getsignal(signal.SIGTERM) == before
    assert "2 seeds, 2 epochs; 3 of 4 runs" in (tmp_path / "report/summary.md").read_text()
    finished = {path: path.stat().st_mtime_ns for run in RUNS[:3] for path in (tmp_path / "report" / run).rglob("*")}
    assert compare(tmp_path).code == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    for run in RUNS:  # SIGTERM saves a further state, in the middle of the epoch
        found, whole = (
            contents(folder / run, "none" if end is terminated else "*") for folder in (tmp_path / "report", report)
        )
        assert difference(found, whole) == []
        assert metrics_of(tmp_path / "report" / run) == metrics_of(report / run)
    assert compare(tmp_path).code == 0, "with nothing left to run"


def test_sigterm_ends_the_processes_of_a_comparison_which_continues(tmp_path, features, monkeypatch):
    """SIGTERM arrives in the third of three runs, or late in the second; two runs are trained at a time."""
    epochs = itertools.count(1)

    @contextlib.contextmanager
    def progress(_):
        yield lambda ended: terminated() if next(epochs) == 82 else None

    size = (*ARGUMENTS, "--methods", "sum", "--seeds", "3", "--epochs", "30", "--jobs", "2", "--output", "report")
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "_progress", progress)
        code, _, err = iprm(tmp_path, *size)
    assert code == 143
    assert multiprocessing.active_children() == []
    (finished,) = re.match(r"iprm: ([12]) of 3 runs are finished", err).groups()
    assert len(rows(tmp_path / "report/runs.csv")) == int(finished)
    assert iprm(tmp_path, *size).code == 0
    assert [row["epoch"] for row in rows(tmp_path / "report/sum/seed=2/metrics.csv")] == [str(k) for k in range(30)]


@pytest.mark.parametrize("below", ["", "c"])
def test_the_folder_of_a_run_is_no_place_for_a_comparison(report, below):
    run = report / "sum/seed=0"
    before = sorted(run.rglob("*"))
    outcome = compare(report.parent, "--output", str(run / below))
    assert outcome.code == 2
    assert "seed=0 is the folder of a run of iprm fit; choose another --output" in outcome.err
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_comparison_that_was_killed_keeps_the_runs_that_had_ended_and_continues(tmp_path, features, jobs):
    """The processes of a killed comparison save their states and end; the same command, at once, waits for them."""
    size = (*ARGUMENTS, "--methods", "sum", "--seeds", "3", "--epochs", "30", "--jobs", str(jobs), "--output", "report")
    with started(tmp_path, *size) as killed:
        waited_for(lambda: any(tmp_path.glob("report/sum/*/test.json")))
        killed.kill()
        killed.join()
    ended = {path: path.stat().st_mtime_ns for path in tmp_path.glob("report/sum/*/test.json")}
    assert 1 <= len(ended) < 3
    assert all(json.loads(path.read_text())["metrics"] for path in ended)
    assert iprm(tmp_path, "report", "report").code == 0
    code, out, err = iprm(tmp_path, *size)
    assert (code, err) == (0, "")
    assert "failed" not in out
    assert {path: path.stat().st_mtime_ns for path in ended} == ended
    for seed in range(3):
        assert [row["epoch"] for row in rows(tmp_path / f"report/sum/seed={seed}/metrics.csv")] == [str(k) for k in range(30)]
    assert not list(tmp_path.rglob(".iprm.lock"))


ENDLESS = (*ARGUMENTS, "--methods", "sum", "--seeds", "2", "--epochs", "100000", "--jobs", "2", "--output", "report")


def processes_of(folder: Path) -> list[int]:
    """The processes that train the two runs of `ENDLESS`."""
    locks = waited_for(lambda: [lock for lock in folder.glob("report/sum/*/.iprm.lock") if lock.read_text()], 2)
    return [int(lock.read_text().split()[1]) for lock in locks]


def is_running(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def test_a_process_of_a_comparison_ends_with_its_parent(tmp_path, features):
    with started(tmp_path, *ENDLESS) as killed:
        processes = processes_of(tmp_path)
        assert killed.pid not in processes
        killed.kill()
        killed.join()
        try:
            waited_for(lambda: not any(map(is_running, processes)))
        finally:
            for process in filter(is_running, processes):
                os.kill(process, signal.SIGKILL)


def test_a_process_of_a_comparison_that_is_killed_ends_it_with_one_line(tmp_path, features):
    with started(tmp_path, *ENDLESS) as comparison:
        processes = processes_of(tmp_path)
        os.kill(processes[0], signal.SIGKILL)
        comparison.join(60)
        assert comparison.exitcode == 2
    assert (tmp_path / "log.txt").read_text().splitlines()[-2:] == [
        "iprm: 0 of 2 runs are finished; to continue, repeat the command with --output report",
        "iprm: one of 2 processes was killed, perhaps for a lack of memory; --jobs N starts N at once",
    ]
    waited_for(lambda: not any(map(is_running, processes)))


@contextlib.contextmanager
def started(folder: Path, *arguments: str):
    """A process that runs `iprm ARGUMENTS`."""
    process = start(folder, *arguments)
    try:
        yield process
    finally:
        process.kill()


def waited_for(found, count: int = 1):
    """What the function returns when it is of this length or, if it is a truth value, true."""
    for _ in range(1200):
        value = found()
        if value and (value is True or len(value) == count):
            return value
        time.sleep(0.05)
    raise AssertionError("waited a minute in vain")


def test_more_seeds_and_methods_join_a_comparison(tmp_path):
    folder = comparison(tmp_path, methods="sum", epochs=1)
    size = ("--methods", "concat", "--seeds", "1", "--epochs", "1", "--jobs", "1", "--output", "report")
    assert iprm(tmp_path, *ARGUMENTS, *size).code == 0
    assert [(row["method"], row["seed"]) for row in rows(folder / "runs.csv")] == [("sum", "0"), ("sum", "1"), ("concat", "0")]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (("--model.feature_dim", "16"), "model.feature_dim of this run is 8, not 16"),
        (("--epochs", "3"), "trainer.max_epochs of this run is 2, not 3"),
        (("--model.encoders", "{audio: linear}"), "model.encoders.audio of this run is None, not 'linear'"),
    ],
)
def test_other_settings_than_those_of_the_folder_are_refused_by_name_and_nothing_is_touched(report, other, named):
    before = {path: path.stat().st_mtime_ns for path in report.rglob("*")}
    code, out, err = compare(report.parent, *other)
    assert (code, out) == (2, "")
    assert err == f"iprm: report/sum/seed=0: {named}; choose another --output\n"
    assert {path: path.stat().st_mtime_ns for path in report.rglob("*")} == before


# a run that fails


def test_a_run_that_meets_nan_fails_and_is_listed_with_its_reason(tmp_path, features):
    code, out, err = compare(tmp_path, "--optimizer.lr", "1e30", methods="sum")
    assert (code, err) == (1, "")
    assert re.search(r"^failed: sum, seed 0: NonFiniteError: .*training batch \d+", out, re.MULTILINE)
    failure = (tmp_path / "report/sum/seed=1/failed.txt").read_text()
    assert failure.startswith("NonFiniteError: ")
    assert "Traceback" in failure


def test_the_others_go_on_and_the_one_that_failed_starts_again(report, tmp_path, monkeypatch):
    save(tmp_path, arrays())
    run_fit = command.run_fit

    def failing(config, folder, *given, **options):
        if folder.parts[-2:] == ("sum", "seed=1"):
            raise NonFiniteError("training step 3: <b>\nand more")
        run_fit(config, folder, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(command, "run_fit", failing)
        found = compare(tmp_path)
    assert (found.code, found.err) == (1, "")
    assert found.out.splitlines()[-2] == "failed: sum, seed 1: NonFiniteError: training step 3: <b> and more"
    assert "features: 2 seeds, 2 epochs; 3 of 4 runs\n" in found.out
    assert "- sum, seed 1: NonFiniteError" in (tmp_path / "report/summary.md").read_text()
    assert iprm(tmp_path, "report", "report").code == 0
    assert "Failed: sum, seed 1: NonFiniteError: training step 3: &lt;b&gt; and more" in (tmp_path / "report.html").read_text()
    assert compare(tmp_path).code == 0
    assert difference(contents(tmp_path / "report/sum/seed=1"), contents(report / "sum/seed=1")) == []
    assert not (tmp_path / "report/sum/seed=1/failed.txt").exists()


# before any training


def test_the_methods_compared_are_each_modality_alone_the_baselines_and_iprm(features, tmp_path):
    config = command.fit_settings(["--config", "features", "--data.path", features])
    methods, jobs = compared.make_jobs(config, None, [0, 1], tmp_path)
    assert methods == ["unimodal-audio", "unimodal-text", "concat", "sum", "weight", "joint", "iprm"]
    assert [(job.seed, job.method) for job in jobs] == [(seed, method) for seed in (0, 1) for method in methods]


BAD = {
    "no dataset": (("compare",), "the following arguments are required: data"),
    "an unknown dataset": (("compare", "--data", "digts"), "unknown dataset 'digts': did you mean 'digits'?"),
    "an unknown option": ((*ARGUMENTS, "--epoches", "3"), "unknown option --epoches: did you mean --epochs?"),
    "an unknown method": ((*ARGUMENTS, "--methods", "sum,conct"), "method: unknown name 'conct': did you mean 'concat'?"),
    "no method": ((*ARGUMENTS, "--methods", ","), "no methods were named"),
    "an unknown dataset option": ((*ARGUMENTS, "--data.batchsize", "3"), "did you mean --data.batch_size?"),
    "an unknown model option": ((*ARGUMENTS, "--model.feature_dm", "1"), "did you mean --model.feature_dim?"),
    "a word for a number": ((*ARGUMENTS, "--model.feature_dim", "wide"), "model.feature_dim: Expected a int. Got value: wide"),
    "a broken mapping": ((*ARGUMENTS, "--model.encoders", "{a"), "model.encoders"),
    "a number out of range": ((*ARGUMENTS, "--optimizer.momentum", "2"), "momentum: expected a number from 0 to 1, got 2"),
    "a batch of one row": (
        (*ARGUMENTS, "--data.batch_size", "1"),
        "batch_size: expected at least 2 to train encoders that normalise",
    ),
    "a seed": ((*ARGUMENTS, "--data.seed", "3"), "data.seed: the comparison determines this setting for each run; use --seeds"),
    "a method": (
        (*ARGUMENTS, "--model.method", "sum"),
        "model.method: the comparison determines this setting for each run; use --methods",
    ),
    "no seeds": ((*ARGUMENTS, "--seeds", "0"), "argument --seeds: expected a whole number from 1 up, got 0"),
    "no epochs": ((*ARGUMENTS, "--epochs", "few"), "argument --epochs: expected a whole number from 1 up, got few"),
    "no path": (("compare", "--data", "features"), "path"),
    "no file": (("compare", "--data", "features", "--path", "no.npz"), "no.npz: there is no such file"),
    "no labels": (("compare", "--data", "features", "--path", "unlabelled/features.npz"), "there is no array 'y' of labels"),
    "a folder where there is a file": ((*ARGUMENTS, "--output", "features.npz"), "File exists: 'features.npz'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_told_before_any_training(tmp_path, features, monkeypatch, arguments, message):
    (tmp_path / "unlabelled").mkdir()
    save(tmp_path / "unlabelled", without("y"))
    monkeypatch.setattr(command, "run_fit", lambda *_: pytest.fail("a run began"))
    code, out, err = iprm(tmp_path, *arguments, *(() if "--jobs" in arguments else ("--jobs", "1")))
    assert (code, out) == (2, "")
    assert err.startswith("iprm: ")
    assert message in err
    assert "Traceback" not in err
