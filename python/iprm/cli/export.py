"""The command `iprm export`: a checkpoint as files that need only torch, or safetensors, to be read."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from iprm.inference.export import BATCHES, export
from iprm.inference.model import load_inference

from .parser import Parser, add_encoder_option

DESCRIPTION = """\
Writes the model of a checkpoint, λ frozen, in float32, into a folder:

  model.pt2          the graph and its weights (torch.export), for any batch size; plain aten operators, so that
                     torch.export.load("model.pt2").module() runs where torch alone is installed. It maps
                     {modality: (B, *shape), or a dict of such tensors} to
                     {"logits": (B, C), "probabilities": (B, C), "logits_by": {head: (B, C)}}
  model.safetensors  the weights that the graph reads, by their names in the checkpoint
  model.json         modalities, shape and type of their inputs, classes, method, λ, versions, sha256 of both files

The files are written when model.pt2, read back, agrees with the checkpoint's own predictions on random inputs.
"""

EXAMPLES = """\
example:
  iprm export --ckpt_path runs/digits/fit/version_0/checkpoints/epoch=1-step=38.ckpt --output exported
"""


def export_command(arguments: Sequence[str]) -> int:
    """Runs `iprm export` and returns the exit code."""
    given = parser().parse_args(arguments)
    model = load_inference(given.ckpt_path, given.encoder)
    difference = export(model, given.output)
    print(f"largest difference from the checkpoint's logits, at {', '.join(map(str, BATCHES))} rows: {difference:.1e}")
    print(f"exported: {given.output}")
    return 0


def parser() -> Parser:
    """The arguments of `iprm export`."""
    p = Parser("iprm export", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--ckpt_path", required=True, metavar="FILE", help="the checkpoint, a path that iprm fit has printed")
    add_encoder_option(p)
    p.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="made if it is not there")
    return p
