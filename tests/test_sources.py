"""Real images are read as they were written, with their own test images apart; no code in a file runs, and files that
are cut, empty or of another format are refused with one message.

Oracle: files written here byte by byte. The .npz source and splits are in test_data.py. Run alone:
pytest tests/test_sources.py
"""

import dataclasses
import functools
import json
import os
import pickle
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image

from dmat import config, files
from dmat.data import shards, sources
from dmat.data.data_sets import DATA_SETS
from dmat.errors import DmatError
from dmat.jobs import prepare_data
from dmat.models.classifiers import data_spec_of
from tests import cifar_files
from tests.cifar_files import FOLDERS, NAMES, python2
from tests.projects import Project

cifar10 = functools.partial(sources.published, "cifar10")
VARIANTS = [
    (data, version, protocol) for data, version in FOLDERS for protocol in ((0, 2) if version == "python" else (2,))
]


def equal(actual, expected):
    """Whether pairs of images and labels are equal in values and types."""
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(actual, expected, strict=True))


def refusal(call, *arguments):
    """The message, one line, with which a call refuses."""
    with pytest.raises(DmatError) as refused:
        call(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- CIFAR


@pytest.mark.parametrize("below", [False, True], ids=["the folder", "its parent"])
@pytest.mark.parametrize(("data", "version", "protocol"), VARIANTS)
def test_cifar_is_read_as_it_was_written(tmp_path, data, version, protocol, below):
    name = FOLDERS[data, version]
    train, test = cifar_files.write(tmp_path / name, data, version, train=200, test=40, protocol=protocol)
    source = sources.load(data, tmp_path if below else tmp_path / name)
    assert equal((source.images, source.labels), train)
    assert equal(source.test, test)
    assert source.class_names == NAMES[data]
    assert source.origin == (
        f"{DATA_SETS[data].title} (Krizhevsky 2009), {version} version, a part of it: 200 and 40 images"
    )
    assert sources.location(data, tmp_path) == tmp_path / name


def test_cifar_folders_are_recognised_by_their_files_and_python_comes_first(tmp_path):
    train, _ = cifar_files.write(tmp_path / "renamed", "cifar100", "binary", train=100)
    assert equal(_pair(tmp_path / "renamed"), train)
    cifar_files.write(tmp_path / "both/cifar-10-batches-bin", version="binary")
    cifar_files.write(tmp_path / "both/cifar-10-batches-py")
    assert "python version" in cifar10(tmp_path / "both").origin


def _pair(path):
    source = sources.recognise(path, "train")
    return source.images, source.labels


@pytest.mark.parametrize("protocol", [0, 2, 3, 4])
def test_pickles_of_python_3_are_read_too(tmp_path, protocol):
    """The same dictionary, saved again with numpy 2 (bytes by _codecs.encode up to protocol 2)."""
    train, _ = cifar_files.write(tmp_path / "c", protocol=protocol, pickled=pickle.dumps)
    assert equal(_pair(tmp_path / "c"), train)


def test_columns_first_arrays_are_read(tmp_path):
    """numpy writes an array in its memory order and records that order."""
    column_major = lambda value, protocol: python2(  # noqa: E731
        {key: np.asfortranarray(entry) if isinstance(entry, np.ndarray) else entry for key, entry in value.items()},
        protocol,
    )
    train, _ = cifar_files.write(tmp_path / "c", pickled=column_major)
    assert equal(_pair(tmp_path / "c"), train)


def test_the_complete_data_set_is_named_as_such(tmp_path, monkeypatch):
    cifar_files.write(tmp_path / "c", train=60, test=12)
    monkeypatch.setitem(DATA_SETS, "cifar10", dataclasses.replace(DATA_SETS["cifar10"], train=60, test=12))
    assert cifar10(tmp_path / "c").origin == "CIFAR-10 (Krizhevsky 2009), python version"


class CallOnUnpickle:
    """An object whose unpickling calls a function."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


HOSTILE = {
    "system": lambda marker: CallOnUnpickle(os.system, f"touch {marker}"),
    "eval": lambda marker: CallOnUnpickle(eval, f"open({str(marker)!r}, 'w')"),
    "open": lambda marker: CallOnUnpickle(open, str(marker), "w"),
    "in a list": lambda marker: [1, [CallOnUnpickle(os.system, f"touch {marker}")]],
    "numpy writes": lambda marker: CallOnUnpickle(np.save, str(marker), 1),
    "getattr": lambda marker: CallOnUnpickle(getattr, [], "append"),
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("file", ["data_batch_3", "batches.meta"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_malicious_pickle_runs_nothing(tmp_path, name, file, protocol):
    marker = tmp_path / "it ran"
    cifar_files.write(tmp_path / "c")
    value = HOSTILE[name](str(marker).replace(" ", "_"))
    (tmp_path / "c" / file).write_bytes(pickle.dumps({b"data": value, b"labels": [1]}, protocol))
    before = sorted(tmp_path.iterdir())
    text = refusal(cifar10, tmp_path / "c")
    assert text.startswith(f"{tmp_path / 'c' / file} names ")
    assert "reading that would run code; expected arrays, numbers and text" in text
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "content",
    [
        b"cantigravity\nfly\n.",  # would be imported
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"cnumpy.core.multiarray.os\n_reconstruct\n.",
        b"c_codecs\ndecode\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",  # a name with a dot
        b"\x80\x02\x82\x01.",  # an entry of the extension registry
        b"Pwho am I\n.",  # a persistent id
        b"cnumpy\ndtype\n}(S'__code__'\nS'x'\ntb.",  # attributes of a global object
        b"cnumpy\nndarray\n(S'u1'\ntRS'x'\nb.",
        b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I99999999\ntcnumpy\ndtype\n(S'u1'\ntRI00\nS'x'\ntb.",
        b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I-1\ntcnumpy\ndtype\n(S'u1'\ntRI00\nS'x'\ntb.",
        b"cnumpy\ndtype\n(S'O'\ntR.",
        b"(lp0\n0g0\n.",
        b"",
        b"<html>404</html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"S'text'\n.",
        b"(d.",
    ],
)
def test_hostile_and_foreign_bytes_are_refused(tmp_path, content):
    cifar_files.write(tmp_path / "c")
    (tmp_path / "c/test_batch").write_bytes(content)
    assert refusal(cifar10, tmp_path / "c").startswith(str(tmp_path / "c/test_batch"))
    assert "antigravity" not in sys.modules


def test_a_pickle_cannot_change_how_the_next_one_is_read(tmp_path):
    train, _ = cifar_files.write(tmp_path / "c")
    good = (tmp_path / "c/test_batch").read_bytes()
    for name in ("cnumpy\ndtype\n", "cnumpy.core.multiarray\n_reconstruct\n"):
        content = f"{name}(N}}S'__defaults__'\n(I1\nI2\nI3\ntstb0(d.".encode()
        (tmp_path / "c/test_batch").write_bytes(content)
        refusal(cifar10, tmp_path / "c")
    (tmp_path / "c/test_batch").write_bytes(good)
    assert equal(_pair(tmp_path / "c"), train)


def _put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _cut(name, rest):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-rest])


ROWS = np.zeros((2, 3072), np.uint8)
DAMAGED = {
    "a batch is missing": ("python", lambda c: (c / "data_batch_4").unlink(), "data_batch_4 does not exist"),
    "no names": ("python", lambda c: (c / "batches.meta").unlink(), "batches.meta does not exist"),
    "no binary names": ("binary", lambda c: (c / "batches.meta.txt").unlink(), "batches.meta.txt does not exist"),
    "empty names": ("binary", _put("batches.meta.txt", b"\n\n"), "does not hold a list of distinct class names"),
    "names twice": ("binary", _put("batches.meta.txt", b"cat\ncat\n"), "does not hold a list of distinct class names"),
    "names are numbers": ("python", _put("batches.meta", python2({b"label_names": [1, 2]})),
                          "does not hold a list of distinct class names"),
    "names are not text": ("binary", _put("batches.meta.txt", b"\xff\xfe"),
                           "does not hold a list of distinct class names"),
    "cut pickle": ("python", _cut("data_batch_2", 1000),
                   "data_batch_2 is incomplete or not a file of CIFAR's python version"),
    "cut row": ("binary", _cut("test_batch.bin", 1), "expected a multiple of 3073: the file is incomplete"),
    "nothing left": ("binary", _put("data_batch_5.bin", b""), "holds 0 images; expected some"),
    "label 255": ("binary", _put("test_batch.bin", b"\xff" + bytes(3072)), "labels from 255 to 255; expected 0 to 9"),
    "label -1": ("python", _put("test_batch", python2({b"data": ROWS, b"labels": [0, -1]})), "labels from -1 to 0"),
    "label 10": ("python", _put("test_batch", python2({b"data": ROWS, b"labels": [0, 10]})), "labels from 0 to 10"),
    "label 10**30": ("python", _put("test_batch", python2({b"data": ROWS, b"labels": [0, 10**30]})), "labels from 0"),
    "few labels": ("python", _put("test_batch", python2({b"data": ROWS, b"labels": [0]})), "not a list of 2 integers"),
    "no labels": ("python", _put("test_batch", python2({b"data": ROWS})), "`labels` is not a list of 2 integers"),
    "text labels": ("python", _put("test_batch", python2({b"data": ROWS, b"labels": [b"0", b"1"]})), "not a list of 2"),
    "no data": ("python", _put("test_batch", python2({b"labels": [0]})), "has nothing under `data`"),
    "grey": ("python", _put("test_batch", python2({b"data": ROWS[:, :1024], b"labels": [0, 1]})), "uint8 (2, 1024)"),
    "floats": ("python", _put("test_batch", python2({b"data": ROWS / 1, b"labels": [0, 1]})), "an array of f8"),
    "a list": ("python", _put("test_batch", python2([1])), "holds a list; expected a dictionary"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_cifar_is_refused(tmp_path, name):
    version, damage, message = DAMAGED[name]
    cifar_files.write(tmp_path / "c", version=version)
    damage(tmp_path / "c")
    text = refusal(cifar10, tmp_path / "c")
    assert text.startswith(str(tmp_path / "c"))
    assert message in text


def test_a_batch_of_another_size_than_the_metadata_says_is_refused(tmp_path):
    cifar_files.write(tmp_path / "c", train=60, test=12)
    (tmp_path / "c/data_batch_2").write_bytes(python2({b"data": ROWS, b"labels": [0, 1]}))
    assert "data_batch_2 holds 2 images; expected 12" in refusal(cifar10, tmp_path / "c")


@pytest.mark.parametrize(("data", "other"), [("cifar10", "cifar100"), ("cifar100", "cifar10")])
def test_one_cifar_is_not_the_other(tmp_path, data, other):
    cifar_files.write(tmp_path / "c", other, train=100)
    text = refusal(sources.load, data, tmp_path / "c")
    title = DATA_SETS[data].title
    assert text.startswith(f"{tmp_path / 'c'} is not a {title} folder; expected {FOLDERS[data, 'python']}")


# --- folders of images


def write_images(root, counts, shape=(6, 5, 3), kind="png", seed=0):
    """Writes random images to one sub-folder per class; returns the arrays by class, in the order of file names."""
    generator, arrays = np.random.default_rng(seed), {}
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        arrays[name] = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
        for k, image in enumerate(arrays[name]):
            Image.fromarray(image[..., 0] if shape[-1] == 1 else image).save(root / name / f"{k:03d}.{kind}")
    return arrays


def stacked(arrays):
    """Images and labels of `write_images`, classes in the order of their names."""
    labels = np.concatenate([np.full(len(arrays[name]), k, dtype=np.int64) for k, name in enumerate(sorted(arrays))])
    return np.concatenate([arrays[name] for name in sorted(arrays)]), labels


@pytest.mark.parametrize("kind", ["png", "bmp", "PNG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_image_folders_are_read_in_the_order_of_names(tmp_path, channels, kind):
    arrays = write_images(tmp_path / "pets", {"dog": 3, "cat": 2, "Ant": 1}, (6, 5, channels), kind)
    (tmp_path / "pets/.ipynb_checkpoints").mkdir()
    (tmp_path / "pets/dog/notes.txt").write_text("no image")
    source = sources.load("folder", tmp_path / "pets")
    assert equal((source.images, source.labels), stacked(arrays))
    assert source.class_names == ("Ant", "cat", "dog")
    assert (source.origin, source.licence, source.test) == ("images in pets", "unknown", None)


def test_jpeg_is_read(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "a/1.jpeg")
    source = sources.folder(tmp_path)
    assert source.images.shape == (1, 8, 8, 3)
    assert np.abs(source.images.astype(int) - 200).max() <= 2


def test_palettes_are_colours(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 4, 3), (255, 0, 0), np.uint8)).quantize(4).save(tmp_path / "a/1.png")
    assert (sources.folder(tmp_path).images == (255, 0, 0)).all()


def test_train_and_test_folders_stay_apart(tmp_path):
    train = write_images(tmp_path / "train", {"b": 3, "a": 2})
    test = write_images(tmp_path / "test", {"a": 1, "b": 2}, seed=1)
    write_images(tmp_path / "val", {"a": 1}, seed=2)  # not read
    source = sources.load("folder", tmp_path)
    assert equal((source.images, source.labels), stacked(train))
    assert equal(source.test, stacked(test))
    shutil.rmtree(tmp_path / "test")
    assert sources.load("folder", tmp_path).test is None


LAYOUTS = {  # counts below the folder -> classes and whether there are test images, or a part of the message
    "a train among vehicles": ({"train": 2, "ship": 1}, ("ship", "train"), False),
    "train and val": ({"train/a": 1, "val/a": 2}, ("a",), False),
    "other words": ({"Training/a": 1, "TESTING/a": 2, "Valid/a": 1}, ("a",), True),
    "both and another": ({"train/a": 1, "test/a": 1, "extra/a": 1}, "has test, train beside extra; expected either"),
    "both without classes": ({"train": 1, "test": 1, "extra": 1}, "has test, train beside extra; expected either"),
    "one and another": ({"train/a": 1, "a": 1}, "has train beside a; expected either classes alone, or train, test"),
    "capitals": ({"Train/a": 1, "TEST/a": 1, "a": 1, "b": 1}, "has TEST, Train beside a, b; expected either"),
    "val beside classes": ({"a": 1, "val/a": 1}, "has val beside a; expected either"),
    "twice": ({"train/a": 1, "training/a": 1}, "has train, training; expected one folder of training"),
    "no train": ({"test/a": 1, "val/a": 1}, "has test, val and no train; expected"),
    "splits in classes": ({"a/train": 1, "a/test": 1}, "a/test is a folder test inside a class; expected "),
    "test lacks a class": ({"train/a": 1, "train/b": 1, "test/a": 1}, "train and test differ in the classes b;"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_of_a_folder_is_clear_or_refused(tmp_path, name):
    counts, expected, *has_test = LAYOUTS[name]
    write_images(tmp_path, counts)
    if not has_test:
        assert expected in refusal(sources.load, "folder", tmp_path)
        return
    source = sources.load("folder", tmp_path)
    assert source.class_names == expected
    assert (source.test is not None) == has_test[0]
    expected_note = "is treated as a class" if "ship" in expected else "is not read"
    assert expected_note in " ".join(source.notes)


def test_classes_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    arrays = write_images(tmp_path, {str(k): 1 for k in range(12)})
    source = sources.load("folder", tmp_path)
    assert source.class_names == tuple(str(k) for k in range(12))
    assert source.labels.tolist() == list(range(12))
    assert np.array_equal(source.images[10], arrays["10"][0])


# --- exactly the files that are read are hashed


def _link(path, target):
    path.symlink_to(target)


def _save(path, pages=1, kind=None):
    frames = [Image.fromarray(np.full((6, 5, 3), 40 * k, np.uint8)) for k in range(pages)]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, kind, save_all=True, append_images=frames[1:]) if pages > 1 else frames[0].save(path, kind)


ADDED = {  # addition to a folder of 2 cats and 2 dogs -> number of images then
    "hidden folder": (lambda r: _save(r / "cat/.ipynb_checkpoints/0-checkpoint.png"), 4),
    "hidden file": (lambda r: (r / "cat/._000.png").write_bytes(b"\0\5\x16\7" + bytes(99)), 4),
    "of an archive": (lambda r: (_save(r / "__MACOSX/cat/0.png"), _save(r / "cat/__MACOSX/0.png")), 4),
    "hidden class": (lambda r: _save(r / ".cache/0.png"), 4),
    "nested": (lambda r: _save(r / "cat/more/0.png"), 5),
    "jfif": (lambda r: _save(r / "cat/9.jfif", kind="JPEG"), 5),
    "gif": (lambda r: _save(r / "cat/9.GIF"), 5),
    "webp": (lambda r: _save(r / "cat/9.webp"), 5),
    "no suffix": (lambda r: _save(r / "cat/9", kind="PNG"), 5),
    "linked file": (lambda r: _link(r / "cat/9.png", r.parent / "elsewhere/a/000.png"), 5),
    "linked class": (lambda r: _link(r / "emu", r.parent / "elsewhere/a"), 6),
}


@pytest.mark.parametrize("name", ADDED)
def test_exactly_the_files_that_are_read_are_hashed(tmp_path, name):
    add, count = ADDED[name]
    root = tmp_path / "pets"
    write_images(root, {"cat": 2, "dog": 2})
    write_images(tmp_path / "elsewhere", {"a": 2}, seed=1)
    before = files.checksum(root)
    add(root)
    assert len(sources.load("folder", root).labels) == len(sources.recognise(root).labels) == count
    assert (files.checksum(root) != before) == (count != 4)
    if count == 6:  # the target of a link counts
        _save(tmp_path / "elsewhere/a/000.png")
        assert files.checksum(root) != before


def test_files_left_out_are_counted(tmp_path):
    write_images(tmp_path, {"train/a": 1, "test/a": 1})
    for name in ("words.txt", "train/list.csv", "train/a/1.txt", "test/a/Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    (note,) = sources.load("folder", tmp_path).notes
    assert note == f"left out because they are not images: 1 .csv, 1 .db, 2 .txt; the first is {tmp_path / 'words.txt'}"


NOT_READ = {
    "film": (lambda r: (r / "a/9.mp4").write_bytes(b"x"), "a/9.mp4 cannot be read as an image"),
    "animated": (lambda r: _save(r / "a/9.gif", 3), "a/9.gif has 3 frames; expected one still image"),
    "animated png": (lambda r: _save(r / "a/9.png", 2), "a/9.png has 2 frames"),
    "pages": (lambda r: _save(r / "a/9.tiff", 2), "a/9.tiff has 2 frames"),
    "a program": (lambda r: (r / "a/9.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "a/9.png cannot be read as an"),
    "outside": (lambda r: _save(r / "0.png"), "0.png is in no sub-folder of"),
    "broken link": (lambda r: _link(r / "a/9.png", r / "nothing"), "a/9.png is neither a file nor a folder, or a link"),
    "in a circle": (lambda r: _link(r / "a/b", r), "a/b is a link to a folder that holds it"),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_unreadable_files_are_refused_by_name(tmp_path, name):
    add, message = NOT_READ[name]
    write_images(tmp_path / "pets", {"a": 2, "b": 2})
    add(tmp_path / "pets")
    assert message in refusal(sources.load, "folder", tmp_path / "pets")


def _picture(path, shape=(6, 5, 3), mode=None):
    image = Image.fromarray(np.zeros(shape, np.uint8))
    (image.convert(mode) if mode else image).save(path)


FOLDER_DAMAGE = {
    "other size": (lambda r: _picture(r / "b/9.png", (7, 5, 3)), "b/9.png is 5x7 in colour; expected 5x6 in colour"),
    "grey among colours": (lambda r: _picture(r / "a/9.png", (6, 5)), "a/9.png is 5x6 in grey; expected 5x6 in colour"),
    "transparent": (lambda r: _picture(r / "a/9.png", mode="RGBA"), "a/9.png has the colour mode RGBA; expected 8-bit"),
    "one bit": (lambda r: _picture(r / "a/9.png", mode="1"), "a/9.png has the colour mode 1; expected 8-bit"),
    "damaged": (lambda r: (r / "a/9.png").write_bytes(b"\x89PNG\r\n"), "a/9.png cannot be read as an image"),
    "cut": (
        lambda r: (r / "a/000.png").write_bytes((r / "a/000.png").read_bytes()[:60]),
        "a/000.png cannot be read as an image",
    ),
    "empty class": (lambda r: (r / "c").mkdir(), "has no image of the classes c; expected some (BMP, "),
}


@pytest.mark.parametrize("name", FOLDER_DAMAGE)
def test_unfitting_images_are_refused(tmp_path, name):
    damage, message = FOLDER_DAMAGE[name]
    write_images(tmp_path, {"a": 2, "b": 2})
    damage(tmp_path)
    assert message in refusal(sources.load, "folder", tmp_path)


def test_folders_without_classes_are_refused(tmp_path):
    assert "has no sub-folders; expected one per class" in refusal(sources.load, "folder", tmp_path)
    assert "expected a folder with one sub-folder" in refusal(sources.load, "folder", tmp_path / "none")
    write_images(tmp_path / "test", {"a": 1})
    assert "has test and no train" in refusal(sources.load, "folder", tmp_path)
    write_images(tmp_path / "train", {"a": 1, "b": 1})
    assert "train and test differ in the classes b" in refusal(sources.load, "folder", tmp_path)
    write_images(tmp_path / "test" / "..", {"test/b": 1}, (7, 5, 3))
    assert "test/b/000.png is 5x7 in colour; expected 5x6" in refusal(sources.load, "folder", tmp_path)


# --- shards and .npz


def write_shards(folder, **values):
    images, labels = cifar_files.random_images(6, 3, 0)
    shards.write_set(folder, images, labels, class_names=["a", "b", "c"], metadata={"licence": "CC0", **values})
    return images, labels


def test_shards_are_a_source_whose_checksums_count(tmp_path):
    pair = write_shards(tmp_path / "s", origin="made here", split="validation")
    source = sources.load("shards", tmp_path / "s")
    assert equal((source.images, source.labels), pair)
    assert (source.class_names, source.licence) == (("a", "b", "c"), "CC0")
    assert source.origin == "made here, split validation"
    content = (tmp_path / "s/images-00000.npy").read_bytes()
    (tmp_path / "s/images-00000.npy").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "images-00000.npy has checksum" in refusal(sources.load, "shards", tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ["a", "b"], "class_counts": [3, 3]}, "has labels from 0 to 2; expected 0 to 1"),
        ({"shards": [{}]}, "manifest.json: shards.0.index: Field required"),
        ({"shards": []}, "manifest.json: it names no shards"),
        ({"shape": [1]}, "manifest.json: shape is [1], not [H, W, 1 or 3]"),
        ({"class_names": None}, "manifest.json: class_names: Input should be a valid list"),
        ({"schema": None}, "has schema None; this dmat reads 1"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(tmp_path, change, message):
    write_shards(tmp_path / "s")
    path = tmp_path / "s/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in refusal(sources.load, "shards", tmp_path / "s")


def test_an_npz_may_bring_test_images(tmp_path):
    train, test = cifar_files.random_images(6, 3, 0), cifar_files.random_images(4, 2, 1)
    arrays = {"image": train[0], "label": train[1], "test_image": test[0], "test_label": test[1]}
    np.savez(tmp_path / "s.npz", **arrays, other=np.zeros(3))
    source = sources.load("npz", tmp_path / "s.npz")
    assert equal((source.images, source.labels), train)
    assert equal(source.test, test)
    assert source.class_names == ("0", "1", "2")
    np.savez(tmp_path / "s.npz", **{key: arrays[key] for key in ("image", "label", "test_image")})
    assert "lacks test_label; expected arrays `test_image` and `test_label`" in refusal(sources.npz, tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", **arrays | {"test_image": test[0][:, :8]})
    assert "the test images are 32x8 in colour, the others 32x32" in refusal(sources.load, "npz", tmp_path / "s.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"image": np.zeros((0, 4, 4, 1), np.uint8), "label": np.zeros(0, int)},
            "has no images; expected at least one",
        ),
        ({"image": np.zeros((1, 4, 4, 1), np.uint8), "label": np.array([10**9])}, "`label` goes up to 1000000000"),
        (
            {"image": np.zeros((1, 4, 4, 1), np.uint8), "label": np.array([None])},
            "is incomplete or not an .npz of numbers",
        ),
    ],
)
def test_odd_npz_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    assert message in refusal(sources.load, "npz", tmp_path / "s.npz")


@pytest.mark.parametrize(
    ("labels", "test", "message"),
    [
        (range(1, 11), [], "no image has the label 0, and labels go up to 10; expected images of every class from 0"),
        ([0, 255, 0], [], "no image has the label 1, 2, 3, 4, 5 and 249 more, and labels go up to 255"),
        ([0, 1, 0], [1, 2], "no image has the label 2, and labels go up to 2"),
    ],
)
def test_labels_with_gaps_are_refused_unless_classes_are_named(tmp_path, labels, test, message):
    images = cifar_files.random_images(len(labels), 1, 0)[0]
    arrays = {"image": images, "label": np.array(labels)}
    arrays |= {"test_image": images[: len(test)], "test_label": np.array(test)} if test else {}
    np.savez(tmp_path / "s.npz", **arrays)
    assert message in refusal(sources.load, "npz", tmp_path / "s.npz")
    names = [f"class {k}" for k in range(256)]
    np.savez(tmp_path / "s.npz", **arrays, class_names=np.array(names))
    assert sources.load("npz", tmp_path / "s.npz").class_names == tuple(names)
    np.savez(tmp_path / "s.npz", **arrays, class_names=np.array(["same", "same"]))
    assert "`class_names` is <U4 (2,); expected one line of text per class" in refusal(
        sources.load, "npz", tmp_path / "s.npz"
    )


def test_a_damaged_npz_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "s.npz", image=cifar_files.random_images(9, 3, 0)[0], label=np.arange(9))
    content = bytearray((tmp_path / "s.npz").read_bytes())
    content[200:260] = bytes(60)
    (tmp_path / "s.npz").write_bytes(content)
    assert "s.npz is incomplete or not an .npz of numbers" in refusal(sources.load, "npz", tmp_path / "s.npz")


# --- recognised formats


def test_the_format_at_a_path_is_recognised(tmp_path):
    train, test = cifar_files.write(tmp_path / "c", "cifar100", train=200)
    arrays = write_images(tmp_path / "pets", {"a": 2, "b": 1})
    pair = write_shards(tmp_path / "s", split="test", origin="made here")
    np.savez(tmp_path / "set.npz", image=pair[0], label=pair[1])
    part = "CIFAR-100 (Krizhevsky 2009), python version, a part of it: 200 and 40 images"
    all_images = "all images, as it has no test images of its own"
    for path, split, expected, origin in (
        (tmp_path / "c", "test", test, f"{part}: its test images"),
        (str(tmp_path / "c"), "train", train, f"{part}: its training images"),
        (tmp_path / "pets", None, stacked(arrays), f"images in pets: {all_images}"),
        (tmp_path / "pets", "train", stacked(arrays), f"images in pets: {all_images}; said to be of the split train"),
        (tmp_path / "s", "test", pair, f"made here, split test: {all_images}"),
        (tmp_path / "set.npz", "test", pair, f"set.npz: {all_images}; said to be of the split test"),
    ):
        source = sources.recognise(path, split)
        assert source.split == (split or "")
        assert equal((source.images, source.labels), expected)
        assert (source.origin, source.test) == (origin, None)
    assert equal((sources.recognise(tmp_path / "c").images,), (test[0],))
    assert sources.recognise(tmp_path / "c").split == "test"
    assert sources.recognise(tmp_path / "s").split == "test"
    with pytest.raises(DmatError, match="holds the split test, not train"):
        sources.recognise(tmp_path / "s", "train")


def test_the_name_digits_is_recognised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    source = sources.recognise("digits")
    assert len(source.images) == 1797
    assert source.origin.endswith("from scikit-learn: all images, as it has no test images of its own")
    assert "digits is not a format that dmat reads" in refusal(sources.recognise, "./digits")


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "no images", "splits of shards"])
def test_an_unknown_format_is_refused_with_the_formats_looked_for(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "text":
        path.write_text("hello")
    elif kind == "splits of shards":
        write_shards(path / "train")
        write_shards(path / "test")
    elif kind != "missing":
        (path / "a" if kind == "no images" else path).mkdir(parents=True)
    text = refusal(sources.recognise, path)
    assert text.startswith(
        f"{path} {'does not exist' if kind == 'missing' else 'is not a format that dmat reads'}; looked for"
    )
    for format_name in ("digits", ".npz", "CIFAR-10", "CIFAR-100", "manifest.json", "sub-folder of images"):
        assert format_name in text


def test_ambiguous_requests_are_refused(tmp_path):
    for data, version in FOLDERS:
        cifar_files.write(tmp_path / FOLDERS[data, version], data, version, train=100)
    text = refusal(sources.recognise, tmp_path)
    assert "holds CIFAR-10 and CIFAR-100, or files with the names of both; expected one" in text
    assert "the split is 'validation'; expected test or train" in refusal(sources.recognise, tmp_path, "validation")


# --- prepare_data


@pytest.fixture
def project(tmp_path, tiny_params):
    """A project whose real images are a CIFAR-10 folder beside other files."""
    pairs = cifar_files.write(tmp_path / "data/cifar-10-batches-py", train=200, test=60)
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "sources").mkdir()
    (folder / "sources/data").symlink_to("../../data")
    settings = {"source": "cifar10", "path": "data", "train": 100, "validation": 50, "test": 60}
    tiny_params["train_scorer"] |= {"images_seen": 128, "evaluate_every": 128, "augmentation": "crop4_flip"}
    project = Project(folder, tiny_params)
    project.write({"prepare_data": settings})
    return project, pairs


def _prepare(folder, source, **counts):
    """Calls `prepare_data.run` directly; returns its metrics and notes."""
    settings = config.PrepareData(source="shards", path=source.name, seed=1, **counts)
    job = types.SimpleNamespace(
        inputs={"source": source}, result=folder / "result", pictures=folder / "pictures"
    )
    prepared = prepare_data.run(settings, job)
    return prepared.metrics, prepared.notes


def test_copies_across_the_splits_are_counted_and_reported(tmp_path):
    """All images of one class are the same image, so that every split holds it."""
    images, labels = cifar_files.random_images(40, 2, 0)
    images[labels == 1] = images[1]
    shards.write_set(tmp_path / "s", images, labels, class_names=["a", "b"], metadata={})
    metrics, (note,) = _prepare(tmp_path, tmp_path / "s", train=16, validation=12, test=12)
    copies = {name: value for name, value in metrics.items() if name.startswith("copies")}
    assert copies == {"copies_within_test": 5, "copies_test_in_train": 6, "copies_test_in_validation": 6,
                      "copies_validation_in_train": 6}  # fmt: skip
    assert "of 12 test images 5 are copies of an earlier one, 6 are also among the training images and 6" in note
    write_shards(tmp_path / "other")
    metrics, notes = _prepare(tmp_path / "2", tmp_path / "other", train=3, validation=2, test=1)
    assert notes == []
    assert {metrics[name] for name in copies} == {0}


def test_a_class_without_training_images_is_refused(tmp_path):
    images, labels = cifar_files.random_images(12, 3, 0)
    shards.write_set(tmp_path / "s", images, labels, class_names=["a", "b", "c", "unicorn"], metadata={})
    assert len(sources.recognise(tmp_path / "s").labels) == 12  # a part of a set may be evaluated
    with pytest.raises(DmatError, match="the training split of 6 images has none of the classes unicorn; expected"):
        _prepare(tmp_path, tmp_path / "s", train=6, validation=3, test=3)


def _split(project, name):
    opened = shards.open_shards(project.folder / f"artifacts/prepare_data/{name}")
    return opened.manifest, opened.all()


def test_own_test_images_are_the_test_split(project):
    project, (train, test) = project
    project.run("prepare_data")
    manifest, actual = _split(project, "test")
    assert equal(actual, test)  # all of them, in their order
    assert manifest["source_split"] == "test"
    drawn = []
    for name in ("train", "validation"):
        manifest, actual = _split(project, name)
        indices = np.array(manifest["source_indices"])
        assert equal(actual, (train[0][indices], train[1][indices]))
        assert manifest["source_split"] == "train"
        assert manifest["class_names"] == list(cifar_files.TEN)
        assert len(set(manifest["class_counts"])) == 1  # stratified
        scaled = actual[0] / 255
        assert manifest["mean"] == pytest.approx(scaled.mean((0, 1, 2)), abs=1e-6)
        assert manifest["std"] == pytest.approx(scaled.std((0, 1, 2)), abs=1e-6)
        drawn += indices.tolist()
    assert len(set(drawn)) == 150
    project.write({"prepare_data": {"test": 20}})
    project.run("prepare_data")
    manifest, _ = _split(project, "test")
    assert manifest["class_counts"] == [2] * 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test": 61}, "prepare_data.test asks for 61 images; cifar10 has 60 test images of its own; ask for fewer"),
        ({"train": 151}, "asks for 201 training images ({'validation': 50, 'train': 151}); cifar10 has 200; ask for"),
        (
            {"normalisation": {"mean": [0.5], "std": [0.5, 0.5, 0.5]}},
            "prepare_data.normalisation has 1 values of mean and 3 of std; the images have 3 channels; give one",
        ),
        ({"path": "nowhere"}, "sources/nowhere, which does not exist; expected the images of source cifar10"),
        ({"source": "cifar100"}, "data is not a CIFAR-100 folder; expected cifar-100-python or cifar-100-binary, or"),
    ],
)
def test_settings_that_do_not_fit_the_source_are_refused(project, settings, message):
    project, _ = project
    project.write({"prepare_data": settings})
    text = project.run("prepare_data", code=2)
    assert message in text
    assert "Traceback" not in text


def test_validation_may_be_the_first_images_and_normalisation_the_published_one(project):
    """Wang et al.'s code: the first images in the order of the files are validation, and leave training."""
    project, (train, _) = project
    project.write({"prepare_data": {"train": 150, "validation_split": "first", "normalisation": "cifar10"}})
    project.run("prepare_data")
    for name, rows in (("validation", slice(50)), ("train", slice(50, None))):
        manifest, actual = _split(project, name)
        assert equal(actual, (train[0][rows], train[1][rows]))
        assert manifest["mean"] == [0.4914, 0.4822, 0.4465]
        assert manifest["std"] == [0.2471, 0.2435, 0.2616]
    project.write({"prepare_data": {"normalisation": {"mean": [0, 0.25, 0.5], "std": [0.5, 1, 2]}}})
    project.run("prepare_data")
    metadata = data_spec_of(shards.open_shards(project.folder / "artifacts/prepare_data/train"))
    assert (metadata.mean, metadata.std) == ((0.0, 0.25, 0.5), (0.5, 1.0, 2.0))


def test_a_source_whose_bytes_changed_is_noticed(project):
    """A result of other bytes is not published again, and no stage uses splits that were made of them."""
    project, _ = project
    project.run("prepare_data")
    provenance = json.loads((project.folder / "artifacts/provenance/prepare_data/all.json").read_text())
    cifar_folder = project.folder.parent / "data/cifar-10-batches-py"
    assert provenance["inputs"] == {"source": {"path": "sources/data", "sha256": files.checksum(cifar_folder)}}
    first = files.checksum(project.folder / "artifacts/prepare_data")
    (cifar_folder.parent / "something else").write_text("beside it")
    project.run("prepare_data")
    assert len(list((project.folder / "runs/prepare_data").iterdir())) == 1

    old = (cifar_folder / "test_batch").read_bytes()
    images, labels = cifar_files.random_images(60, 10, 9)
    rows = images.transpose(0, 3, 1, 2).reshape(60, -1)
    (cifar_folder / "test_batch").write_bytes(python2({b"data": rows, b"labels": labels.tolist()}))
    text = project.run("train_scorer", code=2)
    assert "sources/data has checksum" in text
    assert (
        "bring the old files back, or run `dvc repro` (without DVC: `dmat prepare-data` and the rest after it)" in text
    )
    project.run("prepare_data")
    assert equal(_split(project, "test")[1], (images, labels))
    project.run("train_scorer")

    (cifar_folder / "test_batch").write_bytes(old)
    project.run("prepare_data")
    assert files.checksum(project.folder / "artifacts/prepare_data") == first
    shutil.rmtree(cifar_folder)  # as on a machine that has only the splits
    project.run("train_scorer")
