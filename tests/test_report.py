"""The comparison of arms: what an arm without a headline shows, and that all other values are still compared."""

import numpy as np
import pytest

from dmat.config import WriteReport
from dmat.metrics import pictures
from dmat.metrics.image_measures import Measure
from dmat.pipeline import STAGES
from dmat.report import ablation, charts, costs, image_table, page
from dmat.report import comparison as report
from dmat.robust import auto_attack

SETTINGS = WriteReport(title="t", baseline="real", bootstrap=100, seed=1)


def _tables(**names):
    """Per-image tables of 40 images by run. names: the column of the accuracy under AutoAttack by run."""
    rng = np.random.default_rng(0)
    columns = ("best_clean", "best_pgd", "last_clean", "last_pgd")
    return {run: {name: rng.random(40) < 0.6 for name in (*columns, measure)} for run, measure in names.items()}


RUNS = {"real": ["real-1", "real-2"], "mixed": ["mixed-1", "mixed-2"]}
GOOD, BAD = "best_auto_attack", "best_auto_attack_unchecked"


@pytest.mark.parametrize("without", ["real-2", "mixed-1"])
def test_an_arm_with_a_seed_without_a_headline_shows_no_headline(without):
    names = {run: BAD if run == without else GOOD for runs in RUNS.values() for run in runs}
    tables = _tables(**{run.replace("-", "_"): measure for run, measure in names.items()})
    tables = {run.replace("_", "-"): table for run, table in tables.items()}
    comparison = report.compare(RUNS, tables, SETTINGS)
    arm, other = without[:-2], ({"real", "mixed"} - {without[:-2]}).pop()
    assert GOOD not in comparison["arms"][arm]
    assert GOOD in comparison["arms"][other]
    assert set(comparison["differences"]["mixed"]) == {"best_clean", "best_pgd", "last_clean", "last_pgd"}
    for values in comparison["arms"].values():
        values |= {"best_gap": 0.1, "last_gap": 0.2}
    comparison["no_headline"] = {without: ["Only 40 of 50 images were attacked."]}
    comparison["notes"] = {"real-1": ["of 200 test images these are exact copies: 1 of earlier test images"]}
    table = report.markdown(comparison).splitlines()
    rows = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in table[2:5]}
    assert table[0].split("|")[4].strip() == "AutoAttack, best"
    assert rows[arm][2] == "—"
    assert "[" in rows[other][2]
    assert rows["mixed − real"][2] == "—"
    assert "**" in rows["mixed − real"][1]
    assert table[-3] == f"No AutoAttack accuracy of {without}: Only 40 of 50 images were attacked."
    assert table[-1] == "real-1: of 200 test images these are exact copies: 1 of earlier test images."


def test_without_any_headline_there_is_no_column():
    names = [run for runs in RUNS.values() for run in runs]
    tables = dict(zip(names, _tables(a=BAD, b=BAD, c=BAD, d=BAD).values(), strict=True))
    comparison = report.compare(RUNS, tables, SETTINGS)
    assert list(report.measures_of(comparison)) == ["best_clean", "best_pgd", "last_clean", "last_pgd"]


def _value(share, low, high, seeds=1):
    return {"value": share, "low": low, "high": high, "n": 40, "seeds": seeds, "spread": 0.02}


@pytest.mark.parametrize(
    ("measure", "difference", "fragments"),
    [
        (
            GOOD,
            _value(0.05, 0.033, 0.069),
            [
                "% of the test images stay correct under AutoAttack, +5.0 [+3.3, +6.9] points",
                "points against real; it is the more robust one.",
            ],
        ),
        (GOOD, _value(0.01, -0.01, 0.03), ["+1.0 [-1.0, +3.0] points", "do not tell the two apart"]),
        (GOOD, None, ["under AutoAttack."]),
        (
            "best_pgd",
            _value(-0.05, -0.07, -0.03),
            ["(it has no AutoAttack headline), -5.0 [-7.0, -3.0] points", "it is the less robust one"],
        ),
    ],
)
def test_the_result_is_summarised_in_sentences(measure, difference, fragments):
    comparison = {
        "baseline": "real",
        "arms": {"mixed": {"best_pgd": _value(0.711, 0.682, 0.738), measure: _value(0.711, 0.682, 0.738)}},
        "differences": {"mixed": {measure: difference} if difference else {}},
    }
    (sentence,) = report.sentences(comparison)
    assert sentence.startswith("mixed: 71.1 [68.2, 73.8] %")
    assert all(fragment in sentence for fragment in fragments), sentence


