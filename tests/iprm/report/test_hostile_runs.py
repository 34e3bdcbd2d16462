"""Folders of runs of anyone: what is broken, huge or nested in them is named in the page, which is written within 10 s."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from command import iprm
from hostile_runs import RUNS
from html_page import report
from iprm.compare import reading
from iprm.compare.runs import read_runs
from run_folders import write_comparison, write_run

MIB = 2**20


#: Kinds of which nothing is said, and that could end the drawing.
DRAWN = ("letters that are none",)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_of_anyone_makes_a_page_that_names_what_is_broken(tmp_path: Path, kind: str) -> None:
    harm, word = RUNS[kind]
    run = write_run(tmp_path / "version_0")
    harm(run)
    begun = time.monotonic()
    tracemalloc.start()
    (read,) = read_runs([run])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * MIB
    missing = [line for line in read.missing if line.startswith(word)] if word else []
    if not missing and (word or kind in DRAWN):  # what is not read is not drawn
        page = report(tmp_path, run)
        assert len(page) < MIB
        assert word in page
    assert time.monotonic() - begun < 10


def test_cells_beyond_the_bound_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "version_0", epochs=50)
    monkeypatch.setattr(reading, "MOST_CELLS", 500)
    (read,) = read_runs([run])
    assert max(read.epochs) < 30
    assert "All metrics.csv have more than 500 cells: later epochs are left out." in read.missing


def test_folders_that_link_in_circles_are_read_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs/version_0")
    for k in range(200):
        (tmp_path / f"runs/again{k}").symlink_to(tmp_path / "runs", target_is_directory=True)
        (run / f"above{k}").symlink_to(tmp_path, target_is_directory=True)
    begun = time.monotonic()
    assert len(read_runs([tmp_path / "runs"])) == 1
    assert time.monotonic() - begun < 10


def test_a_folder_whose_name_is_not_utf_8_makes_a_whole_page(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<title>of before – iprm report</title>")
    for folder in (os.fsdecode(b"version_\xff"), "version_1"):
        write_run(tmp_path / "runs" / folder)
    page = report(tmp_path, tmp_path / "runs")
    assert page.rstrip().endswith("</html>")
    assert "version_\\udcff" in page


def test_more_runs_than_a_page_can_show_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iprm.compare.runs.MOST_RUNS", 3)
    with pytest.raises(ValueError, match="expected at most 3 runs, got 4: name those that the report is about"):
        read_runs([write_comparison(tmp_path / "c")])


@pytest.mark.slow
def test_a_hundred_thousand_epochs_make_a_small_page(tmp_path: Path) -> None:
    """142 kB, in 5 s on one Zen 4 core."""
    run = write_run(tmp_path / "version_0", epochs=100_000)
    begun = time.process_time()
    assert len(report(tmp_path, run)) < 300_000
    assert time.process_time() - begun < 20


@pytest.mark.slow
def test_forty_modalities_make_a_page(tmp_path: Path) -> None:
    """3 s on one Zen 4 core, and 18 s when every line was drawn by itself."""
    run = write_run(tmp_path / "version_0", epochs=30, modalities=[f"m{k}" for k in range(40)])
    begun = time.process_time()
    assert len(report(tmp_path, run)) < 2 * MIB
    assert time.process_time() - begun < 12


@pytest.mark.parametrize("target", ["../thesis.html", "../empty", "../absent", "../earlier.html"])
def test_a_page_is_not_written_through_a_link_to_another_folder(tmp_path: Path, target: str) -> None:
    """A page in a file that a shell reads would be commands."""
    run = write_run(tmp_path / "got")
    (tmp_path / "thesis.html").write_text("years")
    (tmp_path / "empty").touch()
    (tmp_path / "earlier.html").write_text("<title>of before – iprm report</title>")
    (run / "report.html").symlink_to(target)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    found = iprm(run, "report", ".")
    assert (found.code, found.out) == (2, "")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_no_settings_of_the_current_folder_steer_a_report(tmp_path: Path) -> None:
    """matplotlib reads a file matplotlibrc where it is imported."""
    run = write_run(tmp_path / "got")
    (run / "matplotlibrc").write_bytes(b"text.usetex: True\n# \xff")
    entry = tmp_path / "iprm"  # as pip installs it: the current folder is not on sys.path
    entry.write_text(f"import sys; sys.path += {sys.path!r}; from iprm.cli.main import main; sys.exit(main())")
    command = [sys.executable, entry, "report", "."]
    ended = subprocess.run(command, cwd=run, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_what_all_runs_together_may_take_is_bounded(tmp_path: Path) -> None:
    """Links to one file: 27 MB for each run, of one file on the disk."""
    epochs = "".join(f"{k},0,0.5\n" for k in range(300_000))
    (tmp_path / "metrics.csv").write_text(f"epoch,step,val_accuracy\n{epochs}")
    (tmp_path / "config.yaml").write_text("".join(f"k{k}: {'v' * 100}\n" for k in range(5000)))
    for k in range(20):
        run = write_run(tmp_path / f"runs/version_{k}")
        for name in ("metrics.csv", "config.yaml"):
            (run / name).unlink()
            (run / name).symlink_to(tmp_path / name)
    begun = time.process_time()
    runs = read_runs([tmp_path / "runs"])
    assert time.process_time() - begun < 20
    assert [len(run.epochs) for run in runs[:6]] == [300_000] * 6
    assert sum(len(run.epochs) for run in runs) < 2**23 / 4
    words = [word for run in runs for word in run.missing]
    assert words.count("All metrics.csv have more than 8388608 cells: later epochs are left out.") > 12
    assert words.count("config.yaml cannot be read: ValueError: the files of all runs take more than 4194304 bytes") > 10


def test_of_many_runs_some_have_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 runs took minutes: a figure takes up to 0.1 s."""
    monkeypatch.setattr("iprm.report.render.MOST_GROUPS", 2)
    for k in range(4):
        write_run(tmp_path / f"runs/version_{k}", settings={"alpha": k}, modalities=("a", "b"), epochs=1)
    page = report(tmp_path, tmp_path / "runs")
    assert "and only the first 2 of 4 configurations, is shown below; iprm report RUN shows one of the 2 other runs" in page
    assert "Shown: the first 2 configurations of 4." in page
    assert page.count("<title>Confusion matrix</title>") == 2
