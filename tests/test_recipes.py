"""Recipes: each is valid, says where its values are from, and trains for a step."""

import collections
import functools

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cli.main import app
from dmat import config, recipes, yaml_file
from dmat.data.augmentation import AUGMENTATIONS
from dmat.data.data_sets import DATA_SETS
from dmat.errors import DmatError
from dmat.models.classifiers import new_classifier
from dmat.pipeline import cost_plan
from dmat.recipes import experiments
from dmat.recipes.experiments import LABELS, patched
from dmat.robust import weight_perturbation
from dmat.robust.attacks import Ball
from dmat.robust.losses import LOSSES, LossSettings, draw_start
from dmat.robust.networks import DataSpec

HEADLINES = {  # clean and AutoAttack accuracy, as the authors report them
    "cifar10-wrn28-1m": (91.12, 63.35),
    "cifar10-wrn28-20m": (92.44, 67.31),
    "cifar10-wrn28-50m": (None, 67.17),
    "cifar10-wrn70-50m": (93.25, 70.69),
    "cifar10-l2-wrn28-50m": (95.16, 83.63),
    "cifar10-l2-wrn70-50m": (95.54, 84.86),
    "cifar100-wrn28-1m": (68.06, 35.65),
    "cifar100-wrn28-50m": (72.58, 38.83),
    "cifar100-wrn70-50m": (75.22, 42.67),
    "svhn-wrn28-50m": (95.56, 64.01),
    "tinyimagenet-wrn28-1m": (65.19, 31.30),
    "cifar10-ikl-wrn28-1m": (90.75, 63.54),
    "cifar10-ikl-wrn28-20m": (92.16, 67.75),
    "cifar100-ikl-wrn28-1m": (68.99, 35.89),
    "cifar100-ikl-wrn28-50m": (73.85, 39.18),
    "cifar10-wrn82-8": (93.11, 71.59),
    "cifar10-wrn94-16": (93.68, 73.71),
    "cifar10-rawrn70-1m": (92.16, 66.33),
    "cifar10-rawrn70-50m": (93.27, 71.09),
    "cifar100-rawrn70-1m": (70.25, 38.73),
    "cifar10-vit-b2-50m": (None, 74.97),
    "cifar100-vit-b2-50m": (None, 44.07),
    "cifar10-score-wrn28-ddpm-1m": (88.61, 61.04),
}
UNPUBLISHED = ("cifar10-preact18-1m", "cifar10-mart-wrn28-1m", "cifar10-consistency-wrn28-1m", "cifar10-awp-wrn28-1m")
ABLATIONS = ("amount", "augmentation", "batch", "beta", "conditional", "ddpm", "early-stopping", "label-smoothing",
             "selection", "share", "steps")  # fmt: skip
NAMES = sorted(recipes.summaries())
load = functools.cache(recipes.load)