def _stage_record(stage, seconds, device="cpu", processes=1, **measured):
    return {
        "stage": stage,
        "seconds": seconds,
        "compute": {"device": device, "processes": processes},
        "measured": measured,
    }


def test_costs_are_device_hours_of_all_ancestors_of_an_arm():
    ancestors = [
        _stage_record("train_diffusion", 7200, "H100", processes=4),
        _stage_record("train_robust", 1800, images_per_second=100.0, model_flops_utilisation=0.2),
        _stage_record("train_robust", 3600, images_per_second=300.0, model_flops_utilisation=0.4),
    ]
    cost = costs.arm_cost("mixed", ancestors, 2000, [1e12, 3e12])
    assert cost.hours == {"train_diffusion": 8.0, "train_robust": 1.5}
    assert cost.total == 9.5
    parts = {"data": 0, "generator": 8 * 3600, "images": 0, "training": 5400, "evaluation": 0}
    assert cost.seconds == parts
    uncounted = {"generator": None, "images": None, "training": 4e12, "evaluation": None}
    assert costs.record(cost) == {"seconds": parts, "flops": uncounted}
    counted = costs.arm_cost("mixed", ancestors, 2000, [1e12], [2.0, 3.0], [7.0], [])
    assert counted.flops == {"generator": 7, "images": 0, "training": 1e12, "evaluation": 5}
    assert cost.devices == ("H100", "cpu")
    assert (cost.training_flops, cost.images_per_second, cost.utilisation) == (4e12, 200.0, pytest.approx(0.3))
    unknown = costs.arm_cost("mixed", [_stage_record("train_robust", 1)], 0, [None])
    assert (unknown.training_flops, unknown.images_per_second, unknown.utilisation) == (None, None, None)


def test_each_stage_of_an_arm_is_in_one_part_of_its_cost():
    stages = [stage for part in costs.PARTS.values() for stage in part]
    assert sorted(stages) == sorted({*STAGES} - {"measure_images", "write_report"})


def test_passes_of_an_evaluation_are_those_of_pgd_and_of_the_images_that_stay_robust():
    assert costs.evaluation_passes(40, 5, None) == 7 * 81
    assert costs.evaluation_passes(40, 5, 0.5) == 7 * 81 + 9721 / 2
    assert auto_attack.suite("standard", 10).passes == costs.STANDARD_PASSES
    assert costs.evaluation_passes(40, 5, 0.5, 1000) == 7 * 81 + 500


HISTORY = {
    "real-1": [{"images_seen": k, "validation_robust": v} for k, v in ((10, 0.5), (20, 0.75), (30, 0.25))],
    "mixed-1": [{"images_seen": k, "validation_robust": v} for k, v in ((10, 0.25), (20, 0.5), (30, 0.625))],
}
NAMES = {"real": ["real-1"], "mixed": ["mixed-1"]}


def test_curves_mark_best_and_last_weights_in_the_colour_of_their_arm():
    chart = charts.curves(NAMES, HISTORY, "validation_robust", {"real-1": 20, "mixed-1": 30})
    real, best, last, mixed, *_ = chart["data"]
    assert (list(real["x"]), list(real["y"])) == ([10, 20, 30], [50, 75, 25])
    assert (best["x"][0], best["y"][0], best["marker"]["symbol"]) == (20, 75, "star")
    assert (last["x"][0], last["y"][0], last["marker"]["symbol"]) == (30, 25, "circle-open")
    assert best["marker"]["color"] == real["line"]["color"] != mixed["line"]["color"]
    assert charts.curves(NAMES, HISTORY, "train_robust") is None


