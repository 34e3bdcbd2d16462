"""Runs the checks of every backend in a child process, and keeps what was found."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import torch

from .. import verdict
from ..backends import backends, forget
from ..loading import NAMES
from ..verdict import Result
from .operators import OPERATORS, Shape
from .plan import REFUSED, Check, checks, checks_of_run

#: The module whose `main` is the child process.
CHILD = "iprm_kernels.verify.child"
#: It has the import path of this process, not the current folder.
CODE = r"import sys; sys.path[:] = sys.argv[1].split('\n'); __import__('importlib').import_module(sys.argv[2]).main()"
#: Time limit of a check in seconds, compilation included, by device type. On a busy CPU a large check takes a minute.
LIMIT = {"cuda": 120.0, "cpu": 600.0}
#: Seconds that a process may take to start.
START = 120.0
#: Seconds that the quick form takes at most.
QUICK = 50.0
#: Processes of one backend that may fail before its remaining checks are given up.
MOST_FAILURES = 5
NO_TIME = "not checked for lack of time: python -m iprm_kernels verify"


class Outcome(NamedTuple):
    """What was found by one check of one backend."""

    backend: str
    check: Check
    reason: str  #: why it failed; empty if it passed
    times: dict[str, float]  #: microseconds by backend, "reference" and "torch.compile"; empty if it failed

    @property
    def refused(self) -> bool:
        """Whether the backend does not support this case, and says so."""
        return self.reason.startswith(REFUSED)


Progress = Callable[[int, int, str], None]  # checks that have ended, all checks, and what runs now


class Verification(NamedTuple):
    """What `verify_backends` found. kept: the file of the verdict, or why none was written."""

    outcomes: list[Outcome]
    kept: str


def verify_backends(
    device: torch.device | str,
    *,
    backend: str | None = None,
    quick: bool = False,
    operators: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    step: tuple[int, int, int] | None = None,
    limit: float | None = None,
    progress: Progress | None = None,
    child: str = CHILD,
) -> Verification:
    """Compares the backends of a device with the reference, times them, and keeps the verdict, which decides from then on
    which backend serves by default on this device.

    The kernels run in child processes: one that crashes or hangs does not harm this process.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        backend: only this one; None for all that serve the device.
        quick: one shape per case, and at most about a minute; what is not reached stays unverified.
        operators: names of operators; None for all.
        dtypes: floating types; None for all, in the quick form float32, and on a GPU bfloat16.
        step: (B, D, C), verify only calls of this size, in the quick form, and not what the verdict has already.
        limit: seconds that one check may take; None for `LIMIT`.
        progress: called before each check.
        child: for tests, the module whose `main` runs instead of that of `child`.

    Raises:
        ValueError: an argument is unknown, or there is no such device.
    """
    device = _device(device)
    if backend is not None and backend not in NAMES[1:]:
        raise ValueError(f"backend: expected one of {', '.join(NAMES[1:])}, got {backend!r}")
    for name in operators or ():
        if name not in OPERATORS:
            raise ValueError(f"operators: expected some of {', '.join(OPERATORS)}, got {name!r}")
    if dtypes is None:
        few = (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16)
        dtypes = few if quick else (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    names = tuple(OPERATORS if operators is None else operators)
    limit = LIMIT[device.type] if limit is None else limit
    plans = functools.partial(_plans, device, backend, names, dtypes, quick, step)
    if not any(plans().values()):
        return Verification([], "")
    outcomes: list[Outcome] = []
    with verdict.alone(QUICK):
        try:  # what was found before an interrupt is kept
            for outcome in _outcomes(plans(), device, limit, QUICK if quick or step else math.inf, progress, child):
                outcomes.append(outcome)
        finally:
            results = [
                Result(o.backend, o.check.case, o.reason, o.times[o.backend] / o.times["reference"] if o.times else None)
                for o in outcomes
                if o.reason != NO_TIME or step is not None  # a training run would try again each time
            ]
            kept = verdict.keep(device, results) if results else "nothing to keep"
            forget()
    return Verification(outcomes, kept)


def _plans(
    device: torch.device,
    backend: str | None,
    operators: Sequence[str],
    dtypes: Sequence[torch.dtype],
    quick: bool,
    step: Shape | None,
) -> dict[str, list[Check]]:
    """The checks of each backend that serves the device; for a training run, those that the verdict does not have yet."""
    known = {(result.backend, result.case) for result in verdict.read(device) or ()} if step else set()
    every = checks(dtypes, quick=quick, operators=operators) if step is None else checks_of_run(operators, dtypes, step)
    return {
        name: [c for c in every if status.operators[c.case.operator].available and (name, c.case) not in known]
        for name, status in backends().items()
        if status.available and device.type in status.devices and backend in (None, name)  # the reference serves "any"
    }


def _outcomes(
    plans: Mapping[str, list[Check]], device: torch.device, limit: float, seconds: float, progress: Progress | None, child: str
) -> Iterator[Outcome]:
    deadline, total, before = time.monotonic() + seconds, sum(map(len, plans.values())), 0
    for name, plan in plans.items():

        def now(ended: int, what: str, before: int = before, name: str = name) -> None:
            if progress is not None:
                progress(before + ended, total, f"{name} {what}")

        yield from _of_backend(_Job(name, device, limit, deadline, now, child), plan)
        before += len(plan)


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError:  # of no known type
        found = None
    if found is not None and found.type == "cpu":
        return torch.device("cpu")
    if found is None or found.type != "cuda" or (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected cpu, or a GPU that torch sees, got {str(device)!r}")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


class _Job(NamedTuple):
    """How the checks of a backend run."""

    backend: str
    device: torch.device
    limit: float  #: seconds of one check
    deadline: float  #: by time.monotonic, for all checks
    progress: Callable[[int, str], None]  #: takes the number of checks that have ended, and what runs now
    child: str


def _of_backend(job: _Job, plan: Sequence[Check]) -> Iterator[Outcome]:
    """The outcomes of all checks, in processes that are started again after one has failed."""
    ended = failures = 0
    while ended < len(plan):
        if failures == MOST_FAILURES or job.deadline - time.monotonic() < 1:
            reason = NO_TIME if failures < MOST_FAILURES else f"not checked: {failures} processes had failed"
            yield from (Outcome(job.backend, check, reason, {}) for check in plan[ended:])
            return
        for outcome in _process(job, plan[ended:], ended):
            ended += 1
            yield outcome
        failures += 1


def _process(job: _Job, plan: Sequence[Check], ended: int) -> Iterator[Outcome]:
    """The outcomes of the checks until one ends the process, at least one. ended: the number of checks before these."""
    # OpenMP threads that spin while they wait take the cores from each other where other processes run
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    environment.pop("IPRM_KERNELS_BACKEND", None)
    request = {
        "device": str(job.device),
        "backend": job.backend,
        "checks": [[*c.case[:2], [list(shape) for shape in c.shapes], c.compiled] for c in plan],
    }
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, "\n".join(sys.path), job.child],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass
            lines: queue.SimpleQueue[str] = queue.SimpleQueue()
            threading.Thread(target=_read_lines, args=(process.stdout, lines), daemon=True).start()
            job.progress(ended, "starts")
            done, ready = 0, False
            while done < len(plan):
                left = max(0.0, job.deadline - time.monotonic())
                try:
                    line = lines.get(timeout=min(job.limit if ready else max(job.limit, START), left))
                except queue.Empty:
                    late = time.monotonic() >= job.deadline
                    yield Outcome(job.backend, plan[done], NO_TIME if late else f"does not end within {job.limit:g} s", {})
                    return
                if not line:
                    _kill(process)
                    yield Outcome(job.backend, plan[done], _death(process.returncode, errors), {})
                    return
                ready = True
                number, *found = json.loads(line) or [done, "ready"]
                if found[0] is None:
                    job.progress(ended + number, " ".join(plan[number].case))
                elif len(found) > 1:
                    yield Outcome(job.backend, plan[number], found[0], found[1])
                    done += 1
                    if len(found) > 2:  # an exception ended it
                        return
        finally:
            _kill(process)


def _read_lines(source: IO[str], lines: Any) -> None:
    """Puts every line into the queue, and an empty one at the end."""
    for line in source:
        lines.put(line)
    lines.put("")


def _death(code: int, errors: IO[bytes]) -> str:
    """How a process has ended that should not have."""
    how = f"exit code {code}"
    if code < 0:
        try:
            how = signal.Signals(-code).name
        except ValueError:
            how = f"signal {-code}"
    errors.seek(0)
    last = errors.read()[-4000:].decode("utf-8", "replace").strip().split("\n")[-1][:200]
    text = "".join(letter if letter.isprintable() else "?" for letter in last)
    return f"the process ended by {how}" + (f": {text}" if text else "")


def _kill(process: subprocess.Popen[str]) -> None:
    """Kills the process and what it has started. The code of a process that is ending already stays as it was."""
    if process.returncode is not None:
        return
    with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # not reaped before, so its number is no other process's
        process.wait(10)  # a process that waits for a GPU may not end
