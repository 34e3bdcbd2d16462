"""The command `iprm`: a table of commands, each in a module of its own that is imported when the command is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from iprm.errors import InputError, closest


class Command(NamedTuple):
    """`iprm NAME` calls ``NAME_command(arguments) -> exit code`` of the module NAME of this package.

    Attributes:
        help: one line for `iprm --help`.
        trains: the module imports Lightning and torch, and may run the operators.
        settings: the command accepts settings of model, data and trainer, and cannot run without any.
    """

    help: str
    trains: bool = True
    settings: bool = False


COMMANDS = {
    "compare": Command("train several methods with several seeds on a dataset; writes a table, a plot and CSV files"),
    "fit": Command("train one model and keep the checkpoint with the best validation accuracy", settings=True),
    "resume": Command("continue a run of fit that was killed or stopped"),
    "test": Command("evaluate a checkpoint on the test split", settings=True),
    "predict": Command("write predictions of a checkpoint as CSV, for a split of a dataset or for new samples", settings=True),
    "report": Command("write an HTML page about runs of fit, or about a comparison", trains=False),
    "profile": Command("measure where the time of an epoch goes, stage by stage", settings=True),
    "check": Command("read a dataset and report problems"),
    "export": Command("write the model of a checkpoint for use with torch alone"),
    "info": Command("print versions and the implementation of each operator on this machine", trains=False),
}

HELP = f"""\
usage: iprm COMMAND [OPTIONS]

Trains multimodal classifiers (audio and image, text and image, ...) in which no modality is starved by another.

commands:
{chr(10).join(f"  {name:<9} {command.help}" for name, command in COMMANDS.items())}

start here:
  iprm compare --data digits                                   two minutes, no download
  iprm fit --config digits                                     one model, on the same data
  iprm compare --data features --path my_features.npz          your own features

iprm COMMAND --help explains a command.
"""

NEEDS_CONFIGURATION = """\
{command} needs a configuration. The package contains some:

  iprm {command} --config digits{checkpoint}

shipped: {shipped}; the path of a YAML file is accepted as well. `iprm {command} --help` explains the settings,
`iprm fit --config digits --print_config` prints a configuration to start from."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0; 1 if training stopped at a non-finite number or a dataset has
    problems; 2 if the input cannot be used (one line on stderr gives the reason); 130 after an interrupt."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "" not in sys.path:  # the current folder, for a user's own datasets; last, so that it shadows no other module
        sys.path.append("")
    try:
        return _dispatch(arguments)
    except (InputError, OSError) as error:
        print(f"iprm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning exits with 1
            return _interrupted()
        return end.code if isinstance(end.code, int) else 0  # --help and --print_config exit


def _interrupted() -> int:
    print("iprm: interrupted", file=sys.stderr)
    return 130


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if name == "--version":
        from iprm_kernels import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        match = closest(name, COMMANDS)
        raise InputError(f"unknown command {name!r}" + (f": did you mean {match!r}?" if match else "; try iprm --help"))
    if COMMANDS[name].settings and len(arguments) == 1:
        raise InputError(_needs_configuration(name))
    try:
        command = getattr(importlib.import_module(f".{name}", __package__), f"{name}_command")
        if not COMMANDS[name].trains:
            return command(arguments[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("iprm"):
            raise
        raise InputError(f'this command needs more packages: pip install "iprm-kernels[train]" ({error})') from error
    return _train(command, arguments[1:])


def _train(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Runs a command whose module has imported Lightning."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    import iprm_kernels as ik
    from iprm.environment import check_variables
    from iprm.training.finite import NonFiniteError

    check_variables()
    try:
        return command(arguments)
    except (MisconfigurationException, ik.BackendUnavailableError) as error:
        raise InputError(str(error)) from error
    except NonFiniteError as error:
        print(f"iprm: stopped at {error}", file=sys.stderr)
        return 1


def _needs_configuration(command: str) -> str:
    from iprm.configs import shipped

    checkpoint = " --ckpt_path CHECKPOINT" if command in ("test", "predict") else ""
    return NEEDS_CONFIGURATION.format(command=command, checkpoint=checkpoint, shipped=", ".join(shipped()))
