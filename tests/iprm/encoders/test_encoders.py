"""Encoders: which is chosen, what each takes and gives, and what is said of those that cannot be."""

from __future__ import annotations

import pytest
import torch
from iprm.encoders.small import build_encoders
from iprm.errors import InputError
from torch import nn

IMAGES = [(1, 8, 8), (1, 12, 12), (1, 40, 64), (3, 96, 32), (2, 1, 5)]


def encoder(shape, kind="auto", feature_dim=16):
    torch.manual_seed(0)
    encoders, widths = build_encoders({"it": shape}, feature_dim, {"it": kind})
    return encoders["it"], widths["it"]


@pytest.mark.parametrize(
    ("shape", "kind"),
    [*((shape, "cnn") for shape in IMAGES), *((shape, kind) for shape in [(7,), (1, 5, 4)] for kind in ("mlp", "linear"))],
)
def test_every_encoder_gives_features_of_the_width_asked_for_and_learns(shape, kind):
    module, width = encoder(shape, kind)
    features = module(torch.randn(8, *shape))
    assert width == 16
    assert features.shape == (8, 16)
    features.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    assert any(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


@pytest.mark.parametrize(("shape", "layer"), [((1, 8, 8), nn.Conv2d), ((7,), nn.Linear)])
def test_images_get_convolutions_and_vectors_two_layers(shape, layer):
    chosen, named = (encoder(shape, kind)[0] for kind in ("auto", "cnn" if len(shape) == 3 else "mlp"))
    assert any(isinstance(part, layer) for part in chosen)
    assert repr(chosen) == repr(named)


def test_identity_keeps_features_and_their_width():
    module, width = encoder((7,), "identity")
    x = torch.randn(3, 7)
    assert module(x) is x
    assert width == 7


def test_modalities_may_have_encoders_of_their_own():
    shapes = {"image": [1, 8, 8], "words": [5], "sound": [9]}
    encoders, widths = build_encoders(shapes, 12, {"words": "identity", "sound": "linear"})
    assert widths == {"image": 12, "words": 5, "sound": 12}
    for modality, shape in shapes.items():
        assert encoders[modality](torch.randn(2, *shape)).shape == (2, widths[modality])


@pytest.mark.parametrize(
    ("shapes", "kinds", "message"),
    [
        ({"it": (7,)}, {"it": "mpl"}, "unknown encoder of modality 'it' 'mpl': did you mean 'mlp'"),
        ({"image": (7,)}, {"imge": "mlp"}, "unknown modality in encoders 'imge': did you mean 'image'"),
        ({"it": (7,)}, {"it": "cnn"}, r"'it': cnn expects an input \(C, H, W\), got \(7,\)"),
        ({"it": (1, 8, 8)}, {"it": "identity"}, r"'it': identity expects an input \(D,\), got \(1, 8, 8\)"),
        ({"mix": (7,)}, {}, "modality 'mix': expected a name .* not reserved"),
        ({"items": (7,)}, {}, "modality 'items': expected a name .* not reserved"),
        ({"a.b": (7,)}, {}, "modality 'a.b': expected a name of letters"),
    ],
)
def test_what_cannot_be_built_is_named(shapes, kinds, message):
    with pytest.raises(InputError, match=message):
        build_encoders(shapes, 16, kinds)


@pytest.mark.parametrize("width", [0, -4, 2.5, "64", True])
def test_a_width_that_is_no_whole_number_from_1_up_is_refused(width):
    with pytest.raises(InputError, match=f"feature_dim: expected a whole number from 1 up, got {width!r}"):
        build_encoders({"it": (7,)}, width, {})