def test_charts_show_the_numbers_of_the_comparison():
    comparison = {
        "baseline": "real",
        "arms": {
            "real": {"best_pgd": _value(0.5, 0.25, 0.625)},
            "mixed": {"best_pgd": _value(0.75, 0.5, 0.875), GOOD: _value(0.625, 0.5, 0.75)},
        },
        "differences": {"mixed": {"best_pgd": _value(0.25, 0.125, 0.5)}},
    }
    _, mixed = charts.accuracies(comparison)["data"]
    assert (list(mixed["y"]), list(mixed["x"])) == (["PGD, best", "AutoAttack, best"], [75, 62.5])
    assert (mixed["error_x"]["arrayminus"], mixed["error_x"]["array"]) == ([25, 12.5], [12.5, 12.5])
    (difference,) = charts.differences(comparison)["data"]
    assert (list(difference["x"]), list(difference["y"])) == ([25], ["PGD, best"])
    assert charts.differences(comparison | {"differences": {}}) is None
    comparison["arms"]["other"] = {"best_pgd": _value(0.625, 0.5, 0.75)}
    distances, counts = {"mixed": (3.5, "scorer"), "other": (2.0, "scorer")}, {"mixed": 1000, "other": 10}
    (line, point, other) = charts.quality(comparison, distances, counts)[0]["data"]
    assert list(line["y"]) == [50, 50]  # by PGD: not every arm has a headline
    assert (list(point["x"]), list(point["y"])) == ([3.5], [75])
    assert (list(other["x"]), list(other["y"])) == ([2.0], [62.5])


def test_a_chart_of_one_place_is_not_drawn():
    """One point, or points above each other, show no relation."""
    one_row = {run: rows[:1] for run, rows in HISTORY.items()}
    assert charts.curves(NAMES, one_row, "validation_robust", {"real-1": 10, "mixed-1": 10}) is None
    assert charts.curves(NAMES, HISTORY | {"real-1": one_row["real-1"]}, "validation_robust") is not None
    arms = {"real": {"best_pgd": _value(0.5, 0.25, 0.625)}, "mixed": {"best_pgd": _value(0.75, 0.5, 0.875)}}
    for distances in ({}, {"mixed": (3.5, "scorer")}, {"real": (3.5, "scorer"), "mixed": (3.5, "scorer")}):
        assert charts.quality({"arms": arms}, distances, {"real": 10, "mixed": 10}) is None
    point = {"epsilon": 0.5, "value": 0.5, "low": 0.25, "high": 0.75}
    sweeps = {"real-1": [point], "mixed-1": [point]}
    assert charts.against_epsilon(NAMES, sweeps, {"arms": arms}, {"norm": "linf", "epsilon": "0.5"}, 0.5) is None


def test_measures_of_images_become_a_table():
    """A measure that a selection lacks is a dash; a cell says how many images it is of."""
    measures = [
        Measure("frechet_distance", 0.28501, 4000, "scorer", "validation", 297, draws=2, spread=0.00412),
        Measure("inception_score", 9.5, 4000, "scorer"),
        Measure("class_agreement", 0.975, 4000),
    ]
    best, unlabelled = ([m.plain() for m in some] for some in (measures, measures[:2]))
    assert image_table.rows({"best": best, "unlabelled": unlabelled}) == [
        ("Fréchet distance: scorer, against validation", ["0.285 ± 0.0041 (4,000 : 297)"] * 2),
        ("inception score: scorer", ["9.5 (4,000)"] * 2),
        ("class agreement", ["0.975 (4,000)", "—"]),
    ]
    assert image_table.frechet_distance(best) == (0.28501, "scorer")
    assert image_table.rows({}) == []


@pytest.mark.parametrize(("epsilon", "number", "radius"), [("8/255", 8 / 255, 8.0), ("0.5", 0.5, 0.5)])
def test_the_radius_is_in_the_unit_in_which_it_was_written(epsilon, number, radius):
    point = {"epsilon": number, "value": 0.5, "low": 0.25, "high": 0.75}
    comparison = {"arms": {"real": {}, "mixed": {GOOD: _value(0.25, 0.125, 0.5)}}}
    threat = {"norm": "linf", "epsilon": epsilon}
    sweep = [{"epsilon": 0.0, "value": 1.0, "low": 0.5, "high": 1.0}, point]
    chart = charts.against_epsilon(NAMES, {"real-1": sweep, "mixed-1": sweep}, comparison, threat, number)
    assert [trace["x"][-1] for trace in chart["data"]] == [pytest.approx(radius)] * 3
    assert [trace["y"][-1] for trace in chart["data"]] == [50, 50, 25]
    assert chart["layout"]["shapes"][0]["x0"] == pytest.approx(radius)


