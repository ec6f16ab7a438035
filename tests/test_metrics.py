"""Intervals and image quality agree with reference libraries, closed forms and double loops;
pictures show what they are given.

Run alone: pytest tests/test_metrics.py
"""

import math
import statistics

import numpy as np
import pytest
import scipy.linalg
from scipy import stats

from dmat import seeds
from dmat.metrics import pictures, study_pictures
from dmat.metrics.intervals import over_seeds, paired_difference, wilson
from dmat.metrics.quality import duplicates, frechet_distance, inception_score, kernel_distance, nearest_distances


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
    found = wilson(flags(right, n))
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 10, 297, 10_000])
def test_wilson_equals_scipy(n):
    for right in sorted({0, 1, n // 3, n - 1, n}):
        found = wilson(flags(right, n))
        expected = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
        assert (found.right, found.n) == (right, n)
        assert 0 <= found.low <= found.high <= 1
        assert found.plain() == {"value": right / n, "low": found.low, "high": found.high, "right": right, "n": n}


def test_wilson_contains_its_value():
    for n in range(1, 2001):
        for right in (0, n // 2, n):
            found = wilson(flags(right, n))
            assert found.low <= found.value <= found.high, found


def test_paired_difference_is_exact_where_there_is_nothing_to_guess():
    """The same change on every image has no spread, however uncertain either accuracy alone is."""
    nothing, load_all = np.zeros(50, dtype=bool), np.ones(50, dtype=bool)
    found = paired_difference([load_all] * 2, [nothing] * 2, 100, seeds.stream(1, "bootstrap"))
    assert found == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 50, "seeds": 2}
    alike = [flags(20, 50), flags(31, 50)]
    found = paired_difference(alike, alike, 100, seeds.stream(1, "bootstrap"))
    assert (found["value"], found["low"], found["high"]) == (0, 0, 0)
    # two seeds that cancel image by image have no spread over images either
    found = paired_difference([load_all, nothing], [nothing, load_all], 100, seeds.stream(1, "bootstrap"))
    assert (found["value"], found["low"], found["high"]) == (0, 0, 0)


def test_paired_difference_equals_a_slow_bootstrap():
    generator = np.random.default_rng(2)
    ours, theirs = [generator.random(40) < 0.7 for _ in range(3)], [generator.random(40) < 0.5 for _ in range(3)]
    found = paired_difference(ours, theirs, 60, seeds.stream(1, "bootstrap"))
    draw, means = seeds.stream(1, "bootstrap"), []
    for _ in range(60):
        chosen = draw.integers(0, 40, 40)
        means.append(sum(int(a[i]) - int(b[i]) for a, b in zip(ours, theirs, strict=True) for i in chosen) / 120)
    assert found["value"] == pytest.approx(sum(int(a.sum()) - int(b.sum()) for a, b in zip(ours, theirs)) / 120)  # noqa: B905
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_paired_difference_swaps_its_sign_with_its_arms():
    generator = np.random.default_rng(3)
    ours, theirs = generator.random(80) < 0.7, generator.random(80) < 0.5
    one = paired_difference([ours], [theirs], 200, seeds.stream(1, "bootstrap"))
    other = paired_difference([theirs], [ours], 200, seeds.stream(1, "bootstrap"))
    assert (one["value"], one["low"], one["high"]) == pytest.approx((-other["value"], -other["high"], -other["low"]))


def test_paired_interval_covers_the_truth_about_as_often_as_it_says():
    """150 experiments in which a tenth of the images truly gains; binomial bounds for 95 %."""
    covered = 0
    for k in range(150):
        draw = np.random.default_rng(k)
        kind = draw.random(200)  # 0.65 both right, 0.15 gained, 0.05 lost, 0.15 neither
        ours, theirs = kind < 0.8, (kind < 0.65) | ((kind >= 0.8) & (kind < 0.85))
        found = paired_difference([ours], [theirs], 200, draw)
        covered += found["low"] <= 0.1 <= found["high"]
    assert 0.89 <= covered / 150 <= 0.99


@pytest.mark.parametrize(
    ("ours", "theirs"), [([flags(1, 5)], [flags(1, 5)] * 2), ([flags(1, 5)], [flags(1, 6)]), ([flags(1, 5)], [])]
)
def test_arms_that_are_no_pair_are_refused(ours, theirs):
    with pytest.raises(ValueError, match="paired arms need the same seeds and the same images"):
        paired_difference(ours, theirs, 100, seeds.stream(1, "bootstrap"))


def test_one_seed_has_wilsons_interval_and_no_spread():
    found = over_seeds([flags(81, 263)], 100, seeds.stream(1, "bootstrap"))
    assert found == {**wilson(flags(81, 263)).plain(), "seeds": 1, "spread": 0.0}


def test_several_seeds_have_a_bootstrap_over_images_and_a_spread():
    generator = np.random.default_rng(4)
    easy = generator.random(400) < 0.6
    runs = [easy ^ (generator.random(400) < 0.1) for _ in range(3)]
    found = over_seeds(runs, 2000, seeds.stream(1, "bootstrap"))
    shares = [one.mean() for one in runs]
    assert found["value"] == pytest.approx(statistics.mean(shares))
    assert found["spread"] == pytest.approx(statistics.stdev(shares))
    assert (found["n"], found["seeds"]) == (400, 3)
    # a normal interval for the mean over images of each image's mean over seeds
    per_image = np.mean(runs, axis=0)
    half = 1.96 * per_image.std(ddof=1) / math.sqrt(400)
    assert found["low"] == pytest.approx(found["value"] - half, abs=0.006)
    assert found["high"] == pytest.approx(found["value"] + half, abs=0.006)


# --- quality


def features(n, d, seed, scale=1.0, shift=0.0):
    generator = np.random.default_rng(seed)
    return (scale * generator.standard_normal((n, d)) @ generator.standard_normal((d, d)) + shift).astype(np.float32)


def exactly(mean, covariance, n=50, seed=0):
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
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_known_gaussians():
    """Equal axes: |mean difference|^2 + sum of squared differences of the standard deviations along them."""
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0]
    ours, theirs = np.array([1.0, 2.0, 0.5, 3.0]), np.array([2.0, 2.0, 1.5, 0.1])
    a = exactly(np.array([0.0, 1.0, 2.0, 3.0]), turn @ np.diag(ours**2) @ turn.T)
    b = exactly(np.array([1.0, 1.0, 0.0, 3.0]), turn @ np.diag(theirs**2) @ turn.T, n=70, seed=1)
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + ((ours - theirs) ** 2).sum())


