"""N processes learn exactly what one process learns from the joined batch: loss, ω, λ and gradients, step by step."""

from __future__ import annotations

import pytest
import torch
from iprm.data.loading import JointBatches
from joint_run import run_processes, train

EXACT = {"rtol": 1e-12, "atol": 1e-12}
#: 59 rows in joint batches of 16: the last one of an epoch has 11; two processes take 6 and 5, four take 3, 3, 3 and 2.
CASES = {
    "two": {"processes": 2},
    "four": {"processes": 4},
    "three modalities on two": {"processes": 2, "modalities": ("sound", "image", "text")},
    "three modalities on four": {"processes": 4, "modalities": ("sound", "image", "text")},
    "labels left out": {"processes": 4, "ignored": 0.5},
    "linear mixup": {"processes": 2, "method": "iprm-linear"},
    "one pass": {"processes": 2, "method": "iprm-one-pass", "modalities": ("sound", "image", "text")},
    "sharded": {"processes": 2, "sharded": True, "modalities": ("sound", "image", "text")},
    "λ of its own on each": {"processes": 2, "apart": True, "steps": 4},
    "a baseline": {"processes": 2, "method": "joint"},
    "replaced heads": {"processes": 2, "replaced": True, "steps": 10},
    "labels left out, replaced heads": {"processes": 4, "replaced": True, "ignored": 0.5, "steps": 10},
    "checkpointed": {"processes": 2, "checkpointed": True, "steps": 10},
    "checkpointed and sharded": {"processes": 2, "checkpointed": True, "sharded": True, "replaced": True, "steps": 10},
}


#: Cases that differ from another one in the method alone, or in the number of processes.
SLOW = ("three modalities on four", "linear mixup", "one pass", "a baseline", "labels left out, replaced heads")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES])
def test_processes_find_what_one_finds_in_the_joined_batch(tmp_path, case):
    options = CASES[case]
    found, alone = run_processes(tmp_path, **options), train(**(options | {"processes": 1}))
    assert len(alone) == options.get("steps", 50)
    for step, expected in enumerate(alone):
        own = [course[step] for course in found]
        assert sum(one["rows"] for one in own) == expected["rows"], step
        torch.testing.assert_close(torch.stack([one["loss"] for one in own]).mean(), expected["loss"], **EXACT)
        for one in own:
            torch.testing.assert_close(one["gradients"], expected["gradients"], **EXACT)
            if expected["strength"] is not None:
                torch.testing.assert_close(one["strength"], expected["strength"], **EXACT)
                torch.testing.assert_close(one["weight"], expected["weight"], **EXACT)
                assert one["strength"].equal(own[0]["strength"]), "the same bits on every process"
                assert one["weight"].equal(own[0]["weight"])


@pytest.mark.parametrize(("modalities", "numbers"), [(("a", "b"), 3), (("a", "b", "c"), 7)])
def test_a_step_costs_one_call_of_two_numbers_a_pair_and_the_count_of_rows(tmp_path, modalities, numbers):
    for course in run_processes(tmp_path, 2, steps=3, modalities=modalities):
        assert [step["sums"] for step in course] == [[numbers]] * 3


def test_a_process_without_rows_leaves_the_joint_batch_what_it_is(tmp_path):
    options = {"steps": 6, "rows": 3, "joint": 4}
    found, alone = run_processes(tmp_path, 4, **options), train(1, **options)
    assert [course[0]["rows"] for course in found] == [1, 1, 1, 0]
    for step, expected in enumerate(alone):
        for course in found:
            torch.testing.assert_close(course[step]["gradients"], expected["gradients"], **EXACT)


# batches


def batches(rows: int, batch_size: int, processes: int, monkeypatch, epoch: int = 0, **options) -> list[list[list[int]]]:
    """The rows of each batch, for every process."""
    found = []
    for rank in range(processes):
        monkeypatch.setattr("iprm.data.loading.rank", lambda rank=rank: rank)
        monkeypatch.setattr("iprm.data.loading.world_size", lambda: processes)
        sampler = JointBatches(rows, batch_size, **options)
        sampler.set_epoch(epoch)
        found.append([own.tolist() for own in sampler])
        assert len(found[-1]) == len(sampler)
    return found


def flat(lists: list[list[int]]) -> list[int]:
    return [row for rows in lists for row in rows]


def joined(found: list[list[list[int]]]) -> list[list[int]]:
    return [flat(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("rows", [59, 64, 67, 5, 1])
@pytest.mark.parametrize("processes", [2, 4])
def test_the_joint_batches_are_those_of_one_process_with_a_batch_as_large(rows, processes, monkeypatch):
    alone = joined(batches(rows, 4 * processes, 1, monkeypatch))
    found = batches(rows, 4, processes, monkeypatch)
    assert joined(found) == alone
    assert flat(alone) == list(range(rows)), "in evaluation every row once"
    for parts in zip(*found, strict=True):
        sizes = [len(own) for own in parts]
        assert max(sizes) - min(sizes) <= 1


def test_an_epochs_order_depends_on_seed_and_epoch_alone(monkeypatch):
    def order(epoch, seed):
        return joined(batches(60, 4, 2, monkeypatch, epoch, shuffle=True, seed=seed))

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(4, 1)
    assert order(3, 1) != order(3, 2)
    assert order(1, 0) != order(0, 1)
    assert sorted(flat(order(3, 1))) == list(range(60))


@pytest.mark.parametrize(("rows", "left_out"), [(64, 0), (65, 1), (67, 3), (68, 0), (5, 0)])
def test_a_rest_of_fewer_than_two_rows_a_process_is_left_out_of_an_epoch_of_training(rows, left_out, monkeypatch):
    found = joined(batches(rows, 4, 2, monkeypatch, shuffle=True))
    assert sum(map(len, found)) == rows - left_out
