"""Intervals and image quality agree with reference libraries, closed forms and double loops;
pictures show the values passed to them.

Run alone: pytest tests/test_metrics.py
"""

import itertools
import math
import statistics

import numpy as np
import pytest
import scipy.linalg
import torch
import torchmetrics.image.fid
import torchmetrics.image.kid
from scipy import stats
from torch_fidelity import metric_fid, metric_prc

from dmat import seeds
from dmat.metrics import pictures, study_pictures
from dmat.metrics.intervals import over_seeds, paired_difference, wilson
from dmat.metrics.quality import frechet_distance, inception_score, kernel_distance, moments, nearest, neighbourhoods


def flags(right, n):
    return np.arange(n) < right


# --- intervals


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # Newcombe 1998, Table I, method 3 (score without continuity correction)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_published_values(right, n, low, high):
    interval = wilson(flags(right, n))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 10, 297, 10_000])
def test_wilson_equals_scipy(n):
    for right in sorted({0, 1, n // 3, n - 1, n}):
        interval = wilson(flags(right, n))
        expected = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
        assert (interval.right, interval.n) == (right, n)
        assert 0 <= interval.low <= interval.high <= 1
        assert interval.plain() == {
            "value": right / n, "low": interval.low, "high": interval.high, "right": right, "n": n
        }  # fmt: skip


def test_wilson_contains_its_value():
    for n in range(1, 2001):
        for right in (0, n // 2, n):
            interval = wilson(flags(right, n))
            assert interval.low <= interval.value <= interval.high, interval


def test_paired_difference_without_spread_has_a_zero_width_interval():
    """The same change on every image has no spread, however uncertain either accuracy alone is."""
    none_correct, all_correct = np.zeros(50, dtype=bool), np.ones(50, dtype=bool)
    difference = paired_difference([all_correct] * 2, [none_correct] * 2, 100, seeds.stream(1, "bootstrap"))
    assert difference == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 50, "seeds": 2}
    arm = [flags(20, 50), flags(31, 50)]
    difference = paired_difference(arm, arm, 100, seeds.stream(1, "bootstrap"))
    assert (difference["value"], difference["low"], difference["high"]) == (0, 0, 0)
    # two seeds that cancel image by image have no spread over images either
    difference = paired_difference(
        [all_correct, none_correct], [none_correct, all_correct], 100, seeds.stream(1, "bootstrap")
    )
    assert (difference["value"], difference["low"], difference["high"]) == (0, 0, 0)


def test_paired_difference_equals_a_slow_bootstrap():
    generator = np.random.default_rng(2)
    first, second = [generator.random(40) < 0.7 for _ in range(3)], [generator.random(40) < 0.5 for _ in range(3)]
    difference = paired_difference(first, second, 60, seeds.stream(1, "bootstrap"))
    draw, means = seeds.stream(1, "bootstrap"), []
    for _ in range(60):
        rows = draw.integers(0, 40, 40)
        means.append(sum(int(a[i]) - int(b[i]) for a, b in zip(first, second, strict=True) for i in rows) / 120)
    assert difference["value"] == pytest.approx(
        sum(int(a.sum()) - int(b.sum()) for a, b in zip(first, second)) / 120  # noqa: B905
    )
    assert (difference["low"], difference["high"]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_paired_difference_swaps_its_sign_with_its_arms():
    generator = np.random.default_rng(3)
    first, second = generator.random(80) < 0.7, generator.random(80) < 0.5
    difference = paired_difference([first], [second], 200, seeds.stream(1, "bootstrap"))
    swapped = paired_difference([second], [first], 200, seeds.stream(1, "bootstrap"))
    assert (difference["value"], difference["low"], difference["high"]) == pytest.approx(
        (-swapped["value"], -swapped["high"], -swapped["low"])
    )


def test_paired_interval_has_its_nominal_coverage():
    """150 experiments in which a tenth of the images truly gain; binomial bounds for 95 %."""
    covered = 0
    for k in range(150):
        draw = np.random.default_rng(k)
        kind = draw.random(200)  # 0.65 both right, 0.15 gained, 0.05 lost, 0.15 neither
        first, second = kind < 0.8, (kind < 0.65) | ((kind >= 0.8) & (kind < 0.85))
        interval = paired_difference([first], [second], 200, draw)
        covered += interval["low"] <= 0.1 <= interval["high"]
    assert 0.89 <= covered / 150 <= 0.99


@pytest.mark.parametrize(
    ("first", "second"), [([flags(1, 5)], [flags(1, 5)] * 2), ([flags(1, 5)], [flags(1, 6)]), ([flags(1, 5)], [])]
)
def test_unpaired_arms_are_refused(first, second):
    with pytest.raises(ValueError, match="paired arms need the same seeds and the same images"):
        paired_difference(first, second, 100, seeds.stream(1, "bootstrap"))


def test_one_seed_has_wilsons_interval_and_no_spread():
    interval = over_seeds([flags(81, 263)], 100, seeds.stream(1, "bootstrap"))
    assert interval == {**wilson(flags(81, 263)).plain(), "seeds": 1, "spread": 0.0}


def test_several_seeds_have_a_bootstrap_over_images_and_a_spread():
    generator = np.random.default_rng(4)
    easy = generator.random(400) < 0.6
    runs = [easy ^ (generator.random(400) < 0.1) for _ in range(3)]
    interval = over_seeds(runs, 2000, seeds.stream(1, "bootstrap"))
    shares = [run.mean() for run in runs]
    assert interval["value"] == pytest.approx(statistics.mean(shares))
    assert interval["spread"] == pytest.approx(statistics.stdev(shares))
    assert (interval["n"], interval["seeds"]) == (400, 3)
    # a normal interval for the mean over images of each image's mean over seeds
    per_image = np.mean(runs, axis=0)
    half = 1.96 * per_image.std(ddof=1) / math.sqrt(400)
    assert interval["low"] == pytest.approx(interval["value"] - half, abs=0.006)
    assert interval["high"] == pytest.approx(interval["value"] + half, abs=0.006)


# --- quality


def features(n, d, seed, scale=1.0, shift=0.0):
    generator = np.random.default_rng(seed)
    return (scale * generator.standard_normal((n, d)) @ generator.standard_normal((d, d)) + shift).astype(np.float32)


def features_with_moments(mean, covariance, n=50, seed=0):
    """Features whose sample mean and covariance are exactly these."""
    raw = np.random.default_rng(seed).standard_normal((n, len(mean)))
    raw -= raw.mean(0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False)).T)
    return white @ np.linalg.cholesky(covariance).T + mean


@pytest.mark.parametrize(("n", "m", "d"), [(60, 80, 5), (300, 200, 16)])
def test_frechet_distance_equals_the_matrix_square_root(n, m, d):
    a, b = features(n, d, 1), features(m, d, 2, scale=1.3, shift=0.5)
    cov_a, cov_b = np.cov(a.astype(float), rowvar=False), np.cov(b.astype(float), rowvar=False)
    difference = a.astype(float).mean(0) - b.astype(float).mean(0)
    expected = difference @ difference + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-8)
    statistics_of = [metric_fid.fid_features_to_statistics(torch.from_numpy(x.astype(float))) for x in (a, b)]
    fidelity = metric_fid.fid_statistics_to_metric(*statistics_of, verbose=False)[metric_fid.KEY_METRIC_FID]
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(fidelity, rel=1e-8)
    fitted = [torch.from_numpy(array) for x in (a, b) for array in moments(x)]
    other = torchmetrics.image.fid._compute_fid(*fitted).item()
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(other, rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    """Equal axes: |mean difference|^2 + sum of squared differences of the standard deviations along them."""
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0]
    std_a, std_b = np.array([1.0, 2.0, 0.5, 3.0]), np.array([2.0, 2.0, 1.5, 0.1])
    a = features_with_moments(np.array([0.0, 1.0, 2.0, 3.0]), rotation @ np.diag(std_a**2) @ rotation.T)
    b = features_with_moments(np.array([1.0, 1.0, 0.0, 3.0]), rotation @ np.diag(std_b**2) @ rotation.T, n=70, seed=1)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(1 + 4 + ((std_a - std_b) ** 2).sum())