def test_frechet_distance_with_fewer_images_than_features():
    a, b = features(10, 30, 1), features(12, 30, 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5 * np.trace(np.cov(a, rowvar=False)))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, b) > 1


def test_kernel_distance_equals_a_double_loop():
    a, b = features(7, 4, 1), features(9, 4, 2, shift=0.3)

    def k(x, y):
        return (sum(float(p) * float(q) for p, q in zip(x, y, strict=True)) / 4 + 1) ** 3

    def within(x):
        return statistics.mean(k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j)

    expected = within(a) + within(b) - 2 * statistics.mean(k(x, y) for x in a for y in b)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_unbiased():
    """Two samples of one distribution: zero on average, so it must be negative at times."""
    generator = np.random.default_rng(5)
    values = [kernel_distance(generator.standard_normal((8, 3)), generator.standard_normal((8, 3))) for _ in range(500)]
    assert min(values) < 0 < max(values)
    assert abs(statistics.mean(values)) < 4 * statistics.stdev(values) / math.sqrt(500)


@pytest.mark.parametrize("classes", [2, 10])
def test_inception_score_lies_between_one_and_the_number_of_classes(classes):
    certain = np.eye(classes)[np.arange(20 * classes) % classes]
    assert inception_score(certain) == pytest.approx(classes)  # sure of itself and even over classes
    assert inception_score(np.full((20, classes), 1 / classes)) == pytest.approx(1)  # never sure
    assert inception_score(np.tile(np.eye(classes)[0], (20, 1))) == pytest.approx(1)  # always the same
    p = np.random.default_rng(1).dirichlet(np.ones(classes), 30)
    mean = [sum(row[c] for row in p) / 30 for c in range(classes)]
    divergence = [sum(row[c] * math.log(row[c] / mean[c]) for c in range(classes)) for row in p]
    assert inception_score(p) == pytest.approx(math.exp(statistics.mean(divergence)))


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_nearest_distance_equals_brute_force(block):
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (11, 4, 4, 3), dtype=np.uint8)
    references = generator.integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    images[3] = references[5]
    expected = [
        min(math.sqrt(((int_image - ref.astype(int)) ** 2).sum()) / 255 for ref in references)
        for int_image in images.astype(int)
    ]
    found = nearest_distances(images, references, block)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert found[3] == 0
    # one grey level in one pixel is seen
    images[3, 0, 0, 0] ^= 1
    assert nearest_distances(images, references, block)[3] == pytest.approx(1 / 255)


