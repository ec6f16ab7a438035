"""A damaged image set: every damaged shard is named, the others are usable, and nothing outside of the set is read.

Run alone: pytest tests/test_set_inspection.py
"""

import json
import shutil

import numpy as np
import pytest

from dmat import checksum_cache, files
from dmat.data import croissant, set_inspection, shards
from dmat.errors import DmatError

SHARD, SHARDS = 6, 3


def write_set(folder, labels=None, **metadata):
    """18 images 4x5x3 of three classes in three shards."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (SHARD * SHARDS, 4, 5, 3), dtype=np.uint8)
    labels = generator.integers(0, 3, len(images)) if labels is None else labels
    entries = [
        shards.write_shard(folder, k, images[k * SHARD :][:SHARD], labels[k * SHARD :][:SHARD]) for k in range(SHARDS)
    ]
    counts = np.bincount(labels[labels >= 0], minlength=3)
    shards.write_manifest(
        folder,
        entries,
        shape=(4, 5, 3),
        class_names=["cat", "dog", "owl"],
        class_counts=counts,
        metadata={"licence": "CC BY 4.0", **metadata},
    )
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = write_set(tmp_path_factory.mktemp("sets") / "sound")
    croissant.write(folder, "sound")
    return folder


@pytest.fixture
def copy(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "copy")


def edit(folder, **values):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | values))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def swap(first, second):
    first.rename(first.with_suffix(".old"))
    second.rename(first)
    first.with_suffix(".old").rename(second)


def resave(folder, number, name, array):
    resave_file(folder, number, name, lambda file: np.save(file, array))


def resave_file(folder, number, name, save):
    """Replaces a file of a shard together with its checksum, as somebody who damages a set on purpose would."""
    path = folder / f"{name}-{number:05d}.npy"
    with path.open("wb") as file:
        save(file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][number][f"{name}_sha256"] = shards.files.sha256(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_sound_set(sound):
    reports = []
    check = set_inspection.verify(sound, reports.append)
    assert check.intact
    assert [shard.entry["index"] for shard in check.shards] == [0, 1, 2]
    assert reports == [SHARD] * SHARDS
    description = set_inspection.describe(sound)
    assert (description["images"], description["shape"], description["classes"]) == (18, [4, 5, 3], 3)
    assert (description["shards"], description["croissant"]) == (3, "croissant.json")
    assert description["bytes"] == sum(path.stat().st_size for path in sound.glob("*.npy"))
    images, labels = set_inspection.open_verified(sound).all()
    assert np.bincount(labels, minlength=3).tolist() == description["class_counts"]
    assert images.shape == (18, 4, 5, 3)


IMAGES, LABELS = "images-00001.npy", "labels-00001.npy"
DAMAGE = {  # damage, damaged shards, fragment of the problem
    "a flipped bit": (lambda f: flip(f / IMAGES), [1], f"{IMAGES} has checksum"),
    "cut": (lambda f: (f / IMAGES).write_bytes((f / IMAGES).read_bytes()[:-7]), [1], "it was altered or cut"),
    "removed": (lambda f: (f / LABELS).unlink(), [1], f"{LABELS} is missing"),
    "two shards swapped": (lambda f: swap(f / "images-00000.npy", f / IMAGES), [0, 1], f"is the content of {IMAGES}"),
    "a label too large": (lambda f: resave(f, 1, "labels", np.full(SHARD, 3)), [1], "from 3 to 3, and the classes"),
    "a label below 0": (lambda f: resave(f, 1, "labels", np.arange(SHARD) - 1), [1], "has labels from -1 to 4"),
    "labels of another type": (lambda f: resave(f, 1, "labels", np.zeros(SHARD, np.int32)), [1], "is int32 [6]"),
    "fewer labels": (lambda f: resave(f, 1, "labels", np.zeros(5, np.int64)), [1], "is int64 [5], and the manifest"),
    "images of another size": (
        lambda f: resave(f, 1, "images", np.zeros((SHARD, 5, 4, 3), np.uint8)), [1], "is uint8 [6, 5, 4, 3]"),
    "images in another order": (
        lambda f: resave(f, 1, "images", np.asfortranarray(np.zeros((SHARD, 4, 5, 3), np.uint8))), [1], "row by row"),
    "an archive": (
        lambda f: resave_file(f, 1, "labels", lambda file: np.savez(file, a=np.zeros(1))), [1], "is not an array"),
    "objects": (
        lambda f: resave(f, 1, "labels", np.array([None] * SHARD, dtype=object)), [1], f"{LABELS} is not an array"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_shard_is_named_and_the_others_are_usable(copy, case):
    damage, damaged, sentence = DAMAGE[case]
    damage(copy)
    check = set_inspection.verify(copy)
    assert not check.intact
    assert [shard.entry["index"] for shard in check.shards if shard.problems] == damaged
    assert any(sentence in problem for shard in check.shards for problem in shard.problems), check
    with pytest.raises(DmatError, match="dmat images verify"):
        set_inspection.open_verified(copy)


def test_the_checksum_cache_is_not_trusted(copy, monkeypatch):
    """A bit that rotted on the disk changes no time, so the cache still has the old checksum."""
    recorded = shards.files.sha256(copy / IMAGES)
    flip(copy / IMAGES)
    state = checksum_cache._key((copy / IMAGES).stat())
    monkeypatch.setattr(checksum_cache, "_process_cache", {state: recorded})
    assert set_inspection.verify(copy, cached=True).intact
    assert not set_inspection.verify(copy).intact


def test_class_counts_that_are_not_those_of_the_labels(copy):
    edit(copy, class_counts=[18, 0, 0])
    check = set_inspection.verify(copy)
    assert not any(shard.problems for shard in check.shards)
    assert check.problems[0].startswith("manifest.json counts 18 images of class cat, and the labels ")
    assert check.problems[1] == "croissant.json does not describe this manifest"


def test_images_without_labels(tmp_path):
    folder = write_set(tmp_path / "set", labels=np.full(18, -1), unlabelled=True)
    assert set_inspection.verify(folder).intact
    assert set_inspection.first_of_classes(set_inspection.open_verified(folder), 1, 5).tolist() == list(range(10))
    resave(folder, 2, "labels", np.zeros(SHARD, np.int64))
    (problem,) = set_inspection.verify(folder).shards[2].problems
    assert problem.endswith("has labels from 0 to 0, and the manifest says that the images have none")


def test_a_set_opens_without_being_read(copy):
    """So that a sheet of a set of millions needs no minutes; types and shapes are compared all the same."""
    flip(copy / IMAGES)
    assert len(set_inspection.open_unverified(copy)) == 18
    resave(copy, 1, "labels", np.zeros(SHARD, np.int32))
    with pytest.raises(DmatError, match=r"labels-00001\.npy is int32 \[6\], and the manifest says int64"):
        set_inspection.open_unverified(copy)


def test_the_first_images_of_each_class(sound):
    images = set_inspection.open_verified(sound)
    labels = images.all()[1]
    for count in (1, 4, 100):
        expected = np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(3)]))
        assert set_inspection.first_of_classes(images, count, 5).tolist() == expected.tolist()
    assert set(labels[set_inspection.first_of_classes(images, 2, 1)]) == {0}


MANIFESTS = {
    "another schema": ({"schema": 2}, "has schema 2; this dmat reads 1"),
    "no shards": ({"shards": []}, "it names no shards"),
    "a shard that is no record": ({"shards": [1]}, r"shards\.0: Input should be a valid dictionary"),
    "a shard without images": ({"shards": [{"index": 0, "count": 0}]}, r"shards\.0\.images: Field required"),
    "another count": ({"count": 17}, "count is 17, and the shards have 18 images"),
    "a count that is text": ({"count": "18"}, "count: Input should be a valid integer"),
    "a shape of two sides": ({"shape": [4, 5]}, r"shape is \[4, 5\], not \[H, W, 1 or 3\]"),
    "a shape of nothing": ({"shape": [0, 5, 3]}, r"shape is \[0, 5, 3\]"),
    "a class twice": ({"class_names": ["a", "a", "b"]}, "class_names are not texts, all different"),
    "fewer counts": ({"class_counts": [18]}, "class_counts are not 3 counts"),
    "a licence that is a list": ({"licence": ["MIT"]}, "licence: Input should be a valid string"),
    "a sampler that is text": ({"sampler": "heun"}, "sampler: Input should be "),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_an_edited_manifest_is_refused(copy, case):
    values, sentence = MANIFESTS[case]
    edit(copy, **values)
    for read in (shards.read_manifest, set_inspection.describe, set_inspection.verify, set_inspection.open_verified):
        with pytest.raises(DmatError, match=sentence):
            read(copy)


@pytest.mark.parametrize("name", ["../secret.npy", "/etc/passwd", ".hidden.npy", "images-00000.npy\n", "a\\b.npy", ""])
def test_a_manifest_cannot_name_files_elsewhere(copy, name):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][1]["labels"] = name
    edit(copy, shards=manifest["shards"])
    with pytest.raises(DmatError, match=r"the labels of shard 1 are in .*, not in a file of the folder"):
        set_inspection.verify(copy)


def test_a_manifest_is_not_read_into_memory_whatever_its_size(copy, monkeypatch):
    monkeypatch.setattr(files, "_MAX_JSON_SIZE", 100)
    with pytest.raises(DmatError, match=r"expected at most 100"):
        shards.read_manifest(copy)
