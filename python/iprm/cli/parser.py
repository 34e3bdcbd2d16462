"""argparse for the commands that are not Lightning's, with suggestions."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from iprm.errors import InputError, closest


class Parser(argparse.ArgumentParser):
    """A parser whose errors suggest the option that was probably meant, and are raised for `main` to print."""

    def error(self, message: str) -> NoReturn:
        match = re.match(r"unrecognized arguments: (\S+)", message)
        if match:
            options = [option for action in self._actions for option in action.option_strings]
            suggestion = closest(match[1].split("=")[0], options)
            message = f"unknown option {match[1]}" + (f": did you mean {suggestion}?" if suggestion else "")
        raise InputError(f"{message}; try {self.prog} --help")


def at_least_one(text: str) -> int:
    """A whole number from 1 up."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text}")
    return number


at_least_one.__name__ = "whole number"  # argparse names the type in its message


def key_value(text: str) -> tuple[str, str]:
    """KEY=VALUE."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return key, value


def add_encoder_option(parser: argparse.ArgumentParser) -> None:
    """--encoder: what of the user's own code a checkpoint may have imported."""
    parser.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="CLASS",
        help="import path of an encoder class of yours that the checkpoint names, such as my_models.TextTower; without it no "
        "module is imported because a checkpoint names it; may be repeated",
    )


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    """--path and --set: the options of a dataset."""
    parser.add_argument("--path", help="the file or folder of a dataset that does not come with the package")
    parser.add_argument(
        "--set",
        type=key_value,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the dataset, such as batch_size=32; may be repeated",
    )