def test_every_headline_and_ablation_is_a_recipe():
    for name, (clean, auto_attack) in HEADLINES.items():
        published = load(name).published
        assert (published.get("clean"), published["auto_attack"]) == (clean, auto_attack)
    assert not any(load(name).published for name in UNPUBLISHED)
    ablations = {f"{start}ablation-{topic}" for topic in ABLATIONS for start in ("", "cifar10-")}
    assert {*HEADLINES, *UNPUBLISHED} | ablations <= {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_and_its_written_file_says_the_same_and_its_sources(name, tmp_path):
    experiment = load(name)
    assert recipes.use(name, tmp_path / "params.yaml") is None
    text = (tmp_path / "params.yaml").read_text()
    assert yaml_file.parse(text).value == experiment.values
    assert config.load(tmp_path / "params.yaml").arms
    assert text.startswith(f"# {name}: {experiment.summary}\n")
    if not experiment.is_flat:
        assert all(experiment.labels.values())
        kinds = collections.Counter(label.partition(" [")[0].partition(",")[0] for label in experiment.labels.values())
        assert {*kinds} <= {*LABELS}
        assert kinds.total() == sum(1 for _ in experiments.leaves(experiment.values))
        assert {label for label in experiment.labels.values() if f"# {label}" not in text} == set()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_no_generator_that_makes_no_images(name):
    params = config.check(dict(load(name).values))[0]
    assert {*params.generators} == {entry.generator for entry in params.image_sets.values()} - {"none"}


def test_numbers_in_brackets_are_rows_of_the_documentation(root):
    page = (root / "docs/recipe.md").read_text()
    labels = [str(text) for name in NAMES for text in (*load(name).labels.values(),
              load(name).published.get("source", ""))]  # fmt: skip
    numbers = {part.partition("]")[0] for label in labels for part in label.split("[")[1:]}
    assert len(numbers) >= 8
    assert [number for number in sorted(numbers) if f"\n| [{number}] |" not in page] == []


def _trained_steps():
    """What differs between arms for one step -> an arm; few of the arms differ in it."""
    arms = {}
    for name in NAMES:
        params = config.check(dict(load(name).values))[0]
        for arm in params.arms.values():
            key = (params.prepare_data.source, arm.network.name, arm.loss, arm.threat.norm, arm.augmentation,
                   arm.awp_gamma > 0)  # fmt: skip
            arms.setdefault(key, (params.prepare_data.source, arm))
    return arms


def test_every_kind_of_arm_trains_for_a_step():
    steps = _trained_steps()
    assert len(steps) >= 22
    assert {arm.loss for _, arm in steps.values()} == {*LOSSES} - {"standard", "pgd_at"}
    for source, arm in steps.values():
        data = DATA_SETS[source]
        shape = (4, data.channels, data.size, data.size)
        generator = np.random.default_rng(0)
        images = AUGMENTATIONS[arm.augmentation](torch.rand(shape), generator)
        network = arm.network.model_copy(update={"depth": 10, "width": 1} if arm.network.width else {})
        spec = DataSpec(data.classes, data.channels, (0.5,) * data.channels, (0.25,) * data.channels)
        model = new_classifier(network, spec, 0).train()
        ball = Ball(arm.threat.norm, float(arm.threat.epsilon))
        settings = LossSettings(
            ball, 1, float(arm.attack_step_size), arm.beta, arm.label_smoothing, arm.alpha, arm.temperature
        )
        before = [parameter.clone() for parameter in model.parameters()]
        start = torch.as_tensor(draw_start(arm.loss, ball, generator, shape))
        means = torch.full((data.classes, data.classes), 1 / data.classes)
        labels = torch.arange(4) // arm.copies
        loss = LOSSES[arm.loss](model, images, labels, start, settings, means).total.mean()
        loss.backward()
        with weight_perturbation.perturbed(model, arm.awp_gamma):
            if arm.awp_gamma:
                model.zero_grad()
                LOSSES[arm.loss](model, images, labels, start, settings, means).total.mean().backward()
        torch.optim.SGD(model.parameters(), arm.learning_rate).step()
        assert loss.isfinite()
        assert any((old != new).any() for old, new in zip(before, model.parameters(), strict=True))


def test_changes_are_merged_by_rfc_7396():
    base = {"a": {"x": 1, "y": 2}, "b": [1, 2], "c": 3}
    assert patched(base, {"a": {"x": None, "z": 4}, "b": [5], "c": {"d": 6, "e": None}}) == {
        "a": {"y": 2, "z": 4}, "b": [5], "c": {"d": 6},
    }  # fmt: skip
    assert base == {"a": {"x": 1, "y": 2}, "b": [1, 2], "c": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [1]\nsources: {compute: choice}\n", "does not say where seeds is from"),
        ("seeds: [1]\nsources: {seeds: choice, compute: choice}\n", "source of compute, which it does not state"),
        ("seeds: [1]\nsources: {seeds: a guess}\n", "has the source 'a guess'; expected one of measured"),
        ("extends: second\nseeds: [1]\nsources: {seeds: choice}\n", "extends second, which extends first"),
    ],
)
def test_a_recipe_without_sources_or_with_two_levels_is_refused(text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "_FOLDER", tmp_path)
    (tmp_path / "first.yaml").write_text("# first: 1\nseeds: [1]\nsources: {seeds: choice}\n")
    (tmp_path / "second.yaml").write_text("# second: 2\nextends: first\nseeds: [2]\nsources: {seeds: choice}\n")
    (tmp_path / "third.yaml").write_text(f"# third: 3\n{text}")
    with pytest.raises(DmatError, match=message):
        recipes.load("third")


def test_diff_shows_what_a_recipe_changes():
    result = CliRunner().invoke(app, ["recipes", "diff", "cifar10-wrn28-20m"])
    assert result.exit_code == 0
    assert result.stdout.startswith("cifar10-wrn28-1m -> cifar10-wrn28-20m\n")
    assert "train_robust.batch: 512 -> 2048\n" in result.stdout
    assert "arms.generated.generated_share: 0.7 -> 0.8\n" in result.stdout


def test_a_plan_counts_operations_as_the_literature_does():
    """Bartoldson et al. 2024: 5.7e18 for 1M images and 400 epochs; here the steps that select weights are added."""
    costs = {cost.stage: cost for cost in cost_plan.plan(load("cifar10-wrn28-1m"), "h100")}
    steps = 20_070_400 * 27 * 10.5e9
    assert steps < costs["train_robust"].flops < 1.1 * steps
    hours = costs["train_robust"].flops / (cost_plan.GPUS["h100"].bf16 * cost_plan.BF16_UTILISATION) / 3600
    assert costs["train_robust"].hours == pytest.approx(hours)
    perturbed = {cost.stage: cost for cost in cost_plan.plan(load("cifar10-awp-wrn28-1m"), "h100")}
    # 6 more passes in the last 95 % of the steps
    assert perturbed["train_robust"].flops - costs["train_robust"].flops == pytest.approx(0.95 * 6 / 27 * steps, 0.01)
    with pytest.raises(DmatError, match="--gpu is 'abacus'; expected one of a100"):
        cost_plan.plan(load("digits"), "abacus")


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_has_a_plan(name):
    costs = cost_plan.plan(load(name), "h100")
    assert all(cost.disk_bytes >= 0 and cost.hours >= 0 for cost in costs)
    assert sum(cost.flops for cost in costs) > 0
