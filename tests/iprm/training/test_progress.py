"""The progress bar of `iprm fit`: its text, and how often it reads metrics."""

from __future__ import annotations

import io

import iprm.training.callbacks.progress
import pytest
from feature_files import arrays, save
from iprm.data.datasets.features import Features
from iprm.training.callbacks.progress import RunProgress, summary
from training import classifier, fit


@pytest.fixture
def read(monkeypatch) -> list[dict[str, str]]:
    """The metrics that the bar received at each read."""
    said: list[dict[str, str]] = []

    def reading(metrics: dict[str, float]) -> dict[str, str]:
        said.append(summary(metrics))
        return said[-1]

    monkeypatch.setattr(iprm.training.callbacks.progress, "summary", reading)
    return said


def run(folder, batch_size: int, epochs: int) -> RunProgress:
    data = Features(save(folder, arrays()), batch_size=batch_size)
    bar = RunProgress(console_kwargs={"file": io.StringIO(), "force_terminal": True})
    fit(folder, data, classifier(data), epochs=epochs, callbacks=[bar], enable_progress_bar=True)
    return bar


def test_metrics_are_read_by_the_epoch_and_not_by_the_step(tmp_path, read):
    run(tmp_path, 40, 3)
    of_one_step = len(read)
    run(tmp_path, 4, 3)
    assert len(read) - of_one_step == of_one_step


def test_the_bar_tells_loss_weights_and_the_accuracy_of_every_head(tmp_path, read):
    bar = run(tmp_path, 8, 2)
    assert read[-1].keys() == {"loss", "λ", "ω", "val %", "audio", "text", "mix"}
    assert bar.get_metrics(None, None) == read[-1]


def test_within_a_long_epoch_it_tells_how_far_loss_and_weights_are(tmp_path, read, monkeypatch):
    monkeypatch.setattr(iprm.training.callbacks.progress, "READ_EVERY", 5)
    run(tmp_path, 4, 1)
    assert next(said for said in read if said).keys() == {"loss", "λ", "ω"}, "before any validation"


def test_the_bar_is_drawn_ten_times_a_second():
    assert RunProgress().refresh_rate == 10
