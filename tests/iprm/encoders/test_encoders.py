"""Encoders: default choice, input and output of each, and errors for encoders that cannot be built."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from iprm.encoders import registry
from iprm.encoders.description import InputSpec
from iprm.encoders.registry import build_encoders, canonical
from iprm.errors import InputError
from torch import nn

IMAGES = [(1, 8, 8), (1, 12, 12), (1, 40, 64), (3, 96, 32), (2, 1, 5)]


def encoder(shape, setting="auto", feature_dim=16):
    torch.manual_seed(0)
    encoders, widths = build_encoders({"it": shape}, feature_dim, {"it": setting})
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


# ResNet-18


@pytest.mark.parametrize("channels", [1, 3])
def test_resnet18_encodes_images_of_any_number_of_channels_in_512_features(channels):
    module, width = encoder((channels, 33, 40), "resnet18")
    assert width == 512
    assert module(torch.randn(2, channels, 33, 40)).shape == (2, 512)
    # the first convolution aside, which depends on the channels: 11,176,512 parameters, as torchvision's without its head
    count = sum(x.numel() for x in module.parameters()) - channels * 64 * 7 * 7
    assert count == 11_176_512 - 3 * 64 * 7 * 7


def test_features_of_frames_are_the_mean_of_those_of_each():
    module, _ = encoder((3, 2, 32, 32), "resnet18")
    module.eval()
    frames = torch.randn(4, 3, 2, 32, 32)
    with torch.no_grad():
        each = torch.stack([module(frames[:, index]) for index in range(3)])
        torch.testing.assert_close(module(frames), each.mean(0))


def test_without_its_package_resnet18_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"resnet18 needs the package transformers: pip install \"iprm-kernels\[vision\]\""):
        encoder((3, 32, 32), "resnet18")


# user-defined classes and factories


class Declared(nn.Module):
    """States its width, and is not to be run."""

    def __init__(self, width: int, layers: int = 1) -> None:
        super().__init__()
        self.feature_dim, self.layers = width, layers

    def forward(self, x):
        raise AssertionError("a stated width needs no batch of zeros")


class Found(nn.Module):
    """States no width, so it is measured; one submodule stays in evaluation mode."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(11, width), nn.BatchNorm1d(width)
        self.norm.eval()

    def forward(self, text):
        assert not self.norm.training
        mask = text["mask"].unsqueeze(2)
        return self.norm((self.table(text["ids"]) * mask).sum(1))


class Flawed(nn.Module):
    def forward(self, x):
        return x[:, None]


TEXT = {"ids": InputSpec((6,), "int64"), "mask": InputSpec((6,), "bool")}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    module = ModuleType("my_encoders")
    vars(module).update(Declared=Declared, Found=Found, Flawed=Flawed, function=lambda: None)
    monkeypatch.setitem(sys.modules, "my_encoders", module)


