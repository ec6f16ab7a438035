"""Files of SVHN, TinyImageNet, MNIST, Hugging Face and sets in parts are read as they were written; damaged, incomplete
and lying files are refused by name.

Oracle: files written here by other libraries or byte by byte. CIFAR and folders of images are in test_sources.py. Run
alone: pytest tests/test_formats.py
"""

import gzip
import io
import itertools
import json
import shutil
import struct
import types
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from PIL import Image

from dmat import config
from dmat.config import WrittenNumber
from dmat.data import data_sets, shards, sources
from dmat.data.augmentation import AUGMENTATIONS
from dmat.data.data_sets import DATA_SETS
from dmat.data.formats.split_files import files_of_splits
from dmat.errors import DmatError
from dmat.jobs import prepare_data


def random_pair(count, shape, classes=10, seed=0):
    """Random images uint8 [count, *shape] and labels int64 [count] that cycle through the classes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    return pixels, np.arange(count, dtype=np.int64) % classes


def check(source, train, test=None):
    """Whether a source has these images and labels, in values and types."""
    pairs = [((source.images, source.labels), train), *([(source.test, test)] if test else [])]
    assert (source.test is None) == (test is None)
    for actual, expected in pairs:
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)


def refusal(name, path):
    """The message, one line, with which a source refuses."""
    with pytest.raises(DmatError) as refused:
        sources.load(name, path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- the table


@pytest.mark.parametrize("name", DATA_SETS)
def test_the_facts_fit_each_other(name):
    data_set = DATA_SETS[name]
    assert name in sources.SOURCES
    assert data_set.augmentation in AUGMENTATIONS
    assert data_set.norm in ("linf", "l2")
    assert 0 < WrittenNumber(data_set.epsilon) < 1
    assert len(set(data_set.class_names)) in (0, data_set.classes)
    for values in data_set.normalisation or ():
        assert len(values) == data_set.channels
        assert all(0 < value < 1 for value in values)
    assert bool(data_set.layouts) == (name != "digits")


def test_the_facts_are_those_of_torchvision_and_scikit_learn():
    from torchvision import datasets

    assert list(DATA_SETS["fashion_mnist"].class_names) == datasets.FashionMNIST.classes
    assert [name[0] for name in datasets.MNIST.classes] == list(DATA_SETS["mnist"].class_names)
    assert DATA_SETS["cifar10"].layouts[0] == (datasets.CIFAR10.base_folder,)
    assert DATA_SETS["cifar100"].layouts[0] == (datasets.CIFAR100.base_folder,)
    assert DATA_SETS["cifar100"].class_names == tuple(sorted(DATA_SETS["cifar100"].class_names))
    assert len(sources.digits().labels) == DATA_SETS["digits"].train


# --- SVHN


def write_svhn(folder, *, compressed=True, **changes):
    """Writes both files of SVHN; changes: arrays of the test file to replace. Returns the training and test pair."""
    folder.mkdir(exist_ok=True)
    pairs = random_pair(20, (32, 32, 3)), random_pair(10, (32, 32, 3), seed=1)
    for name, (images, labels) in zip(("train", "test"), pairs, strict=True):
        written = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        arrays = {"X": images.transpose(1, 2, 3, 0), "y": written} | (changes if name == "test" else {})
        scipy.io.savemat(folder / f"{name}_32x32.mat", arrays, do_compression=compressed)
    return pairs


@pytest.mark.parametrize("compressed", [True, False])
def test_svhn_is_read_and_ten_is_a_zero(tmp_path, compressed):
    train, test = write_svhn(tmp_path, compressed=compressed)
    source = sources.load("svhn", tmp_path)
    check(source, train, test)
    assert source.class_names == tuple("0123456789")
    assert source.origin == "SVHN (Netzer et al. 2011), cropped digits, a part of it: 20 and 10 images"
    check(sources.recognise(tmp_path, "test"), test)


def test_labels_of_svhn_may_be_floats_of_matlab(tmp_path):
    _, test = write_svhn(tmp_path, y=np.array([[10, 1, 2, 3, 4, 5, 6, 7, 8, 9]], dtype=float))
    assert sources.load("svhn", tmp_path).test[1].tolist() == test[1].tolist()


X = np.zeros((32, 32, 3, 10), np.uint8)
SVHN_ARRAYS = {
    "floats": ({"X": X / 1}, "`X` is double (32, 32, 3, 10); expected X uint8 (32, 32, 3, N)"),
    "a cell": ({"X": np.array([1, "text"], object)}, "`X` is another type (1, 2)"),
    "a record": ({"X": {"a": 1}}, "`X` is another type (1, 1)"),
    "other size": ({"X": X[:28]}, "`X` is uint8 (28, 32, 3, 10)"),
    "images first": ({"X": X.transpose(3, 0, 1, 2)}, "`X` is uint8 (10, 32, 32, 3)"),
    "fewer labels": ({"y": np.ones((9, 1), np.uint8)}, "holds X (32, 32, 3, 10), y (9, 1); expected X"),
    "text": ({"y": "abcdefghij"}, "`y` is another type"),
    "label 0": ({"y": np.zeros((10, 1), np.uint8)}, "`y` holds values from 0 to 0; expected the whole numbers 1 to 10"),
    "label 11": ({"y": np.full((10, 1), 11, np.uint8)}, "`y` holds values from 11 to 11"),
    "a half": ({"y": np.full((10, 1), 1.5)}, "`y` holds values from 1.5 to 1.5"),
    "not a number": ({"y": np.full((10, 1), np.nan)}, "`y` holds values from nan to nan"),
}


@pytest.mark.parametrize("name", SVHN_ARRAYS)
def test_other_arrays_than_those_of_svhn_are_refused(tmp_path, name):
    changes, message = SVHN_ARRAYS[name]
    write_svhn(tmp_path, **changes)
    text = refusal("svhn", tmp_path)
    assert text.startswith(str(tmp_path / "test_32x32.mat"))
    assert message in text


def _larger(content, lengths=True):
    """Writes a number of images of 1,000,000 into the header of an uncompressed file, and perhaps their bytes."""
    content = content.replace(struct.pack("<4i", 32, 32, 3, 10), struct.pack("<4i", 32, 32, 3, 10**6), 1)
    size = 3 * 32 * 32
    return content.replace(struct.pack("<2I", 2, 10 * size), struct.pack("<2I", 2, 10**6 * size), lengths)


def _compressed(content):
    """The first array of an uncompressed file as a compressed element, cut."""
    (length,) = struct.unpack("<I", content[132:136])
    element = zlib.compress(content[128 : 136 + length - 1000])
    return content[:128] + struct.pack("<2I", 15, len(element)) + element


MAT_DAMAGE = {
    "cut": (lambda content: content[:-9], "is not a complete MATLAB file (it ends inside an array)"),
    "half": (lambda content: content[: len(content) // 2], "(it ends inside an array)"),
    "cut inside": (_compressed, "(an array is shorter than its header says)"),
    "only images": (lambda content: content[:30_912], "holds X (32, 32, 3, 10); expected X (32, 32, 3, N) and y (N, 1"),
    "empty": (lambda content: b"", "(it does not begin as one of level 5)"),
    "a page": (lambda content: b"<html>404</html>", "(it does not begin as one of level 5)"),
    "version 7.3": (lambda content: content[:124] + b"\0\2IM" + b"\x89HDF", "(it does not begin as one of level 5)"),
    "twice": (lambda content: content + content[128:], "(it holds X twice)"),
    "says too many": (lambda content: _larger(content, False), "(`X` has other values than its type and dimensions sa"),
    "says too much": (_larger, "says that it holds 3,072,000,000 bytes of pixels or labels; expected fewer in 30,"),
    "no type": (lambda content: content.replace(struct.pack("<2I", 2, 30_720), struct.pack("<2I", 60_000, 30_720)),
                "(`X` has other values than its type and dimensions say)"),  # scipy's reader crashes here
    "another type": (lambda content: content.replace(struct.pack("<2I", 2, 30_720), struct.pack("<2I", 9, 30_720)),
                     "(`X` has other values than its type and dimensions say)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MAT_DAMAGE)
def test_damaged_files_of_svhn_are_refused(tmp_path, name):
    damage, message = MAT_DAMAGE[name]
    write_svhn(tmp_path, compressed=False)
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(damage(path.read_bytes()))
    assert message in refusal("svhn", tmp_path)


# --- MNIST and Fashion-MNIST


def write_idx(folder, stored=lambda content: content, suffix=""):
    """Writes the four files of MNIST; returns the training and test pair."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = random_pair(20, (28, 28, 1)), random_pair(10, (28, 28, 1), seed=1)
    for name, (images, labels) in zip(("train", "t10k"), pairs, strict=True):
        header = struct.pack(">4i", 0x803, len(images), 28, 28)
        (folder / f"{name}-images-idx3-ubyte{suffix}").write_bytes(stored(header + images.tobytes()))
        header = struct.pack(">2i", 0x801, len(labels))
        (folder / f"{name}-labels-idx1-ubyte{suffix}").write_bytes(stored(header + labels.astype(np.uint8).tobytes()))
    return pairs


