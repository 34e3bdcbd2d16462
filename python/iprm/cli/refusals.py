"""Errors of Lightning, jsonargparse and torch that a setting causes, as one line; other errors keep their traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import TracebackType

from iprm.errors import InputError

#: Packages that check settings.
CHECKERS = {"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning", "jsonargparse"}
#: Packages that these call with settings.
CALLED = {
    *("torch", "torchmetrics", "numpy", "yaml", "fsspec", "rich", "docstring_parser", "typeshed_client", "typing_extensions"),
    *("tensorboard", "tensorboardX", "wandb", "mlflow", "comet_ml", "neptune"),
}
OURS = {"iprm", "iprm_kernels"}
#: Modules of Lightning that run the batches of a model.
STEPS = tuple(
    f"lightning.pytorch.loops.{name}" for name in ("training_epoch_loop", "evaluation_loop", "prediction_loop", "optimization")
)
#: Errors whose message is a sentence; that of another, such as ZeroDivisionError, follows its name.
SPOKEN = (ValueError, TypeError, RuntimeError, ImportError, OSError)


def refusal(error: BaseException) -> str | None:
    """The message of an error that a setting causes; None for every other error.

    A setting causes an error if the command line leads to it through Lightning, jsonargparse and torch alone: no frame of the
    traceback belongs to a model, a dataset, a callback or other code of the user. Once batches run, only errors that Lightning
    itself raises count, because torch would also raise those of a model, for example in its backward pass.
    """
    if isinstance(error, InputError):
        return str(error)
    if not isinstance(error, Exception) or error_of_user(error) is not None:
        return None
    frames = [name for name in _modules(error.__traceback__) if _package(name) not in sys.stdlib_module_names]
    raised_by = _package(frames[-1]) if frames else ""
    stepping = any(name.startswith(STEPS) for name in frames)
    by_settings = all(_package(name) not in OURS or name.startswith("iprm.cli.") for name in frames)
    checked = by_settings and raised_by in (CHECKERS if stepping else CHECKERS | CALLED)
    misconfigured = type(error).__name__ == "MisconfigurationException"  # Lightning's, which is not imported for its name
    return _message(error, misconfigured) if checked or misconfigured else None


def _message(error: Exception, spoken: bool) -> str:
    text = " ".join(str(error).split())
    return text if text and (spoken or isinstance(error, SPOKEN)) else ": ".join(filter(None, (type(error).__name__, text)))


def error_of_user(error: BaseException) -> BaseException | None:
    """The error, or the one of its causes, with a frame that is neither ours nor a library's."""
    known = CHECKERS | CALLED | OURS | sys.stdlib_module_names
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if any(_package(name) not in known for name in _modules(cause.__traceback__)):
            return cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _modules(traceback: TracebackType | None) -> Iterator[str]:
    """The modules of the frames, the innermost last."""
    while traceback is not None:
        yield traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next


def _package(module: str) -> str:
    return module.partition(".")[0]
