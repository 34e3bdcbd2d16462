"""The closest name to one that does not exist, and what is a number."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from feature_files import arrays, save
from iprm.data import make_data
from iprm.errors import InputError, check_number, check_whole, closest, plain_values, unknown
from iprm.methods.balancer import Balancer
from iprm.training.checkpoint import read_checkpoint
from iprm.training.classifier import FusionClassifier
from iprm.training.optim import StepAtFraction
from torch import nn

KNOWN = ("digits", "av-digits", "features")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("digts", "digits"), ("DIGITS", "digits"), ("av_digits", "av-digits"), ("feature", "features"), ("xyz", None), ("", None)],
)
def test_the_closest_is_found_whatever_the_case_and_the_dashes_or_else_none(name, meant):
    assert closest(name, KNOWN) == meant


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digts", "unknown dataset 'digts': did you mean 'digits'? (known: av-digits, digits, features)"),
        ("xyz", "unknown dataset 'xyz' (known: av-digits, digits, features)"),
    ],
)
def test_the_message_names_what_is_known(name, message):
    assert unknown("dataset", name, iter(KNOWN)) == message


FLOATS = (np.float16, np.float32, np.float64, np.longdouble)
INTEGERS = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64)
HALVES = [*(kind(0.5) for kind in FLOATS), 0.5, Fraction(1, 2), Decimal("0.5"), np.array(0.5), np.array(0.5, np.float32)]
ONES = [*(kind(1) for kind in INTEGERS), 1, np.array(1)]


@pytest.mark.parametrize("value", [*HALVES, *ONES], ids=lambda value: type(value).__name__)
def test_every_real_number_is_one(value):
    number = check_number("alpha", value, 1)
    assert number == value
    assert type(number) in (int, float)
    assert type(number) is (int if value == 1 else float)


@pytest.mark.parametrize(
    "value",
    [
        *(True, np.True_, "0.5", None, 1j, np.complex64(1), math.nan, np.float32("nan"), np.float32("inf"), Decimal("NaN"), -1),
        *(10**400, Fraction(10**400), np.array([0.5]), torch.tensor([0.5]), np.str_("1"), np.datetime64("2020-01-01"), [0.5]),
    ],
    ids=repr,
)
def test_what_is_no_finite_real_number_from_0_up_is_refused(value):
    with pytest.raises(InputError, match="alpha: expected a number from 0 up, got "):
        check_number("alpha", value)


@pytest.mark.parametrize("value", [1.0, np.float32(1), True, -1, "1", None, np.array([1])], ids=repr)
def test_a_whole_number_is_of_an_integer_type(value):
    with pytest.raises(InputError, match="rows: expected a whole number from 0 up"):
        check_whole("rows", value)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, Decimal, lambda text: Fraction(text)])
def test_an_option_may_be_any_number(kind):
    encoders = {"x": nn.Linear(2, 4), "y": nn.Linear(2, 4)}
    assert Balancer(encoders, 4, 3, "ogm", alpha=kind("0.5")).rule.alpha == 0.5
    assert Balancer(encoders, 4, 3, "mslr", initial={"x": kind("0.5")}).rule.initial == [0.5, 1.0]
    assert Balancer(encoders, 4, 3, "ogm", window=(np.int64(1), np.uint8(5)), freeze={"x": np.int64(2)}).rule.last == 5
    optimizer = torch.optim.SGD(encoders["x"].parameters(), lr=1.0)
    StepAtFraction(optimizer, np.int64(10), kind("0.5"), kind("0.5"))
    assert type(optimizer.param_groups[0]["lr"]) is float
    data = make_data("digits", val_fraction=kind("0.125"), test_fraction=kind("0.25"), batch_size=np.int64(8), seed=np.uint8(3))
    assert (data.fractions, data.batch_size, data.seed) == ({"test": 0.25, "val": 0.125}, 8, 3)


def test_a_checkpoint_of_numpys_numbers_can_be_read(tmp_path):
    """Reading one that holds numpy's own scalars would run code."""
    import lightning as L

    data = make_data("features", path=save(tmp_path, arrays()), batch_size=np.int64(16), seed=np.int32(1))
    model = FusionClassifier(
        {"audio": (np.int64(4),), "text": (np.int32(6),)},
        np.int64(3),
        "ogm",
        {"alpha": np.float32(0.5), "window": [np.int64(0), np.int64(9)]},
        feature_dim=np.uint8(8),
        optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": np.float32(0.25), "momentum": np.float64(0.5)}},
        lr_scheduler={"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": np.float16(0.5)}},
        modality_options={"audio": {"lr_scale": np.float32(0.5), "freeze": np.int64(0)}},
    )
    trainer = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert read_checkpoint(tmp_path / "model.ckpt")["hyper_parameters"]["method_options"] == {"alpha": 0.5, "window": [0, 9]}


def test_numbers_at_any_depth_are_made_plain():
    given = {"a": [np.float32(0.5), {"b": np.int64(3)}], "c": (np.True_, "x", None, 1.5), "d": torch.float32}
    plain = plain_values(given)
    assert plain == given
    assert [type(value) for value in (plain["a"][0], plain["a"][1]["b"], *plain["c"])] == [
        float,
        int,
        bool,
        str,
        type(None),
        float,
    ]
