"""`python -m iprm_kernels verify` finds every kind of fault that is planted, and no faulty backend serves by default."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import planted
import pytest
import torch
from places import Place
from torch import Tensor
from verdicts import CPU, calls_of, empty_cache, kept, passed

import iprm_kernels as ik
from iprm_kernels import verdict
from iprm_kernels.verify import child, run
from iprm_kernels.verify.checks import check
from iprm_kernels.verify.command import main

OPERATORS = (
    "normalize", "geodesic_mixup", "batch_kl", "strength_weights", "average_strength", "linear_probe_rebalance",
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from empty_cache(tmp_path, monkeypatch)


def test_every_planted_fault_is_found_and_serves_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    planted.install(monkeypatch.setattr)
    seen: list[str] = []
    found = ik.verify_backends(
        "cpu", backend="triton", operators=OPERATORS, dtypes=[torch.float32], step=(64, 32, 6), limit=4.0,
        progress=lambda ended, total, what: seen.append(f"{ended}/{total} {what}"), child="planted",
    )  # fmt: skip
    reasons = {outcome.check.case.operator: outcome.reason for outcome in found.outcomes}
    assert tuple(reasons) == OPERATORS
    assert "out, largest: error" in reasons["normalize"]
    assert "SIGSEGV" in reasons["geodesic_mixup"]
    assert reasons["batch_kl"] == "does not end within 4 s"
    assert "strength: not finite, or not written" in reasons["strength_weights"]
    assert "weight: 3 runs with the same inputs differ" in reasons["average_strength"]
    assert reasons["linear_probe_rebalance"] == ""
    (slow,) = (outcome for outcome in found.outcomes if not outcome.reason)
    assert slow.times["triton"] > slow.times["reference"]
    assert "0/6 triton starts" in seen
    assert found.kept == str(next(cache.glob("verdict-*.json")))
    for result in verdict.read(CPU) or []:
        assert verdict.fastest([result], result.case) == []
    statuses = ik.backends()
    for operator in OPERATORS:
        assert statuses["triton"].operators[operator].default_for == ()
        assert statuses["reference"].operators[operator].default_for == ("cpu",)
        assert (reasons[operator] or "verified, time over the reference's: float32 small") in str(
            statuses["triton"].operators[operator].verified["cpu"]
        )
    planted_kernel = {"triton": planted.serves()["normalize"].run}
    assert torch.equal(ik.normalize(torch.ones(3, 4)), torch.full((3, 4), 0.5)), planted_kernel


def test_of_two_processes_at_once_the_second_uses_what_the_first_found(monkeypatch: pytest.MonkeyPatch) -> None:
    calls_of(monkeypatch)
    found = []

    def verify() -> None:
        found.append(
            ik.verify_backends(
                "cpu", backend="triton", operators=["strength_weights"], dtypes=[torch.float32], step=(4, 4, 2), child="planted"
            )
        )

    threads = [threading.Thread(target=verify) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(each.outcomes) for each in found) == [0, 1]


def test_a_run_does_not_check_again_what_the_verdict_has(monkeypatch: pytest.MonkeyPatch) -> None:
    calls_of(monkeypatch)
    kept(passed("normalize", "small", 0.5))
    found = ik.verify_backends(
        "cpu", backend="triton", operators=["normalize"], dtypes=[torch.float32], step=(4, 4, 2), child="no module"
    )
    assert found.outcomes == []


@pytest.mark.parametrize("operator", ["normalize", "batch_kl", "linear_probe_rebalance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_backends_pass(fused: Place, operator: str, dtype: torch.dtype) -> None:
    assert check(fused.backend, operator, dtype, (9, 100, 7), fused.device) == ""


def test_a_kernel_that_changes_its_input_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def normalize_in_place(x: Tensor, eps: float, out: Tensor, norm: Tensor) -> None:
        planted.whole["normalize"](x, eps, x, norm)
        out.copy_(x)

    monkeypatch.setitem(planted.FAULTS, "normalize", normalize_in_place)
    planted.install(monkeypatch.setattr)
    assert check("triton", "normalize", torch.float32, (4, 8), CPU) == "it changes its input x"


@pytest.mark.parametrize("argument", [["--device", "tpu"], ["--device", "cuda:99"], ["--backend", "jax"]])
def test_the_command_refuses_what_it_does_not_know(argument: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["verify", *argument])
    assert caught.value.code == 2
    assert re.search(rf"error: .*{argument[0][2:]}: .*{argument[1]}", capsys.readouterr().err)


def test_a_child_ends_with_its_parent() -> None:
    job = {"device": "cpu", "backend": "triton", "checks": [["batch_kl", "float32", [[4, 4]], False]]}
    process = subprocess.Popen(
        [sys.executable, "-c", run.CODE, "\n".join(sys.path), "planted"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    assert [process.stdout.readline() for _ in range(2)] == ["[]\n", "[0, null]\n"]  # it hangs
    process.stdin.close()
    assert process.wait(20) == 1
    process.stdout.close()


def test_what_a_backend_refuses_and_what_raises(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A refusal is reported as such and the process continues; any other exception ends it, after a report."""

    def checked(backend: str, operator: str, *_: object) -> str:
        raise {"normalize": ik.BackendUnavailableError("one pair"), "batch_kl": RuntimeError("CUDA error: bad")}[operator]

    monkeypatch.setattr(child, "_checked", checked)
    checks = [[name, "float32", [[2, 3]], False] for name in ("normalize", "batch_kl", "normalize")]
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"device": "cpu", "backend": "cuda", "checks": checks})))
    monkeypatch.setattr(child, "_end_with_parent", lambda: None)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    child.main()
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert lines == [[], [0, None], [0, "refused: one pair", {}], [1, None], [1, "RuntimeError: CUDA error: bad", {}, True]]
