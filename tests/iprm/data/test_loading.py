"""Batches of loaders and their workers, the number of workers, and splits that are not in memory."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from feature_files import AugmentedFeatures, AugmentedSplit, arrays, save
from iprm.data import loading, make_data
from iprm.data.datasets.features import Features
from iprm.data.loading import Loader, default_workers
from iprm.data.module import MultimodalData
from iprm.data.quality import check, check_at_start
from iprm.data.split import Batch, Split
from iprm.encoders.description import InputSpec
from iprm.errors import InputError

# random numbers in workers


def loaded(path: str, num_workers: int, epoch: int = 0, after: int = 0, seed: int = 0) -> list[torch.Tensor]:
    """The images of an epoch, or of its remaining batches after a resume, from newly started workers."""
    loader = AugmentedFeatures(path, num_workers=num_workers, seed=seed).train_dataloader()
    assert isinstance(loader, Loader)
    loader.load_state_dict({"epoch": epoch, "batches": after})
    return [inputs["image"] for inputs, _ in loader]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_augmented_batches_are_the_same_by_one_worker_by_two_and_by_workers_started_in_the_middle_of_an_epoch(features):
    alone = loaded(features, 1)
    assert len(alone) == 3
    assert same(loaded(features, 2), alone)
    assert same(loaded(features, 2, after=1), alone[1:])


def test_workers_that_live_on_augment_each_epoch_as_new_ones_do(features):
    loader = AugmentedFeatures(features).train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # as Lightning does
        epochs.append([inputs["image"] for inputs, _ in loader])
    assert same(epochs[1], loaded(features, 1, epoch=1))


class Drawn(torch.utils.data.Dataset):
    """One random number of each generator per batch."""

    def __getitem__(self, rows: torch.Tensor) -> tuple[float, float, float]:
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002 - the generator that others use


def drawn(seed: int, epoch: int, num_workers: int = 1) -> list[tuple[float, float, float]]:
    loader = Loader(Drawn(), num_workers=num_workers, rows=9, batch_size=3, seed=seed)
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_each_batch_has_random_numbers_of_its_own_by_seed_epoch_and_process(monkeypatch):
    found = [*drawn(0, 0), *drawn(0, 1), *drawn(1, 0)]
    monkeypatch.setattr(loading, "world_size", lambda: 2)
    monkeypatch.setattr(loading, "rank", lambda: 1)
    found += drawn(0, 0)
    assert all(len(set(of_generator)) == len(found) == 11 for of_generator in zip(*found, strict=True))


def test_without_workers_random_numbers_are_those_of_the_model(features):
    torch.manual_seed(1)
    first = drawn(0, 0, num_workers=0)[0][0]
    assert first == torch.rand(1, generator=torch.Generator().manual_seed(1)).item()


# number of workers


class OnDisk:
    in_memory = False


@pytest.mark.parametrize(
    ("cores", "processes", "expected"),
    [(16, 4, 3), (16, 1, 8), (4, 1, 3), (4, 4, 1), (2, 8, 1), (1, 1, 1)],
    ids=["shared out", "no more than get faster", "one a core but one", "at least one", "too few cores", "one core"],
)
def test_the_processes_of_a_machine_share_its_cores_out_among_their_workers(monkeypatch, cores, processes, expected):
    monkeypatch.setattr(loading, "available_cores", lambda: cores)
    assert default_workers(OnDisk(), processes) == expected


@pytest.mark.parametrize(("trainer", "torchrun"), [(SimpleNamespace(num_devices=4), None), (None, "4")])
def test_processes_are_those_that_the_trainer_or_torchrun_has_started_here(monkeypatch, features, trainer, torchrun):
    monkeypatch.setattr(loading, "available_cores", lambda: 16)
    if torchrun:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", torchrun)
    data = AugmentedFeatures(features, num_workers=None)
    data.trainer = trainer
    assert data.train_dataloader().num_workers == 3


@pytest.mark.parametrize("num_workers", [0, 1])
def test_as_many_workers_are_started_as_are_asked_for(features, num_workers):
    data = make_data("features", path=features, num_workers=num_workers)
    assert [loader.num_workers for loader in (data.train_dataloader(), data.predict_dataloader())] == [num_workers] * 2


def test_data_in_memory_have_no_workers(features):
    assert Features(features).train_dataloader().num_workers == 0


# splits that are not in memory


@dataclass(frozen=True)
class Made(Split):
    """Produces rows on access, and counts them."""

    made: list[int]
    width: int = 4

    in_memory = False

    def __getitem__(self, rows: int | torch.Tensor) -> Batch:
        self.made.append(len(rows))
        return {"x": torch.randn(len(rows), self.width)}, self.target[rows]


def made(rows: int = 1000, width: int = 4) -> Made:
    return Made({}, torch.arange(rows) % 2, {}, [], width)


class MadeData(MultimodalData):
    def read(self) -> dict[str, Split]:
        return {name: made() for name in ("train", "val", "test")}


def test_shapes_and_the_check_before_a_run_make_a_few_rows_and_take_no_random_numbers():
    before = torch.get_rng_state()
    data = MadeData()
    assert (data.inputs, data.modalities, data.num_classes) == ({"x": InputSpec((4,))}, ("x",), 2)
    assert data.describe()["val"]["rows"] == 1000
    assert sum(data.splits["train"].made) == 4
    assert sum(data.splits["val"].made) == 2
    assert torch.get_rng_state().equal(before)


def test_rows_that_are_made_are_held_to_one_shape():
    with pytest.raises(InputError, match=r"modality 'x': rows of shape \(3,\) in val, of \(4,\) in train"):
        check_at_start("Mine", {"train": made(), "val": made(width=3), "test": made()})


def test_a_check_of_rows_that_are_made_says_that_it_has_not_read_them():
    report = check("Mine", {name: made() for name in ("train", "val", "test")})
    assert [finding.what for finding in report.findings] == ["inputs: made when they are asked for, and not read through"]


# digests


def described(folder, content: dict[str, np.ndarray]) -> dict[str, dict[str, object]]:
    return Features(save(folder, content)).describe()


def test_the_same_data_have_the_same_digests(tmp_path):
    assert described(tmp_path, arrays()) == described(tmp_path, arrays())


OTHERS = {
    "values": {"x_text": arrays()["x_text"] + 1},
    "a width": {"x_text": np.pad(arrays()["x_text"], ((0, 0), (0, 1)))},
    "a name": {"x_words": arrays()["x_text"]},
    "labels of the same splits": {"y": 2 - arrays()["y"], "split": np.arange(60) // 6 % 3},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_other_data_of_the_same_rows_have_other_digests(tmp_path, other):
    one = arrays() | {name: x for name, x in other.items() if name == "split"}
    found, before = described(tmp_path, one | other), described(tmp_path, one)
    assert all(found[name]["digest"] != before[name]["digest"] for name in before)
    assert [split["rows"] for split in found.values()] == [split["rows"] for split in before.values()]


def test_random_numbers_leave_the_digest_what_it_is_and_other_sources_do_not(tmp_path):
    assert MadeData().describe() == MadeData().describe()
    split = Features(save(tmp_path, arrays())).splits["train"]
    one, other = (AugmentedSplit({"text": x}, split.target, split.origin) for x in (torch.zeros(39, 6), torch.ones(39, 6)))
    assert one.digest == AugmentedSplit(one.inputs, split.target, split.origin).digest
    assert one.digest != other.digest
