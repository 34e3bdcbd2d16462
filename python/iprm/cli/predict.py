"""The command `iprm predict`: predictions for a split of a dataset, or with --input for new, unlabelled samples."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from iprm.encoders.description import each
from iprm.errors import InputError
from iprm.files import check_output, replacing
from iprm.inference.inputs import Piece, Source, find_samples, gathered, joined
from iprm.inference.model import Inference, load_inference
from iprm.inference.predictions import cells, columns, write_predictions
from iprm.streams import cell

from .fusion_cli import FusionCLI, run
from .parser import Parser, add_checkpoint_options, at_least_one

DESCRIPTION = """\
Writes the predictions of a checkpoint for new, unlabelled samples as CSV: file, row, prediction (the name of a class), and the
probability p_<class> of every class. The samples are one of

  a folder of .npz files   arrays x_<modality>, as in the dataset `features`: (D,) or (C, H, W) in a file of one sample,
                           (N, D) or (N, C, H, W) in a file of several
  one such .npz file
  a folder of .npy files   <modality>.npy, (N, D) or (N, C, H, W)

with integer or floating-point values, in the shapes that the model was trained on. A modality of several tensors has one array
per tensor, x_<modality>.<name> or <modality>.<name>.npy; an input that was integer in training must be integer. Other arrays
and files are ignored. Files are read in order of name; `file` is the .npz, or the folder of .npy files; `row` counts from 0
in each.

All files are checked first. A non-finite value ends the run with its file, array and row: the CSV is written completely or
not at all. Of .npy files, at most --batch_size rows are in memory at a time; an .npz is read as a whole. Object arrays are
refused, because loading one would run any code the file contains.
"""

EXAMPLES = """\
examples:
  iprm predict --ckpt_path CHECKPOINT --input new_samples/ --output predictions.csv
  iprm predict --ckpt_path CHECKPOINT --input my_features.npz
"""


#: The beginnings of both kinds of predictions, which may be replaced by new ones.
HEADERS = ("row,target,prediction", "file,row,prediction")


def predict_command(arguments: Sequence[str]) -> int:
    """Runs `iprm predict` and returns the exit code."""
    if any(argument.partition("=")[0] == "--input" for argument in arguments):
        return _predict_samples(arguments)
    return run(PredictCLI, arguments)


class PredictCLI(FusionCLI):
    """`iprm predict` on a split of a dataset."""

    command, needs_checkpoint = "predict", True

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--output", type=str, default="predictions.csv", help="default: predictions.csv")

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        check_output(Path(self.config.output), *HEADERS)  # before the work rather than after it

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        one_process = {"devices": 1, "num_nodes": 1, "strategy": "auto"}  # so that rows are written in order
        return super().instantiate_trainer(**one_process, **kwargs)

    def execute(self) -> None:
        batches: Any = self.trainer.predict(self.model, datamodule=self.datamodule, ckpt_path=self.config.ckpt_path)
        write_predictions(Path(self.config.output), batches, self.model.classes)
        print(f"predictions: {self.config.output}")


def _predict_samples(arguments: Sequence[str]) -> int:
    needs_help = not {"-h", "--help"}.isdisjoint(arguments)  # even in the place of a value
    given = parser().parse_args(["--help"] if needs_help else arguments)
    model = load_inference(given.ckpt_path, given.encoder)
    sources = find_samples(given.input, model.inputs)
    check_output(given.output, *HEADERS)  # before the work rather than after it
    rows = write_sample_predictions(
        given.output, model.to("cuda" if torch.cuda.is_available() else "cpu"), sources, given.batch_size
    )
    print(f"predictions: {given.output} ({rows} rows)")
    return 0


def parser() -> Parser:
    """The arguments of `iprm predict --input`."""
    p = Parser("iprm predict", description=DESCRIPTION, epilog=EXAMPLES)
    add_checkpoint_options(p)
    p.add_argument("--input", required=True, type=Path, metavar="PATH", help="the samples")
    p.add_argument("--output", type=Path, default=Path("predictions.csv"), metavar="FILE", help="default: predictions.csv")
    p.add_argument("--batch_size", type=at_least_one, default=256, metavar="N", help="rows per batch (default: 256)")
    return p


def write_sample_predictions(path: Path, model: Inference, sources: Sequence[Source], batch_size: int) -> int:
    """Writes the CSV, completely or not at all, and returns the number of rows.

    Raises:
        InputError: a file is damaged, or a value or prediction is not finite.
    """
    count = 0
    with replacing(path) as file:
        writer = csv.writer(file)
        writer.writerow(["file", "row", *columns(model.classes)])
        for count, row in enumerate(_rows(model, sources, batch_size), 1):  # noqa: B007 - the number of rows is returned
            writer.writerow(row)
    return count


def _rows(model: Inference, sources: Sequence[Source], batch_size: int) -> Iterator[list[Any]]:
    pieces = (piece for source in sources for piece in source.read(batch_size))
    for batch in gathered(pieces, batch_size):
        places = [(piece.source, piece.first_row + row) for piece in batch for row in range(piece.rows)]
        probability = _probabilities(model, batch)
        if not bool((finite := probability.isfinite().all(1)).all()):
            source, row = places[finite.tolist().index(False)]
            raise InputError(f"{source}, row {row}: the prediction of this checkpoint is not finite")
        for place, predicted in zip(places, cells(probability, model.classes), strict=True):
            yield [*map(cell, place), *predicted]


@torch.inference_mode()
def _probabilities(model: Inference, batch: Sequence[Piece]) -> Tensor:
    """-> (B, C)"""
    device = next(model.parameters()).device
    inputs = {
        m: each(lambda array: torch.from_numpy(array).to(device), arrays) for m, arrays in joined(batch, model.inputs).items()
    }
    return model(inputs)["probabilities"]
