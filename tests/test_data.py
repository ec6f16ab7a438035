"""Images reach a batch unchanged, in exact numbers and order, and damaged or foreign files are refused.

Oracles: counting, slow versions per image, and reading the same thing back another way. Run alone:
pytest tests/test_data.py
"""

import collections
import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from scipy import stats

from dmat import files, seeds
from dmat.data import near_copies, overlap, shards
from dmat.data.batches import MixedBatches, ResidentBatches
from dmat.data.mixing import BatchOrder, Mix, ShuffledSequence
from dmat.data.permutation import Permutation
from dmat.data.pixels import iter_batches, load_all, to_bytes, to_float
from dmat.data.selections import SelectedImages
from dmat.data.sources import SOURCES, digits, npz, stratified
from dmat.errors import DmatError


def random_images(n, shape=(4, 5, 3), seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (n, *shape), dtype=np.uint8), generator.integers(0, 3, n)


def write_in_shards(folder, images, labels, sizes):
    """A set of several shards with the given numbers of images."""
    edges = np.cumsum([0, *sizes])
    assert edges[-1] == len(images)
    entries = [
        shards.write_shard(folder, k, images[a:b], labels[a:b]) for k, (a, b) in enumerate(itertools.pairwise(edges))
    ]
    shards.write_manifest(
        folder,
        entries,
        shape=images.shape[1:],
        class_names=["a", "b", "c"],
        class_counts=np.bincount(labels, minlength=3),
        metadata={"licence": "none"},
    )
    return folder


# --- splits


@pytest.mark.parametrize("count", [0, 1, 10, 299, 300])
def test_split_has_the_class_shares_of_the_whole(count):
    labels = np.random.default_rng(1).choice(4, 300, p=[0.5, 0.3, 0.15, 0.05])
    indices = stratified(labels, count, seeds.stream(1, "split"))
    assert len(indices) == count
    assert (np.diff(indices) > 0).all()  # sorted and without repetition
    for c in range(4):
        assert abs((labels[indices] == c).sum() - count * (labels == c).mean()) < 1


@pytest.mark.parametrize(
    ("sizes", "count", "takes"),
    [
        ((8, 8), 3, (2, 1)),  # a tie goes to the lower class
        ((5, 3, 2), 5, (3, 1, 1)),  # 2.5, 1.5 and 1: the odd one to the lower class
        ((7, 2, 1), 5, (4, 1, 0)),  # 3.5, 1 and 0.5
        ((1, 2, 5), 4, (1, 1, 2)),  # 0.5, 1 and 2.5
        ((10, 5, 1), 4, (3, 1, 0)),  # 2.5, 1.25 and 0.25
        ((1, 5, 10), 4, (0, 1, 3)),
        ((4, 1, 1), 2, (2, 0, 0)),  # 4/3, 1/3 and 1/3: three ties, the lower class
    ],
)
def test_rounding_follows_the_largest_remainders(sizes, count, takes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    indices = stratified(labels, count, seeds.stream(1, "split"))
    assert tuple(np.bincount(labels[indices], minlength=len(sizes))) == takes


def test_split_depends_on_its_seed_and_draws_uniformly():
    labels = np.arange(60) % 3
    same = [stratified(labels, 20, seeds.stream(5, "split/test")) for _ in range(2)]
    assert np.array_equal(*same)
    other = stratified(labels, 20, seeds.stream(6, "split/test"))
    assert not np.array_equal(same[0], other)
    drawn = np.bincount(np.concatenate([stratified(labels, 20, seeds.stream(k, "s")) for k in range(600)]))
    assert stats.chisquare(drawn).pvalue > 0.001


def test_successive_splits_are_disjoint_and_stratified():
    labels = digits().labels
    remaining, splits = np.arange(len(labels)), []
    for name, count in (("test", 1000), ("validation", 297), ("train", 500)):
        indices = remaining[stratified(labels[remaining], count, seeds.stream(1, f"split/{name}"))]
        remaining = np.setdiff1d(remaining, indices)
        splits.append(indices)
    all_indices = np.concatenate(splits)
    assert len(np.unique(all_indices)) == len(all_indices) == 1797
    for indices in splits:
        shares = np.bincount(labels[indices]) / len(indices)
        assert np.abs(shares - np.bincount(labels) / 1797).max() < 2 / len(indices)


@pytest.mark.parametrize("count", [-1, 11])
def test_split_of_too_many_is_refused(count):
    with pytest.raises(DmatError, match=f"a split of {count} images was requested, but there are 10; ask for fewer"):
        stratified(np.zeros(10, dtype=int), count, seeds.stream(1, "split"))


# --- sources


def test_digits_are_the_1797_of_scikit_learn_in_17_levels():
    source = digits()
    assert source.images.shape == (1797, 8, 8, 1)
    assert (source.images.dtype, source.labels.dtype) == (np.uint8, np.int64)
    assert set(np.unique(source.images).tolist()) == {round(v * 255 / 16) for v in range(17)}
    assert np.bincount(source.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert source.class_names == tuple("0123456789")
    assert source.licence == "CC BY 4.0"
    # the first row of the first image, a zero, as in scikit-learn's documentation: 0 0 5 13 9 1 0 0
    assert (source.images[0, 0, :, 0] / 255 * 16).round().tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64])
