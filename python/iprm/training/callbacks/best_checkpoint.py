"""Keeps the best checkpoint on validation, in a run folder that may be moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

FILENAME = "best-{epoch}-{step}"  # differs from the default of a user's own ModelCheckpoint
#: Entries of the state of a `ModelCheckpoint` that are paths.
PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        folder = Path(self.dirpath or "")
        if not (folder / state_dict["best_model_path"]).is_file():
            return  # a new run that starts from another run's checkpoint
        paths = {name: str(folder / path) if path else "" for name, path in state_dict.items() if name in PATHS}
        best = {str(folder / path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath})
        self.current_score = state_dict["current_score"]


def best_checkpoint(trainer: L.Trainer) -> ModelCheckpoint | None:
    """The callback that keeps the best model of a run: `BestCheckpoint`, or else the first that monitors anything."""
    keepers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    ours = [callback for callback in keepers if isinstance(callback, BestCheckpoint)]
    return next(iter([*ours, *(callback for callback in keepers if callback.monitor)]), None)
