"""The command `iprm export`: writes a checkpoint as files that torch or safetensors can read without this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from iprm.files import check_outputs
from iprm.inference.export import BATCHES, export
from iprm.inference.model import load_inference

from .parser import Parser, add_checkpoint_options

DESCRIPTION = """\
Writes the model of a checkpoint, in float32 and with λ frozen, to a folder:

  model.pt2          graph and weights (torch.export) for any batch size, in plain aten operators:
                     torch.export.load("model.pt2").module() needs only torch. It maps
                     {modality: (B, *shape), or a dict of such tensors} to
                     {"logits": (B, C), "probabilities": (B, C), "logits_by": {head: (B, C)}}
  model.safetensors  the weights of the graph, by their names in the checkpoint
  model.json         modalities, shape and dtype of their inputs, classes, method, λ, versions, sha256 of both files

The files are written only if model.pt2, read back, reproduces the logits of the checkpoint on random inputs.
"""

EXAMPLES = """\
example:
  iprm export --ckpt_path runs/digits/fit/version_0/checkpoints/epoch=1-step=38.ckpt --output exported
"""


def export_command(arguments: Sequence[str]) -> int:
    """Runs `iprm export` and returns the exit code."""
    given = parser().parse_args(arguments)
    model = load_inference(given.ckpt_path, given.encoder)
    check_outputs(given.output, "model.json", '{\n  "modalities": [', "model.pt2", "model.safetensors")
    difference = export(model, given.output)
    print(f"largest difference from the checkpoint's logits, at {', '.join(map(str, BATCHES))} rows: {difference:.1e}")
    print(f"exported: {given.output}")
    return 0


def parser() -> Parser:
    """The arguments of `iprm export`."""
    p = Parser("iprm export", description=DESCRIPTION, epilog=EXAMPLES)
    add_checkpoint_options(p)
    p.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="created if it does not exist")
    return p