def test_npz_source_reads_the_published_layout(tmp_path, save, kind):
    images, labels = random_images(7)
    save(tmp_path / "set.npz", image=images, label=labels.astype(kind))
    source = npz(tmp_path / "set.npz")
    assert np.array_equal(source.images, images)
    assert np.array_equal(source.labels, labels)
    assert source.labels.dtype == np.int64
    assert source.class_names == ("0", "1", "2")
    assert source.origin == "set.npz"
    assert SOURCES["npz"] is npz


IMAGES, LABELS = random_images(4)
REFUSED = {
    "no label": ({"image": IMAGES}, "lacks label; expected arrays `image` and `label`; save"),
    "neither": ({"x": IMAGES}, "lacks image, label; expected arrays `image` and `label`; save"),
    "floats": ({"image": IMAGES / 255, "label": LABELS}, "`image` is float64 (4, 4, 5, 3); expected uint8 [N, H, W,"),
    "flat": ({"image": IMAGES[..., 0], "label": LABELS}, "`image` is uint8 (4, 4, 5); expected uint8 [N, H, W, 1 or"),
    "channels first": (
        {"image": IMAGES.transpose(0, 3, 1, 2), "label": LABELS},
        "`image` is uint8 (4, 3, 4, 5); expected uint8 [N, H, W, 1 or 3]",
    ),
    "too few": ({"image": IMAGES, "label": LABELS[:3]}, "`label` is int64 (3,); expected 4 integers from 0"),
    "one-hot": ({"image": IMAGES, "label": np.eye(4, dtype=int)}, "`label` is int64 (4, 4); expected 4 integers"),
    "float labels": ({"image": IMAGES, "label": LABELS / 1}, "`label` is float64 (4,); expected 4 integers from 0"),
    "negative": ({"image": IMAGES, "label": LABELS - 5}, "`label` is int64 (4,); expected 4 integers from 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_npz_source_refuses_other_arrays(tmp_path, name):
    arrays, text = REFUSED[name]
    path = tmp_path / "set.npz"
    np.savez(path, **arrays)
    with pytest.raises(DmatError) as refused:
        npz(path)
    assert str(refused.value).startswith(str(path))
    assert text in str(refused.value)


@pytest.mark.parametrize("path", [None, "missing.npz"])
def test_npz_source_needs_a_file(tmp_path, path):
    path = path and tmp_path / path
    with pytest.raises(DmatError) as refused:
        npz(path)
    assert str(refused.value) == (
        f"prepare_data.path is {path}; expected an .npz file with `image` and `label`, or a folder of them; give "
        f"its path"
    )


@pytest.mark.parametrize("kind", ["text", "npy", "empty"])
def test_npz_source_refuses_other_files(tmp_path, kind):
    path = tmp_path / "set.npz"
    with open(path, "wb") as file:
        if kind == "npy":
            np.save(file, IMAGES)
        elif kind == "text":
            file.write(b"<html>404</html>")
    with pytest.raises(DmatError, match=r"set\.npz"):
        npz(path)


# --- shards


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("sizes", [(9,), (4, 4, 1), (0, 5, 0, 4)])
def test_shards_return_the_written_images(tmp_path, sizes, verify):
    images, labels = random_images(9)
    opened = shards.open_shards(write_in_shards(tmp_path, images, labels, sizes), verify)
    assert (len(opened), opened.shape, opened.classes) == (9, (4, 5, 3), 3)
    for actual, expected in zip(opened.all(), (images, labels), strict=True):
        assert np.array_equal(actual, expected)
        assert actual.dtype == expected.dtype
    assert opened.manifest["class_counts"] == np.bincount(labels, minlength=3).tolist()
    assert opened.manifest["count"] == 9
    assert opened.manifest["licence"] == "none"


@pytest.mark.parametrize("sizes", [(9,), (4, 4, 1), (0, 5, 0, 4)])
def test_take_accepts_global_indices_in_any_order_with_repetition(tmp_path, sizes):
    images, labels = random_images(9)
    opened = shards.open_shards(write_in_shards(tmp_path, images, labels, sizes))
    for indices in ([8, 0, 4, 3], [5, 5, 5], [], list(range(8, -1, -1)), *([k] for k in range(9))):
        positions = np.array(indices, dtype=np.int64)
        taken = opened.take(positions)
        assert np.array_equal(taken[0], images[positions])
        assert np.array_equal(taken[1], labels[positions])
    for outside in (9, -1):
        with pytest.raises(IndexError):
            opened.take(np.array([outside]))


def test_folders_open_as_one_set_in_the_order_given(tmp_path):
    images, labels = random_images(9)
    first = write_in_shards(tmp_path / "1", images[:5], labels[:5], (3, 2))
    second = write_in_shards(tmp_path / "2", images[5:], labels[5:], (4,))
    for order in ((first, second), (second, first)):
        actual, _ = shards.open_shards(order).all()
        expected = images if order[0] == first else np.concatenate([images[5:], images[:5]])
        assert np.array_equal(actual, expected)


def test_writing_a_set_twice_gives_identical_bytes(tmp_path):
    images, labels = random_images(9)
    strided = np.asfortranarray(images)  # the same numbers, otherwise laid out in memory
    for name, array in (("1", images), ("2", strided)):
        shards.write_set(tmp_path / name, array, labels, class_names=["a", "b", "c"], metadata={"x": 1})
    first, second = (sorted((tmp_path / name).iterdir()) for name in "12")
    assert [path.name for path in first] == ["images-00000.npy", "labels-00000.npy", "manifest.json"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert files.checksum(tmp_path / "1") == files.checksum(tmp_path / "2")


def test_manifest_holds_count_and_checksum_of_every_shard(tmp_path):
    images, labels = random_images(9)
    manifest = json.loads((write_in_shards(tmp_path, images, labels, (4, 5)) / shards.MANIFEST).read_text())
    assert [entry["count"] for entry in manifest["shards"]] == [4, 5]
    for entry in manifest["shards"]:
        for key in ("images", "labels"):
            assert entry[f"{key}_sha256"] == files.sha256(tmp_path / entry[key])


@pytest.mark.parametrize("name", ["images-00000.npy", "labels-00001.npy"])
@pytest.mark.parametrize("damage", ["one bit", "cut", "empty"])
def test_altered_shard_is_refused(tmp_path, name, damage):
    images, labels = random_images(9)
    path = write_in_shards(tmp_path, images, labels, (4, 5)) / name
    content, before = bytearray(path.read_bytes()), files.sha256(path)
    content[-1] ^= 1
    path.write_bytes({"one bit": bytes(content), "cut": bytes(content[:-8]), "empty": b""}[damage])
    with pytest.raises(DmatError) as refused:
        shards.open_shards(tmp_path)
    assert str(refused.value) == (
        f"{path} has checksum {files.sha256(path)[:12]}; its manifest says {before[:12]}; the file was altered or "
        f"cut: restore it (`dvc checkout`) or delete the folder and run its stage again"
    )


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["images-00000.npy", "labels-00001.npy"])
def test_missing_shard_is_refused(tmp_path, name, verify):
    refuses_without(tmp_path, name, verify)


@pytest.mark.parametrize("verify", [True, False])
def test_missing_manifest_is_refused(tmp_path, verify):
    refuses_without(tmp_path, shards.MANIFEST, verify)


def refuses_without(tmp_path, name, verify):
    images, labels = random_images(9)
    write_in_shards(tmp_path, images, labels, (4, 5))
    shutil.move(tmp_path / name, tmp_path / "elsewhere")
    with pytest.raises(DmatError) as refused:
        shards.open_shards(tmp_path, verify)
    assert str(refused.value) == f"{tmp_path / name} does not exist; run the stage that makes it, or `dvc repro`"


def change_manifest(folder, change):
    path = folder / shards.MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_other_schema_is_refused(tmp_path):
    images, labels = random_images(3)
    write_in_shards(tmp_path, images, labels, (3,))
    change_manifest(tmp_path, lambda manifest: manifest.update(schema=99))
    with pytest.raises(DmatError) as refused:
        shards.open_shards(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path / shards.MANIFEST} has schema 99; this dmat reads {shards.SCHEMA}; regenerate the set or use the "
        f"dmat that wrote it"
    )


@pytest.mark.parametrize("verify", [True, False])
def test_wrong_count_in_the_manifest_is_refused(tmp_path, verify):
    images, labels = random_images(3)
    write_in_shards(tmp_path, images, labels, (3,))
    change_manifest(tmp_path, lambda manifest: (manifest["shards"][0].update(count=4), manifest.update(count=4)))
    with pytest.raises(DmatError, match=r"00000\.npy holds uint8 \[3, 4, 5, 3\]; its manifest says uint8 \[4, 4"):
        shards.open_shards(tmp_path, verify)


@pytest.mark.parametrize(
    ("shape", "change", "content"),
    [
        ((5, 4, 3), {}, "[5, 4, 3] of 3 classes"),
        ((4, 5, 3), {"class_names": ["a", "b"], "class_counts": [2, 1]}, "[4, 5, 3] of 2 classes"),
    ],
)
def test_folders_with_different_images_are_refused(tmp_path, shape, change, content):
    images, labels = random_images(3)
    write_in_shards(tmp_path / "1", images, labels, (3,))
    write_in_shards(tmp_path / "2", images.reshape(3, *shape), labels, (3,))
    change_manifest(tmp_path / "2", lambda manifest: manifest.update(change))
    with pytest.raises(DmatError) as refused:
        shards.open_shards([tmp_path / "1", tmp_path / "2"])
    assert str(refused.value) == (
        f"{tmp_path / '2'} holds images {content}; expected [4, 5, 3] of 3 as in {tmp_path / '1'}; generate both with "
        f"one image size and the same classes"
    )


# --- copies


def test_copies_are_found_pixel_by_pixel(tmp_path, monkeypatch):
    """Brute force over all pairs; sets are read in batches, and only the requested images."""
    monkeypatch.setattr(overlap, "BATCH", 4)
    images, labels = random_images(30, (2, 2, 1))
    images //= 86  # three levels: only 81 images are possible, so that some repeat
    images[7] = images[3]
    others = images[[20, 7, 21]]
    image_digests = overlap.digests(images)
    assert overlap.repeated(image_digests).tolist() == [
        any(np.array_equal(x, y) for y in images[:k]) for k, x in enumerate(images)
    ]
    assert overlap.repeated(image_digests)[7]
    expected = [any(np.array_equal(x, y) for y in others) for x in images]
    assert overlap.shared(image_digests, overlap.digests(others)).tolist() == expected
    opened = shards.open_shards(write_in_shards(tmp_path, images, labels, (9, 0, 21)))
    assert np.array_equal(overlap.digests_of(opened), image_digests)
    assert np.array_equal(overlap.digests_of(opened, np.array([20, 7, 21])), overlap.digests(others))
    assert len(overlap.digests_of(opened, np.zeros(0, int))) == 0


@pytest.mark.parametrize("shape", [(8, 8, 1), (13, 10, 3), (2, 20, 1)])
def test_near_copies_are_those_of_all_pairs(shape, monkeypatch):
    """Whatever the distance and the blocks: exact copies, pairs beside the limit, and a crowd of near ones."""
    monkeypatch.setattr(near_copies, "_ROWS", 7)
    monkeypatch.setattr(near_copies, "_CANDIDATES", 3)
    images, _ = random_images(40, shape)
    images[30:] = images[30:] // 32 + 100  # a crowd
    images[9] = images[2]
    images[12] = images[5]
    images[12, 0, 0, 0] ^= 1
    flat = images.reshape(40, -1).astype(int)
    distances = np.sqrt(((flat[:, None] - flat) ** 2).sum(2)) / 255
    levels = np.unique(distances)[1:]  # just above a distance, its pair counts
    for limit in (0.0, 1.01 / 255, *np.nextafter(levels[:: len(levels) // 20], 9), 0.1, 9.0):
        expected = [any(distances[i, j] < limit or distances[i, j] == 0 for j in range(i)) for i in range(40)]
        assert near_copies.near_copies(images, limit).tolist() == expected


# --- pixels


def test_bytes_and_floats_are_each_others_inverse_at_every_level():
    levels = np.arange(256, dtype=np.uint8).reshape(2, 8, 16, 1)
    unit = to_float(levels)
    assert unit.dtype == torch.float32
    assert unit.shape == (2, 1, 8, 16)
    assert unit.flatten().tolist() == pytest.approx([v / 255 for v in range(256)])
    assert (unit.min(), unit.max()) == (0, 1)
    assert np.array_equal(to_bytes(unit * 2 - 1), levels)


def test_to_bytes_rounds_to_the_nearest_and_clips():
    values = np.linspace(-1.3, 1.3, 4001)
    expected = [min(255, max(0, round((v + 1) / 2 * 255))) for v in values]
    actual = to_bytes(torch.from_numpy(values).reshape(1, 1, 1, -1))
    assert actual.dtype == np.uint8
    assert actual.flatten().tolist() == expected
    assert set(actual.flatten().tolist()) == set(range(256))


def test_channels_move_to_the_front_and_back():
    images, _ = random_images(2)
    unit = to_float(images)
    for n, row, column, channel in itertools.product(range(2), range(4), range(5), range(3)):
        assert unit[n, channel, row, column].item() == pytest.approx(images[n, row, column, channel] / 255)
    assert np.array_equal(to_bytes(unit * 2 - 1), images)


def test_consecutive_batches_cover_all_images_once(tmp_path):
    images, labels = random_images(9)
    x, y = load_all(shards.open_shards(write_in_shards(tmp_path, images, labels, (4, 5))))
    assert torch.equal(x, to_float(images))
    batches = list(iter_batches(x, y, 4))
    assert [rows for rows, _, _ in batches] == [slice(0, 4), slice(4, 8), slice(8, 9)]
    assert torch.equal(torch.cat([part for _, part, _ in batches]), x)
    assert torch.equal(torch.cat([part for _, _, part in batches]), y)
    assert all(torch.equal(x[rows], part) for rows, part, _ in batches)


# --- mixing


@pytest.mark.parametrize(
    ("batch", "share", "generated"),
    [(128, 0.7, 89), (512, 0.7, 358), (2048, 0.8, 1638), (10, 0.0, 0), (10, 1.0, 10), (10, 0.99, 9)],
)
def test_every_batch_holds_the_exact_numbers(batch, share, generated):
    mix = Mix(100, 300, batch, share)
    order = BatchOrder(mix, seed=1)
    assert (mix.real_per_batch, mix.generated_per_batch) == (batch - generated, generated)
    for step in (0, 1, 7, 1000):
        real, synthetic = order.at(step)
        assert (len(real), len(synthetic)) == (batch - generated, generated)
        assert (real.dtype, synthetic.dtype) == (np.int64, np.int64)
        assert set(real.tolist()) <= set(range(100))
        assert set(synthetic.tolist()) <= set(range(300))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 99, 1000])
def test_permutations_and_their_inverses_are_exact(size):
    permutation = Permutation(size, 1, "order")
    items = permutation.items(np.arange(size))
    assert items.dtype == np.int64
    assert sorted(items.tolist()) == list(range(size))
    assert np.array_equal(permutation.positions(items), np.arange(size))
    assert np.array_equal(permutation.items(np.array([size - 1, 0])), items[[-1, 0]])


def test_a_part_of_a_huge_permutation_takes_no_memory():
    size = 50_000_000_000
    permutation = Permutation(size, 1, "order")
    items = permutation.items(np.arange(10_000))
    assert len(set(items.tolist())) == 10_000
    assert items.min() >= 0
    assert items.max() < size
    assert np.array_equal(permutation.positions(items), np.arange(10_000))
    assert abs(items.mean() / size - 0.5) < 4 / np.sqrt(12 * 10_000)


def test_permutations_are_equally_likely_and_independent():
    """Chi-square tests: all orders of four items, and the differences of neighbours among 40."""
    counts = collections.Counter(tuple(Permutation(4, 1, "order", k).items(np.arange(4)).tolist()) for k in range(6000))
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4
    orders = np.stack([Permutation(40, 1, "order", k).items(np.arange(40)) for k in range(1000)])
    assert stats.chisquare(np.bincount((np.diff(orders) % 40).ravel(), minlength=40)[1:]).pvalue > 1e-4
    assert stats.chisquare(np.bincount((orders[:-1, 7] - orders[1:, 7]) % 40, minlength=40)).pvalue > 1e-4


@pytest.mark.parametrize("count", [1, 7, 50])
def test_every_epoch_of_a_sequence_is_another_permutation(count):
    sequence = ShuffledSequence(3, "order/real", count)
    indices = sequence.at(0, 4 * count)
    epochs = indices.reshape(4, count)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(count))
    if count > 1:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4


def test_positions_do_not_depend_on_earlier_reads():
    whole = ShuffledSequence(3, "order/real", 7).at(0, 100)
    reader = ShuffledSequence(3, "order/real", 7)
    for position, length in [(93, 7), (0, 1), (6, 2), (50, 0), (13, 15), (7, 7), (0, 100), (99, 1)]:
        assert np.array_equal(reader.at(position, length), whole[position : position + length])


def test_order_depends_on_seed_and_source():
    def read(seed, purpose):
        return tuple(ShuffledSequence(seed, purpose, 50).at(0, 50).tolist())

    names = [(1, "order/real"), (2, "order/real"), (1, "order/generated")]
    assert len({read(*name) for name in names}) == 3
    real, generated = BatchOrder(Mix(50, 50, 100, 0.5), seed=1).at(0)
    assert tuple(real.tolist()) == read(1, "order/real")
    assert tuple(generated.tolist()) == read(1, "order/generated")


def test_generated_images_may_be_drawn_with_replacement():
    """Wang et al.'s code: uniform, with replacement; real images are unaffected."""
    order, shuffled = (
        BatchOrder(Mix(40, 10, 20, 0.5, generated_sampling=kind), seed=1)
        for kind in ("with_replacement", "without_replacement")
    )
    drawn = np.stack([order.at(step)[1] for step in range(400)])
    assert drawn.shape == (400, 10)
    assert any(len(set(row)) < 10 for row in drawn.tolist())
    counts = np.bincount(drawn.ravel(), minlength=10)
    assert np.abs(counts - 400).max() < 4 * np.sqrt(4000 * 0.1 * 0.9)
    assert np.array_equal(order.at(7)[1], drawn[7])
    assert not np.array_equal(drawn[0], drawn[1])
    assert all(np.array_equal(order.at(step)[0], shuffled.at(step)[0]) for step in range(5))
    coverage_of_two_steps = len(set(drawn[:2].ravel().tolist())) / 10
    assert order.mix.coverage(40)["generated_coverage"] == pytest.approx(coverage_of_two_steps, abs=0.2)


def test_generated_images_may_be_read_once_in_their_order():
    order = BatchOrder(Mix(40, 25, 20, 0.5, generated_sampling="one_pass"), seed=1)
    assert [order.at(step)[1].tolist() for step in (0, 1)] == [list(range(10)), list(range(10, 20))]
    assert order.steps_of("generated", 19, 60) == [1]
    assert order.steps_of("generated", 24, 40) == []


@pytest.mark.parametrize(
    "mix",
    [
        Mix(7, 23, 10, 0.7),
        Mix(7, 23, 10, 0.7, generated_sampling="with_replacement"),
        Mix(50, 0, 8, 0.0, reshuffle_steps=3),
        Mix(5, 9, 12, 0.25, copies=2, reshuffle_steps=4),
    ],
)
def test_the_steps_that_use_an_image(mix):
    order, steps = BatchOrder(mix, seed=1), 17
    drawn = [order.at(step) for step in range(steps)]
    for number, (source, size) in enumerate({"real": mix.real, "generated": mix.generated}.items()):
        for index in range(size):
            expected = [step for step in range(steps) if index in drawn[step][number]]
            assert order.steps_of(source, index, steps * mix.batch) == expected


@pytest.mark.parametrize("mix", [Mix(100, 300, 128, 0.7), Mix(9, 9, 12, 0.3), Mix(9, 9, 7, 0.5), Mix(9, 0, 16, 0.0)])
def test_every_part_of_a_batch_has_its_share_of_generated_images(mix):
    """Each process of a training gets whole parts: batch norm in each of them sees both kinds."""
    of_part = mix.is_generated.reshape(mix.parts, -1)
    assert of_part.sum() == mix.generated_per_batch
    assert np.ptp(of_part.sum(1)) <= 1
    assert (np.diff(of_part.astype(int), axis=1) >= 0).all()  # real images first
    size = mix.drawn // mix.parts
    assert mix.rows_of_parts(slice(0, mix.drawn)) == slice(0, mix.drawn)
    assert mix.rows_of_parts(slice(mix.drawn - 1, mix.drawn)) == slice(mix.drawn - size, mix.drawn)


def test_real_images_may_be_reshuffled_after_each_epoch():
    """Wang et al.'s code: 98 batches of 512 with 154 real images each read 15,092 of 48,976; then a new order."""
    mix = Mix(48_976, 100, 512, 0.7, reshuffle_steps=98)
    assert mix.real_per_batch * 98 == 15_092
    order = BatchOrder(mix, seed=1)
    for epoch in (0, 3):
        drawn = np.concatenate([order.at(98 * epoch + step)[0] for step in range(98)])
        assert len(set(drawn.tolist())) == 15_092
        assert np.array_equal(drawn, Permutation(48_976, 1, "order/real", epoch).items(np.arange(15_092)))
    assert np.array_equal(BatchOrder(mix, seed=1).at(98 * 3 + 5)[0], order.at(98 * 3 + 5)[0])  # equal when read alone
    assert np.array_equal(order.at(299)[1], BatchOrder(Mix(48_976, 100, 512, 0.7), seed=1).at(299)[1])


@pytest.mark.parametrize(("real", "steps"), [(7, 4), (10, 2), (20, 1), (100, 4)])
def test_epochs_read_different_permutations(real, steps):
    """5 real images a step, in epochs that read less than one permutation, exactly one, or several."""
    order = BatchOrder(Mix(real, 0, 5, 0.0, reshuffle_steps=steps), seed=1)
    whole = ShuffledSequence(1, "order/real", real)
    rounds = -(-5 * steps // real)
    for step in range(3 * steps):
        epoch, within = divmod(step, steps)
        assert np.array_equal(order.at(step)[0], whole.at(epoch * rounds * real + 5 * within, 5))


@pytest.mark.parametrize(("real", "steps", "count"), [(100, 4, 10), (30, 2, 7), (12, 3, 3), (200, 1, 9)])
def test_coverage_of_reshuffled_images_is_the_average_over_runs(real, steps, count):
    mix = Mix(real, 0, 5, 0.0, reshuffle_steps=steps)
    distinct = [
        len(np.unique(np.concatenate([order.at(step)[0] for step in range(count)])))
        for order in (BatchOrder(mix, seed) for seed in range(60))
    ]
    report = mix.coverage(5 * count)
    assert report["real_coverage"] == pytest.approx(
        np.mean(distinct) / real, abs=4 * np.std(distinct) / real / 60**0.5 + 1e-9
    )
    assert (report["real_drawn"], report["real_epochs"]) == (5 * count, 5 * count / real)


@pytest.mark.parametrize(("share", "generated"), [(0.0, 0), (0.7, 18)])
def test_copies_reduce_the_images_drawn_per_batch(share, generated):
    """As Wang et al.'s code cuts and mixes: four copies of a quarter of the batch."""
    mix = Mix(100, 300, 104, share, copies=4)
    assert (mix.drawn, mix.generated_per_batch, mix.real_per_batch) == (26, generated, 26 - generated)
    order = BatchOrder(mix, 1)
    real = np.concatenate([order.at(step)[0] for step in range(3)])
    assert np.array_equal(real, ShuffledSequence(1, "order/real", 100).at(0, 3 * (26 - generated)))
    report = mix.coverage(208)  # two steps
    assert (report["real_drawn"], report["generated_drawn"]) == (2 * (26 - generated), 2 * generated)


def test_coverage_counts_the_last_batch_as_full():
    """1,000 images in batches of 128 are 8 steps, as in training."""
    report = Mix(real=256, generated=512, batch=128, generated_share=0.5).coverage(1000)
    assert (report["real_drawn"], report["generated_drawn"]) == (512, 512)
    assert (report["real_epochs"], report["generated_epochs"]) == (2.0, 1.0)


@pytest.mark.parametrize(("real", "generated", "share"), [(20, 300, 0.7), (100, 15, 0.25), (30, 0, 0.0)])
def test_coverage_equals_the_counts_of_a_run(real, generated, share):
    mix = Mix(real, generated, 10, share)
    order, counters = BatchOrder(mix, 1), {"real": collections.Counter(), "generated": collections.Counter()}
    for step in range(9):
        for source, indices in zip(counters, order.at(step), strict=True):
            counters[source].update(indices.tolist())
    report = mix.coverage(90)
    for source, size in (("real", real), ("generated", generated)):
        assert report[f"{source}_drawn"] == counters[source].total()
        assert report[f"{source}_epochs"] == pytest.approx(counters[source].total() / size if size else 0)
        assert report[f"{source}_coverage"] == pytest.approx(len(counters[source]) / size if size else 0)


# --- batches


@pytest.fixture
def mixed(tmp_path):
    """Real images are dark and generated ones bright, so that each image shows its source."""
    real, real_labels = random_images(6, (2, 2, 1))
    generated, generated_labels = random_images(20, (2, 2, 1), seed=1)
    real, generated = real // 2, generated // 2 + 128
    selected = np.array([1, 2, 5, 8, 13, 17, 18, 19])
    real_set = shards.open_shards(write_in_shards(tmp_path / "real", real, real_labels, (6,)))
    generated_set = shards.open_shards(write_in_shards(tmp_path / "generated", generated, generated_labels, (9, 11)))
    images = SelectedImages(generated_set, selected, None)
    return (
        lambda: MixedBatches(Mix(6, len(selected), 5, 0.6), 4, real_set, images),
        (real, generated, generated_labels, selected),
    )


def test_batches_do_not_depend_on_the_order_of_access(mixed):
    make, _ = mixed
    forward = [make().at(step) for step in range(8)]
    batches = make()
    for step in (7, 0, 3, 3, 6, 1, 2, 5, 4):
        images, labels = batches.at(step)
        assert torch.equal(images, forward[step][0])
        assert torch.equal(labels, forward[step][1])


def test_batches_hold_real_images_first_then_selected_ones(mixed):
    make, (real, generated, generated_labels, selected) = mixed
    batches, counts = make(), collections.Counter()
    index_of = {generated[k].tobytes(): k for k in selected}
    assert len(index_of) == len(selected)
    for step in range(8):
        images, labels = batches.at(step)
        assert images.shape == (5, 2, 2, 1)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        as_bytes = images.numpy()
        assert all(any(np.array_equal(image, r) for r in real) for image in as_bytes[:2])
        for image, label in zip(as_bytes[2:], labels[2:], strict=True):
            index = index_of[image.tobytes()]
            assert label == generated_labels[index]
            counts[index] += 1
    assert counts == dict.fromkeys(selected.tolist(), 3)  # 24 draws of 8 images: three epochs without replacement


def test_a_process_reads_its_rows_alone(mixed, monkeypatch):
    make, _ = mixed
    batches = make()
    images, labels = batches.at(3)
    read, gather = collections.Counter(), shards.Shards.gather

    def count(self, indices, *rest):
        read.update(indices.tolist())
        gather(self, indices, *rest)

    monkeypatch.setattr(shards.Shards, "gather", count)
    for rows in (slice(0, 1), slice(1, 4), slice(2, 2), slice(4, 5)):
        read.clear()
        own_images, own_labels = batches.at(3, rows)
        assert torch.equal(own_images, images[rows])
        assert torch.equal(own_labels, labels[rows])
        assert read.total() == rows.stop - rows.start


def test_images_that_stay_on_the_device_give_the_same_batches(mixed):
    make, _ = mixed
    batches = make()
    resident = ResidentBatches(batches.mix, 4, batches.real, batches.generated, torch.device("cpu"))
    for step in (0, 5, 2):
        for rows in (None, slice(1, 4)):
            for tensor, expected in zip(resident.at(step, rows), batches.at(step, rows), strict=True):
                assert torch.equal(tensor, expected)


def test_batches_take_labels_that_a_scorer_gave(mixed):
    make, _ = mixed
    batches = make()
    pseudo_labels = np.arange(8) + 50
    selected = dataclasses.replace(batches.generated, pseudo_labels=pseudo_labels)
    scored = MixedBatches(batches.mix, 4, batches.real, selected)
    seen = set()
    for step in range(8):
        (images, labels), (same_images, other_labels) = batches.at(step), scored.at(step)
        assert torch.equal(images, same_images)
        assert torch.equal(labels[:2], other_labels[:2])  # real ones
        positions = batches.order.at(step)[1]
        assert other_labels[2:].tolist() == pseudo_labels[positions].tolist()
        seen |= set(other_labels[2:].tolist())
    assert seen == set(pseudo_labels.tolist())


def test_batches_without_generated_images(tmp_path):
    images, labels = random_images(6)
    opened = shards.open_shards(write_in_shards(tmp_path, images, labels, (6,)))
    images_of_batch, labels_of_batch = MixedBatches(Mix(6, 0, 6, 0.0), 1, opened, None).at(0)
    order = BatchOrder(Mix(6, 0, 6, 0.0), 1).at(0)[0]
    assert np.array_equal(images_of_batch.numpy(), images[order])
    assert np.array_equal(labels_of_batch.numpy(), labels[order])