@pytest.mark.parametrize("below", ["", "MNIST/raw"])
@pytest.mark.parametrize(("stored", "suffix"), [(bytes, ""), (gzip.compress, ".gz"), (gzip.compress, "")])
def test_mnist_is_read_plain_and_compressed(tmp_path, stored, suffix, below):
    train, test = write_idx(tmp_path / below, stored, suffix)
    check(sources.load("mnist", tmp_path), train, test)
    assert sources.location("mnist", tmp_path) == tmp_path / below


def test_fashion_mnist_has_the_same_files_and_other_classes(tmp_path):
    train, test = write_idx(tmp_path / "f")
    source = sources.load("fashion_mnist", tmp_path / "f")
    check(source, train, test)
    assert (source.class_names[9], source.licence) == ("Ankle boot", "MIT")
    text = "holds MNIST and Fashion-MNIST, or files with the names of both; expected one of them; give the folder"
    with pytest.raises(DmatError, match=text):
        sources.recognise(tmp_path / "f")
    write_idx(tmp_path / "FashionMNIST/raw")  # the folder says which
    assert sources.recognise(tmp_path).class_names[9] == "Ankle boot"


IDX_DAMAGE = {  # name and new content of a file
    "cut": ("train-images-idx3-ubyte", lambda c: c[:-1], "(fewer bytes than its header says, 15,680)"),
    "surplus": ("train-images-idx3-ubyte", lambda c: c + b"\0", "(more bytes than its header says, 15,680)"),
    "no header": ("t10k-labels-idx1-ubyte", lambda c: c[:5], "is damaged (unpack requires a buffer of 4 bytes)"),
    "empty": ("t10k-labels-idx1-ubyte", lambda c: b"", "begins with nothing; expected 00 00 08 01, an IDX file of byt"),
    "a page": ("t10k-labels-idx1-ubyte", lambda c: b"<html>", "begins with 3c 68 74 6d; expected 00 00 08 01"),
    "floats": ("train-images-idx3-ubyte", lambda c: b"\0\0\r\3" + c[4:], "begins with 00 00 0d 03; expected 00 00 08"),
    "labels as images": ("train-images-idx3-ubyte", lambda c: b"\0\0\b\1" + c[4:], "expected 00 00 08 03"),
    "too many": ("train-images-idx3-ubyte", lambda c: c[:4] + b"\xff" * 12, "bytes of pixels or labels; expected fewe"),
    "fewer labels": (
        "train-labels-idx1-ubyte", lambda c: c[:7] + b"\x13" + c[8:-1], "holds 19 labels, train-images-idx3-ubyte 20 im"
    ),
    "label 10": ("train-labels-idx1-ubyte", lambda c: c[:-1] + b"\n", "has labels from 0 to 10; expected 0 to 9"),
    "cut gzip": ("train-images-idx3-ubyte", lambda c: gzip.compress(c)[:-9], "is damaged (Compressed file ended befor"),
    "wrong gzip": ("train-images-idx3-ubyte", lambda c: gzip.compress(c)[:200] + bytes(99), "is damaged ("),
    "gzip checksum": ("train-images-idx3-ubyte", lambda c: gzip.compress(c)[:-8] + bytes(8), "is damaged (CRC check f"),
}  # fmt: skip


