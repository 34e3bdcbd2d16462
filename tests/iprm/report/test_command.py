"""The command `iprm report`: its output, its suggestions for paths that are not runs, and the modules it does not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command import iprm
from iprm.compare.runs import read_runs
from iprm.errors import InputError
from run_folders import write_comparison, write_run


def test_the_output_goes_where_it_is_asked_for(tmp_path):
    run = write_run(tmp_path / "version_0")
    assert iprm(tmp_path, "report", str(run), "--output", "new/page.html").out == "report: new/page.html\n"
    assert (tmp_path / "new/page.html").read_text().startswith("<!doctype html>")


def refused(folder: Path, *arguments: str) -> str:
    code, out, err = iprm(folder, "report", *arguments)
    assert (code, out) == (2, "")
    assert not (folder / "report.html").exists()
    return err.removeprefix("iprm: ").rstrip("\n")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("runs/fit/versin_1", "runs/fit/version_1"),
        ("runs/fit/version_1/metrics.csv", "runs/fit/version_1"),
        ("runs/fit/version_1/checkpoints", "runs/fit/version_1"),
    ],
)
def test_the_run_that_was_meant_is_suggested(tmp_path, given, meant):
    for k in range(2):
        write_run(tmp_path / f"runs/fit/version_{k}")
    assert refused(tmp_path, given).endswith(f"; did you mean {meant}?")


def test_a_folder_above_runs_means_all_of_them_in_their_order(tmp_path):
    for k in (2, 10):
        write_run(tmp_path / f"runs/digits/fit/version_{k}", seed=k)
    write_comparison(tmp_path / "runs/compare", ("sum", "concat"))
    found = [str(run.folder.relative_to(tmp_path)) for run in read_runs([tmp_path / "runs"])]
    compared = [f"runs/compare/{method}/seed={seed}" for method in ("sum", "concat") for seed in (0, 1)]
    assert found == [*compared, "runs/digits/fit/version_2", "runs/digits/fit/version_10"]
    assert iprm(tmp_path, "report", "runs").out == "report: report.html\n"


def test_a_folder_without_runs_is_refused(tmp_path):
    (tmp_path / "runs/empty").mkdir(parents=True)
    assert (
        refused(tmp_path, "runs") == "runs: not a run of iprm fit: none of metrics.csv, config.yaml, diagnostics.json is in it"
    )


def test_where_there_is_no_run_none_is_suggested(tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty", "nothing") == "nothing: there is no such run"
    with pytest.raises(InputError, match="there is no such run"):
        read_runs([tmp_path / "empty/nothing"])


def test_no_run_at_all_is_refused(tmp_path):
    assert refused(tmp_path) == "the following arguments are required: runs; try iprm report --help"


LIGHT = """
import sys
from iprm.cli.main import main

assert main(sys.argv[1:]) == 0
heavy = {"torch", "lightning", "iprm_kernels"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_report_loads_neither_torch_nor_lightning(tmp_path):
    runs = [write_run(tmp_path / "version_0"), write_comparison(tmp_path / "compare")]
    subprocess.run([sys.executable, "-c", LIGHT, "report", *map(str, runs)], check=True, cwd=tmp_path)