def test_frechet_distance_with_fewer_images_than_features():
    a, b = moments(features(10, 30, 1)), moments(features(12, 30, 2))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5 * np.trace(a.covariance))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, b) > 1


def kernel_distance_by_loops(a, b):
    def k(x, y):
        return (sum(float(p) * float(q) for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def within(x):
        return statistics.mean(k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j)

    return within(a) + within(b) - 2 * statistics.mean(k(x, y) for x in a for y in b)


def test_kernel_distance_equals_a_double_loop():
    """With as many images as a subset has, every subset is the whole."""
    a, b = features(8, 4, 1), features(8, 4, 2, shift=0.3)
    distance, deviation = kernel_distance(a, b)
    assert distance == pytest.approx(kernel_distance_by_loops(a, b), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)
    whole = [torch.from_numpy(x.astype(float)) for x in (a, b)]
    assert distance == pytest.approx(torchmetrics.image.kid.poly_mmd(*whole).item(), rel=1e-9)


def test_kernel_distance_is_that_of_random_subsets():
    """Their mean is near the value of all images, from which it differs by few standard errors."""
    a, b = features(40, 4, 1), features(9, 4, 2, shift=0.3)
    distance, deviation = kernel_distance(a, b)
    assert deviation > 0
    assert abs(distance - kernel_distance_by_loops(a, b)) < 4 * deviation / math.sqrt(100)
    assert kernel_distance(a, b) == (distance, deviation)


def test_kernel_distance_is_unbiased():
    """Two samples of one distribution: zero on average, so it must be negative at times."""
    generator = np.random.default_rng(5)
    values = [kernel_distance(*generator.standard_normal((2, 8, 3)))[0] for _ in range(60)]
    assert min(values) < 0 < max(values)
    assert abs(statistics.mean(values)) < 4 * statistics.stdev(values) / math.sqrt(60)


@pytest.mark.parametrize("classes", [2, 10])
def test_inception_score_lies_between_one_and_the_number_of_classes(classes):
    certain = 100.0 * np.eye(classes)
    assert inception_score(np.tile(certain, (20, 1))) == pytest.approx(classes)  # sure of itself and even over classes
    assert inception_score(np.zeros((20, classes))) == pytest.approx(1)  # never sure
    assert inception_score(np.tile(certain[0], (20, 1))) == pytest.approx(1)  # always the same
    p = np.random.default_rng(1).dirichlet(np.ones(classes), 30)
    mean = [sum(row[c] for row in p) / 30 for c in range(classes)]
    divergence = [sum(row[c] * math.log(row[c] / mean[c]) for c in range(classes)) for row in p]
    assert inception_score(np.log(p)) == pytest.approx(math.exp(statistics.mean(divergence)))


def neighbourhoods_by_loops(generated, real):
    def radius(x, others, k):
        return sorted(math.dist(x, y) for y in others)[k]  # the first is the image itself

    def in_a_ball(points, centres, k):
        return statistics.mean(any(math.dist(x, c) <= radius(c, centres, k) for c in centres) for x in points)

    balls = [[math.dist(y, x) < radius(x, real, 5) for x in real] for y in generated]
    return {
        "precision": in_a_ball(generated, real, 3),
        "recall": in_a_ball(real, generated, 3),
        "density": sum(map(sum, balls)) / (5 * len(generated)),
        "coverage": statistics.mean(map(any, zip(*balls, strict=True))),
    }


@pytest.mark.parametrize("block", [4, 1000])
@pytest.mark.parametrize(("n", "m", "d", "shift"), [(20, 15, 3, 0.4), (6, 25, 2, 0.0), (12, 12, 1, 1.0)])
def test_neighbourhoods_equal_loops_over_all_pairs(n, m, d, shift, block, monkeypatch):
    monkeypatch.setattr("dmat.metrics.quality._BLOCK", block)
    generator = np.random.default_rng(n)
    generated, real = generator.standard_normal((n, d)) + shift, generator.standard_normal((m, d))
    measures = neighbourhoods(generated, real)
    assert measures == pytest.approx(neighbourhoods_by_loops(generated.tolist(), real.tolist()), rel=1e-12)
    fidelity = metric_prc.prc_features_to_metric(*map(torch.from_numpy, (generated, real)), verbose=False)
    assert [measures["precision"], measures["recall"]] == pytest.approx([fidelity["precision"], fidelity["recall"]])


def test_density_and_coverage_of_one_distribution_have_their_expectations():
    """1, and 1 less the probability that the nearest five of N - 1 real and N generated images are all real."""
    generator, n = np.random.default_rng(1), 100
    draws = [neighbourhoods(*generator.standard_normal((2, n, 2))) for _ in range(40)]
    missed = math.prod((n - k) / (2 * n - k) for k in range(1, 6))
    for measure, expected in (("density", 1), ("coverage", 1 - missed)):
        values = [draw[measure] for draw in draws]
        assert abs(statistics.mean(values) - expected) < 4 * statistics.stdev(values) / math.sqrt(40)


def test_neighbourhoods_of_equal_far_and_narrow_sets():
    real = np.random.default_rng(1).standard_normal((30, 4))
    assert neighbourhoods(real, real) == pytest.approx(dict.fromkeys(("precision", "recall", "density", "coverage"), 1))
    assert set(neighbourhoods(real + 100, real).values()) == {0}
    narrow = neighbourhoods(real[:1] + 1e-3 * real, real)  # all of them copies of one image
    assert narrow["precision"] == 1
    assert narrow["recall"] < 0.1
    assert narrow["coverage"] < 0.5
    assert narrow["density"] > 1


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_nearest_equals_brute_force(block):
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (11, 4, 4, 3), dtype=np.uint8)
    references = generator.integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    images[3] = references[5] = references[7]  # the first of equally near ones
    distances = np.array(
        [[math.sqrt(((image - other.astype(int)) ** 2).sum()) / 255 for other in references] for image in images]
    )
    found_nearest = nearest(images, references, block)
    assert found_nearest.distances.tolist() == pytest.approx(distances.min(1).tolist(), rel=1e-12)
    assert found_nearest.indices.tolist() == distances.argmin(1).tolist()
    assert (found_nearest.distances[3], found_nearest.indices[3]) == (0, 5)
    # one grey level in one pixel is seen
    images[3, 0, 0, 0] ^= 1
    assert nearest(images, references, block).distances[3] == pytest.approx(1 / 255)


# --- pictures


CLASS_NAMES = tuple(f"class {k}" for k in range(10))


def falling_curve(start, points):
    return [(2 * k / 255, start * 0.8**k, start * 0.8**k - 0.05, start * 0.8**k + 0.05) for k in range(points)]


def accuracies(classes):
    return {"clean": [(0.9, 0.8, 0.95)] * classes, "auto_attack": [(k / classes, 0.0, 1.0) for k in range(classes)]}


def confusion_counts(classes):
    return np.random.default_rng(classes).integers(0, 50, (classes, classes)) + 100 * np.eye(classes, dtype=np.int64)


def attack_example(n, channels, size=8):
    """Clean and adversarial images, labels, predictions before and after the attack."""
    clean = np.random.default_rng(n).random((n, size, size, channels), dtype=np.float32)
    return clean, np.clip(clean + 8 / 255, 0, 1), np.arange(n), np.arange(n), np.arange(n)[::-1]


def draw_curves(curves):
    return lambda path: pictures.against_epsilon(path, curves, 8 / 255, "8/255", "curves")


def draw_classes(classes, measures):
    return lambda path: pictures.per_class(path, classes, measures, "classes")


def draw_confusion(counts):
    return lambda path: pictures.confusion(path, counts, [f"class {k}" for k in range(len(counts))], "confusion")


def draw_perturbations(*images, **options):
    return lambda path: pictures.perturbations(path, *images, "8/255", **options)


PICTURES = {
    "two curves": draw_curves({"ours": falling_curve(0.9, 9), "theirs": falling_curve(0.8, 9)}),
    "one of two curves is empty": draw_curves({"ours": falling_curve(0.9, 9), "theirs": []}),
    "one point": draw_curves({"ours": falling_curve(0.9, 1)}),
    "no curve": draw_curves({}),
    "a radius that is no fraction": lambda path: pictures.against_epsilon(path, {}, 0.5, "0.5", "curves"),
    "10 classes": draw_classes(CLASS_NAMES, accuracies(10)),
    "100 classes": draw_classes([f"a rather long name of class {k}" for k in range(100)], accuracies(100)),
    "one class right everywhere": draw_classes(["all"], {"clean": [(1.0, 0.9, 1.0)]}),
    "no measure": draw_classes(CLASS_NAMES, {}),
    "confusion of 10": draw_confusion(confusion_counts(10)),
    "confusion of 20, the last with counts": draw_confusion(confusion_counts(20)),
    "confusion of 21": draw_confusion(confusion_counts(21)),
    "confusion of 100": draw_confusion(confusion_counts(100)),
    "confusion of 200": draw_confusion(confusion_counts(200)),
    "confusion of one class": draw_confusion(np.array([[7]])),
    "confusion without images": draw_confusion(np.zeros((3, 3), dtype=np.int64)),
    "perturbations, grey": draw_perturbations(*attack_example(10, 1)),
    "perturbations, colour": draw_perturbations(*attack_example(10, 3, 32), classes=CLASS_NAMES),
    "perturbation of one image": draw_perturbations(*attack_example(1, 3), classes=CLASS_NAMES),
    "perturbations of nothing": draw_perturbations(*(attack_example(2, 1)[k] for k in (0, 0, 2, 3, 4))),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_written_and_equal_for_equal_input(tmp_path, name):
    for file in ("one.png", "two.png"):
        PICTURES[name](tmp_path / "folder" / file)
    content = (tmp_path / "folder" / "one.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content == (tmp_path / "folder" / "two.png").read_bytes()


@pytest.fixture
def figures(monkeypatch):
    """Collects the figures that `pictures` would write, so that tests can read them."""
    collected = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: collected.append(figure))
    yield collected
    from matplotlib import pyplot

    pyplot.close("all")


def test_the_radius_of_the_threat_model_is_marked_on_the_curve(tmp_path, figures):
    draw_curves({"ours_1": falling_curve(0.9, 9)[::-1], "nothing": []})(tmp_path)
    axes = figures[0].axes[0]
    curve, line = axes.get_lines()
    assert list(line.get_xdata()) == pytest.approx([8, 8])
    assert list(curve.get_xdata()) == pytest.approx(list(range(0, 18, 2)))  # in order, in 255ths
    assert curve.get_ydata()[0] == pytest.approx(90)
    assert (line.get_linestyle(), axes.get_ylim()) == ("--", (0, 100))
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["ours 1", "threat model: 8/255"]


def test_classes_are_drawn_in_order_with_the_first_on_top(tmp_path, figures):
    draw_classes(CLASS_NAMES, accuracies(10))(tmp_path)
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(CLASS_NAMES)
    assert axes.get_ylim() == (9.5, -0.5)
    clean, auto_attack = axes.get_lines()
    assert list(clean.get_xdata()) == pytest.approx([90] * 10)
    assert list(auto_attack.get_xdata()) == pytest.approx([10 * k for k in range(10)])
    assert list(np.round((clean.get_ydata() + auto_attack.get_ydata()) / 2)) == list(range(10))
    with pytest.raises(ValueError, match="reshape"):  # a measure of another number of classes
        draw_classes(CLASS_NAMES, accuracies(9))(tmp_path)


@pytest.mark.parametrize(("classes", "cells"), [(1, 1), (20, 400), (21, 0)])
def test_a_confusion_matrix_shows_percentages_up_to_20_classes(tmp_path, figures, classes, cells):
    counts = confusion_counts(classes)
    draw_confusion(counts)(tmp_path)
    axes = figures[0].axes[0]
    percentages = axes.get_images()[0].get_array()  # rows are labels
    assert [text.get_text() for text in axes.texts] == [f"{value:.0f}" for value in np.ravel(percentages)][:cells]
    assert np.allclose(percentages.sum(1), 100)
    assert np.allclose(percentages[0], 100 * counts[0] / counts[0].sum())
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("label", "prediction under attack")


def test_perturbations_show_their_factor_and_the_class_names(tmp_path, figures):
    clean, _, *labels = attack_example(3, 1)
    adversarial = clean.clip(0.1, 0.9) + 8 / 255
    draw_perturbations(clean.clip(0.1, 0.9), adversarial, *labels, classes=CLASS_NAMES)(tmp_path)
    draw_perturbations(clean.clip(0.1, 0.9), adversarial, *labels)(tmp_path)
    draw_perturbations(clean, clean, *labels)(tmp_path)
    rows = [[axes.get_ylabel() for axes in figure.axes][::3] for figure in figures]
    assert rows[0] == rows[1] == ["image", "perturbation\n× 15.9", "adversarial"]  # 8/255 becomes half of the range
    assert rows[2][1] == "no\nperturbation"
    captions = [[axes.get_xlabel() for axes in figure.axes] for figure in figures]
    assert (captions[0][0], captions[0][6]) == ("class 0", "class 0\n→ class 2")
    assert (captions[1][0], captions[1][6]) == ("label 0", "0 → 2")


def arm_table(arms):
    """Intervals at the top of the axis, where the numbers above the bars need the most room."""
    return {f"arm_{k}": {f"measure {m}": (0.996, 0.99, 1.0) for m in range(5)} for k in range(arms)}


HISTORY = [{"images_seen": 1000 * k, "first": 0.1 * k, "second": 0.5} for k in range(1, 5)]
WITH_LABELS = PICTURES | {
    **{f"bars of {k} arms": lambda path, k=k: pictures.bars(path, arm_table(k), "bars") for k in (1, 2, 4, 5, 8)},
    "curves": lambda path: pictures.curves(path, HISTORY, ["first", "second"], "curves", "value", {"best": 2000}),
    "runs": lambda path: pictures.arms(path, {f"arm_{k}-1": HISTORY for k in range(6)}, "first", "runs", "value"),
}


def colliding_labels(figure):
    """Texts of a figure that overlap by more than a pixel, or leave it."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    outside_ticks = {
        id(label)
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(limits := axis.get_view_interval()) <= tick.get_loc() <= max(limits)
        for label in (tick.label1, tick.label2)
    }
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if id(text) not in outside_ticks]
    collisions = [
        (first, second)
        for (first, a), (second, b) in itertools.combinations(boxes, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]
    frame = figure.bbox
    leaving = [
        text
        for text, box in boxes
        if box.x0 < -1 or box.y0 < -1 or box.x1 > frame.x1 + 1 or box.y1 > frame.y1 + 1
    ]
    return collisions, leaving


@pytest.mark.parametrize("name", WITH_LABELS)
def test_labels_of_pictures_do_not_collide(tmp_path, figures, name):
    WITH_LABELS[name](tmp_path)
    assert colliding_labels(figures[0]) == ([], [])


def test_colliding_labels_are_detected(tmp_path, figures):
    pictures.bars(tmp_path, arm_table(2), "bars")
    axes = figures[0].axes[0]
    axes.text(0, 50, "here")
    axes.text(0, 50, "and here")
    axes.text(9, 50, "outside")
    assert colliding_labels(figures[0]) == ([("here", "and here")], ["outside"])


def test_a_line_of_one_point_has_a_marker(tmp_path, figures):
    pictures.curves(tmp_path, HISTORY[:1], ["first"], "curves", "value")
    pictures.arms(tmp_path, {"arm-1": HISTORY[:1], "other-1": HISTORY}, "first", "runs", "value")
    markers = [line.get_marker() for figure in figures for line in figure.axes[0].get_lines()]
    assert markers == [".", ".", ""]


def _study_trials():
    outcomes = [("COMPLETE", 0.5), ("PRUNED", 0.2), ("FAIL", None), ("COMPLETE", 0.6)]
    points = []
    for k, (state, value) in enumerate(outcomes):
        reports = {} if value is None else {100: value / 2, 200: value}
        points.append(
            study_pictures.TrialPoint(k, state, {"beta": 1.0 + k, "learning_rate": 0.1 * (k + 1)}, value, reports)
        )
    return points


def test_pictures_of_a_study_show_its_trials_and_are_equal_for_equal_studies(tmp_path):
    scales = {"beta": "linear", "learning_rate": "log"}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        study_pictures.history(tmp_path / folder / "history.png", _study_trials())
        study_pictures.curves(tmp_path / folder / "curves.png", _study_trials())
        study_pictures.slices(tmp_path / folder / "slices.png", _study_trials(), scales)
        study_pictures.importances(tmp_path / folder / "importances.png", {"beta": 0.75, "learning_rate": 0.25}, 2)
    pictures = sorted((tmp_path / "one").iterdir())
    assert len(pictures) == 4
    for path in pictures:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    study_pictures.history(tmp_path / "fewer.png", _study_trials()[:2])
    assert (tmp_path / "fewer.png").read_bytes() != (tmp_path / "one" / "history.png").read_bytes()


def test_a_study_in_which_every_trial_failed_can_be_drawn(tmp_path):
    failed = [study_pictures.TrialPoint(0, "FAIL", {"beta": 1.0}, None, {})]
    study_pictures.history(tmp_path / "history.png", failed)
    study_pictures.curves(tmp_path / "curves.png", failed)
    study_pictures.slices(tmp_path / "slices.png", failed, {"beta": "log"})
    assert len(list(tmp_path.iterdir())) == 3
