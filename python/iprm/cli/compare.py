"""The command `iprm compare`: methods x seeds on one dataset, each an ordinary run of `iprm fit`."""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import iprm_kernels as ik
from iprm.compare.run import DEFAULT_COMPARISON, Clock, Job, make_jobs, read_once
from iprm.compare.runs import COMPARISON, TEST, is_run, read_runs, settings_of_comparison
from iprm.compare.sweep import Advance, default_jobs, ended_by_sigterm, sweep
from iprm.compare.table import Comparison, Table, write
from iprm.data import DATASETS
from iprm.data.module import MultimodalData
from iprm.environment import versions
from iprm.errors import InputError
from iprm.files import check_received, created, reading, replacing, write_atomically
from iprm.locks import locked
from iprm.methods import METHODS
from iprm.streams import say
from iprm.training.callbacks.best_checkpoint import best_checkpoint
from iprm.training.checkpoint import saved_states, state_to_resume
from iprm.training.lightning import quiet_lightning

from .console import print_table
from .fit import FitCLI, fit_settings
from .fusion_cli import as_list, run
from .parser import PATH, Parser, at_least_one, dataset_arguments, divided

DESCRIPTION = """\
Trains several methods with several seeds on one dataset. A seed determines splits, initial weights and the order of batches;
all methods use the same seeds. Every run has a folder OUTPUT/METHOD/seed=K, as iprm fit writes it, with the test metrics of
its best checkpoint on validation in test.json. Prints a table of mean ± standard deviation over seeds, and writes summary.md,
runs.csv, history.csv, plot.png and settings.json to OUTPUT. The same command with the same --output resumes an interrupted
comparison: finished runs are kept, interrupted runs resume, missing and failed runs start. Exit code 1 if a run failed.
"""

EXAMPLES = """\
any setting of iprm fit can be given by its full name: --model.feature_dim 32 --trainer.max_epochs 5 --data.batch_size 32

examples:
  iprm compare --data digits
  iprm compare --data digits --methods concat,iprm --seeds 5 --epochs 30
  iprm compare --data av-digits --path recordings/ --output runs/spoken
  iprm compare --data features --path features.npz --model.feature_dim 32
"""

METHOD_NAMES = ", ".join([*(name for name in METHODS if name != "unimodal"), "unimodal-<modality>"])
#: Files that a comparison writes to its folder, and replaces when it is repeated.
FILES = ("summary.md", "runs.csv", "history.csv", "plot.png", COMPARISON)
#: Seconds that a run waits for the process of an earlier comparison, which saves its state after that comparison was killed.
PATIENCE = 60
#: Settings of `iprm fit` that differ between runs, and the option of this command that determines each.
OWN = {"model.method": "--methods", "data.seed": "--seeds", "data.init_args.seed": "--seeds"}


def parser() -> Parser:
    """The arguments of `iprm compare`."""
    p = Parser("iprm compare", description=DESCRIPTION, epilog=EXAMPLES)
    p.add_argument("--data", required=True, metavar="NAME", help=f"dataset: {', '.join(DATASETS)}")
    p.add_argument("--path", help=PATH)
    names = f"each modality alone, {', '.join(DEFAULT_COMPARISON)}"
    p.add_argument("--methods", metavar="A,B,...", help=f"{METHOD_NAMES} (default: {names})")
    p.add_argument("--seeds", type=at_least_one, default=3, metavar="N", help="number of seeds: 0, 1, ..., N-1 (default: 3)")
    p.add_argument("--epochs", type=at_least_one, metavar="N", help="default: as in the dataset's shipped configuration")
    p.add_argument("--output", type=Path, metavar="FOLDER", help="default: runs/compare-<dataset>-<time>")
    p.add_argument("--jobs", type=at_least_one, metavar="N", help="parallel processes (default: one per core; 1 with a GPU)")
    return p


def compare_command(arguments: Sequence[str]) -> int:
    """Runs `iprm compare` and returns the exit code."""
    own, settings = divided(arguments)
    given = parser().parse_args(own)
    config = fit_settings(_settings(given, settings))
    asked = [name.strip() for name in given.methods.split(",") if name.strip()] if given.methods is not None else None
    default = Path("runs") / f"compare-{Path(given.data).stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    with created(given.output or default, anew=given.output is None) as folder, locked(folder, "comparison"):
        comparison = _compare(folder, config, asked, given)
    for table in comparison.tables:
        print_table(_dense(table))
    for note in comparison.notes:
        say(f"note: {note}")
    for failure in comparison.failed:
        say(f"failed: {failure}")
    say(f"report: {folder}")
    return 1 if comparison.failed else 0


