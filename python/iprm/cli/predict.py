"""The command `iprm predict --input`: a checkpoint's predictions of new samples, which have no labels and no dataset."""

from __future__ import annotations

import csv
import tempfile
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iprm.encoders.description import each
from iprm.errors import InputError
from iprm.inference.inputs import Piece, Source, find_samples, gathered, joined
from iprm.inference.model import Inference, load_inference
from iprm.inference.predictions import cells, columns

from .parser import Parser, add_encoder_option, at_least_one

DESCRIPTION = """\
Writes a checkpoint's predictions of new samples, without labels, as CSV: file, row, prediction, and the probability p_<class>
of every class. The samples are one of

  a folder of .npz files   arrays x_<modality>, as the dataset `features` has them: (D,) or (C, H, W) for a file of one
                           sample, (N, D) or (N, C, H, W) for a file of several
  one such .npz file
  a folder of .npy files   <modality>.npy, (N, D) or (N, C, H, W)

with the shapes the model was trained with, whole numbers or floating. A modality of several tensors has an array for each,
x_<modality>.<name> or <modality>.<name>.npy; what the model was trained with as whole numbers has to be such. Other arrays and
files are left aside. Files are taken in order of name; `file` is the .npz, or the folder of .npy files; `row` counts from 0 in
each.

The headers of all files are checked first. A value that is not finite ends the run, by file, array and row: the CSV is written
whole or not at all. Memory holds --batch_size rows at a time; an array of an .npz in Fortran order, whole. Object arrays are
refused: loading one would run whatever code the file holds.
"""

EXAMPLES = """\
examples:
  iprm predict --ckpt_path CHECKPOINT --input new_samples/ --output predictions.csv
  iprm predict --ckpt_path CHECKPOINT --input my_features.npz
"""


def is_for_samples(arguments: Sequence[str]) -> bool:
    """Whether arguments of `iprm predict` ask for new samples, and not for a split of a dataset."""
    return any(argument.partition("=")[0] == "--input" for argument in arguments)


def predict_command(arguments: Sequence[str]) -> int:
    """Runs `iprm predict --input` and returns the exit code."""
    wants_help = not {"-h", "--help"}.isdisjoint(arguments)  # also where it stands in the place of a value
    given = parser().parse_args(["--help"] if wants_help else arguments)
    if given.config is not None:
        raise InputError("--config: a checkpoint holds all that --input needs; leave one of the two out")
    model = load_inference(given.ckpt_path, given.encoder)
    sources = find_samples(given.input, model.inputs)
    given.output.parent.mkdir(parents=True, exist_ok=True)  # if this cannot be, better now than after the work
    rows = write_sample_predictions(given.output, model.to(_device(given.accelerator)), sources, given.batch_size)
    print(f"predictions: {given.output} ({rows} rows)")
    return 0


def parser() -> Parser:
    """The arguments of `iprm predict --input`."""
    p = Parser("iprm predict", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--ckpt_path", required=True, metavar="FILE", help="the checkpoint, a path that iprm fit has printed")
    p.add_argument("--input", required=True, type=Path, metavar="PATH", help="the samples")
    add_encoder_option(p)
    p.add_argument("--output", type=Path, default=Path("predictions.csv"), metavar="FILE", help="default: predictions.csv")
    p.add_argument("--batch_size", type=at_least_one, default=256, metavar="N", help="rows at a time (default: 256)")
    p.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu"), help="default: auto, a GPU if there is one")
    p.add_argument("--config", help=SUPPRESS)
    return p


def _device(accelerator: str) -> torch.device:
    there = torch.cuda.is_available()
    if accelerator == "gpu" and not there:
        raise InputError("--accelerator gpu: torch sees no GPU here")
    return torch.device("cuda" if there and accelerator != "cpu" else "cpu")


def write_sample_predictions(path: Path, model: Inference, sources: Sequence[Source], batch_size: int) -> int:
    """Writes the CSV, which appears when it is whole, and returns the number of its rows.

    Raises:
        InputError: a file turns out to be broken, or a value is not finite.
    """
    count = 0
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".predictions-") as folder:
        unfinished = Path(folder) / path.name
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "row", *columns(model.num_classes)])
            for row in _rows(model, sources, batch_size):
                writer.writerow(row)
                count += 1
        unfinished.replace(path)
    return count


def _rows(model: Inference, sources: Sequence[Source], batch_size: int) -> Iterator[list[Any]]:
    pieces = (piece for source in sources for piece in source.read(batch_size))
    for batch in gathered(pieces, batch_size):
        places = [(piece.source, piece.first_row + row) for piece in batch for row in range(piece.rows)]
        for place, predicted in zip(places, cells(_probabilities(model, batch)), strict=True):
            yield [*place, *predicted]


@torch.inference_mode()
def _probabilities(model: Inference, batch: Sequence[Piece]) -> Tensor:
    """-> (B, C)"""
    device = next(model.parameters()).device
    inputs = {m: each(lambda array: torch.from_numpy(array).to(device), arrays) for m, arrays in joined(batch).items()}
    return model(inputs)["probabilities"]
