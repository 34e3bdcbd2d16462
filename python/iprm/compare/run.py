"""The runs of a comparison: one configuration of `iprm fit` per method and seed; reads the data once per seed."""

from __future__ import annotations

import copy
import itertools
import json
import pkgutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from iprm.data.module import MultimodalData
from iprm.errors import InputError
from iprm.files import reading, write_atomically
from iprm.names import file_name
from iprm.training.checkpoint import saved_states
from iprm.training.classifier import FusionClassifier

from .reading import flattened, read, read_yaml
from .runs import CONFIG, DISPLAY, FAILED, TEST, settings_of_comparison

#: Methods of a comparison if none are named, after one unimodal method per modality.
DEFAULT_COMPARISON = ("concat", "sum", "weight", "joint", "iprm")


class Job(NamedTuple):
    """One run. config: the settings of `iprm fit`, as in config.yaml."""

    method: str
    seed: int
    folder: Path
    config: dict[str, Any]


def make_jobs(
    config: Mapping[str, Any], methods: Sequence[str] | None, seeds: Sequence[int], folder: Path
) -> tuple[list[str], list[Job]]:
    """The methods (for None, each modality alone and `DEFAULT_COMPARISON`) and the runs, one seed after the other.

    Reads the data of the first seed and builds every model, so that errors are raised before any training.

    Raises:
        InputError: the dataset, a method or an option cannot be used, or the folder has a comparison with other settings or of
            other data.
    """
    dataset = config["data"]
    data = read_once(pkgutil.resolve_name(dataset["class_path"]), **(dataset["init_args"] | {"seed": seeds[0]}))
    unimodal = [f"unimodal-{modality}" for modality in data.modalities]
    names = [*unimodal, *DEFAULT_COMPARISON] if methods is None else list(dict.fromkeys(methods))
    if not names:
        raise InputError("no methods were named")
    for name in names:
        learned = {key: config[key] for key in ("optimizer", "lr_scheduler")}
        model = FusionClassifier(data.inputs, data.num_classes, **{**config["model"], **learned, "method": name})
        model.check_training(data.batch_size)
    jobs = []
    for seed, name in itertools.product(seeds, names):
        settings = copy.deepcopy(dict(config)) | {"seed_everything": seed}
        settings["model"]["method"], settings["data"]["init_args"]["seed"] = name, seed
        jobs.append(Job(name, seed, folder / file_name(name) / f"seed={seed}", settings))
        if _began(jobs[-1].folder):
            _refuse_other(jobs[-1].folder, "run", read(jobs[-1].folder / CONFIG, read_yaml, []) or {}, jobs[-1].config)
        if seed == seeds[0] and (jobs[-1].folder / TEST).is_file():
            _refuse_other_data(jobs[-1].folder, data)
    before = flattened(settings_of_comparison(folder).get("settings", {}))
    if before and any(map(_began, folder.glob("*/seed=*"))):  # its methods may be others than those of these runs
        _refuse_other(
            folder, "comparison", before, {name: value for name, value in config.items() if name != "seed_everything"}
        )
    return names, jobs


#: Settings that differ between the runs of a comparison.
DIFFERENT = ("model.method", "data.init_args.seed")
#: Most characters of a value in a message.
MOST_CHARACTERS = 80


def _began(folder: Path) -> bool:
    """Whether a folder has a run that would be kept or resumed, rather than one that has failed before it saved a state."""
    return (folder / CONFIG).is_file() and (bool(saved_states(folder)) or not (folder / FAILED).is_file())


def _refuse_other(folder: Path, what: str, there: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    here = flattened(config)
    for name in dict.fromkeys((*here, *there)):
        was, asked = there.get(name), here.get(name)
        if name in DISPLAY or (what == "comparison" and name in DIFFERENT):
            continue
        if name.partition(".")[0] in config and was != asked:
            is_not = f"{_shortened(was)}, not {_shortened(asked)}"
            raise InputError(f"{folder}: {name} of this {what} is {is_not}; choose another --output")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def _refuse_other_data(folder: Path, data: MultimodalData) -> None:
    with reading(folder / TEST):
        text = (folder / TEST).read_bytes()
    try:
        splits = dict(json.loads(text)["splits"])
    except (ValueError, TypeError, LookupError):
        return  # damaged, or of an earlier version
    for name, here in data.describe().items():
        if splits.get(name, here) != here:
            raise InputError(
                f"{folder}: this run is of other data: its {name} split was {splits[name]}, not {here}; choose another --output"
            )


_last_read: dict[str, MultimodalData] = {}  # one entry: memory holds the data of one seed


def read_once(cls: type[MultimodalData], *args: Any, **options: Any) -> MultimodalData:
    """A new dataset object, with the splits of the last one made in this process if class, options and current folder are the
    same."""
    data = cls(*args, **options)
    key = f"{Path.cwd()} {cls.__module__}.{cls.__qualname__} {args} {sorted(options.items())}"
    if key in _last_read:
        data.splits = _last_read[key].splits
    else:
        _last_read.clear()
        _last_read[key] = data
    return data


class Clock(L.Callback):
    """Times the training steps of each epoch, without validation; calls `advance` with the number of epochs that have ended."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance
        self.seconds: list[float] = []
        self._began: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.advance(trainer.current_epoch)  # earlier epochs of a resumed run

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._began = time.perf_counter() if self._began is None else self._began

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._began is not None:  # otherwise this is the check before training
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            self.seconds.append(time.perf_counter() - self._began)
            self._began = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.advance(1)

    def record(self, job_folder: Path, metrics: Mapping[str, float], data: MultimodalData) -> None:
        """Writes test.json atomically; a run with this file is finished."""
        content = {
            "metrics": {name.removeprefix("test_"): value for name, value in metrics.items()},
            "seconds_per_epoch": statistics.median(self.seconds) if self.seconds else None,
            "splits": data.describe(),
        }
        write_atomically(job_folder / TEST, json.dumps(content, indent=2) + "\n")