@pytest.mark.parametrize("name", IDX_DAMAGE)
def test_damaged_idx_files_are_refused_by_name(tmp_path, name):
    file, damage, message = IDX_DAMAGE[name]
    write_idx(tmp_path)
    path = tmp_path / file
    path.write_bytes(damage(path.read_bytes()))
    text = refusal("mnist", tmp_path)
    assert text.startswith(str(path))
    assert message in text


# --- TinyImageNet

IDS = ("n02", "n01", "n10")  # not in their order
TINY = (64, 64, 3)


def write_tiny(root, seed=0):
    """Writes `tiny-imagenet-200` with lossless images whose names say JPEG; returns the training and test pair."""
    pairs = random_pair(6, TINY, 3, seed), random_pair(3, TINY, 3, seed + 1)
    for images, labels, folder in (
        (*pairs[0], lambda k: root / "train" / sorted(IDS)[k] / "images"),
        (*pairs[1], lambda k: root / "val/images"),
    ):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder(label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder(label) / f"{number}.JPEG", "PNG")
    (root / "wnids.txt").write_text("\n".join(IDS))
    (root / "words.txt").write_text("n00\tentity\nn01\tcrane, bird\nn02\tgoldfish, Carassius\nn10\tcrane, machine\n")
    lines = [f"{number}.JPEG\t{sorted(IDS)[label]}\t0\t0\t9\t9" for number, label in enumerate(pairs[1][1])]
    (root / "val/val_annotations.txt").write_text("\n".join(lines) + "\n")
    (root / "test/images").mkdir(parents=True)
    (root / "test/images/test_0.JPEG").write_bytes(b"not read")
    order = np.argsort(pairs[0][1], kind="stable")  # class by class
    return (pairs[0][0][order], pairs[0][1][order]), pairs[1]