def test_duplicates_are_later_copies_byte_for_byte():
    images = np.random.default_rng(1).integers(0, 256, (6, 3, 3, 1), dtype=np.uint8)
    assert duplicates(images) == 0
    images[4] = images[5] = images[1]
    assert duplicates(images) == 2
    images[5, 2, 2, 0] ^= 1
    assert duplicates(images) == 1
    assert duplicates(images.transpose(0, 2, 1, 3)) == 1  # not contiguous in memory
    assert duplicates(np.zeros((5, 2, 2, 3), dtype=np.uint8)) == 4


# --- pictures


TEN = tuple(f"class {k}" for k in range(10))


def falling(start, points):
    return [(2 * k / 255, start * 0.8**k, start * 0.8**k - 0.05, start * 0.8**k + 0.05) for k in range(points)]


def accuracies(classes):
    return {"clean": [(0.9, 0.8, 0.95)] * classes, "auto_attack": [(k / classes, 0.0, 1.0) for k in range(classes)]}


def confused(classes):
    return np.random.default_rng(classes).integers(0, 50, (classes, classes)) + 100 * np.eye(classes, dtype=np.int64)


def attacked(n, channels, size=8):
    """Natural and adversarial images, labels, predictions before and after."""
    natural = np.random.default_rng(n).random((n, size, size, channels), dtype=np.float32)
    return natural, np.clip(natural + 8 / 255, 0, 1), np.arange(n), np.arange(n), np.arange(n)[::-1]


def radii(curves):
    return lambda path: pictures.against_epsilon(path, curves, 8 / 255, "8/255", "curves")


def by_class(classes, measures):
    return lambda path: pictures.per_class(path, classes, measures, "classes")


def confusion(counts):
    return lambda path: pictures.confusion(path, counts, [f"class {k}" for k in range(len(counts))], "confusion")


def perturbed(*images, **options):
    return lambda path: pictures.perturbations(path, *images, "8/255", **options)


