"""The `digits` dataset, and the behaviour common to all datasets: registry, seeds, splits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from iprm.data import make_data
from iprm.data.datasets.digits import scanned_digits
from iprm.data.module import MultimodalData
from iprm.errors import InputError


def test_image_is_the_digit_somewhere_in_an_empty_canvas_and_strip_its_middle_rows():
    pixels, labels = scanned_digits()
    offsets = set()
    for split in make_data("digits").splits.values():
        for image, strip, target, row in zip(
            split.inputs["image"], split.inputs["strip"], split.target, split.origin["image"], strict=True
        ):
            assert target == labels[row]
            np.testing.assert_array_equal(strip, pixels[row][3:5].reshape(-1))
            windows = image[0].unfold(0, 8, 1).unfold(1, 8, 1)
            places = (windows == torch.from_numpy(pixels[row])).all(-1).all(-1).nonzero()
            assert image.sum() == pytest.approx(pixels[row].sum())
            offsets.update(map(tuple, places.tolist()))
    assert offsets == {(top, left) for top in range(5) for left in range(5)}


def test_splits_are_disjoint_complete_and_a_quarter_is_kept_for_the_end():
    splits = make_data("digits").splits
    rows = torch.cat([split.origin["strip"] for split in splits.values()])
    assert rows.sort().values.equal(torch.arange(1797))
    assert len(splits["test"]) == pytest.approx(1797 / 4, abs=5)


def test_a_seed_gives_the_same_data_again_and_another_seed_other_splits():
    one, same, other = (make_data("digits", seed=seed) for seed in (1, 1, 2))
    assert one.describe() == same.describe()
    assert one.splits["train"].inputs["image"].equal(same.splits["train"].inputs["image"])
    assert one.describe()["test"]["digest"] != other.describe()["test"]["digest"]


def test_the_order_of_training_batches_follows_the_seed_and_changes_by_epoch():
    first, again = (make_data("digits", seed=4).train_dataloader() for _ in range(2))

    def order(loader):
        return torch.cat([target for _, target in loader])

    one = order(first)
    assert order(again).equal(one)
    again.sampler.set_epoch(1)  # as Lightning does
    assert not order(again).equal(one)
    assert not order(make_data("digits", seed=5).train_dataloader()).equal(one)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digts", {}, "unknown dataset 'digts': did you mean 'digits'"),
        ("digits", {"batchsize": 3}, "unknown option of dataset 'digits' 'batchsize': did you mean 'batch_size'"),
        ("features", {}, "dataset 'features' needs the option 'path'"),
        ("digits", {"batch_size": 0}, "batch_size: expected a whole number from 1 up, got 0"),
        ("digits", {"num_workers": -1}, "num_workers: expected a whole number from 0 up, got -1"),
        ("digits", {"seed": -1}, "seed: expected a whole number from 0 up, got -1"),
        ("digits", {"val_fraction": 0.5, "test_fraction": 0.5}, "sum below 1, got 0.5 and 0.5"),
        ("digits", {"predict_split": "tset"}, "unknown split 'tset': did you mean 'test'"),
    ],
)
def test_what_does_not_exist_or_cannot_be_is_refused_with_a_suggestion(name, options, message):
    with pytest.raises(InputError, match=message):
        make_data(name, **options)


def test_a_dataset_that_does_not_say_how_it_is_read_is_refused_when_made():
    class Unfinished(MultimodalData):
        pass

    with pytest.raises(TypeError, match=r"abstract class Unfinished.*read"):
        Unfinished()
