"""A trained model loaded from a checkpoint for inference, by `iprm export` and `iprm predict --input`."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from iprm.data import options_of
from iprm.encoders.description import Input, descriptions, flat
from iprm.encoders.named_modules import NamedModules
from iprm.encoders.registry import imported_classes
from iprm.errors import InputError
from iprm.fusion.module import FusionModule
from iprm.training.checkpoint import read_checkpoint
from iprm.training.classifier import FusionClassifier

#: Input tensors of a model that is read from a checkpoint alone.
MOST_INPUTS = 64
#: Settings of a checkpoint that would start a compiler or need a GPU, and change no result.
SPEEDS = {"compile", "cuda_graph"}


class Inference(nn.Module):
    """A `FusionClassifier` in evaluation mode, float32 on the CPU, without gradients, with the last λ of training.

    modality -> (B, *shape), or a dict of such tensors, to {"logits": (B, C), "probabilities": (B, C), "logits_by":
    {head: (B, C)}}. Its inputs are the modalities that the method reads: for "unimodal-<modality>", that one alone.
    """

    def __init__(self, model: FusionClassifier) -> None:
        super().__init__()
        self.settings: dict[str, Any] = model.structure
        assert isinstance(model.fusion, FusionModule)
        self.fusion, self.rule = model.fusion, model.rule
        self.encoders = NamedModules({modality: model.encoders[modality] for modality in self.fusion.modalities})
        self.inputs = {m: description for m, description in descriptions(self.settings["inputs"]).items() if m in self.encoders}
        self.classes, self.num_classes = model.classes, int(self.settings["num_classes"])
        self.float().eval().requires_grad_(False)

    def forward(self, inputs: Mapping[str, Input]) -> dict[str, Any]:
        output = self.fusion({modality: self.encoders[modality](inputs[modality]) for modality in self.fusion.modalities})
        logits = self.rule.predict(output)
        return {"logits": logits, "probabilities": logits.softmax(1), "logits_by": output.logits_by}


def load_inference(path: str | Path, encoders: Collection[str] = ()) -> Inference:
    """Loads the model of a checkpoint of `iprm fit`, trained in any precision and on any device.

    No code of the checkpoint runs: only tensors and plain values are read, and a class that the checkpoint names is imported
    only if `encoders` lists it.

    Args:
        path: the file.
        encoders: import paths of encoder classes to allow, in addition to the encoders of `ENCODERS`.

    Raises:
        InputError: there is no such file, it is not a checkpoint of `iprm fit`, it names an encoder class that is not in
            `encoders`, or its weights do not fit its settings.
    """
    checkpoint = read_checkpoint(path, mmap=True)
    known = set(options_of(FusionClassifier))
    settings = {name: value for name, value in checkpoint["hyper_parameters"].items() if name in known - SPEEDS}
    try:
        inputs = settings["inputs"]
        count = len(flat(descriptions(inputs)))  # each takes time to build, and each pair of modalities memory
        if count > MOST_INPUTS:
            raise InputError(f"expected at most {MOST_INPUTS} input tensors, got {count}")
        for modality, cls in imported_classes(settings.get("encoders")).items():
            if cls not in encoders:
                raise InputError(
                    f"the encoder of modality {modality!r} is the class {cls}, which would be imported and run; "
                    f"if you trust it, add {shlex.join(['--encoder', cls])}"
                )
        with torch.device("meta"):  # allocates nothing: the weights are replaced below, and a damaged size may be huge
            model = FusionClassifier(**settings)
        model.load_state_dict(checkpoint["state_dict"], assign=True)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise InputError(f"{path}: the model of this checkpoint cannot be made: {error}") from error
    return Inference(model)
