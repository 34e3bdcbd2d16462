"""The command `iprm resume`: a run that was killed, stopped or is to be longer goes on in its own folder."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from iprm.training.checkpoint import state_to_resume

from .fit import lightning_command
from .parser import Parser

DESCRIPTION = """\
Goes on with a run of iprm fit from its last saved state: after a crash, a kill, SIGTERM of a scheduler, or an interrupt. It
ends with the weights, metrics and checkpoints it would have had. States are saved at the beginning of every epoch, and within
one if iprm fit was told how often (--state.every_n_steps N).
"""

EXAMPLES = """\
examples:
  iprm resume runs/digits/fit/version_0
  iprm resume runs/digits/fit/version_0 --previous                     the last state is broken
  iprm resume runs/digits/fit/version_0 --trainer.max_epochs 40        and further than it was to go
"""


def resume_command(arguments: Sequence[str]) -> int:
    """Runs `iprm resume` and returns the exit code."""
    p = Parser("iprm resume", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, metavar="RUN", help="the folder of the run, as iprm fit has printed it")
    p.add_argument("--previous", action="store_true", help="go on from the state before the last")
    given, settings = p.parse_known_args(arguments)
    state = state_to_resume(given.run, given.previous)
    config = str(given.run / "config.yaml")
    return lightning_command("fit", ["--config", config, "--ckpt_path", str(state), *settings], given.run)