def test_utilisations_of_a_report_are_relative_to_one_peak():
    """During the second training a busy machine measured half the peak, at the same number of operations per second."""
    slow, quick = (
        costs.Cost(arm, ("cpu",), {}, 1000, 2e9, 100.0, utilisation) for arm, utilisation in (("a", 0.2), ("b", 0.4))
    )
    gpu = costs.Cost("c", ("gpu",), {}, 1000, 2e9, 100.0, 0.01)
    unknown = costs.Cost("d", ("cpu",), {}, 1000, None, None, None)
    adjusted = costs.with_common_peak([slow, quick, gpu, unknown])
    assert [cost.utilisation for cost in adjusted] == [
        pytest.approx(0.2), pytest.approx(0.2), pytest.approx(0.01), None
    ]  # fmt: skip


def _provenance(**values):
    return {"git_commit": "c" * 40, "git_dirty": False, **values}


def test_a_commit_is_named_for_reproduction_only_where_it_suffices():
    """Uncommitted changes are only in the run."""
    clean = {"train_robust a-1": _provenance(), "evaluate_robust a-1": _provenance()}
    assert page.reproduction(clean)[1] == [f"git checkout {'c' * 40}", "make repro"]
    for other, fragment in (
        (_provenance(git_dirty=True), "at one commit with local changes"),
        (_provenance(git_commit="d" * 40), "at 2 commits,"),
        ({}, "at one commit with local changes"),  # where there was no repository
    ):
        sentence, commands = page.reproduction(clean | {"train_robust a-1": other})
        assert fragment in sentence
        assert commands == ["dmat runs reproduce evaluate_robust/a-1"]
    assert "outside a git repository" in page.reproduction({"evaluate_robust a-1": {}})[0]


def test_reproduction_names_the_dmat_of_a_project_without_code():
    """In such a project the commit holds only parameters."""
    parts = {"train_robust a-1": _provenance(dmat="0.1.0"), "evaluate_robust a-1": _provenance(dmat="0.1.0")}
    sentence, commands = page.reproduction(parts)
    assert sentence == "Every part was made at one commit without local changes, by dmat 0.1.0."
    assert commands == [f"git checkout {'c' * 40}", "dvc repro"]
    for other, fragment in (
        (_provenance(dmat="0.2.0"), "at one commit by dmat 0.1.0 and 0.2.0, so no commit"),
        (_provenance(), "at one commit by dmat 0.1.0 and of the project itself, so no commit"),
    ):
        sentence, commands = page.reproduction(parts | {"train_robust b-1": other})
        assert fragment in sentence
        assert commands == ["dmat runs reproduce evaluate_robust/a-1"]
    assert (
        "by dmat 0.1.0+gabc.changed, so no commit"
        in page.reproduction({"mix_images a": _provenance(dmat="0.1.0+gabc.changed")})[0]
    )


def _records(**settings):
    """Provenance of an arm: of generate_images and select_images where `images` or `keep` say so, of train_robust."""
    generated = {key: settings.pop(key) for key in ("source", "steps", "keep") if key in settings}
    stages = []
    if generated:
        name = f"set{generated}"
        image_set = {"generator": name, "source": generated.get("source"), "sampler": {"steps": generated.get("steps")}}
        stages.append({"stage": "generate_images", "settings": image_set})
        stages.append({"stage": "select_images", "settings": {"image_set": name, "keep": generated.get("keep", 1.0)}})
        settings = {"generated_share": 0.7, "images": name, **settings}
    training = {"images": "none", "generated_share": 0.0, "beta": 5.0, "augmentation": "crop4", **settings}
    stages += [{"stage": "train_robust", "settings": training}] * 2  # two seeds
    return [*stages, {"stage": "evaluate_robust", "settings": {"beta": name if generated else ""}}]


REAL = _records()


