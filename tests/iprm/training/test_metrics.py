"""Epoch metrics against scikit-learn on the whole split, and against sums computed directly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from iprm.fusion.output import FusionOutput
from iprm.training.class_metrics import mean_average_precision
from iprm.training.metrics import EpochMeans, EpochMetrics
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

C = 4


def batches(classes: int = C, sizes=(9, 9, 5)):
    """Batches of outputs of two heads, with targets below `classes`."""
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        logits = torch.randn(size, C, generator=generator)
        heads = {"x": logits + torch.randn(size, C, generator=generator), "mix": torch.randn(size, C, generator=generator)}
        target = torch.arange(size) % classes
        yield FusionOutput(torch.nn.functional.cross_entropy(logits, target), logits, heads), target


def measured(data) -> dict[str, float]:
    metrics = EpochMetrics()
    for output, target in data:
        metrics.update(output, target)
    return {name: value.item() for name, value in metrics.compute().items()}


def joined(data):
    """The whole split: target (N,), and logits (N, C) by head, "" the prediction's."""
    outputs, targets = zip(*data, strict=True)
    logits = {"": torch.cat([out.logits for out in outputs])}
    logits |= {name: torch.cat([out.logits_by[name] for out in outputs]) for name in outputs[0].logits_by}
    return torch.cat(targets), logits


def test_every_metric_of_a_split_is_scikit_learns():
    target, logits = joined(batches())
    expected = {
        "loss": torch.nn.functional.cross_entropy(logits[""], target).item(),
        "accuracy": accuracy_score(target, logits[""].argmax(1)),
        "macro_f1": f1_score(target, logits[""].argmax(1), average="macro"),
        "map": average_precision_score(np.eye(C)[target], logits[""].double().softmax(1), average="macro"),
        "accuracy_x": accuracy_score(target, logits["x"].argmax(1)),
        "accuracy_mix": accuracy_score(target, logits["mix"].argmax(1)),
    }
    assert measured(batches()) == pytest.approx(expected)


def test_a_class_that_the_split_does_not_have_does_not_count_in_the_mean_over_classes():
    target, logits = joined(batches(classes=C - 1))
    probability = logits[""].double().softmax(1)
    values = measured(batches(classes=C - 1))
    assert values["map"] == pytest.approx(average_precision_score(np.eye(C - 1)[target], probability[:, : C - 1]))
    assert values["macro_f1"] == pytest.approx(f1_score(target, logits[""].argmax(1), average="macro"))


def test_rows_labelled_minus_100_count_in_no_metric():
    """Of the validation, and of the means of a training epoch."""
    (output, target), *_ = batches(sizes=(23,))
    kept = torch.arange(23) % 4 != 1
    logits, labels = output.logits[kept], target[kept]
    loss = torch.nn.functional.cross_entropy(logits, labels)
    part = FusionOutput(loss, logits, {name: x[kept] for name, x in output.logits_by.items()}), labels
    whole = output._replace(loss=loss), target.where(kept, torch.tensor(-100))
    assert measured([whole]) == pytest.approx(measured([part]))
    assert means_of([whole, part]) == pytest.approx(means_of([part, part]))
    nothing = output._replace(loss=torch.tensor(torch.nan)), torch.full((23,), -100)
    assert measured([whole, nothing]) == pytest.approx(measured([part]))
    assert means_of([whole, nothing]) == pytest.approx(means_of([part]))


def test_equal_scores_are_one_threshold():
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(4, (40, 3), generator=generator) / 4
    target = torch.randint(3, (40,), generator=generator)
    expected = average_precision_score(np.eye(3)[target], score.double(), average="macro")
    assert mean_average_precision(score, target).item() == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [1, 500, 2**21])
@pytest.mark.parametrize("levels", [5, 10**6])
def test_average_precision_of_many_unequal_classes_is_scikit_learns(chunk, levels, monkeypatch):
    """One class has half of the rows, some have one, some none."""
    monkeypatch.setattr("iprm.training.class_metrics.CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(levels, (400, 90), generator=generator) / levels
    target = (torch.rand(400, generator=generator) ** 4 * 90).long()
    expected = [average_precision_score((target == k).numpy(), score[:, k].numpy()) for k in target.unique()]
    assert mean_average_precision(score, target).item() == pytest.approx(np.mean(expected), rel=1e-6)


def test_metrics_of_4000_classes_copy_the_probabilities_once():
    """(2000, 4000) float32 are 32 MB; the metrics took 160 to 180 MB when scores were sorted, and take 71 MB."""
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2000, 4000, generator=generator), torch.randint(4000, (2000,), generator=generator)
    metrics = EpochMetrics()
    metrics.update(FusionOutput(torch.tensor(1.0), logits, {"x": logits}), target)
    with torch.profiler.profile(profile_memory=True) as profile:
        metrics.compute()
    peak = held = 0
    for event in sorted(profile.events(), key=lambda event: event.time_range.start):
        held += event.self_cpu_memory_usage
        peak = max(peak, held)
    assert peak < 100 * 2**20


