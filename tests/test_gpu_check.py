"""benchmarks/gpu_check.sh with commands that only record their arguments: what it runs, what it leaves out, and what is on disk
when it is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import context
import pytest

ROOT = Path(__file__).parents[1]
#: Appends its arguments to $ASKED and writes the files that pytest would. If they match $SLOW, it sleeps $SLEEPS s; if they
#: match $FAILS, it fails.
COMMAND = """#!/usr/bin/env bash
[[ $1 == -c && $2 == *sysconfig* ]] && echo /nowhere && exit
echo "$(basename "$0") $*" >> "$ASKED"
echo "output of $*"
for argument in "$@"; do
  [[ $argument == --*=*.json || $argument == --*=*.xml ]] && echo '{}' > "${argument#*=}"
done
[[ -n $SLOW && $* =~ $SLOW ]] && sleep "$SLEEPS"
[[ -z $FAILS || ! $* =~ $FAILS ]]
"""
TESTS = ["cache", "carried", "tests", "memcheck", "racecheck", "trainer"]
BENCHMARKS = ["cache", "carried", "bandwidth", "graph", "launches", "memory", "epoch", "operators", "head", "batches"]


def start(folder: Path, *halves: str, fails: str = "", slow: str = "", sleeps: float = 30) -> subprocess.Popen[str]:
    commands = folder / "commands"
    commands.mkdir()
    for name in ("python", "nvidia-smi", "compute-sanitizer"):
        (commands / name).write_text(COMMAND)
        (commands / name).chmod(0o755)
    told = {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHON": str(commands / "python"), "ASKED": str(folder / "asked")}
    (folder / "tmp").mkdir()
    (folder / "cache").mkdir()
    told["TRITON_CACHE_DIR"] = str(folder / "cache")
    told |= {"FAILS": fails, "SLOW": slow, "SLEEPS": str(sleeps), "TMPDIR": str(folder / "tmp")}
    command = ["bash", str(ROOT / "benchmarks/gpu_check.sh"), str(folder / "results"), *halves]
    return subprocess.Popen(
        command, env={**os.environ, **told}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run(folder: Path, *halves: str, fails: str = "") -> tuple[int, str, list[str]]:
    """Exit status, output, and the commands that it ran."""
    process = start(folder, *halves, fails=fails)
    said = process.communicate(timeout=60)[0]
    return process.returncode, said, (folder / "asked").read_text().splitlines()


def packed(folder: Path, half: str) -> dict[str, str]:
    """The files of an archive, by name."""
    with tarfile.open(folder / f"results/{half}.tar.gz") as archive:
        return {
            member.name.removeprefix("./"): archive.extractfile(member).read().decode()
            for member in archive.getmembers()
            if member.isfile()
        }


def parts_of(files: dict[str, str]) -> list[str]:
    """The parts that have ended, in this order."""
    return re.findall(r"^== (\w+): status \d+, \d+ of at most \d+ s$", files.get("times.txt", ""), re.MULTILINE)


def test_both_halves_run_every_part_and_pack_it(tmp_path: Path) -> None:
    status, said, asked = run(tmp_path)
    assert status == 0, said
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["benchmarks.tar.gz", "tests.tar.gz"]
    for half, parts in (("tests", TESTS), ("benchmarks", BENCHMARKS)):
        files = packed(tmp_path, half)
        assert sorted(parts_of(files)) == sorted(parts)
        assert {f"{part}.log" for part in parts} <= set(files)
        assert files["times.txt"].endswith("all that ran passed\n")
        assert "machine.log" in files
    assert {f"{part}.json" for part in BENCHMARKS[2:]} <= set(files)
    assert not any("setup.py" in command for command in asked), "the carried extension is used"
    assert not list((tmp_path / "tmp").iterdir())
    of_trainer = "tests/iprm/profile/test_profile.py tests/iprm/training/test_cuda_graphs.py tests/iprm/training/test_finite.py"
    tests = [command for command in asked if "-m gpu" in command]
    assert tests[0].endswith(" tests/iprm_kernels")
    assert "-n 14" in tests[0]
    assert tests[1].endswith(of_trainer)


def test_without_lightning_the_tests_of_the_trainer_are_named(tmp_path: Path) -> None:
    status, _, asked = run(tmp_path, "tests", fails="import lightning")
    assert status == 0
    assert sum("-m gpu" in command for command in asked) == 1
    assert "left out, for " in packed(tmp_path, "tests")["times.txt"]


@pytest.mark.parametrize("fails", ["iprm_kernels as ik", "-m pytest", "memcheck|racecheck", "."])
def test_every_part_runs_after_others_have_failed(tmp_path: Path, fails: str) -> None:
    """A carried extension that cannot be imported is built; if that fails too, Triton runs alone."""
    status, _, asked = run(tmp_path, fails=fails)
    assert status == 1
    for half, parts in (("tests", TESTS), ("benchmarks", BENCHMARKS)):
        files = packed(tmp_path, half)
        lacking = {"trainer"} if fails == "." else set()
        assert set(parts) - lacking <= set(parts_of(files))
        assert ("failed: " in files["times.txt"]) == (half == "tests" or "check" not in fails)
    if fails == "iprm_kernels as ik":
        assert any("setup.py -q build_ext --inplace" in command for command in asked)
        assert "Triton runs alone" in files["times.txt"]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
@pytest.mark.parametrize(("half", "slow"), [("tests", "-n 14"), ("tests", "racecheck"), ("benchmarks", "launches")])
def test_a_kill_loses_only_what_was_running(tmp_path: Path, half: str, slow: str, sent: signal.Signals) -> None:
    """The whole group is killed, as a machine ends it; after SIGTERM the output of the part that ran is packed too."""
    process = start(tmp_path, half, slow=slow)
    waited = time.monotonic() + 30
    asked = tmp_path / "asked"
    while time.monotonic() < waited and not (asked.is_file() and re.search(slow, asked.read_text())):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(sent) if sent == signal.SIGTERM else os.killpg(process.pid, sent)
    process.wait(timeout=10)
    process.stdout.close()
    files = packed(tmp_path, half)
    before = ["cache", "carried", *{"-n 14": [], "racecheck": ["tests"], "launches": ["bandwidth", "graph"]}[slow]]
    assert parts_of(files)[: len(before)] == before
    assert {f"{part}.log" for part in before} <= set(files)
    assert all(json.loads(files[f"{part}.json"]) == {} for part in before[2:] if half == "benchmarks")
    if sent == signal.SIGTERM:
        running = {"-n 14": "tests"}.get(slow, slow)
        assert "output of " in files[f"{running}.log"]
        assert "stopped" in files["times.txt"]


def test_a_half_ends_in_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that hang are ended at their limits, and what has no time left is named."""
    monkeypatch.setenv("SECONDS_PER_HALF", "12")
    process = start(tmp_path, "benchmarks", slow="bandwidth|graph")
    begin = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - begin < 20
    times = packed(tmp_path, "benchmarks")["times.txt"]
    assert "bandwidth: status 124" in times
    assert "no time left" in times


def test_the_commit_is_passed_in_where_there_is_no_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, wanted in (("0123abc", ("0123abc", False)), ("0123abc-dirty", ("0123abc", True))):
        monkeypatch.setenv("IPRM_COMMIT", given)
        found = context.context()
        assert (found["commit"], found["dirty"]) == wanted
