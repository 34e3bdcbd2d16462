"""The command `iprm resume`: continues a run in its own folder, after a kill or stop, or for more epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from iprm.training.checkpoint import state_to_resume

from .fit import FitCLI
from .fusion_cli import run
from .parser import Parser

DESCRIPTION = """\
Continues a run of iprm fit from its last saved state: after a crash, a kill, a scheduler's SIGTERM, or an interrupt. The
final weights, metrics and checkpoints equal those of an uninterrupted run. States are saved at the beginning of every
epoch, and within an epoch at the interval given to iprm fit (--state.every_n_batches N). Settings of iprm fit may follow.

RUN/config.yaml names classes, which are imported: read it before you resume a run that others have handed you.
"""

EXAMPLES = """\
examples:
  iprm resume runs/digits/fit/version_0
  iprm resume runs/digits/fit/version_0 --previous                     if the last state is damaged
  iprm resume runs/digits/fit/version_0 --trainer.max_epochs 40        train for more epochs
"""


def parser() -> Parser:
    """The arguments of `iprm resume`, without settings of `iprm fit`."""
    p = Parser(
        "iprm resume", usage="iprm resume RUN [--previous] [--SETTING VALUE ...]", description=DESCRIPTION, epilog=EXAMPLES
    )
    p.add_argument("run", type=Path, metavar="RUN", help="the folder of the run, printed by iprm fit")
    p.add_argument("--previous", action="store_true", help="resume from the state before the last")
    return p


def resume_command(arguments: Sequence[str]) -> int:
    """Runs `iprm resume` and returns the exit code."""
    flags = [argument for argument in arguments if argument in ("-h", "--help", "--previous")]
    run_and_settings = [argument for argument in arguments if argument not in flags]
    given = parser().parse_args([*flags, *run_and_settings[:1]])
    state = state_to_resume(given.run, given.previous)
    settings = ["--config", str(given.run / "config.yaml"), "--ckpt_path", str(state), *run_and_settings[1:]]
    return run(FitCLI, settings, folder=given.run)
