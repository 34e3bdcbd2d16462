"""Errors of Lightning, jsonargparse and torch that a setting causes, as one line; other errors keep their traceback."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from types import TracebackType

from iprm.errors import InputError

#: Packages that check settings.
CHECKERS = {"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning", "jsonargparse"}
#: Packages that these call with settings.
CALLED = {"torch", "torchmetrics", "numpy", "yaml", "fsspec", "rich"}
CALLED |= {"docstring_parser", "typeshed_client", "typing_extensions", "packaging"}
CALLED |= {"tensorboard", "tensorboardX", "wandb", "mlflow", "comet_ml", "neptune"}
OURS = {"iprm", "iprm_kernels"}
#: Modules of Lightning that run the batches of a model.
STEPS = tuple(
    f"lightning.pytorch.loops.{name}" for name in ("training_epoch_loop", "evaluation_loop", "prediction_loop", "optimization")
)
#: The module of Lightning that restores states, and its functions that do.
RESTORES = ("lightning.pytorch.trainer.connectors.checkpoint_connector", ("restore", "_restore", "resume_start"))
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
    if not isinstance(error, Exception) or isinstance(error, SyntaxError) or error_of_user(error) is not None:
        return None
    if _restoring(error.__traceback__):
        return f"the checkpoint cannot be restored: {_message(error, False)}"
    frames = [name for name in _modules(error.__traceback__) if _package(name) not in sys.stdlib_module_names]
    raised_by = _package(frames[-1]) if frames else ""
    stepping = any(name.startswith(STEPS) for name in frames)
    by_settings = all(_package(name) not in OURS or name.startswith("iprm.cli.") for name in frames)
    checked = by_settings and raised_by in (CHECKERS if stepping else CHECKERS | CALLED)
    if raised_by == "torch" and frames[-1].startswith("torch.optim."):  # a step with these settings
        return f"{'lr_scheduler' if 'lr_scheduler' in frames[-1] else 'optimizer'}: {_message(error, False)}"
    misconfigured = type(error).__name__ == "MisconfigurationException"  # Lightning's, which is not imported for its name
    return _message(error, misconfigured) if checked or misconfigured else None


def _message(error: Exception, spoken: bool) -> str:
    text = " ".join(brief(str(error)).split())
    return text if text and (spoken or isinstance(error, SPOKEN)) else ": ".join(filter(None, (type(error).__name__, text)))


#: jsonargparse's message of a value that none of several types accepts, without another such message within it.
UNION = re.compile(
    r"(?: *- Expected a path but .*\n *- )?Does not validate against any of the Union subtypes\n *Subtypes: .*\n *Errors:\n"
    r"(?P<errors>(?:(?!.*Does not validate).*\n)*?) *Given value type: .*\n *Given value: (?P<value>.*)"
)
#: Reasons within it that say no more than the type.
TYPE_ALONE = re.compile(r"Expected an? (?!dot import path)(?P<type>.*)|Not a valid subclass")
#: The forms of types within it, and words for them.
TYPE = re.compile(r"<class '(?:\w+\.)*(\w+)'>")
LITERAL = re.compile(r"(?:typing\.)?Literal\[(.*)\]")
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true, false",
    "str": "text",
    "dict": "a mapping",
    "NoneType": "null",
}


def brief(message: str) -> str:
    """A message of jsonargparse, reduced to the first reason that says more than the expected type, or to the types."""
    while (shorter := UNION.sub(_first_reason, message)) != message:
        message = shorter
    return message


def _first_reason(union: re.Match[str]) -> str:
    margin = re.match(" *", union["errors"])
    reasons = re.split(rf"^{margin[0] if margin else ''}- ", union["errors"], flags=re.MULTILINE)[1:]
    types = [TYPE.sub(r"\1", match["type"]) for match in map(TYPE_ALONE.match, reasons) if match and match["type"]]
    telling = next((reason.rstrip() for reason in reasons if not TYPE_ALONE.match(reason)), None)
    if telling and not (telling.startswith("Expected a dot import path") and {"int", "float"}.intersection(types)):
        return telling
    words: list[str] = []
    for name in types:
        literal = LITERAL.fullmatch(name)
        words += literal[1].replace("'", "").split(", ") if literal else [TYPES.get(name, name)]
    *first, last = dict.fromkeys(words) or [""]
    return f"expected {', '.join(first)}{' or ' if first else ''}{last}, got {union['value']}" if last else union[0]


def error_of_user(error: BaseException) -> BaseException | None:
    """The error, or the one of its causes, with a frame that is neither ours nor a library's."""
    known = CHECKERS | CALLED | OURS | sys.stdlib_module_names
    waiting, seen = [error], set()
    while waiting:
        cause = waiting.pop()
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        if any(_package(name) not in known for name in _modules(cause.__traceback__)):
            return cause
        above = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
        waiting += [*([above] if above else []), *_of_each_type(cause.__traceback__)]
    return None


def _of_each_type(traceback: TracebackType | None) -> Iterator[BaseException]:
    """The errors of all types that a value was tried as; jsonargparse chains the first alone."""
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name == "raise_union_unexpected_value":
            yield from (error for error in frame.f_locals.get("exceptions", ()) if isinstance(error, BaseException))
        traceback = traceback.tb_next


def _modules(traceback: TracebackType | None) -> Iterator[str]:
    """The modules of the frames, the innermost last."""
    while traceback is not None:
        yield traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next


def _restoring(traceback: TracebackType | None) -> bool:
    """Whether a frame is one of Lightning restoring a checkpoint."""
    while traceback is not None:
        code, module = traceback.tb_frame.f_code, traceback.tb_frame.f_globals.get("__name__", "")
        if module == RESTORES[0] and code.co_name.startswith(RESTORES[1]):
            return True
        traceback = traceback.tb_next
    return False


def _package(module: str) -> str:
    return module.partition(".")[0]
