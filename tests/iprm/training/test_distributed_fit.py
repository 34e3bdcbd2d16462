"""`iprm fit` in several processes: with Lightning's launcher, under torchrun, and sharded. Results equal those of one process,
and interrupted runs resume.

Tests whose subject is not the launcher run their ranks as torchrun would start them, but forked from a process that has
imported everything.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from command import iprm, table
from feature_files import arrays, save
from forked import run_command_on_ranks
from run_contents import RUN, difference, left

EPOCHS = 3
IPRM = ("-m", "iprm")
SCRIPT = (str(Path(sys.executable).parent / "iprm"),)  # unlike -m it does not put the current folder on sys.path
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *IPRM)
SETTINGS = ("--data.path", "features.npz", "--trainer.max_epochs", str(EPOCHS), "--trainer.enable_progress_bar", "false")
#: Encoders without batch normalisation, because each process sees only its part of a batch.
ALIKE = ("--data", "features", "--model.encoders", '{"audio": "linear", "text": "linear"}', "--optimizer.lr", "0.1")
TWO = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--data.batch_size", "8")
NOISY = ("--data", "feature_files.NoisyFeatures", "--trainer.strategy", "ddp")


@pytest.fixture
def folder(tmp_path) -> Path:
    save(tmp_path, arrays(121))  # 78 rows to train on: the last joint batch of 16 has 14
    return tmp_path


def run(folder: Path, *arguments: str, by: tuple[str, ...] = IPRM) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, *by, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, timeout=120, capture_output=True, text=True)


def metrics(folder: Path, version: int = 0) -> list[dict[str, float]]:
    with (folder / f"runs/fit/version_{version}/metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def check_alike(folder: Path) -> None:
    """Checks that the second run in `folder` logged the same metrics as the first."""
    alone, found = metrics(folder, 0), metrics(folder, 1)
    assert len(alone) == EPOCHS
    for expected, row in zip(alone, found, strict=True):
        assert row == pytest.approx(expected, rel=1e-4), "in float32"


def on_two_ranks(folder: Path, *arguments: str) -> str:
    """The output of the first of two ranks; both must succeed."""
    ranks = run_command_on_ranks(folder, 2, *arguments, *TWO)
    assert [code for code, _ in ranks] == [0, 0], "\n".join(log for _, log in ranks)
    return ranks[0][1]


def check_ranks(folder: Path, *settings: str, strategy: Sequence[str] = ("ddp",)) -> None:
    """Checks that two ranks log what one process logs with a batch as large."""
    settings = (*settings, *SETTINGS)
    assert iprm(folder, "fit", *settings, "--data.batch_size", "16").code == 0
    on_two_ranks(folder, "fit", *settings, "--trainer.strategy", *strategy)
    check_alike(folder)


@pytest.mark.parametrize(
    "by", [pytest.param(IPRM, id="launched"), pytest.param(TORCHRUN, id="torchrun", marks=pytest.mark.slow)]
)
def test_two_processes_that_a_launcher_starts_log_what_one_logs_with_a_batch_as_large(folder, by):
    assert iprm(folder, "fit", *ALIKE, *SETTINGS, "--data.batch_size", "16").code == 0
    done = run(folder, "fit", *ALIKE, *SETTINGS, *TWO, "--trainer.strategy", "ddp", by=by)
    assert done.returncode == 0, done.stderr
    check_alike(folder)


def test_sharded_processes_log_what_one_logs(folder):
    check_ranks(folder, *ALIKE, strategy=["fsdp2"])


@pytest.mark.slow
def test_processes_whose_buffers_are_left_where_they_are_log_what_one_logs(folder):
    check_ranks(folder, *ALIKE, strategy=["DDPStrategy", "--trainer.strategy.broadcast_buffers", "false"])


@pytest.mark.parametrize(
    "method", ["ogm-ge", *(pytest.param(method, marks=pytest.mark.slow) for method in ("mslr", "dgl", "ensemble"))]
)
def test_two_processes_train_by_a_rule_as_one_does(folder, method):
    check_ranks(folder, *ALIKE, "--model.method", method)


@pytest.mark.slow
def test_pairs_at_random_are_learned_by_two_processes_that_look_for_heads_without_gradient(tmp_path):
    three = arrays(121)
    save(tmp_path, {**three, "x_image": three["x_audio"] + three["x_text"][:, :4]})
    linear = ("--model.encoders", '{"audio": "linear", "text": "linear", "image": "linear"}')
    at_random = ("--data", "features", *linear, "--model.method_options", '{"pairs": "random"}')
    check_ranks(tmp_path, *at_random, strategy=["ddp_find_unused_parameters_true"])


@pytest.mark.slow
def test_sharded_batch_norm_is_validated_by_the_statistics_that_are_saved(folder):
    """Buffers of the first process, as under DDP, with equal metrics. The default MLP has batch normalisation."""
    for strategy in ("ddp", "fsdp2"):
        on_two_ranks(folder, "fit", "--data", "features", *SETTINGS, "--trainer.strategy", strategy)
    check_alike(folder)


@pytest.mark.slow
def test_a_modality_that_the_method_does_not_read_has_no_encoder_to_wait_for(folder):
    on_two_ranks(folder, "fit", *ALIKE[:2], *SETTINGS, "--trainer.strategy", "ddp", "--model.method", "unimodal-audio")


@pytest.mark.slow
def test_a_dataset_of_the_users_own_is_found_in_the_current_folder_by_every_process(folder):
    (folder / "my_data.py").write_text("from iprm.data.datasets.features import Features\n\n\nclass MyData(Features): ...\n")
    done = run(folder, "fit", "--data", "my_data.MyData", *SETTINGS, *TWO, "--trainer.strategy", "ddp", by=SCRIPT)
    assert done.returncode == 0, done.stderr
    assert len(metrics(folder)) == EPOCHS


def test_a_split_is_tested_by_two_processes_as_by_one_and_predicted_in_order(folder):
    assert iprm(folder, "fit", *ALIKE, *SETTINGS, "--data.batch_size", "16").code == 0
    (checkpoint,) = (folder / "runs/fit/version_0/checkpoints").iterdir()
    of = ("--config", "runs/fit/version_0/config.yaml", "--ckpt_path", str(checkpoint))
    alone = iprm(folder, "test", *of)
    two = on_two_ranks(folder, "test", *of, "--trainer.strategy", "ddp")
    expected = table(alone.out)
    assert "test_accuracy" in expected
    assert table(two) == pytest.approx(expected, rel=1e-6), "in float32"

    assert iprm(folder, "predict", *of, "--output", "alone.csv").code == 0
    on_two_ranks(folder, "predict", *of, "--trainer.strategy", "ddp", "--output", "two.csv")
    with (folder / "alone.csv").open() as one, (folder / "two.csv").open() as other:
        rows, targets = zip(*([row["row"], row["target"]] for row in csv.DictReader(one)), strict=True)
        assert list(zip(rows, targets, strict=True)) == [(row["row"], row["target"]) for row in csv.DictReader(other)]


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_and_they_resume_bit_identically(folder):
    """Each process adds its own noise to its batches."""
    places = [folder / "alone", folder / "stopped"]
    for place in places:
        place.mkdir()
        save(place, arrays(121))
    assert run(places[0], "fit", *NOISY, *SETTINGS, *TWO).returncode == 0
    told = ("--data.signal_step", "7", "--data.signal_number", str(int(signal.SIGTERM)))
    stopped = run(places[1], "fit", *NOISY, *SETTINGS, *TWO, *told)
    assert stopped.returncode == 143, stopped.stderr
    assert f"stopped by SIGTERM; to continue: iprm resume {RUN}" in stopped.stderr
    assert run(places[1], "resume", str(RUN), "--data.signal_step", "-1").returncode == 0
    assert difference(left(places[1]), left(places[0])) == []
