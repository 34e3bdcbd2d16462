"""The figures of a report: colours that everybody can distinguish, the content, and byte-identical repetition."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from importlib import resources

import numpy as np
import pytest
from iprm.compare.record import Angles, Record, Strength
from iprm.compare.runs import read_runs
from iprm.compare.table import Comparison
from iprm.report import figures
from iprm.report.figures import MOST_LINES, PALETTE, Line
from matplotlib.figure import Figure
from run_folders import course, write_comparison, write_metrics

# colours

STYLE = resources.files("iprm.report").joinpath("style.css").read_text(encoding="utf-8")
LIGHT_SCHEME, DARK_SCHEME = (
    {name: [int(value[k : k + 2], 16) / 255 for k in (0, 2, 4)] for name, value in re.findall(r"--([\w-]+): #(\w{6})\b", block)}
    for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
)
COLOURS = [f"c{k}" for k in range(len(PALETTE))]

#: Maps linear RGB to the colour seen with each kind of dichromacy: Machado, Oliveira, Fernandes, "A Physiologically-based Model
#: for Simulation of Color Vision Deficiency", IEEE TVCG 2009, severity 1.
VISIONS = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # of linear sRGB


def linear(colour: Sequence[float]) -> np.ndarray:
    c = np.array(colour)
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """The contrast ratio of WCAG 2.2."""
    low, high = sorted(float(XYZ[1] @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(colour: Sequence[float], vision: str) -> np.ndarray:
    """CIELAB of a colour, as seen with this vision."""
    t = XYZ @ np.clip(np.array(VISIONS[vision]) @ linear(colour), 0, 1) / XYZ.sum(1)
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("scheme", [LIGHT_SCHEME, DARK_SCHEME], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_what_is_behind_them(scheme):
    for text, behind in (("ink", "page"), ("ink", "card"), ("ink", "notice"), ("soft", "page"), ("soft", "card")):
        assert contrast(scheme[text], scheme[behind]) >= 4.5, (text, behind)
    for line in COLOURS:
        assert contrast(scheme[line], scheme["card"]) >= 3, line


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("scheme", [LIGHT_SCHEME, DARK_SCHEME], ids=["light", "dark"])
def test_colours_differ_whoever_sees_them(scheme, vision):
    for one, other in itertools.combinations(COLOURS, 2):
        assert np.linalg.norm(lab(scheme[one], vision) - lab(scheme[other], vision)) >= 20, (one, other)


def test_figures_have_the_colours_of_the_page_in_the_light():
    as_css = {name: "#" + "".join(f"{round(255 * part):02x}" for part in colour) for name, colour in LIGHT_SCHEME.items()}
    assert [as_css[name] for name in COLOURS] == list(PALETTE)
    assert (as_css["soft"], as_css["grid"]) == (figures.SOFT, figures.GRID)


# figures


@pytest.fixture
def axes():
    return Figure().add_subplot()


def drawn(axes) -> dict[str, list[float]]:
    """label -> values of each line that has one."""
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("_")}


def test_lines_are_the_courses_by_epoch_with_training_thin(axes):
    figures.lines(axes, [Line("a", {1: 0.5, 0: 0.25}, 0, {0: 0.1, 1: 0.2})])
    training, validation = axes.lines
    assert list(validation.get_xdata()) == [0, 1]
    assert (list(validation.get_ydata()), list(training.get_ydata())) == ([0.25, 0.5], [0.1, 0.2])
    assert training.get_linewidth() < validation.get_linewidth()


def test_the_mean_is_of_the_runs_that_reach_an_epoch_with_their_range():
    line = figures.mean([{0: 1.0, 1: 2.0}, {0: 3.0}], "m", 0, [{0: 1.0}, {0: 2.0}])
    assert (line.course, line.training, line.band) == ({0: 2.0, 1: 2.0}, {0: 1.5}, {0: (1.0, 3.0), 1: (2.0, 2.0)})
    assert figures.mean([{0: 1.0}], "m", 0).band == {}


def test_the_confusion_matrix_shows_every_count_that_is_not_zero(axes):
    counts = {(0, 0): 5, (0, 1): 1, (1, 1): 6}
    figures.confusion(axes, Record("iprm", ("a",), 2, [6, 6], counts, [], [], True, 0, {}))
    assert {(text.get_position()[::-1], int(text.get_text())) for text in axes.texts} == set(counts.items())
    (image,) = axes.images
    alpha = image.get_array()[..., 3]
    assert alpha[1, 0] == 0
    assert alpha[0, 0] > alpha[0, 1] > 0


def test_angles_are_shares_over_180_degrees(axes):
    figures.angles(axes, [Angles(("a", "b"), [1, 3, 0, 0], np.pi / 3, 0)])
    values, edges, _ = axes.patches[0].get_data()
    assert (list(values), list(edges)) == ([0.25, 0.75, 0, 0], [0, 45, 90, 135, 180])
    assert axes.lines[0].get_xdata()[0] == pytest.approx(60)


def test_strength_has_a_bar_for_each_class_with_samples_from_the_middle(axes):
    figures.strength_by_class(axes, Strength(("a", "b"), ([0.2, None, 0.9], [0.8, None, 0.1])))
    assert [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches] == [(0.5, 0.2), (0.5, pytest.approx(0.9))]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2"]


def test_of_1000_classes_the_strongest_and_weakest_have_a_bar(axes):
    omega = [k / 1000 for k in range(1000)]
    figures.strength_by_class(axes, Strength(("a", "b"), (omega, [1 - w for w in omega])))
    assert len(axes.patches) == figures.MOST_BARS
    assert axes.patches[0].get_height() == pytest.approx(0.499)


def comparison(folder, *methods, **options) -> Comparison:
    return Comparison(folder, read_runs([write_comparison(folder, methods, **options)]))


def test_the_plot_has_the_accuracy_of_every_method_and_the_course_of_its_measures(tmp_path):
    scores, measured = figures.comparison_figure(comparison(tmp_path / "c", "unimodal-audio", "iprm")).axes
    assert [label.get_text() for label in scores.get_yticklabels()] == ["unimodal-audio", "iprm"]
    seeds = [pytest.approx([50, 51]), pytest.approx([60, 61])]
    assert all(any(list(line.get_xdata()) == each for line in scores.lines) for each in seeds)
    expected = course(("video", "audio"), 5, mixes=True)[1::2]
    lines = drawn(measured)
    assert lines["iprm: λ"] == pytest.approx([row["weight"] for row in expected])
    assert lines["iprm: ω audio"] == pytest.approx([row["strength_audio"] for row in expected])


def test_after_one_epoch_the_axis_of_epochs_has_whole_numbers(tmp_path):
    found = comparison(tmp_path / "c", "concat", "iprm", seeds=[0], epochs=1)
    assert found.title == "features: 1 seed, 1 epoch"
    _, measured = figures.comparison_figure(found).axes
    assert all(tick == round(tick) for tick in measured.get_xticks())


def test_without_a_method_that_measures_anything_the_plot_says_so(tmp_path):
    _, measured = figures.comparison_figure(comparison(tmp_path / "c", "sum", "concat")).axes
    assert [text.get_text() for text in measured.texts] == ["none of these methods measures weights"]


def test_the_plot_of_twelve_modalities_names_the_pairs_farthest_from_the_middle_and_draws_all(tmp_path):
    modalities = [f"m{k}" for k in range(12)]
    folder = write_comparison(tmp_path / "c", ("iprm",), modalities=modalities, seeds=[0])
    rows = course(modalities, 5, mixes=True)
    rows[-1]["weight_m10_m11"] = 0.999
    write_metrics(folder / "iprm/seed=0/metrics.csv", rows)
    _, measured = figures.comparison_figure(Comparison(folder, read_runs([folder]))).axes
    names = [text.get_text() for text in measured.get_legend().get_texts()]
    assert len(names) == MOST_LINES
    assert {"iprm: λ m9 × m11", "iprm: λ m10 × m11"} <= set(names), "at 0.79 and at 0.999"
    assert measured.get_title() == "Named: the 12 of 66 that end farthest from 0.5."
    (others, *_) = measured.collections
    assert len([line for line in measured.lines if len(line.get_xdata()) == 5]) + len(others.get_segments()) == 66


def test_many_epochs_are_thinned_to_the_smallest_and_the_largest_value_of_each_part(axes):
    course = {epoch: float(epoch % 100 == 50) for epoch in range(100_000)}
    figures.lines(axes, [Line("a", course, 0, band={epoch: (value, value + 1) for epoch, value in course.items()})])
    (line,) = axes.lines
    assert len(line.get_xdata()) == figures.MOST_POINTS
    assert sum(line.get_ydata()) == figures.MOST_POINTS // 2
    assert all(course[epoch] == value for epoch, value in zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert (np.diff(line.get_xdata()) > 0).all()
    few = {epoch: course[epoch] for epoch in range(figures.MOST_POINTS)}
    assert figures.thinned(few) == (list(few), list(few.values()))


@pytest.mark.parametrize("views", [2, 3, 6, 12])
def test_axes_keep_their_size_beside_long_names(tmp_path, views, recwarn):
    """matplotlib gives up the layout, with a warning, if the names need more room than there is."""
    modalities = [f"{'front' if k % 2 else 'rear'}_camera_embedding_of_the_video_{k}" for k in range(views)]
    methods = ("iprm", "iprm-one-pass", *(f"unimodal-{modality}" for modality in modalities))
    figure = figures.comparison_figure(comparison(tmp_path / "c", *methods, modalities=modalities, seeds=[0]))
    widths = [axes.get_position().width for axes in figure.axes]
    assert min(widths) > 0.2
    assert [str(warning.message) for warning in recwarn] == []


def test_a_name_is_shortened_in_its_middle():
    assert figures.short("front_camera_left", 12) == "front_…_left"
    assert figures.short("front_camera", 12) == "front_camera"


def test_the_plot_of_many_methods_leaves_out_omega(tmp_path):
    methods = [f"iprm-{k}" for k in range(5)]
    _, measured = figures.comparison_figure(comparison(tmp_path / "c", *methods, seeds=[0])).axes
    assert [text.get_text() for text in measured.get_legend().get_texts()] == [f"{method}: λ" for method in methods]


def test_the_same_figure_is_the_same_bytes_and_is_titled():
    one, same = (figures.svg(lambda axes: axes.plot([0, 1], [0, 1], **figures.style(8)), "a <b>", "c & d") for _ in range(2))
    assert one == same
    assert one.startswith('<svg viewBox="0 0 336 204" role="img"><title>a &lt;b&gt;</title><desc>c &amp; d</desc>')
    assert "var(--grid)" in one
    assert not re.search("clip-path|url|metadata|<style|#[0-9a-f]{6}", one)
