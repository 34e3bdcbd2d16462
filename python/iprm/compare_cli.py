"""The command `iprm compare`: arguments to settings, runs, a report."""

from __future__ import annotations

import datetime
import inspect
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from .arguments import Parser, at_least_one, key_value
from .compare import check, compare, default_jobs
from .configs import load_config, shipped
from .data import DATASETS, dataset_class
from .experiment import Settings
from .report import rich_table, write_report
from .suggest import InputError, unknown
from .trainer import FusionClassifier

DESCRIPTION = """\
Trains several methods with several seeds on one dataset. A seed decides splits, initial weights and the order of batches, and
is shared by all methods. The model best on validation is tested once. Prints a table of mean ± standard deviation over seeds
and writes a folder with summary.md, runs.csv, history.csv, plot.png and settings.json.
"""

EXAMPLES = """\
examples:
  iprm compare --data digits
  iprm compare --data digits --methods concat,iprm --seeds 5 --epochs 30
  iprm compare --data av-digits --path recordings/ --output runs/spoken
  iprm compare --data features --path features.npz --model learning_rate=0.05
"""


def parser() -> Parser:
    """The arguments of `iprm compare`."""
    p = Parser("iprm compare", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, metavar="NAME", help=f"dataset: {', '.join(DATASETS)}")
    p.add_argument("--path", help="where the dataset is, for those that do not come with the package")
    p.add_argument("--methods", metavar="A,B,...", help="default: each modality alone, the baselines, and iprm")
    p.add_argument("--seeds", type=at_least_one, default=3, metavar="N", help="number of seeds, from 0 up (default: 3)")
    p.add_argument("--epochs", type=at_least_one, metavar="N", help="default: as in the dataset's shipped configuration")
    p.add_argument("--output", type=Path, metavar="FOLDER", help="default: runs/compare-<dataset>-<time>")
    p.add_argument("--jobs", type=at_least_one, metavar="N", help="processes at a time (default: one a core; 1 with a GPU)")
    p.add_argument("--set", type=key_value, action="append", default=[], metavar="KEY=VALUE", help="an option of the dataset")
    p.add_argument("--model", type=key_value, action="append", default=[], metavar="KEY=VALUE", help="an option of the model")
    p.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu"), help="default: auto")
    return p


def settings_from(
    data: str, path: str | None, epochs: int | None, options: Iterable[tuple[str, str]], model: Iterable[tuple[str, str]]
) -> Settings:
    """What the shipped configuration of the dataset says, changed by what the command line says.

    Raises:
        InputError: no such dataset, or model option.
    """
    dataset_class(data)  # tells at once if there is none
    config = load_config(data) if data in shipped() else {}
    data_options = dict(config.get("data", {}).get("init_args", {})) | _values(options)
    if path is not None:
        data_options["path"] = path
    data_options.pop("seed", None)
    model_options = {k: v for k, v in config.get("model", {}).items() if k != "method"} | _values(model)
    known = set(inspect.signature(FusionClassifier.__init__).parameters) - {"self", "shapes", "num_classes", "method"}
    for option in model_options:
        if option not in known:
            raise InputError(unknown("option of the model", option, known))
    return Settings(data, data_options, model_options, epochs or config.get("trainer", {}).get("max_epochs", 20))


def _values(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    return {key: yaml.safe_load(value) for key, value in pairs}


def compare_command(arguments: Sequence[str]) -> int:
    """Runs `iprm compare` and returns the exit code."""
    given = parser().parse_args(arguments)
    settings = settings_from(given.data, given.path, given.epochs, given.set, given.model)
    settings = replace(settings, accelerator=given.accelerator)
    asked = [name.strip() for name in given.methods.split(",") if name.strip()] if given.methods is not None else None
    methods, modalities, splits = check(settings, asked, range(given.seeds))
    jobs = given.jobs or default_jobs(len(methods) * given.seeds)
    results = compare(settings, methods, range(given.seeds), jobs)

    title = f"{given.data}: {given.seeds} seeds, {settings.epochs} epochs"
    folder = given.output or Path("runs") / f"compare-{given.data}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    record = {**asdict(settings), "methods": methods, "seeds": list(range(given.seeds)), "jobs": jobs, "splits": splits}
    summary = write_report(folder, results, modalities, record, title)
    console = Console()
    console.print(rich_table(summary, title))
    console.print(f"report: {folder}", highlight=False, soft_wrap=True)
    return 0