@pytest.mark.parametrize(
    ("arms", "counts", "key", "values", "references", "scale"),
    [
        ({"real": REAL, "a": _records(steps=9), "b": _records(steps=4)}, [0, 9, 9],
         "generate_images.sampler.steps", {"b": 4, "a": 9}, ["real"], "linear"),
        ({"a": _records(steps=4), "b": _records(steps=40)}, [9, 9],
         "generate_images.sampler.steps", {"a": 4, "b": 40}, [], "log"),
        ({"real": REAL, **{f"share{s}": _records(steps=4, generated_share=s) for s in (0.3, 0.9)}}, [0, 9, 9],
         "train_robust.generated_share", {"real": 0, "share0.3": 0.3, "share0.9": 0.9}, [], "linear"),
        ({f"{steps}{name}": _records(augmentation=name, **({"steps": 4} if steps else {}))
          for steps in (0, 4) for name in ("none", "cutout")}, [0, 0, 9, 9],
         "train_robust.augmentation", {"0none": "none", "0cutout": "cutout", "4none": "none", "4cutout": "cutout"},
         [], "words"),
        ({"real": REAL, "few": _records(source="1m", keep=0.1), "1m": _records(source="1m"),
          "5m": _records(source="5m")},
         [0, 100, 1000, 5000], ablation.AMOUNT, {"few": 100, "1m": 1000, "5m": 5000}, ["real"], "log"),
        ({"ddpm": _records(source="ddpm"), "edm": _records(source="edm")}, [9, 9],
         "generate_images.source", {"ddpm": "ddpm", "edm": "edm"}, [], "words"),
    ],
)  # fmt: skip
def test_the_key_in_which_alone_the_arms_differ_is_the_axis_of_an_ablation(
    arms, counts, key, values, references, scale
):
    varied = ablation.varied(arms, dict(zip(arms, counts, strict=True)))
    assert (varied.key, dict(varied.values), varied.references, varied.scale) == (key, values, references, scale)
    assert [*varied.values] == [*values]  # in the order of the axis
    assert sorted(arm for members in varied.series.values() for arm in members) == sorted(values)


@pytest.mark.parametrize(
    "arms",
    [
        {"real": REAL, "generated": _records(steps=4)},
        {"a": _records(steps=4), "b": _records(steps=4)},
        {"a": _records(steps=4, beta=3.0), "b": _records(steps=9)},
        {"a": _records(steps=4, beta=3.0), "b": _records(steps=4), "c": _records(augmentation="none"), "d": REAL},
        {"a": [*_records(steps=4), *_records(steps=9)], "b": _records(steps=4, beta=3.0)},  # a mixture
    ],
)
def test_arms_that_differ_in_nothing_or_in_several_keys_are_no_ablation(arms):
    counts = {arm: 9 if any(record["stage"] == "generate_images" for record in arms[arm]) else 0 for arm in arms}
    assert ablation.varied(arms, counts) is None


def test_ticks_of_an_ablation_do_not_touch():
    values = {"a": 1e3, "b": 1.01e3, "c": 2e4, "d": 1.5e6}
    varied = ablation.Ablation("k", values, {"all": [*values]}, [])
    assert varied.ticks == [(1e3, "1k"), (1.01e3, ""), (2e4, "20k"), (1.5e6, "1.5M")]
    words = ablation.Ablation("k", {"a": "x", "b": "y", "c": "x"}, {}, [])
    assert (words.ticks, words.positions) == ([(0.0, "x"), (1.0, "y")], {"a": 0.0, "b": 1.0, "c": 0.0})


def test_the_figure_of_an_ablation_shows_the_numbers_of_the_comparison(tmp_path):
    arms = {"real": REAL, "a": _records(steps=4), "b": _records(steps=9)}
    varied = ablation.varied(arms, {"real": 0, "a": 9, "b": 9})
    accuracies = {arm: {"best_clean": _value(0.8, 0.7, 0.9), "best_pgd": _value(share, share - 0.1, share + 0.1)}
                  for arm, share in (("real", 0.3), ("a", 0.5), ("b", 0.6))}  # fmt: skip
    comparison = {"baseline": "real", "arms": accuracies, "differences": {}}
    assert ablation.measures(comparison) == ("best_clean", "best_pgd")
    line, reference = charts.against_varied(varied, comparison, "best_pgd")["data"]
    assert (list(line["x"]), list(line["y"]), list(reference["y"])) == ([4, 9], [50, 60], [30, 30])
    assert list(line["error_y"]["array"]) == pytest.approx([10, 10])
    lines, references = ablation.panel(varied, comparison, "best_pgd")
    assert lines == {"with generated images": [(4, 0.5, 0.4, 0.6), (9, 0.6, 0.5, pytest.approx(0.7))]}
    assert references == {"real": 0.3}
    pictures.ablation(tmp_path / "a.png", {"PGD": (lines, references)}, varied.ticks, varied.scale, varied.key, "t")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
