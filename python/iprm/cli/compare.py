"""The command `iprm compare`: arguments to settings, runs, a report."""

from __future__ import annotations

import datetime
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from iprm.compare.run import Result, Settings
from iprm.compare.sweep import check, compare, default_jobs, ended_by_sigterm, in_order
from iprm.compare.table import rich_table, write_report
from iprm.configs import load_config, shipped
from iprm.data import DATASETS, options_of
from iprm.errors import InputError
from iprm.methods import METHODS
from iprm.training.classifier import FusionClassifier

from .options import dataset_options, typed
from .parser import Parser, add_dataset_options, at_least_one, dataset_settings, key_values

DESCRIPTION = """\
Trains several methods with several seeds on one dataset. A seed decides splits, initial weights and the order of batches, and
is shared by all methods. The model best on validation is tested once. Prints a table of mean ± standard deviation over seeds
and writes a folder with summary.md, runs.csv, history.csv, plot.png and settings.json; if it is ended early, of the runs
that are finished.
"""

EXAMPLES = """\
examples:
  iprm compare --data digits
  iprm compare --data digits --methods concat,iprm --seeds 5 --epochs 30
  iprm compare --data av-digits --path recordings/ --output runs/spoken
  iprm compare --data features --path features.npz --model learning_rate=0.05
"""

METHOD_NAMES = ", ".join([*(name for name in METHODS if name != "unimodal"), "unimodal-<modality>"])


def parser() -> Parser:
    """The arguments of `iprm compare`."""
    p = Parser("iprm compare", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, metavar="NAME", help=f"dataset: {', '.join(DATASETS)}")
    add_dataset_options(p)
    p.add_argument(
        "--methods", metavar="A,B,...", help=f"{METHOD_NAMES} (default: each modality alone, the baselines, and iprm)"
    )
    p.add_argument("--seeds", type=at_least_one, default=3, metavar="N", help="how many seeds: 0, 1, ... N-1 (default: 3)")
    p.add_argument("--epochs", type=at_least_one, metavar="N", help="default: as in the dataset's shipped configuration")
    p.add_argument("--output", type=Path, metavar="FOLDER", help="default: runs/compare-<dataset>-<time>")
    p.add_argument("--jobs", type=at_least_one, metavar="N", help="processes at a time (default: one a core; 1 with a GPU)")
    p.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"an option of the model; may be repeated: {', '.join(_model_options())}",
    )
    p.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu"), help="default: auto, a GPU if there is one")
    return p


def settings_from(data: str, epochs: int | None, given: Mapping[str, str], model: Mapping[str, str]) -> Settings:
    """What the shipped configuration of the dataset says, changed by what the command line says.

    Raises:
        InputError: no such dataset, or option of it or of the model, or a value of a wrong type.
    """
    if "seed" in given:
        raise InputError("seed: a comparison gives every run its own; choose their number by --seeds")
    data_options = dataset_options(data, given)
    data_options.pop("seed", None)
    config = load_config(data) if data in shipped() else {}
    model_options = {name: value for name, value in config.get("model", {}).items() if name != "method"}
    model_options |= typed("the model", FusionClassifier, _model_options(), model)
    return Settings(data, data_options, model_options, epochs or config.get("trainer", {}).get("max_epochs", 20))


def _model_options() -> list[str]:
    return [name for name in options_of(FusionClassifier) if name not in ("shapes", "num_classes", "method")]


def compare_command(arguments: Sequence[str]) -> int:
    """Runs `iprm compare` and returns the exit code."""
    given = parser().parse_args(arguments)
    settings = settings_from(given.data, given.epochs, dataset_settings(given), key_values("--model", given.model))
    settings = replace(settings, accelerator=given.accelerator)
    asked = [name.strip() for name in given.methods.split(",") if name.strip()] if given.methods is not None else None
    methods, modalities, splits = check(settings, asked, range(given.seeds))
    jobs = given.jobs or default_jobs(len(methods) * given.seeds)
    folder = given.output or Path("runs") / f"compare-{given.data}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)  # if this cannot be, better now than after the work
    title = f"{given.data}: {given.seeds} seeds, {settings.epochs} epochs"
    record = {**asdict(settings), "methods": methods, "seeds": list(range(given.seeds)), "jobs": jobs, "splits": splits}

    results: list[Result] = []
    try:
        with ended_by_sigterm():
            for result in compare(settings, methods, range(given.seeds), jobs):
                results.append(result)
    except BaseException:
        if results:
            finished = f"{len(results)} of {len(methods) * given.seeds} runs"
            write_report(folder, in_order(results, methods), modalities, record, f"{title}; {finished}")
            print(f"iprm: {finished} are finished; a report of these: {folder}", file=sys.stderr)
        raise
    summary = write_report(folder, in_order(results, methods), modalities, record, title)
    console = Console()
    console.print(rich_table(summary, title))
    console.print(f"report: {folder}", highlight=False, soft_wrap=True)
    return 0