@pytest.mark.parametrize("below", ["", "tiny-imagenet-200"])
def test_tiny_imagenet_is_read_with_val_as_test(tmp_path, below):
    train, test = write_tiny(tmp_path / below)
    source = sources.load("tinyimagenet", tmp_path)
    check(source, train, test)
    assert source.class_names == ("crane (n01)", "goldfish", "crane (n10)")
    assert source.origin == "TinyImageNet (Stanford CS231n), JPEG files, a part of it: 6 and 3 images"
    check(sources.recognise(tmp_path, "test"), test)


def test_grey_images_of_tiny_imagenet_become_colour_images(tmp_path):
    write_tiny(tmp_path)
    path = tmp_path / "train/n01/images/0.JPEG"
    Image.fromarray(random_pair(1, (64, 64))[0][0]).save(path)
    with Image.open(path) as opened:
        assert (opened.format, opened.mode) == ("JPEG", "L")
        expected = np.asarray(opened.convert("RGB"))
    assert np.array_equal(sources.load("tinyimagenet", tmp_path).images[0], expected)


def _remove(name):
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def _append(name, text):
    return lambda root: (root / name).write_text((root / name).read_text() + text)


TINY_DAMAGE = {
    "no ids": (_remove("wnids.txt"), "wnids.txt does not exist; expected it beside the other files; unpack"),
    "no words": (_remove("words.txt"), "words.txt does not exist"),
    "no list": (_remove("val/val_annotations.txt"), "val_annotations.txt does not exist"),
    "id twice": (_append("wnids.txt", "\nn01"), "wnids.txt does not hold distinct WordNet ids"),
    "unknown id": (_append("wnids.txt", "\nn99"), "words.txt has no words for n99"),
    "no class": (_remove("train/n02"), "train lacks the folders n02; expected one folder for each id in wnids.txt"),
    "no train": (_remove("train"), "train lacks the folders n01, n02, n10"),
    "another class": (lambda r: (r / "train/n55").mkdir(), "train has n55; expected one folder for each id"),
    "empty class": (lambda r: [p.unlink() for p in (r / "train/n02/images").iterdir()], "n02/images is empty"),
    "image gone": (_remove("val/images/1.JPEG"), "line 2, names 1.JPEG, which is not in val/images or is named twice"),
    "unlisted": (lambda r: (r / "val/images/9.JPEG").touch(), "val_annotations.txt lacks 9.JPEG; expected every image"),
    "listed twice": (_append("val/val_annotations.txt", "0.JPEG\tn01"), "line 4, names 0.JPEG, which is not in"),
    "other id": (_append("val/val_annotations.txt", "9.JPEG\tn77"), "line 4, has no class; expected an image and its"),
    "no id": (_append("val/val_annotations.txt", "9.JPEG"), "line 4, has no class"),
    "outside": (_append("val/val_annotations.txt", "../../wnids.txt\tn01"), "names ../../wnids.txt, which is not in v"),
    "binary list": (lambda r: (r / "val/val_annotations.txt").write_bytes(b"\xff\xfe\n"), "line 1, has no class"),
    "other size": (
        lambda r: Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(r / "val/images/0.JPEG"),
        "val/images/0.JPEG is 32x32 in colour; expected 64x64 in colour",
    ),
    "no image": (lambda r: (r / "val/images/0.JPEG").write_bytes(b"x"), "val/images/0.JPEG cannot be read as an image"),
}


@pytest.mark.parametrize("name", TINY_DAMAGE)
def test_damaged_tiny_imagenet_is_refused_by_name(tmp_path, name):
    damage, message = TINY_DAMAGE[name]
    write_tiny(tmp_path)
    damage(tmp_path)
    text = refusal("tinyimagenet", tmp_path)
    assert text.startswith(str(tmp_path))
    assert message in text


def test_tiny_imagenet_as_two_npz_files(tmp_path):
    train, test = random_pair(6, TINY, 3), random_pair(3, TINY, 3, seed=1)
    np.savez(tmp_path / "train.npz", image=train[0], label=train[1])
    assert f"{tmp_path / 'val.npz'} does not exist" in refusal("tinyimagenet", tmp_path)
    np.savez(tmp_path / "val.npz", image=test[0], label=test[1].astype(np.int32))
    source = sources.load("tinyimagenet", tmp_path)
    check(source, train, test)
    assert "two .npz files" in source.origin
    np.savez(tmp_path / "val.npz", image=test[0][:, :32, :32], label=test[1])
    assert "val.npz holds images 32x32 in colour; expected 64x64 in colour" in refusal("tinyimagenet", tmp_path)


# --- which files are parts of which split

