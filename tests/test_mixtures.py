"""Mixtures of selections: which image of which selection a training reads at which position."""

import collections
import dataclasses
from fractions import Fraction
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from dmat import config, yaml_file
from dmat.data import shards
from dmat.data.batches import MixedBatches
from dmat.data.mixes import open_mix
from dmat.data.mixing import BatchOrder, Mix
from dmat.data.selections import write_selection
from dmat.data.turns import MAX_TURNS, Turns, weights_of
from dmat.errors import DmatError
from dmat.jobs import combine_selections
from dmat.pipeline import single_images
from dmat.workspace import Workspace
from tests import forked


@pytest.mark.parametrize(("weights", "turn"), list(product([(1, 1), (1, 3), (5, 2, 1), (7, 7, 7, 1)], [1, 4])))
def test_positions_of_a_selection_count_up_and_can_be_inverted(weights, turn):
    turns = Turns(tuple(100 * w for w in weights), weights, turn)
    positions = np.arange(5 * turn * sum(weights) + 3)
    selections, own = turns.selections(positions), turns.own_positions(positions)
    counts = collections.Counter()
    for position, k, q in zip(positions, selections, own, strict=True):
        assert q == counts[k]
        assert turns.drawn(int(position)) == [counts[j] for j in range(len(weights))]
        counts[k] += 1
    for k in range(len(weights)):
        assert np.array_equal(turns.positions(k, own[selections == k]), positions[selections == k])
    assert np.array_equal(turns.selections(positions[7:9]), selections[7:9])  # at any position, alone


def test_any_part_of_the_sequence_has_the_shares():
    weights, rng = (5, 2, 1), np.random.default_rng(1)
    selections = Turns((10, 10, 10), weights).selections(np.arange(8000))
    for start, length in rng.integers(1, 4000, (200, 2)):
        counts = np.bincount(selections[start : start + length], minlength=3)
        assert np.abs(counts - length * np.array(weights) / 8).max() < 2


def test_a_turn_of_an_epoch_belongs_to_one_selection():
    selections = Turns((9, 9), (1, 2), turn_length=30).selections(np.arange(180)).reshape(6, 30)
    assert (selections == selections[:, :1]).all()
    assert collections.Counter(selections[:, 0].tolist()) == {0: 2, 1: 4}


def test_weights_are_the_smallest_whole_numbers_in_the_ratio_as_written():
    assert weights_of([0.5, 0.5]) == (1, 1)
    assert weights_of([0.1, 0.2, 0.7]) == (1, 2, 7)
    assert weights_of([3, 1e-3]) == (3000, 1)
    assert [Fraction(w, 100) for w in weights_of([0.33, 0.67])] == [Fraction("0.33"), Fraction("0.67")]
    with pytest.raises(ValueError, match=f"expected at most {MAX_TURNS:,}"):
        weights_of([1 / 3, 0.5])


def mix_of(sampling="without_replacement", turn=1, sizes=(30, 12), weights=(3, 2)):
    mix = Mix(50, sum(sizes), 10, 0.6, sampling)
    return dataclasses.replace(mix, turns=Turns(sizes, weights, turn))