def test_a_class_is_called_with_its_arguments_and_its_stated_width_is_taken():
    module, width = encoder((3,), {"class_path": "my_encoders.Declared", "init_args": {"width": 9, "layers": 2}})
    assert (type(module), module.layers, width) == (Declared, 2, 9)
    assert encoder((3,), {"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "out_features": 5}})[1] == 5


def test_the_width_of_a_class_that_does_not_state_it_is_that_of_its_features():
    state = torch.get_rng_state()
    module, width = encoder(TEXT, "my_encoders.Found")
    assert width == 4
    assert module.training
    assert not module.norm.training, "as the class has left it"
    assert module.norm.running_mean.equal(torch.zeros(4)), "nothing is learned of zeros"
    torch.manual_seed(0)
    Found()
    expected = torch.get_rng_state()
    encoder(TEXT, "my_encoders.Found")
    assert torch.get_rng_state().equal(expected)
    torch.set_rng_state(state)


def test_a_factory_under_a_name_gets_description_width_and_options(monkeypatch):
    monkeypatch.setitem(registry.ENCODERS, "mine", lambda spec, feature_dim, depth: Declared(feature_dim * depth))
    assert encoder((3,), {"class_path": "mine", "init_args": {"depth": 2}}, 8)[1] == 16
    with pytest.raises(InputError, match="'it': mine needs the option 'depth'"):
        encoder((3,), "mine")


def test_settings_have_one_form():
    given = {"a": "cnn", "b": {"class_path": "x.Y"}, "c": {"class_path": "x.Y", "init_args": {"sizes": (1, 2)}}}
    one = canonical(given)
    assert one == {"a": "cnn", "b": "x.Y", "c": {"class_path": "x.Y", "init_args": {"sizes": [1, 2]}}}
    assert canonical(one) == one


@pytest.mark.parametrize(
    ("inputs", "encoders", "message"),
    [
        ({"it": (7,)}, {"it": "mpl"}, "encoder of modality 'it': unknown encoder 'mpl': did you mean 'mlp'"),
        ({"image": (7,)}, {"imge": "mlp"}, "unknown modality in encoders 'imge': did you mean 'image'"),
        ({"it": (7,)}, {"it": "cnn"}, r"'it': cnn expects an input \(C, H, W\), got \(7,\)"),
        ({"it": (1, 8, 8)}, {"it": "identity"}, r"'it': identity expects an input \(D,\), got \(1, 8, 8\)"),
        ({"it": (7,)}, {"it": "resnet18"}, r"'it': resnet18 expects an input \(C, H, W\) or \(T, C, H, W\), got \(7,\)"),
        (
            {"it": TEXT},
            {},
            r"'it': there is no default for a dict of tensors \(ids, mask\); give a name, or the import path",
        ),
        ({"it": TEXT["ids"]}, {}, r"'it': there is no default for tokens \(6,\) of int64"),
        ({"it": TEXT}, {"it": "mlp"}, r"'it': mlp expects one tensor of floating numbers, got a dict of tensors \(ids, mask\)"),
        (
            {"it": InputSpec((1, 8, 8), "uint8")},
            {"it": "cnn"},
            "cnn expects one tensor of floating numbers, .*uint8",
        ),
        ({"mix": (7,)}, {}, "modality 'mix': the name of a head of the fused prediction; expected another name"),
        ({"": (7,)}, {}, "modality '': expected a name, got an empty one"),
        ({"a.b": (7,), "a": {"b": (3,)}}, {}, "modality 'a.b': the tensor 'b' of the modality 'a' has the same label"),
        ({"it": {"a.b": TEXT["ids"]}}, {}, "modality 'it': expected names of letters, digits and underscores, got 'a.b'"),
        ({"it": {}}, {}, "modality 'it': expected at least one tensor, got an empty dict"),
        ({"it": {"ids": 3}}, {}, "input 'it.ids': expected an InputSpec, or a mapping of shape and dtype, got 3"),
        ({"it": {"shape": [3], "dtype": "float23"}}, {}, "dtype of an input: expected the name of a torch type, .*'float23'"),
        ({"it": (7, -1)}, {}, r"shape of an input: expected whole numbers from 0 up, got \(7, -1\)"),
        ({"it": (7,)}, {"it": 3}, "'it': expected a name, an import path, or a mapping of class_path and init_args, got 3"),
        ({"it": (7,)}, {"it": {"class_path": "mlp", "args": {}}}, "'it': expected a name, an import path, or a mapping"),
        ({"it": (7,)}, {"it": {"class_path": "mlp", "init_args": {"f": nn.ReLU}}}, "'it': expected init_args of plain values"),
        ({"it": (7,)}, {"it": {"class_path": "mlp", "init_args": {"depth": 3}}}, "'it': mlp has no options, got 'depth'"),
        ({"it": (7,)}, {"it": "no_such.Tower"}, "'it': no_such.Tower cannot be imported: No module named 'no_such'"),
        ({"it": (7,)}, {"it": "my_encoders.Foond"}, "'it': my_encoders.Foond cannot be imported: .* has no attribute 'Foond'"),
        ({"it": (7,)}, {"it": "my_encoders.function"}, "'it': expected the import path of a subclass of torch.nn.Module"),
        ({"it": (7,)}, {"it": "my_encoders.Declared"}, "'it': my_encoders.Declared needs the option 'width'"),
        (
            {"it": (7,)},
            {"it": {"class_path": "my_encoders.Declared", "init_args": {"width": 2, "layer": 3}}},
            "'it': unknown option of my_encoders.Declared 'layer': did you mean 'layers'",
        ),
        (
            {"it": (7,)},
            {"it": "my_encoders.Flawed"},
            r"'it': expected features \(B, D\) .* got shape \(2, 1, 7\)",
        ),
    ],
)
def test_what_cannot_be_built_is_named(inputs, encoders, message):
    with pytest.raises(InputError, match=message):
        build_encoders(inputs, 16, encoders)


@pytest.mark.parametrize("width", [0, -4, 2.5, "64", True])
def test_a_width_that_is_no_whole_number_from_1_up_is_refused(width):
    with pytest.raises(InputError, match=f"feature_dim: expected a whole number from 1 up, got {width!r}"):
        build_encoders({"it": (7,)}, width, {})