PICTURES = {
    "two curves": radii({"ours": falling(0.9, 9), "theirs": falling(0.8, 9)}),
    "one of two curves is empty": radii({"ours": falling(0.9, 9), "theirs": []}),
    "one point": radii({"ours": falling(0.9, 1)}),
    "no curve": radii({}),
    "a radius that is no fraction": lambda path: pictures.against_epsilon(path, {}, 0.5, "0.5", "curves"),
    "10 classes": by_class(TEN, accuracies(10)),
    "100 classes": by_class([f"a rather long name of class {k}" for k in range(100)], accuracies(100)),
    "one class right everywhere": by_class(["all"], {"clean": [(1.0, 0.9, 1.0)]}),
    "no measure": by_class(TEN, {}),
    "confusion of 10": confusion(confused(10)),
    "confusion of 20, the last with counts": confusion(confused(20)),
    "confusion of 21": confusion(confused(21)),
    "confusion of 100": confusion(confused(100)),
    "confusion of 200": confusion(confused(200)),
    "confusion of one class": confusion(np.array([[7]])),
    "confusion without images": confusion(np.zeros((3, 3), dtype=np.int64)),
    "perturbations, grey": perturbed(*attacked(10, 1)),
    "perturbations, colour": perturbed(*attacked(10, 3, 32), classes=TEN),
    "perturbation of one image": perturbed(*attacked(1, 3), classes=TEN),
    "perturbations of nothing": perturbed(*(attacked(2, 1)[k] for k in (0, 0, 2, 3, 4))),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_written_and_equal_for_equal_input(tmp_path, name):
    for file in ("one.png", "two.png"):
        PICTURES[name](tmp_path / "folder" / file)
    content = (tmp_path / "folder" / "one.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content == (tmp_path / "folder" / "two.png").read_bytes()


@pytest.fixture
def drawn(monkeypatch):
    """Figures that pictures would write, kept to be read."""
    kept = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: kept.append(figure))
    yield kept
    from matplotlib import pyplot

    pyplot.close("all")


def test_the_radius_of_the_threat_model_is_where_the_curve_has_it(tmp_path, drawn):
    radii({"ours_1": falling(0.9, 9)[::-1], "nothing": []})(tmp_path)
    axes = drawn[0].axes[0]
    curve, line = axes.get_lines()
    assert list(line.get_xdata()) == pytest.approx([8, 8])
    assert list(curve.get_xdata()) == pytest.approx(list(range(0, 18, 2)))  # in order, in 255ths
    assert curve.get_ydata()[0] == pytest.approx(90)
    assert (line.get_linestyle(), axes.get_ylim()) == ("--", (0, 100))
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["ours 1", "threat model: 8/255"]


def test_classes_stand_in_the_order_given_with_the_first_on_top(tmp_path, drawn):
    by_class(TEN, accuracies(10))(tmp_path)
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(TEN)
    assert axes.get_ylim() == (9.5, -0.5)
    clean, auto_attack = axes.get_lines()
    assert list(clean.get_xdata()) == pytest.approx([90] * 10)
    assert list(auto_attack.get_xdata()) == pytest.approx([10 * k for k in range(10)])
    assert list(np.round((clean.get_ydata() + auto_attack.get_ydata()) / 2)) == list(range(10))
    with pytest.raises(ValueError, match="reshape"):  # a measure of another number of classes
        by_class(TEN, accuracies(9))(tmp_path)


@pytest.mark.parametrize(("classes", "cells"), [(1, 1), (20, 400), (21, 0)])
def test_a_confusion_shows_its_shares_up_to_20_classes(tmp_path, drawn, classes, cells):
    counts = confused(classes)
    confusion(counts)(tmp_path)
    axes = drawn[0].axes[0]
    shares = axes.get_images()[0].get_array()  # rows are labels
    assert [text.get_text() for text in axes.texts] == [f"{share:.0f}" for share in np.ravel(shares)][:cells]
    assert np.allclose(shares.sum(1), 100)
    assert np.allclose(shares[0], 100 * counts[0] / counts[0].sum())
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("label", "prediction under attack")


def test_perturbations_say_their_factor_and_the_names_of_classes(tmp_path, drawn):
    natural, _, *numbers = attacked(3, 1)
    moved = natural.clip(0.1, 0.9) + 8 / 255
    perturbed(natural.clip(0.1, 0.9), moved, *numbers, classes=TEN)(tmp_path)
    perturbed(natural.clip(0.1, 0.9), moved, *numbers)(tmp_path)
    perturbed(natural, natural, *numbers)(tmp_path)
    rows = [[axes.get_ylabel() for axes in figure.axes][::3] for figure in drawn]
    assert rows[0] == rows[1] == ["image", "perturbation\n× 15.9", "adversarial"]  # 8/255 becomes half of the range
    assert rows[2][1] == "no\nperturbation"
    captions = [[axes.get_xlabel() for axes in figure.axes] for figure in drawn]
    assert (captions[0][0], captions[0][6]) == ("class 0", "class 0\n→ class 2")
    assert (captions[1][0], captions[1][6]) == ("label 0", "0 → 2")


def _study_trials():
    shape = [("COMPLETE", 0.5), ("PRUNED", 0.2), ("FAIL", None), ("COMPLETE", 0.6)]
    made = []
    for k, (state, value) in enumerate(shape):
        reports = {} if value is None else {100: value / 2, 200: value}
        made.append(study_pictures.TrialPoint(k, state, {"beta": 1.0 + k, "learning_rate": 0.1 * (k + 1)}, value, reports))
    return made


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
