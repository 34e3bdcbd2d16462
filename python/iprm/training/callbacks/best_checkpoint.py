"""Keeps the best checkpoint on validation, in a run folder that may be moved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from iprm.errors import InputError

FILENAME = "best-{epoch}-{step}"  # differs from the default of a user's own ModelCheckpoint
#: Entries of the state of a `ModelCheckpoint` that are paths.
PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")
SCORES = ("best_model_score", "current_score", "kth_value")


class BestCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` for the best epoch on validation. Its state stays valid if the run folder is moved before resuming."""

    def __init__(self, monitor: str = "val_accuracy", mode: str = "max", **options: Any) -> None:
        # no version counter: a resumed run overwrites the file that the killed run left
        super().__init__(monitor=monitor, mode=mode, **{"filename": FILENAME, "enable_version_counter": False, **options})

    def state_dict(self) -> dict[str, Any]:
        """The state with file names only, without folders."""
        state = super().state_dict()
        paths = {name: Path(path).name if path else "" for name, path in state.items() if name in PATHS}
        best = {Path(path).name: score for path, score in state["best_k_models"].items()}
        return {**state, **paths, "best_k_models": best, "dirpath": ""}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Checks the state of every `ModelCheckpoint` of the trainer before Lightning restores any: Lightning opens and removes
        what the paths in it name. The state of a user's own `ModelCheckpoint` in another folder is not restored.

        Raises:
            InputError: an entry is not the path of a checkpoint that the callback itself writes, or a score is no number.
        """
        states = checkpoint["callbacks"]
        for callback in trainer.checkpoint_callbacks:
            # Lightning's own key of checkpoints before 1.5 is the class
            key = next((key for key in (callback.state_key, type(callback)) if states.get(key)), None)
            if key is None or not isinstance(callback, ModelCheckpoint):
                continue
            if not isinstance(callback, BestCheckpoint) and states[key].get("dirpath", callback.dirpath) != callback.dirpath:
                states[key] = {"best_model_path": "", "dirpath": None}
            _check_state(callback, states[key])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        folder = Path(self.dirpath or "")
        if not (folder / state_dict["best_model_path"]).is_file():
            return  # a new run that starts from another run's checkpoint
        paths = {name: str(folder / path) if path else "" for name, path in state_dict.items() if name in PATHS}
        best = {str(folder / path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath})
        self.current_score = state_dict["current_score"]


def _check_state(callback: ModelCheckpoint, state: dict[str, Any]) -> None:
    """Raises InputError unless every path of the state is one that the callback itself writes, and every score a number."""
    best = state.get("best_k_models", {})
    paths = [*((name, state[name]) for name in PATHS if state.get(name, "") != ""), *(("best_k_models", path) for path in best)]
    for name, path in paths:
        if not _writes(callback, path):
            raise InputError(f"the checkpoint's {name} is {path!r}, which this run has not written")
    for name, score in [*((name, state.get(name)) for name in SCORES), *(("best_k_models", best[path]) for path in best)]:
        number = isinstance(score, Tensor) and score.ndim == 0 and not score.is_complex() and not score.isnan()
        if score is not None and not number:
            raise InputError(f"the checkpoint's {name} has the score {score!r}, expected a number")
    for name, path in paths:
        if best and name != "last_model_path" and path not in best:
            raise InputError(f"the checkpoint's {name} is {path!r}, which is none of its best_k_models")


def _writes(callback: ModelCheckpoint, path: Any) -> bool:
    """Whether `path` is that of a file which the callback would write, by its template of file names. The states of
    `BestCheckpoint` have names without folders."""
    ours = isinstance(callback, BestCheckpoint)
    prefix = "" if ours else f"{callback.dirpath}/"
    if not isinstance(path, str) or not path.startswith(prefix) or ".." in Path(path).parts:
        return False

    def value(field: re.Match[str]) -> str:
        return (f"{field['name']}=" if callback.auto_insert_metric_name else "") + "{}"

    for template in (callback.filename or "{epoch}-{step}", callback.CHECKPOINT_NAME_LAST):
        literal = re.sub(r"\{(?P<name>[^:}]*)[^}]*\}", value, template).split("{}")
        pattern = ("[^/]*" if ours else ".*").join(map(re.escape, literal))
        if re.fullmatch(rf"{pattern}(-v\d+)?\.ckpt", path.removeprefix(prefix)):
            return True
    return False


def best_checkpoint(trainer: L.Trainer) -> ModelCheckpoint | None:
    """The callback that keeps the best model of a run: `BestCheckpoint`, or else the first that monitors anything."""
    keepers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    ours = [callback for callback in keepers if isinstance(callback, BestCheckpoint)]
    return next(iter([*ours, *(callback for callback in keepers if callback.monitor)]), None)