NAMES = {  # names of files -> names of each split, or a part of the message
    "Hugging Face": ("train-00001-of-00002 train-00000-of-00002 test-00000-of-00001",
                     {"train": "train-00000-of-00002 train-00001-of-00002", "test": "test-00000-of-00001"}),
    "with a hash": ("train-00000-of-00002-a1b2 train-00001-of-00002-c3d4",
                    {"train": "train-00000-of-00002-a1b2 train-00001-of-00002-c3d4"}),
    "numbers": ("part10 part2 part1 part9 part8 part7 part6 part5 part4 part3",
                {"train": "part1 part2 part3 part4 part5 part6 part7 part8 part9 part10"}),
    "from 0": ("0000 0001", {"train": "0000 0001"}),
    "other words": ("Training Test valid", {"train": "Training", "test": "Test"}),
    "no numbers": ("a b", {"train": "a b"}),
    "a year": ("set2023", {"train": "set2023"}),
    "trained": ("trained_1 trained_2", {"train": "trained_1 trained_2"}),
    "last is missing": ("train-00000-of-00003 train-00001-of-00003",
                        "lacks train-00002-of-00003.x; expected all 3 parts of the set beside each other; add it"),
    "first is missing": ("50m_part2 50m_part3", "lacks 50m_part1.x; expected all 3 parts of the set"),
    "test part is missing": ("train test-00001-of-00002", "lacks test-00000-of-00002.x; expected all 2 parts"),
    "gap": ("1m 5m 10m", "lacks 2m.x; expected all 10 parts"),
    "absurd count": ("train-0-of-99999999999", "lacks train-1-of-99999999999.x; expected all 99999999999 parts"),
    "two sets": ("a-0-of-1 a-1-of-2", "has a-0-of-1.x, a-1-of-2.x; expected the parts of one set, each once"),
    "not a part": ("train-0-of-2 train-1-of-2 train-extra", "expected the parts of one set, each once"),
    "twice": ("part1 part01", "expected the parts of one set, each once"),
    "beyond": ("a-1-of-1", "expected the parts of one set, each once"),
    "no train": ("test", "has test.x; expected parts of one set alone, or files of which each begins with train, test"),
    "beside splits": ("train test more", "expected parts of one set alone, or files of which each begins with train"),
    "two words": ("val valid train", "expected parts of one set alone, or files of which each begins with train"),
    "nothing": ("", "has no .x file; expected some directly in it"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_splits_and_parts_follow_from_names(tmp_path, name):
    stems, expected = NAMES[name]
    for other in ("README.md", ".hidden.x"):
        (tmp_path / other).touch()
    for stem in stems.split():
        (tmp_path / f"{stem}.x").touch()
    if isinstance(expected, dict):
        splits, notes = files_of_splits(tmp_path, ".x")
        assert {split: " ".join(path.stem for path in paths) for split, paths in splits.items()} == expected
        assert bool(notes) == ("valid" in stems)
    else:
        with pytest.raises(DmatError) as refused:
            files_of_splits(tmp_path, ".x")
        assert expected in str(refused.value)


# --- .npz in parts


def write_parts(folder, sizes=(4, 6, 5), names=("part1", "part2", "part10"), **arrays):
    """Writes one .npz per size; returns the images and labels of all together."""
    images, labels = random_pair(sum(sizes), (4, 5, 3), 3)
    ends = list(itertools.accumulate(sizes))
    for name, start, end in zip(names, [0, *ends], ends, strict=False):
        np.savez_compressed(folder / f"{name}.npz", image=images[start:end], label=labels[start:end], **arrays)
    return images, labels


def test_parts_are_one_set_in_the_order_of_their_names(tmp_path):
    pair = write_parts(tmp_path, names=("part1", "part2", "part3"))
    source = sources.load("npz", tmp_path)
    check(source, pair)
    assert source.class_names == ("0", "1", "2")
    check(sources.recognise(tmp_path, "train"), pair)


def test_files_of_splits_stay_apart(tmp_path):
    images, labels = write_parts(tmp_path, names=("train_1", "train_2", "test"), class_names=np.array(["a", "b", "c"]))
    source = sources.load("npz", tmp_path)
    check(source, (images[:10], labels[:10]), (images[10:], labels[10:]))
    assert source.class_names == ("a", "b", "c")


def _savez(folder, name="part2", **changes):
    images, labels = random_pair(6, (4, 5, 3), 3)
    arrays = {"image": images, "label": labels} | changes
    np.savez(folder / f"{name}.npz", **{key: value for key, value in arrays.items() if value is not None})


def _lying_npz(path, shape, keep=0):
    """An .npz of one image whose header claims more."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", file.getvalue() + bytes(keep))
        content = io.BytesIO()
        np.save(content, np.zeros(1, np.int64))
        archive.writestr("label.npy", content.getvalue())


PART_DAMAGE = {
    "missing": (lambda f: (f / "part2.npz").unlink(), "lacks part2.npz; expected all 3 parts"),
    "cut": (lambda f: (f / "part2.npz").write_bytes((f / "part2.npz").read_bytes()[:-50]), "part2.npz is incomplete"),
    "not an archive": (lambda f: (f / "part2.npz").write_bytes(b"<html>"), "part2.npz is incomplete or not an .npz"),
    "floats": (lambda f: _savez(f, image=np.zeros((6, 4, 5, 3))), "part2.npz: `image` is float64 (6, 4, 5, 3); expect"),
    "flat": (lambda f: _savez(f, image=np.zeros((6, 60), np.uint8)), "part2.npz: `image` is uint8 (6, 60); expected"),
    "no image": (lambda f: _savez(f, image=None), "part2.npz lacks image; expected arrays `image` and `label`"),
    "no label": (lambda f: _savez(f, label=None), "part2.npz lacks label; expected arrays `image` and `label`"),
    "other size": (lambda f: _savez(f, image=np.zeros((6, 5, 5, 3), np.uint8)),
                   "part2.npz holds images 5x5 in colour; expected 5x4 in colour as in part1.npz"),
    "fewer labels": (lambda f: _savez(f, label=np.zeros(5, int)), "part2.npz: `label` is int64 (5,); expected 6 integ"),
    "label": (lambda f: _savez(f, label=np.full(6, -1)), "part2.npz: `label` is int64 (6,); expected 6 integers from"),
    "absurd label": (lambda f: _savez(f, label=np.full(6, 10**9)), "part2.npz: `label` goes up to 1000000000"),
    "names": (lambda f: _savez(f, class_names=np.array(["a", "b", "c"])), "part2.npz has other `class_names` than par"),
    "few names": (lambda f: _savez(f, class_names=np.array(["a", "b"])), "part2.npz has labels from 0 to 2; expected"),
    "test images": (lambda f: _savez(f, test_image=np.zeros((1, 4, 5, 3), np.uint8), test_label=np.zeros(1, int)),
                    "part2.npz is one of several parts and holds `test_image`"),
    "objects": (lambda f: _savez(f, label=np.array([None] * 6)), "part2.npz is incomplete or not an .npz of numbers"),
    "says too many": (lambda f: _lying_npz(f / "part2.npz", (10**12, 4, 5, 3)),
                      "image is uint8 [1000000000000, 4, 5, 3], which 128 bytes do not hold exactly"),
    "negative": (lambda f: _lying_npz(f / "part2.npz", (-1, 4, 5, 3)), "part2.npz"),
    "says more": (lambda f: _lying_npz(f / "part2.npz", (100, 4, 5, 3), 60), "part2.npz is incomplete or not an .npz"),
}  # fmt: skip


@pytest.mark.parametrize("name", PART_DAMAGE)
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path, name):
    damage, message = PART_DAMAGE[name]
    write_parts(tmp_path, names=("part1", "part2", "part3"))
    damage(tmp_path)
    assert message in refusal("npz", tmp_path)


def test_a_single_npz_that_says_too_many_is_refused_before_memory_is_allocated(tmp_path):
    _lying_npz(tmp_path / "s.npz", (10**12, 4, 5, 3))
    assert "which 128 bytes do not hold exactly" in refusal("npz", tmp_path / "s.npz")


# --- Parquet


def encoded(image, kind="PNG"):
    """The bytes of an image file. image: uint8 [H, W, C]."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, kind)
    return file.getvalue()


def write_parquet(path, images, labels, class_names=None, *, columns=("image", "label"), more=None, kind=None):
    """Writes a file as `datasets` does: a struct of bytes and path, and a label whose metadata names the classes."""
    struct_of_image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    as_rows = [image if isinstance(image, dict) else {"bytes": encoded(image), "path": "/a"} for image in images]
    arrays = {columns[0]: pa.array(as_rows, struct_of_image), columns[1]: pa.array(list(labels), kind or pa.int64())}
    table = pa.table(arrays | (more or {}))
    if class_names is not None:
        features = {columns[0]: {"_type": "Image"}, columns[1]: {"names": class_names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


PETS = ["cat", "dog", "emu"]


@pytest.mark.parametrize("channels", [1, 3])
def test_parquet_is_read_with_the_class_names_of_its_metadata(tmp_path, channels):
    train, test = random_pair(9, (6, 5, channels), 3), random_pair(4, (6, 5, channels), 3, seed=1)
    write_parquet(tmp_path / "train-00000-of-00002.parquet", train[0][:5], train[1][:5], PETS)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", train[0][5:], train[1][5:], PETS)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", test[0], test[1], PETS)
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", test[0], test[1], PETS)
    source = sources.load("parquet", tmp_path)
    check(source, train, test)
    assert source.class_names == ("cat", "dog", "emu")
    (note,) = source.notes
    assert note.startswith("validation-00000-of-00001.parquet in ")
    check(sources.recognise(tmp_path, "test"), test)
    check(sources.recognise(tmp_path / "test-00000-of-00001.parquet"), test)


def test_a_single_parquet_file_without_metadata_and_with_jpeg(tmp_path):
    images, labels = random_pair(4, (8, 8, 3), 2)
    contents = [{"bytes": encoded(image, "JPEG"), "path": None} for image in images]
    more = {"coarse_label": pa.array([0] * 4), "name": pa.array(["x"] * 4)}
    write_parquet(tmp_path / "x", contents, labels, columns=("img", "fine_label"), more=more, kind=pa.uint8())
    source = sources.load("parquet", tmp_path / "x")
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(content["bytes"]))) for content in contents])
    check(source, (decoded, labels))
    assert source.class_names == ("0", "1")


