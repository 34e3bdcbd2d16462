"""Runs commands of `iprm`, each in a process that may be killed, forked from one that has already imported everything.

python forked.py LIST        LIST: a JSON file of [folder, arguments] to run in turn; prints a JSON list of exit codes
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

Command = tuple[Path, Sequence[str]]


def run_forked(folder: Path, commands: Sequence[Command], timeout: float = 300) -> list[int]:
    """Exit codes of `iprm ARGUMENTS` in each folder; negative if a signal ended the process, as in subprocess."""
    listing = folder / "commands.json"
    listing.write_text(json.dumps([[str(place), list(arguments)] for place, arguments in commands]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a process whose OpenMP has threads cannot be forked
    done = subprocess.run(
        [sys.executable, __file__, str(listing)],
        env=environment,
        timeout=timeout,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout)


def _main(listing: Path) -> None:
    import iprm.cli.fit
    import iprm.cli.resume
    import torch
    from iprm.cli.main import main

    assert iprm.cli.fit is not None
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    codes = []
    for place, arguments in json.loads(listing.read_text()):
        child = os.fork()
        if child == 0:
            os.chdir(place)
            with (Path(place) / "log.txt").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                os._exit(main(arguments))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(codes))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
