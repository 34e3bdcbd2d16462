"""A trained model as a function of its inputs: what `iprm export` and `iprm predict --input` read from a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from iprm.data import options_of
from iprm.encoders.description import Input, descriptions
from iprm.encoders.registry import imported_classes
from iprm.errors import InputError
from iprm.fusion.module import FusionModule
from iprm.training.checkpoint import read_checkpoint
from iprm.training.classifier import FusionClassifier


class Inference(nn.Module):
    """A `FusionClassifier` in evaluation: λ is the one that training left, nothing is learned, float32 on the CPU.

    modality -> (B, *shape), or a dict of such tensors, to {"logits": (B, C), "probabilities": (B, C), "logits_by":
    {head: (B, C)}}. It takes the modalities that its method reads, for "unimodal-<modality>" that one alone.
    """

    def __init__(self, model: FusionClassifier) -> None:
        super().__init__()
        self.settings: dict[str, Any] = model.structure
        assert isinstance(model.fusion, FusionModule)
        self.fusion, self.rule = model.fusion, model.rule
        self.encoders = nn.ModuleDict({modality: model.encoders[modality] for modality in self.fusion.modalities})
        self.inputs = {m: description for m, description in descriptions(self.settings["inputs"]).items() if m in self.encoders}
        self.num_classes: int = self.settings["num_classes"]
        self.float().eval().requires_grad_(False)

    def forward(self, inputs: Mapping[str, Input]) -> dict[str, Any]:
        output = self.fusion({modality: encoder(inputs[modality]) for modality, encoder in self.encoders.items()})
        logits = self.rule.predict(output)
        return {
            "logits": logits,
            "probabilities": logits.softmax(1),
            "logits_by": output.logits_by,
        }


def load_inference(path: str | Path, encoders: Collection[str] = ()) -> Inference:
    """The model of a checkpoint that `iprm fit` has written, whatever precision or device it was trained with.

    No code of the checkpoint runs: tensors and plain values alone are read, and no module is imported because the checkpoint
    names it.

    Args:
        path: the file.
        encoders: import paths of encoder classes that the checkpoint may name, beside the encoders of `ENCODERS`.

    Raises:
        InputError: no such file, no checkpoint of `iprm fit`, one with an encoder class that is not among `encoders`, or one
            whose weights are not those of its settings.
    """
    checkpoint = read_checkpoint(path, mmap=True)
    known = options_of(FusionClassifier)
    settings = {name: value for name, value in checkpoint["hyper_parameters"].items() if name in known}
    try:
        for modality, cls in imported_classes(settings.get("encoders")).items():
            if cls not in encoders:
                raise InputError(
                    f"the encoder of modality {modality!r} is the class {cls}, which would be imported and run; "
                    f"if you trust it, add --encoder {cls}"
                )
        with torch.device("meta"):  # no memory is taken for weights that are about to be replaced, however large a size says
            model = FusionClassifier(**settings)
        model.load_state_dict(checkpoint["state_dict"], assign=True)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise InputError(f"{path}: the model of this checkpoint cannot be made: {error}") from error
    return Inference(model)