@pytest.mark.parametrize("first", ["grey", "colour"])
def test_grey_images_among_colour_images_become_colour_images(tmp_path, first):
    colour, grey = random_pair(2, (6, 5, 3))[0], random_pair(2, (6, 5, 1))[0]
    images = [*grey, *colour] if first == "grey" else [*colour, *grey]
    write_parquet(tmp_path / "x.parquet", images, [0, 1, 0, 1])
    source = sources.load("parquet", tmp_path / "x.parquet")
    assert np.array_equal(source.images, np.stack([np.broadcast_to(image, (6, 5, 3)) for image in images]))
    assert source.notes == ("2 grey images of train became colour images",)


FOUR = random_pair(4, (6, 5, 3), 2)
PARQUET = {  # arguments of the second part -> message
    "label 2": ({"labels": [0, 1, 2, 0]}, "has labels from 0 to 2; expected 0 to 1"),
    "label -1": ({"labels": [0, -1, 0, 0]}, "row 1, has the label -1; expected an image and a class counted from 0"),
    "no label": ({"labels": [0, 1, None, 0]}, "row 2, has the label None"),
    "only a path": ({"images": [{"bytes": None, "path": "/etc/hostname"}] * 4}, "row 0, has no bytes of an image"),
    "no image": ({"images": [{"bytes": b"<html>", "path": ""}] * 4}, "row 0 cannot be read as an image"),
    "a program": ({"images": [{"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n"}] * 4}, "row 0 cannot be read as an image"),
    "other size": ({"images": random_pair(4, (5, 5, 3))[0]}, "row 0, is 5x5 in colour; expected 5x6 in colour"),
    "floats": ({"kind": pa.float64()}, "expected one of images (a struct with the bytes of an image file) and one of"),
    "other column": ({"columns": ("img", "label")}, "has the columns img and label and 2 class names; expected image,"),
    "two of images": ({"more": {"other": pa.array([{"bytes": b""}] * 4)}}, "has the columns image struct<"),
    "integers": ({"columns": ("image", "a"), "more": {"b": pa.array([0] * 4)}}, "or one of them named label or fine_l"),
    "other names": ({"class_names": ["dog", "cat"]}, "expected image, label and the 2 names as in train-0-of-2.parque"),
    "names twice": ({"class_names": ["cat", "cat"]}, "does not hold distinct class names of label"),
    "names are numbers": ({"class_names": [1, 2]}, "does not hold distinct class names of label"),
}


