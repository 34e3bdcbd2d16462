"""The parser of every command: jsonargparse, with one-line errors that suggest the name that was probably meant."""

from __future__ import annotations

import inspect
import pkgutil
import re
from argparse import ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse

from iprm.configs import shipped
from iprm.errors import InputError, closest

from .refusals import brief, error_of_user

#: jsonargparse's messages for an unknown option: of the parser, of a group, or of a class that another option names.
UNKNOWN = re.compile(
    r"(?:unrecognized arguments: --|Group '(?P<group>[\w.]+)' does not accept option '"
    r"|key \"(?P<key>[\w.]+)\":.*class_path '(?P<path>[\w.]+)':\s*Option '|Option ')(?P<name>[\w.-]+)",
    re.DOTALL,
)
PATH = "file or folder of a dataset that is not part of the package"
#: The forms in which jsonargparse quotes options and types.
QUOTED = re.compile(r"Parser key \"([\w.]+)\"|<class '(?:\w+\.)*(\w+)'>")


class OneLineErrors:
    """Mixin for a jsonargparse parser: its errors are raised as InputError, each on one line.

    The suggestions depend on two of jsonargparse's messages (`UNKNOWN`); any other message is passed on unchanged.
    """

    def error(self: Any, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # this parser parses a nested class; the outer parser will report the error
            super().error(message, ex)  # type: ignore[misc]
        if ex is not None and (cause := error_of_user(ex)) is not None:  # in a module that a setting names
            raise cause
        message = brief(message)
        if match := UNKNOWN.search(message):
            raise InputError(self._unknown(**match.groupdict()))
        raise InputError(f"{one_line(message)}; try {self.prog} --help")

    def _unknown(self: Any, name: str, group: str | None, key: str | None, path: str | None) -> str:
        known = ["help", *self.get_defaults(skip_validation=True).keys()]
        if path is not None:
            known = [f"{key}.{parameter}" for parameter in inspect.signature(pkgutil.resolve_name(path)).parameters]
        name = ".".join(filter(None, (group or key, name)))
        meant = closest(name, known)
        if meant == name:  # it has a place, and no name
            example = next(line.strip() for line in self.epilog.splitlines() if line.strip().startswith(self.prog))
            return f"unknown option --{name}: {name.upper()} is given without it, as in: {example}"
        return f"unknown option --{name}" + (f": did you mean --{meant}?" if meant else f"; try {self.prog} --help")


def one_line(message: str) -> str:
    """A message of jsonargparse without line breaks, with options and types named as in Python."""
    return " ".join(QUOTED.sub(r"\1\2", message).split())


class Parser(OneLineErrors, jsonargparse.ArgumentParser):
    """The parser of a command without settings of Lightning. Help texts keep their line breaks."""

    def __init__(self, prog: str, **options: Any) -> None:
        options.setdefault("formatter_class", RawDescriptionHelpFormatter)
        super().__init__(prog, allow_abbrev=False, **options)


def at_least_one(text: str | int) -> int:
    """Option type: a whole number from 1 up."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"expected a whole number from 1 up, got {text}")
    return number


def add_checkpoint_options(parser: Parser) -> None:
    """--ckpt_path, and --encoder: the user's own classes that loading the checkpoint may import."""
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="the checkpoint, a path printed by iprm fit")
    parser.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="CLASS",
        help="import path of your own encoder class that the checkpoint names, such as my_models.TextTower; other classes "
        "named by a checkpoint are not imported; may be repeated",
    )


def divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the arguments into a command's own and settings of `iprm fit`, --GROUP.NAME VALUE."""
    own: list[str] = []
    settings: list[str] = []
    chosen = own
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0]
            chosen = settings if "." in name or name in ("optimizer", "lr_scheduler") else own
        chosen.append(argument)
    return own, settings


def dataset_arguments(given: jsonargparse.Namespace) -> list[str]:
    """The arguments of `iprm fit` for the dataset or configuration `given.data`, with its `given.path` if there is one."""
    source = "--config" if given.data in shipped() or Path(given.data).is_file() else "--data"
    return [source, given.data, *([] if given.path is None else [f"--data.path={given.path}"])]
