"""metrics.csv of a run."""

from __future__ import annotations

import csv
import itertools
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from iprm.errors import InputError
from iprm.files import new_folder, replacing
from iprm.streams import cell
from iprm.training.lightning import first_process, next_version

#: Largest share of the time of a run that writing its file takes: 10^5 rows of 14 columns take 1.5 s on one core, and would be
#: written after every epoch.
SHARE = 0.02
#: Characters that UTF-8 cannot encode.
SURROGATE = re.compile("[\ud800-\udfff]")


class RunLog(CSVLogger):
    """Lightning's CSV logger with one row per logged step, which `RunState` rewinds to the point where a run was interrupted.
    The whole file is rewritten at the end of a run, and before it at most once per second and for a `SHARE` of the time.

    Without a `version`, the run gets a folder of its own, ``<save_dir>/<name>/version_<N>``. The first process creates it when
    the version is first read: runs that start at the same moment get different folders.
    """

    def __init__(self, save_dir: str | Path, name: str = "fit", version: int | str | None = None) -> None:
        super().__init__(save_dir, name, version)
        self.rows: list[dict[str, float]] = []
        self._changed, self._next = False, -1.0  # since the file was written, and when it may be written again

    @property
    def version(self) -> int | str:
        """The number or name of the run. Processes other than the first get a number that no folder has, and do not use it."""
        if self._version is None:
            number = next_version(self)
            if first_process():
                root = Path(self.save_dir) / self.name
                folder = new_folder(root / f"version_{n}" for n in itertools.count(number))
                number = int(folder.name.removeprefix("version_"))
            self._version = number
        return self._version

    @property
    def folder(self) -> Path | None:
        """The folder of the run; None if it is a new run that has not created it yet."""
        return None if self._version is None else Path(self.log_dir)

    @property
    def experiment(self) -> Any:
        """Replaces Lightning's writer, which would delete the file of a resumed run."""
        return self

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        row = {"epoch": int(values.pop("epoch", 0)), "step": len(self.rows) if step is None else step}
        if self.rows and row.items() <= self.rows[-1].items():
            self.rows[-1].update(values)
        else:
            self.rows.append(row | values)
        self._changed = True

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: config.yaml holds the hyperparameters."""

    def restore(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Replaces all rows by `rows`; logging continues after them. The file is not written before the next row: the run may
        be refused.

        Raises:
            InputError: a row is no mapping of names, which UTF-8 can encode, to numbers.
        """
        for row in rows:
            items = row.items() if isinstance(row, Mapping) else [("", "")]
            if not all(type(v) in (int, float) and type(n) is str and not SURROGATE.search(n) for n, v in items):
                raise InputError(f"the checkpoint's metrics have the row {row!r}, expected names and numbers")
        self.rows = [dict(row) for row in rows]

    @rank_zero_only
    def save(self) -> None:
        if self._changed and time.monotonic() > self._next:
            self._write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._changed:
            self._write()

    def _write(self) -> None:
        began = time.monotonic()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with replacing(Path(self.log_dir) / "metrics.csv") as file:
            csv.writer(file).writerows([[*map(cell, names)], *([row.get(name) for name in names] for row in self.rows)])
        now = time.monotonic()
        self._changed, self._next = False, now + max(1, (now - began) / SHARE)