@pytest.mark.parametrize("name", PARQUET)
def test_parquet_that_does_not_fit_is_refused_by_name(tmp_path, name):
    changes, message = PARQUET[name]
    write_parquet(tmp_path / "train-0-of-2.parquet", *FOUR, PETS[:2])
    arguments = {"images": FOUR[0], "labels": FOUR[1], "class_names": PETS[:2]} | changes
    write_parquet(tmp_path / "train-1-of-2.parquet", **arguments)
    text = refusal("parquet", tmp_path)
    assert text.startswith(f"{tmp_path / 'train-1-of-2.parquet'}")
    assert message in text


PARQUET_DAMAGE = {
    "cut": lambda content: content[:-9],
    "damaged": lambda content: content[:40] + bytes(60) + content[100:],
    "empty": lambda content: b"",
    "a page": lambda content: b"<html>404</html>",
}


@pytest.mark.parametrize("name", PARQUET_DAMAGE)
def test_damaged_parquet_is_refused(tmp_path, name):
    path = tmp_path / "x.parquet"
    write_parquet(path, *FOUR, PETS[:2])
    path.write_bytes(PARQUET_DAMAGE[name](path.read_bytes()))
    assert refusal("parquet", path).startswith(str(path))


@pytest.mark.parametrize("metadata", ["{", "[1]", '{"info": 1}', '{"info": {"features": {"label": []}}}', "[" * 10**5])
def test_odd_metadata_is_refused(tmp_path, metadata):
    path = tmp_path / "x.parquet"
    write_parquet(path, *FOUR)
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": metadata}), path)
    assert "x.parquet: the metadata `huggingface` does not hold distinct class names" in refusal("parquet", path)