def test_each_selection_is_read_without_replacement_and_in_its_share():
    mix = mix_of()
    read = np.concatenate([BatchOrder(mix, 1).at(step)[1] for step in range(100)])
    first, second = read[read < 30], read[read >= 30] - 30
    assert (len(first), len(second)) == (360, 240) == tuple(mix.generated_drawn(600))
    for images, size in ((first, 30), (second, 12)):
        assert all(len(set(epoch)) == size for epoch in np.split(images, len(images) // size))


def test_one_selection_is_read_as_without_a_mixture():
    plain = Mix(50, 30, 10, 0.6)
    mixed = dataclasses.replace(plain, turns=Turns((30,), (1,)))
    for step in (0, 3, 77):
        assert np.array_equal(BatchOrder(plain, 4).at(step)[1], BatchOrder(mixed, 4).at(step)[1])


@pytest.mark.parametrize("sampling", ["without_replacement", "with_replacement", "one_pass"])
@pytest.mark.parametrize("turn", [1, 18])
def test_the_steps_of_an_image_are_those_that_read_it(sampling, turn):
    sizes = (400, 400) if sampling == "one_pass" else (30, 12)
    mix = mix_of(sampling, turn, sizes)
    order, used = BatchOrder(mix, 2), collections.defaultdict(set)
    for step in range(40):
        for index in order.at(step)[1].tolist():
            used[index].add(step)
    for index in range(mix.generated):
        assert order.steps_of("generated", index, 400) == sorted(used.get(index, ()))
    coverage = mix.coverage(400)
    assert coverage["generated_drawn"] == 240
    if sampling != "with_replacement":
        assert coverage["generated_coverage"] == pytest.approx(len(used) / mix.generated)


def test_coverage_is_that_of_each_selection():
    report = mix_of(sizes=(10, 1000), weights=(1, 1)).coverage(40)  # 24 generated images
    assert report["generated_coverage"] == pytest.approx((10 + 12) / 1010)
    anew = mix_of("with_replacement", sizes=(10, 1000), weights=(1, 1)).coverage(40)
    expected = 10 * (1 - np.exp(-1.2)) + 1000 * (1 - np.exp(-0.012))
    assert anew["generated_coverage"] == pytest.approx(expected / 1010)


def problems_of(root, **mixtures):
    return config.check(yaml_file.read(root / "params.yaml").value | {"mixtures": mixtures})[1]


@pytest.mark.parametrize(("entry", "problem"), [
    ({"of": {"edm18_best": 1.0}}, "mixtures.pool.of"),
    ({"of": {"edm18_best": 0.5, "edm40": 0.5}}, "mixtures.pool.of names edm40; expected some of edm18_best"),
    ({"of": {"edm18_best": 0.5, "edm40": 0.0}}, "mixtures.pool.of.edm40 is 0.0"),
    ({"of": {"edm18_best": 1 / 3, "edm40": 0.5}}, "expected at most 10,000; round the shares"),
    ({"of": {"edm18_best": 0.5, "edm/40": 0.5}}, "expected letters, digits and underscores only"),
    ({"of": {"edm18_best": 0.5, "edm40": 0.5}, "rotate": "step"}, "mixtures.pool.rotate is 'step'"),
])  # fmt: skip
def test_a_mixture_that_cannot_be_is_refused_when_params_yaml_is_read(root, entry, problem):
    assert any(problem in text for text in problems_of(root, pool=entry)), problems_of(root, pool=entry)


def test_a_mixture_has_a_name_of_its_own(root):
    entry = {"of": {"edm18_best": 0.5, "other": 0.5}}
    assert "mixtures.edm18_best has the name of a selection" in " ".join(problems_of(root, edm18_best=entry))


def test_the_list_of_mixtures_may_be_empty_but_must_be_there(root):
    values = dict(yaml_file.read(root / "params.yaml").value)
    assert config.check(values)[1] == []
    del values["mixtures"]
    assert config.check(values)[1] == [
        "mixtures is missing; expected named entries, for example mixtures: {}"
    ]


@pytest.fixture(scope="module", params=["none", "epoch"])
def project(request, finished, tmp_path_factory):
    """A project with an arm that trains on the best and the worst images of a set, 3 to 1."""
    copy = finished.copy_without("train_robust", tmp_path_factory.mktemp("mixtures") / "project")
    copy.write({
        "selections": {"edm18_best": {"keep": 0.5}, "hard": {"image_set": "edm18", "keep": 0.3, "band": "hard"}},
        "mixtures": {"pool": {"of": {"edm18_best": 0.75, "hard": 0.25}, "rotate": request.param}},
        "arms": {"generated": {"images": "pool"}},
    })  # fmt: skip
    for command in (
        ("select-images", "--selection", "edm18_best"), ("select-images", "--selection", "hard"),
        ("combine-selections", "--mixture", "pool"), ("mix-images", "--arm", "generated"),
        ("train-robust", "--arm", "generated", "--seed", "1"),
    ):  # fmt: skip
        code, text = forked.run(copy.folder, *command)
        assert code == 0, text
    return copy


def opened(project):
    real = shards.open_shards(project.folder / "artifacts/prepare_data/train")
    return real, *open_mix(project.folder / "artifacts/mix_images/generated", real, project.folder)


def test_an_arm_trains_on_the_images_of_a_mixture(project):
    real, mix, generated = opened(project)
    best, hard = generated.parts
    assert (len(best), len(hard), len(generated), mix.generated) == (50, 30, 80, 80)
    batches = MixedBatches(mix, 1, real, generated)
    images, labels = batches.at(3)
    names = batches.names(3)
    everything, all_labels = shards.open_shards(project.folder / "artifacts/generate_images/edm18").take(np.arange(100))
    read = {name: names[f"generated of {name}"] for name in ("edm18_best", "hard")}
    assert len(read["edm18_best"]) + len(read["hard"]) == mix.generated_per_batch == 44
    if project.params["mixtures"]["pool"]["rotate"] == "none":
        assert (len(read["edm18_best"]), len(read["hard"])) == (33, 11)
    else:
        assert min(len(indices) for indices in read.values()) == 0
    found = {image.tobytes() for image in images[mix.is_generated].numpy()}
    indices = [*read["edm18_best"], *read["hard"]]
    assert found == {everything[index].tobytes() for index in indices}
    assert sorted(labels[mix.is_generated].tolist()) == sorted(all_labels[indices].tolist())


def test_the_epochs_of_a_rotation_follow_the_shares(project):
    if project.params["mixtures"]["pool"]["rotate"] == "none":
        pytest.skip("every batch has images of both")
    real, mix, generated = opened(project)
    batches = MixedBatches(mix, 1, real, generated)
    steps_per_epoch = 2  # of 64 of 100 images
    per_step = [len(batches.names(step)["generated of hard"]) for step in range(8 * steps_per_epoch)]
    epochs = [per_step[k : k + steps_per_epoch] for k in range(0, len(per_step), steps_per_epoch)]
    assert sorted(map(tuple, epochs)) == [(0, 0)] * 6 + [(44, 44)] * 2


def test_the_steps_of_an_image_are_found_in_a_mixture(project):
    params, workspace = config.load(project.folder / "params.yaml"), Workspace(project.folder, project.folder)
    real, mix, generated = opened(project)
    batches = MixedBatches(mix, 1, real, generated)
    used = [{index for name, indices in batches.names(step).items() if name != "real" for index in indices}
            for step in range(10)]  # fmt: skip
    for index in range(0, 100, 3):
        usage = single_images.usage("edm18", index, "generated", 1, params, workspace)
        assert usage.steps == [step for step in range(10) if index in used[step]]
        assert usage.selected == any(index in part.indices for part in generated.parts)


def test_a_selection_that_changed_after_the_mix_is_refused(project, tmp_path):
    copy = project.copy_without("evaluate_robust", tmp_path / "copy")
    path = copy.folder / "artifacts/select_images/hard/indices.npy"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DmatError, match="hard changed after the mix was written"):
        opened(copy)


def test_one_pass_needs_enough_images_of_each_selection(project, tmp_path):
    copy = project.copy_without("evaluate_robust", tmp_path / "copy")
    copy.write({"arms": {"generated": {"generated_sampling": "one_pass"}}})
    assert "images of selection edm18_best; it has 50, and generated_sampling is one_pass" in copy.run("mix_images", 2)


def test_selections_of_other_images_are_no_mixture(tmp_path):
    record = {"image_set": "x", "classes": 10, "manifest_sha256": "", "pool": 4, "kept": 2}
    for name, shape in (("a", [8, 8, 1]), ("b", [8, 8, 3])):
        write_selection(tmp_path / name, np.arange(2), {**record, "shape": shape})
    settings = config.Mixture(of={"a": 0.5, "b": 0.5})
    job = SimpleNamespace(inputs={name: tmp_path / name for name in "ab"}, instance={"mixture": "pool"})
    with pytest.raises(DmatError, match=r"mixture pool: b has images \[8, 8, 3\] of 10 classes, a \[8, 8, 1\] of 10"):
        combine_selections.run(settings, job)
