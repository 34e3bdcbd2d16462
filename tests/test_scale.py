"""The arithmetic of benchmarks/scale_model.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scale_model as model
import torch
import torch.distributed as dist
from iprm_kernels._head_step import _take_share
from torch.utils._python_dispatch import TorchDispatchMode

from iprm_kernels.collectives import joint_sums


@pytest.mark.parametrize(("pairs", "size"), [(1, 12), (3, 28), (6, 52)])
def test_a_message_is_two_sums_a_pair_and_a_count(pairs, size):
    assert model.message_bytes(pairs) == size


def test_the_tree_is_what_nccl_predicts_of_itself_on_two_nodes():
    """NCCL's log in github.com/NVIDIA/nccl/issues/1453: "128 Bytes -> Algo 0 proto 0 time 25.214764", of which 25.2 latency."""
    assert model.tree_latency(16) == pytest.approx(25.2148, abs=0.1)


def test_one_node_asks_nothing_of_the_network():
    dear = model.TREE._replace(inter=1e6)
    assert model.tree_latency(8, dear) == model.tree_latency(8)
    assert model.ring_latency(8, model.RING._replace(inter=1e6)) == model.ring_latency(8)


def test_a_tree_grows_by_the_logarithm_of_nodes_and_a_ring_by_ranks():
    trees = [model.tree_latency(n) for n in model.RANKS]
    hops = np.diff(trees[1:])
    assert hops == pytest.approx([2 * model.TREE.inter] * len(hops), abs=0.02)
    rings = [model.ring_latency(n) - model.RING.base for n in model.RANKS]
    assert rings[-1] / rings[-2] == pytest.approx(2, rel=0.01)


def test_a_fitted_network_gives_back_the_measurement_it_was_fitted_to():
    for name, (measured, _) in model.PUBLISHED.items():
        assert model.tree_latency(16, model.NETWORKS[name]) == pytest.approx(measured, abs=0.02)


def test_ranks_come_in_whole_nodes():
    with pytest.raises(ValueError, match="expected whole nodes of 8, got 12"):
        model.tree_latency(12)


def test_without_variation_and_for_a_rank_alone_a_second_wait_costs_nothing():
    assert model.second_wait(64, [0.0], trials=50) == pytest.approx([0], abs=1e-12)
    assert model.second_wait(1, [0.05], trials=50) == pytest.approx([0], abs=1e-12)


def test_a_rank_as_slow_in_both_phases_is_waited_for_once():
    assert model.second_wait(256, [0.01, 0.05], correlation=1.0, trials=50) == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize("forward", [1 / 3, 1 / 2])
def test_small_variation_costs_what_the_largest_of_normal_variables_says(forward):
    """With m = E[max of N standard normals], σ m (f + (1-f) - √(f² + (1-f)²)) to first order in σ."""
    ranks, variation = 64, 0.002
    largest = np.random.default_rng(1).standard_normal((20_000, ranks)).max(1).mean()
    expected = variation * largest * (1 - math.hypot(forward, 1 - forward))
    assert model.second_wait(ranks, [variation], forward=forward, trials=20_000)[0] == pytest.approx(expected, rel=0.02)


def test_a_second_wait_costs_more_with_more_ranks_and_more_variation():
    small, large = (model.second_wait(n, [0.01, 0.05]) for n in (8, 512))
    assert small[0] < small[1] < large[1]
    assert small[0] < large[0]


def test_the_simulation_is_the_same_every_time():
    assert model.second_wait(16, [0.03], trials=100) == model.second_wait(16, [0.03], trials=100)


def test_the_head_step_moves_the_features_of_sum_fusion_and_multiplies_ten_sixths_of_it():
    shape = (1024, 512, 31)
    assert model.head_flops(*shape) / model.head_flops(*shape, "sum") == pytest.approx(10 / 6)
    features = 2 * 6 * shape[0] * shape[1]
    assert model.head_bytes(*shape) - features == 4 * 11 * shape[0] * shape[2]
    assert model.head_bytes(*shape, "sum") - features == 4 * 4 * shape[0] * shape[2]


def test_the_head_steps_share_falls_as_encoders_grow():
    for shape in model.SHAPES:
        shares = [model.head_share(shape, parameters) for parameters in model.PARAMETERS]
        assert shares == sorted(shares, reverse=True)
        assert 0 < shares[-1] < shares[0] < 1


class Operations(TorchDispatchMode):
    """Counts what is called but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = ("unsqueeze", "slice", "select", "detach", "alias")
        self.count += not any(view in str(function) for view in views)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_step_of_several_processes_has_as_many_kernels_more_as_the_model_says(group):
    """Those around the all-reduce; CUDA would launch one for each."""
    target, kl, state, loss, losses = torch.arange(8), torch.ones(2), torch.ones(9), torch.ones(()), torch.ones(3)
    with Operations() as operations:
        joint, share = joint_sums(kl, target, -100, group)
        kl.copy_(joint)
        _take_share(share, state, loss, losses)
    assert operations.count - 1 == model.GROUP_LAUNCHES
