"""The command `iprm`. Only the commands that train load Lightning, and `report` not even torch."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence

from iprm.errors import InputError, closest

HELP = """\
usage: iprm COMMAND [OPTIONS]

Trains classifiers of several modalities (sound and image, text and image, ...) that do not starve each other.

commands:
  compare   train several methods with several seeds on a dataset; a table, a plot and CSV files
  fit       train one model and keep the checkpoint that is best on validation
  resume    go on with a run of fit that was killed or stopped
  test      evaluate a checkpoint on the test split
  predict   write a checkpoint's predictions as CSV, of a dataset's split or of new samples
  report    an HTML page about one or several runs of fit
  profile   say where an epoch's time goes, stage by stage
  check     read a dataset through and say what is wrong with it
  export    write a checkpoint's model for use where torch alone is installed
  info      versions, and which implementation of each operator runs here

start here:
  iprm compare --data digits                                   two minutes, nothing to download
  iprm fit --config digits                                     one model, on the same data
  iprm compare --data features --path my_features.npz          your own features

iprm COMMAND --help explains a command.
"""

NEEDS_CONFIGURATION = """\
{command} needs a configuration. Try one that comes with the package:

  iprm {command} --config digits{checkpoint}

shipped: {shipped}; a path to a YAML file of your own works as well. `iprm {command} --help` explains the settings,
`iprm fit --config digits --print_config` writes a configuration to start from."""

COMMANDS = ("compare", "fit", "resume", "test", "predict", "report", "profile", "check", "export", "info")
#: Where the function <command>_command of a command is that is not Lightning's.
MODULES = {
    "check": "check",
    "compare": "compare",
    "export": "export",
    "profile": "profile",
    "resume": "resume",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 1 for a run that met a number that is not finite and for a dataset
    with problems, 2 for input that cannot be used (the message says which and suggests another), 130 after an interrupt."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "" not in sys.path:  # the current folder, where a user's own dataset is; last, so that it shadows nothing
        sys.path.append("")
    try:
        return _dispatch(arguments)
    except (InputError, OSError) as error:
        print(f"iprm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning leaves with 1
            return _interrupted()
        return end.code if isinstance(end.code, int) else 0  # of --help and --print_config


def _interrupted() -> int:
    print("iprm: interrupted", file=sys.stderr)
    return 130


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        from iprm_kernels import __version__

        print(__version__)
        return 0
    if command not in COMMANDS:
        match = closest(command, COMMANDS)
        raise InputError(f"unknown command {command!r}" + (f": did you mean {match!r}?" if match else "; try iprm --help"))
    if command == "info":
        from .info import info_command

        return info_command(arguments[1:])
    if command == "report":
        from .report import report_command

        return report_command(arguments[1:])
    return _training_command(command, arguments[1:])


def _training_command(command: str, arguments: list[str]) -> int:
    if command in ("fit", "test", "predict", "profile") and not arguments:
        raise InputError(_needs_configuration(command))
    try:
        run = _function(command, arguments)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("iprm"):
            raise
        raise InputError(f'this command needs more packages: pip install "iprm-kernels[train]" ({error})') from error
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    import iprm_kernels as ik
    from iprm.environment import check_variables
    from iprm.training.finite import NonFiniteError

    check_variables()
    try:
        return run(arguments)
    except (MisconfigurationException, ik.BackendUnavailableError) as error:
        raise InputError(str(error)) from error
    except NonFiniteError as error:
        print(f"iprm: stopped at {error}", file=sys.stderr)
        return 1


def _function(command: str, arguments: Sequence[str]) -> Callable[[Sequence[str]], int]:
    """What runs a command; importing it loads what it needs."""
    if command == "predict":
        from .predict import is_for_samples, predict_command

        if is_for_samples(arguments):
            return predict_command
    if command in MODULES:
        return getattr(importlib.import_module(f".{MODULES[command]}", __package__), f"{command}_command")
    from .fit import lightning_command

    return functools.partial(lightning_command, command)


def _needs_configuration(command: str) -> str:
    from iprm.configs import shipped

    checkpoint = "" if command in ("fit", "profile") else " --ckpt_path CHECKPOINT"
    return NEEDS_CONFIGURATION.format(command=command, checkpoint=checkpoint, shipped=", ".join(shipped()))