@pytest.mark.parametrize("classes", [3, 5000])
def test_metrics_of_thousands_of_classes_take_memory_of_the_classes(classes):
    """With a matrix of classes, 5,000 would take 200 MB."""
    target = torch.arange(40) % 3 * (classes // 3)
    logits = torch.randn(40, classes, generator=torch.Generator().manual_seed(0))
    with torch.profiler.profile(profile_memory=True) as profile:
        values = measured([(FusionOutput(torch.tensor(1.0), logits, {"x": logits}), target)])
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert allocated < 200 * 40 * classes
    assert values["macro_f1"] == pytest.approx(f1_score(target, logits.argmax(1), average="macro"))


def test_batches_count_by_their_rows():
    (output, target), *_ = batches(sizes=(23,))
    halves = [
        (
            FusionOutput(torch.nn.functional.cross_entropy(output.logits[rows], target[rows]), output.logits[rows], {}),
            target[rows],
        )
        for rows in (slice(0, 20), slice(20, 23))
    ]
    assert measured(halves) == pytest.approx(measured([(output._replace(logits_by={}), target)]))


def test_a_split_is_forgotten_by_the_next():
    metrics = EpochMetrics()
    first, second, _ = batches()
    metrics.update(*first)
    metrics.reset()
    metrics.update(*second)
    assert {name: value.item() for name, value in metrics.compute().items()} == measured([second])


def test_an_output_without_a_loss_is_refused():
    (output, target), *_ = batches()
    with pytest.raises(TypeError, match="output: expected one with a loss"):
        EpochMetrics().update(output._replace(loss=None), target)


def step(loss: float, correct: int, rows: int, **measures: float):
    """An output whose prediction is right in the first `correct` of `rows`, and head `x` in none, with twice the loss."""
    target = torch.zeros(rows, dtype=torch.int64)
    logits = torch.nn.functional.one_hot((torch.arange(rows) >= correct).long(), 2).float()
    wrong = torch.nn.functional.one_hot(torch.ones(rows, dtype=torch.int64), 2).float()
    losses_by = {"x": torch.tensor(2 * loss)}
    named = {name: torch.tensor(value) for name, value in measures.items()}
    return FusionOutput(torch.tensor(loss), logits, {"x": wrong}, losses_by=losses_by, measures=named), target


def means_of(steps, **state: float) -> dict[str, float]:
    means = EpochMeans()
    for output, target in steps:
        means.update(output, target)
    found = means.compute({name: torch.tensor(value) for name, value in state.items()})
    return {name: value.item() for name, value in found.items()}


def test_training_means_are_over_rows():
    values = means_of([step(loss=1.0, correct=3, rows=4), step(loss=4.0, correct=1, rows=2)])
    loss = (4 * 1 + 2 * 4) / 6
    expected = {"train_loss": loss, "train_loss_x": 2 * loss, "train_accuracy": 4 / 6, "train_accuracy_x": 0}
    assert values == pytest.approx(expected)


def test_measures_are_means_over_the_steps_that_gave_them_by_their_own_names():
    steps = [step(1.0, 1, 2, strength_x=0.2, k=1.0), step(1.0, 1, 2, strength_x=0.4, k=3.0), step(1.0, 1, 2, ratio=7.0)]
    values = means_of(steps, weight=0.4)
    measures = {name: value for name, value in values.items() if not name.startswith("train")}
    assert measures == pytest.approx({"strength_x": 0.3, "k": 2.0, "ratio": 7.0, "weight": 0.4})


def test_means_continue_from_a_saved_state():
    first, second = step(1.0, 1, 2, k=1.0), step(3.0, 2, 4, k=3.0)
    whole, saved, restored = EpochMeans(), EpochMeans(), EpochMeans()
    for output, target in (first, second):
        whole.update(output, target)
    saved.update(*first)
    restored.load_state_dict(saved.state_dict(), torch.device("cpu"))
    restored.update(*second)
    assert restored.compute({}) == whole.compute({})


def test_an_epoch_without_steps_has_no_means():
    means = EpochMeans()
    means.update(*step(1.0, 1, 2))
    means.reset()
    assert means.compute({}) == {}


def test_means_survive_outputs_that_are_written_over():
    """Overwrites the outputs, as the next replay of a CUDA graph does."""
    output, target = step(2.0, 1, 2, strength_x=0.25)
    means = EpochMeans()
    means.update(output, target)
    output.loss.fill_(7.0)
    output.measures["strength_x"].fill_(7.0)
    values = means.compute({})
    assert (values["train_loss"].item(), values["strength_x"].item()) == (2.0, 0.25)
