"""Exports the model of a checkpoint as files that need only torch, or safetensors, to be read."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.export import Dim, ExportedProgram

import iprm_kernels as ik
from iprm.encoders.description import Input, InputSpec, each, flat, nested, plain
from iprm.environment import versions
from iprm.errors import InputError
from iprm.files import replacing

from .model import Inference

#: Batch sizes at which the exported graph is compared: 1 and 2, which tracing may specialise on, and an arbitrary one.
BATCHES = (1, 2, 17)
#: Largest allowed difference of logits, in units of the largest logit or 1: 64 roundings of float32. Both models run the same
#: operators, except that the mixture is plain torch in the exported graph and a kernel in the original. With features of width
#: 8 to 512, IPRM's logits differed by at most 8.9e-8, those of the baselines by 0.
BOUND = 64 * torch.finfo(torch.float32).eps


def export(model: Inference, folder: Path) -> float:
    """Writes model.pt2, model.safetensors and model.json, all or none of them.

    Returns:
        The largest difference between the logits of model.pt2, after reading it back, and those of `model`, in units of the
        largest logit or 1.

    Raises:
        InputError: that difference is above `BOUND`, or the logits are not finite.
    """
    program = exported(model)
    folder.mkdir(parents=True, exist_ok=True)
    graph = io.BytesIO()  # torch ends the process if it cannot write its last bytes to a file
    torch.export.save(program, graph)
    difference = largest_difference(model, torch.export.load(graph).module())
    if not difference <= BOUND:
        raise InputError(f"the exported graph differs from the checkpoint's logits by {difference:.1e}, beyond {BOUND:.1e}")
    contents = {"model.pt2": graph.getvalue(), "model.safetensors": save(weights_read(program))}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    description = json.dumps(describe(model) | {"sha256": digests}, indent=2, ensure_ascii=False) + "\n"
    with contextlib.ExitStack() as files:  # the last to be written is the first to be renamed: the digests of the others
        for name, content in {**contents, "model.json": description.encode()}.items():
            files.enter_context(replacing(folder / name, "wb")).write(content)
    return difference


def exported(model: Inference) -> ExportedProgram:
    """The graph of `model` for any number of rows, in aten operators only, without source file names.

    Raises:
        InputError: an encoder class cannot be traced for any number of rows, or uses operators of other libraries.
    """
    batch = Dim("batch")
    example = {modality: each(lambda spec: spec.zeros(3), description) for modality, description in model.inputs.items()}
    sizes = {modality: each(lambda _: {0: batch}, description) for modality, description in model.inputs.items()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", category=FutureWarning)  # raised by torch itself inside torch.export
        try:
            program = torch.export.export(model, (example,), dynamic_shapes=(sizes,), strict=False)
        except Exception as error:  # torch.export raises errors of any type for a user's own encoder class
            raise InputError(f"torch.export cannot trace the model: {type(error).__name__}: {error}") from error
        program = program.run_decompositions(ik.decompositions())
    for node in program.graph.nodes:
        for note in ("stack_trace", "from_node", "torch_fn"):
            node.meta.pop(note, None)
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten":
            raise InputError(f"{node.target}: the exported graph contains an operator that is not one of torch")
    return program


def largest_difference(model: Inference, other: Any) -> float:
    """The largest difference of the logits of two models over `BATCHES`, in units of the largest logit or 1; NaN if one is."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    for rows in BATCHES:
        drawn = {label: _random(spec, rows, generator) for label, spec in flat(model.inputs).items()}
        inputs = nested(drawn, model.inputs)
        ours, theirs = logits(model, inputs), logits(other, inputs)
        if not bool(ours.isfinite().all()):
            raise InputError("the checkpoint's logits are not finite")
        scale = ours.abs().max().clamp(min=1)
        differences.append((ours - theirs).abs().max() / scale)
    return float(torch.stack(differences).max())


def _random(spec: InputSpec, rows: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, or integers 0 and 1: the number of integers that an encoder accepts is unknown."""
    if spec.floating:
        return torch.randn(rows, *spec.shape, generator=generator)
    return torch.randint(2, (rows, *spec.shape), generator=generator).to(spec.torch_dtype)


@torch.no_grad()
def logits(model: Any, inputs: Mapping[str, Input]) -> Tensor:
    """Logits of the prediction and of every head.  -> (1 + heads, B, C)"""
    output = model(dict(inputs))
    return torch.stack([output["logits"], *output["logits_by"].values()])


def weights_read(program: ExportedProgram) -> dict[str, Tensor]:
    """The parameters and buffers of the checkpoint that the graph reads, by name. Excluded are λ of the next training step, and
    non-persistent buffers, which the graph holds as constants."""
    used = {node.name for node in program.graph.nodes if node.users}
    read = [spec.target for spec in program.graph_signature.input_specs if spec.arg.name in used]
    return {name: program.state_dict[name].detach().contiguous().clone() for name in read if name in program.state_dict}


def describe(model: Inference) -> dict[str, Any]:
    """The content of model.json: inputs, number and names of classes, method, encoders and versions."""
    weight = getattr(model.fusion, "eval_weight", None)
    return {
        "modalities": list(model.inputs),
        "inputs": plain(model.inputs),
        "classes": model.num_classes,
        "class_names": list(model.classes),
        **{name: model.settings[name] for name in ("method", "method_options", "encoders", "feature_dim")},
        "weight": None if weight is None else weight.tolist(),
        "versions": versions(),
    }