def _compare(folder: Path, config: dict[str, Any], asked: Sequence[str] | None, given: Any) -> Comparison:
    check_received(folder)
    _refuse_other_files(folder)
    methods, jobs = make_jobs(config, asked, range(given.seeds), folder)
    with quiet_lightning():
        _ComparedRun(jobs[0].config, jobs[0].folder, lambda ended: None)  # builds the trainer, which checks its settings
    _write_settings(folder, {"data": given.data, "methods": methods, "seeds": list(range(given.seeds)), "settings": config})
    pending = [job for job in jobs if not (job.folder / TEST).is_file()]
    try:
        with ended_by_sigterm():
            sweep(pending, _train, given.jobs or default_jobs(len(pending)))
    except BaseException:
        finished = sum((job.folder / TEST).is_file() for job in jobs)
        report = ""
        with contextlib.suppress(OSError):  # the disk may be full
            report = f"; their report: {_report(folder).folder}" if finished else ""
        done = f"{finished} of {len(jobs)} runs are finished"
        again = f"to continue, repeat the command with --output {shlex.quote(str(folder))}"
        print(f"iprm: {done}{report}; {again}", file=sys.stderr)
        raise
    return _report(folder)


def _refuse_other_files(folder: Path) -> None:
    """Raises InputError if the folder has files that a comparison would replace but no comparison, or is within a run."""
    run = next((path for path in (folder.resolve(), *folder.resolve().parents) if is_run(path)), None)
    if run is not None:
        raise InputError(f"{folder}: {run} is the folder of a run of iprm fit; choose another --output")
    found = [name for name in FILES if (folder / name).exists()]
    if COMPARISON in found:
        with reading(folder / COMPARISON):
            pass
    if found and not settings_of_comparison(folder):
        what = f"{found[0]} there was not written by iprm compare, and is not replaced"
        raise InputError(f"{folder}: {what}; choose another --output")


def _dense(table: Table) -> Table:
    """The table with narrower columns: heads on several lines, no blank before ±."""
    rows = [[cell.replace(" ±", "±") for cell in row] for row in table.rows]
    return table._replace(head=[name.replace(" ", "\n") for name in table.head], rows=rows)


def _settings(given: Any, settings: Sequence[str]) -> list[str]:
    """The arguments of `iprm fit` that correspond to this command's options, followed by `settings`."""
    found = [*dataset_arguments(given), "--trainer.devices=1"]
    found += [] if given.epochs is None else [f"--trainer.max_epochs={given.epochs}"]
    for argument in (found := [*found, *settings]):
        name = argument.partition("=")[0].removeprefix("--")
        if name in OWN:
            raise InputError(f"{name}: the comparison determines this setting for each run; use {OWN[name]}")
    return found


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes settings.json: the settings of this call, with its methods and seeds added to those already in the file."""
    before = settings_of_comparison(folder)
    for name in ("methods", "seeds"):
        settings[name] = list(dict.fromkeys([*before.get(name, []), *settings[name]]))
    backends = {name: str(status) for name, status in ik.backends().items()}
    record = {**settings, "versions": versions(), "platform": platform.platform(), "backends": backends}
    write_atomically(folder / COMPARISON, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _report(folder: Path) -> Comparison:
    """Writes the tables and the plot of a comparison to its folder."""
    from iprm.report.figures import comparison_figure

    comparison = Comparison(folder, read_runs([folder]))
    write(comparison)
    with replacing(folder / "plot.png", "wb") as file:
        comparison_figure(comparison).savefig(file, dpi=150)
    return comparison


class _ComparedRun(FitCLI):
    """`iprm fit` without output, followed by a test of the best checkpoint on validation."""

    says_how_to_continue = False  # the command says it once for all runs

    def __init__(self, arguments: dict[str, Any], folder: Path, advance: Advance) -> None:
        self.clock = Clock(advance)
        super().__init__(arguments, folder)

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        self.parser.add_instantiator(read_once, MultimodalData, subclasses=True)

    def instantiate_trainer(self, **options: Any) -> Any:
        trainer = self.config_init.trainer
        trainer.enable_progress_bar = False  # set here, so that config.yaml equals that of `iprm fit`
        return super().instantiate_trainer(callbacks=[*as_list(trainer.callbacks), self.clock], **options)

    def execute(self) -> None:
        self.fit()
        best = best_checkpoint(self.trainer)
        assert self.folder is not None
        self.trainer.loggers = []  # metrics.csv holds no test metrics
        path = best.best_model_path if best else ""
        (metrics,) = self.trainer.test(self.model, self.datamodule, path or None, verbose=False, weights_only=True)
        self.clock.record(self.folder, metrics, self.datamodule)


def run_fit(config: dict[str, Any], folder: Path, advance: Advance) -> None:
    """Runs `_ComparedRun` in this folder; a run that it already holds resumes from its last state."""
    with locked(folder, "run", PATIENCE):
        state = str(state_to_resume(folder)) if saved_states(folder) else None
        run(_ComparedRun, {**config, "ckpt_path": state}, folder=folder, advance=advance)


def _train(job: Job, advance: Advance) -> None:
    run_fit(job.config, job.folder, advance)
