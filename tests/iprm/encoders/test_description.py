"""Input descriptions: read from batches, kept as plain values, and read back."""

from __future__ import annotations

import json

import pytest
import torch
from iprm.encoders.description import InputSpec, described, descriptions, flat, nested, plain

BATCH = {
    "image": torch.zeros(2, 3, 8, 8),
    "text": {"ids": torch.zeros(2, 6, dtype=torch.int64), "mask": torch.ones(2, 6, dtype=torch.bool)},
}
SPECS = {"image": InputSpec((3, 8, 8)), "text": {"ids": InputSpec((6,), "int64"), "mask": InputSpec((6,), "bool")}}


def test_a_batch_is_described_and_its_description_survives_as_plain_values():
    assert described(BATCH) == SPECS
    values = plain(SPECS)
    assert values["image"] == {"shape": [3, 8, 8], "dtype": "float32"}
    assert descriptions(json.loads(json.dumps(values))) == SPECS
    assert plain({"image": [3, 8, 8]}) == {"image": values["image"]}, "a shape means float32"


def test_a_modality_may_have_a_tensor_called_shape():
    specs = {"it": {"shape": InputSpec((4,)), "dtype": InputSpec((2,), "int64")}}
    assert descriptions(plain(specs)) == specs


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        ((7,), "float32", "vector"),
        ((5, 7), "float64", "sequence"),
        ((3, 8, 8), "float32", "image"),
        ((4, 3, 8, 8), "float16", "frames"),
        ((), "float32", "tensor"),
        ((7,), "int64", "tokens"),
        ((3, 8, 8), "uint8", "tensor"),
    ],
)
def test_kinds(shape, dtype, kind):
    assert InputSpec(shape, dtype).kind == kind


def test_labels_keep_order_and_lead_back():
    assert list(flat(BATCH)) == ["image", "text.ids", "text.mask"]
    assert nested(flat(SPECS), SPECS) == SPECS
