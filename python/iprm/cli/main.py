"""The command `iprm`: a table of commands, each in a module of its own that is imported when the command is called."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from iprm import streams
from iprm.errors import InputError, unknown

from .caches import provide_caches

#: name -> its line in `iprm --help`. `iprm NAME` calls ``NAME_command(arguments) -> exit code`` of the module NAME here.
COMMANDS = {
    "compare": "train several methods with several seeds on a dataset; writes a table, a plot and CSV files",
    "fit": "train one model and keep the checkpoint with the best validation accuracy",
    "resume": "continue a run of fit that was killed or stopped",
    "test": "evaluate a checkpoint on the test split",
    "predict": "write predictions of a checkpoint as CSV, for a split of a dataset or for new samples",
    "report": "write an HTML page about runs of fit, or about a comparison",
    "profile": "measure where the time of an epoch goes, stage by stage",
    "check": "read a dataset and report problems",
    "export": "write the model of a checkpoint for use with torch alone",
    "info": "print versions and the implementation of each operator on this machine",
}
#: Commands that import neither Lightning nor torch when they start.
LIGHT = ("report", "info")

#: Characters of a line of an error, which may quote values of a file.
LONGEST = 4000

HELP = f"""\
usage: iprm COMMAND [OPTIONS]

Trains multimodal classifiers (audio and image, text and image, ...) in which no modality is starved by another.

commands:
{chr(10).join(f"  {name:<9} {line}" for name, line in COMMANDS.items())}

start here:
  iprm compare --data digits                                   two minutes, no download
  iprm fit --config digits                                     one model, on the same data
  iprm compare --data features --path my_features.npz          your own features

iprm COMMAND --help explains a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0; 1 if training stopped at a non-finite number or a dataset has
    problems; 2 if the input cannot be used (one line on stderr gives the reason); 130 after an interrupt; 141 if the reader of
    the output has ended, as after `iprm info | head -1`."""
    streams.write_any_text()
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        with _own_modules(*given[:1]):
            code = _exit_code(given)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:  # of writing; Python would write again at exit what could not be written
        streams.drop(sys.stdout)
        if isinstance(error, BrokenPipeError):
            streams.drop(sys.stderr)
            return streams.UNREAD
        _say(error)
        return 2
    return code


@contextlib.contextmanager
def _own_modules(command: str = "") -> Iterator[None]:
    """Within the context, a user's own datasets and encoders are imported from the folder where the command was started, after
    all other folders. Its path is absolute: the parser changes into the folder of a configuration, which may be anybody's. The
    commands `LIGHT` use none: `iprm report .` is called in folders of anyone."""
    before = sys.path[:]
    with contextlib.suppress(FileNotFoundError):  # the folder has been removed
        here = [] if command in LIGHT else [os.getcwd()]
        sys.path[:] = dict.fromkeys([*map(os.path.abspath, before), *here])
    try:
        yield
    finally:
        sys.path[:] = before


def _exit_code(arguments: list[str]) -> int:
    try:
        return _dispatch(arguments)
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError) and not streams.has_readers():
            raise
        _say(error)
        return 2
    except MemoryError as error:
        print(": ".join(["iprm: not enough memory", *filter(None, [str(error)])]), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning exits with 1
            return _interrupted()
        if isinstance(end.__context__, BrokenPipeError):  # Rich exits with 1
            return streams.UNREAD
        return end.code if isinstance(end.code, int) else 0  # --help and --print_config exit


def _say(error: Exception) -> None:
    first, *others = map(str, error.args) if isinstance(error, InputError) and error.args else [str(error)]
    for line in (f"iprm: {first}", *others):
        streams.say(line if len(line) <= LONGEST else f"{line[:LONGEST]}...", error=True)


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
        raise InputError(unknown("command", name, COMMANDS))
    if name != "info" and not {"-h", "--help"} & set(arguments):
        provide_caches()
        _import_matplotlib()
    try:
        command = getattr(importlib.import_module(f".{name}", __package__), f"{name}_command")
        if name in LIGHT:
            return command(arguments[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("iprm"):
            raise
        raise InputError(f'this command needs more packages: pip install "iprm-kernels[train]" ({error})') from error
    return _train(command, arguments[1:])


def _import_matplotlib() -> None:
    """Imports matplotlib, which torchmetrics and reports use, without the file matplotlibrc of the current folder, which may be
    anyone's: the file may start TeX."""
    if os.path.lexists("matplotlibrc"):
        here = os.getcwd()
        os.chdir(os.path.dirname(__file__))
        try:
            importlib.import_module("matplotlib")
        except ModuleNotFoundError:
            return
        finally:
            os.chdir(here)


def _train(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Runs a command whose module has imported Lightning."""
    import rich

    import iprm_kernels as ik
    from iprm.environment import check_variables
    from iprm.training.finite import NonFiniteError

    from .refusals import error_of_user, refusal

    check_variables()
    rich.reconfigure(markup=False, emoji=False)  # Lightning prints names of metrics, which contain those of modalities
    warnings = logging.StreamHandler()
    warnings.setFormatter(streams.PrintableFormatter())
    logging.getLogger("iprm").addHandler(warnings)
    try:
        return command(arguments)
    except ik.BackendUnavailableError as error:
        raise InputError(str(error)) from error
    except NonFiniteError as error:
        print(streams.printable(f"iprm: stopped at {error}"), file=sys.stderr)
        return 1
    except InputError:  # whose lines would become one
        raise
    except Exception as error:
        if (reason := refusal(error)) is not None:
            raise InputError(reason) from error
        if (own := error_of_user(error)) is None or own is error:
            raise
        raise own from None  # jsonargparse has wrapped it
    finally:
        logging.getLogger("iprm").removeHandler(warnings)