def test_parquet_that_says_far_more_than_it_holds_is_refused_before_memory_is_allocated(tmp_path):
    """One small image that 9,000 rows refer to: as many pixels cannot be in so few bytes."""
    content = {"bytes": encoded(np.zeros((200, 200, 1), np.uint8))}
    write_parquet(tmp_path / "x.parquet", [content] * 9_000, [0] * 9_000)
    assert "says that it holds 360,000,000 bytes of pixels or labels" in refusal("parquet", tmp_path / "x.parquet")


# --- any damage


def _write_pets(folder):
    folder.mkdir(exist_ok=True)
    write_parquet(folder / "train.parquet", *FOUR, PETS[:2])


DAMAGEABLE = {  # source, what writes its files, the file to damage
    "svhn": ("svhn", lambda folder: write_svhn(folder, compressed=False), "test_32x32.mat"),
    "svhn compressed": ("svhn", write_svhn, "test_32x32.mat"),
    "idx": ("mnist", write_idx, "train-images-idx3-ubyte"),
    "idx compressed": ("mnist", lambda folder: write_idx(folder, gzip.compress, ".gz"), "train-images-idx3-ubyte.gz"),
    "npz": ("npz", lambda folder: write_parts(folder, names=("part1", "part2", "part3")), "part2.npz"),
    "parquet": ("parquet", _write_pets, "train.parquet"),
    "list": ("tinyimagenet", write_tiny, "val/val_annotations.txt"),
}


@pytest.mark.parametrize("name", DAMAGEABLE)
def test_no_damage_does_more_than_a_refusal(tmp_path, name):
    """Bytes at both ends are overwritten or lost, 60 times: the file is read or refused with one line."""
    source, write, file = DAMAGEABLE[name]
    write(tmp_path)
    content, generator, refused = (tmp_path / file).read_bytes(), np.random.default_rng(3), 0
    for _ in range(60):
        damaged = bytearray(content)
        for position in generator.integers(0, min(len(content), 400), 3) * generator.choice([-1, 1], 3):
            end = position + 4 if position + 4 else len(damaged)
            damaged[position:end] = generator.choice([b"\xff\xff\xff\x7f", b"", generator.bytes(4)])
        (tmp_path / file).write_bytes(damaged)
        try:
            sources.load(source, tmp_path)
        except DmatError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 10


# --- prepare_data


def _prepare(folder, name, path, **settings):
    """Calls `prepare_data.run` with a source; returns the shards of each split."""
    values = config.PrepareData(source=name, path=path.name, seed=1, **settings)
    job = types.SimpleNamespace(inputs={"source": path}, result=folder / "result", pictures=folder / "pictures")
    prepare_data.run(values, job)
    return {split: shards.open_shards(folder / "result" / split) for split in ("train", "validation", "test")}


def test_svhn_becomes_splits_as_published(tmp_path):
    train, test = write_svhn(tmp_path / "svhn")
    counts = {"train": 10, "validation": 10, "test": 10}
    splits = _prepare(
        tmp_path, "svhn", tmp_path / "svhn", **counts, validation_split="first", normalisation="svhn"
    )
    for split, (images, labels) in (
        ("validation", (train[0][:10], train[1][:10])),
        ("train", (train[0][10:], train[1][10:])),
        ("test", test),
    ):
        manifest, pair = splits[split].manifest, splits[split].all()
        assert np.array_equal(pair[0], images)
        assert np.array_equal(pair[1], labels)
        assert (manifest["mean"], manifest["source_split"]) == ([0.5] * 3, "test" if split == "test" else "train")


@pytest.mark.parametrize("name", [name for name in DATA_SETS if name != "digits"])
def test_missing_files_are_refused_with_what_to_put_where(tmp_path, name):
    command = f", or run `dmat sources download {name}`"
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(DmatError) as refused:
            sources.location(name, path)
        text = str(refused.value)
        assert f"; put {data_sets.expected_files(name)}, from http" in text
        assert f", into sources/{name}" in text
        assert (command in text) == (name != "tinyimagenet")


@pytest.mark.parametrize(
    ("name", "write", "file", "message"),
    [
        ("svhn", write_svhn, "test_32x32.mat", "test_32x32.mat does not exist; expected it beside the other file; put"),
        ("mnist", write_idx, "t10k-labels-idx1-ubyte", "t10k-labels-idx1-ubyte does not exist, nor t10k-labels-idx1-"),
    ],
)
def test_a_missing_part_of_a_data_set_is_named(tmp_path, name, write, file, message):
    write(tmp_path)
    (tmp_path / file).unlink()
    text = refusal(name, tmp_path)
    assert message in text
    assert text.endswith(f"into sources/{name}, or run `dmat sources download {name}`")
