"""Released image sets (.npz) are read as a stream, bit for bit, and hostile or damaged ones are refused by name.

Oracles: numpy's own reader and writer, and counting of memory. Run alone: pytest tests/test_npz_stream.py
"""

import io
import itertools
import os
import re
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from dmat.data import npz_stream, sources, zip_members
from dmat.data.npz_stream import open_released, write_released
from dmat.errors import DmatError

N = 23


def arrays(count=N, shape=(4, 5, 3), dtype=np.int64):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, *shape), dtype=np.uint8), np.arange(count).astype(dtype) % 4


def read(path, size=7):
    with open_released(path) as released:
        blocks = list(released.blocks(size))
        assert all(len(images) == size for images, _ in blocks[:-1])
        assert [images.flags.owndata for images, _ in blocks] == [True] * len(blocks)
        return np.concatenate([images for images, _ in blocks]), np.concatenate([labels for _, labels in blocks])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("size", [1, 7, N, 1000])
@pytest.mark.parametrize("channels", [1, 3])
def test_blocks_of_any_size_are_the_images(tmp_path, save, size, channels):
    images, labels = arrays(shape=(4, 5, channels))
    save(tmp_path / "a.npz", image=images, label=labels, more=np.zeros(3))
    with open_released(tmp_path / "a.npz") as released:
        assert (len(released), released.shape, released.classes) == (N, (4, 5, channels), 4)
        assert released.class_names == ("0", "1", "2", "3")
        assert released.class_counts == np.bincount(labels).tolist()
        assert released.labelled
        assert released.ignored == ("more",)
        assert np.array_equal(released.labels, labels)
        for _ in range(2):  # every call starts at the first image
            blocks = list(released.blocks(size))
            assert np.array_equal(np.concatenate([block for block, _ in blocks]), images)
            assert np.array_equal(np.concatenate([block for _, block in blocks]), labels)
            assert {block.dtype for _, block in blocks} == {np.dtype(np.int64)}


def test_two_readers_do_not_disturb_each_other(tmp_path):
    images, labels = arrays()
    np.savez(tmp_path / "a.npz", image=images, label=labels)
    with open_released(tmp_path / "a.npz") as released:
        pairs = list(zip(released.blocks(5), released.blocks(5), strict=True))
        assert all(np.array_equal(a, b) for (a, _), (b, _) in pairs)


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i4", "<u4", ">i8", "<u8"])
def test_labels_of_any_integer_type(tmp_path, dtype):
    images, labels = arrays(dtype=dtype)
    np.savez(tmp_path / "a.npz", image=images, label=labels)
    assert np.array_equal(read(tmp_path / "a.npz")[1], labels.astype(np.int64))


def test_zip64_and_comments(tmp_path, monkeypatch):
    images, labels = arrays()
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)  # as if every size and offset needed 64 bits
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.comment = b"c" * 60_000
        for name, array in (("image", images), ("label", labels)):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.save(member, array)
    assert b"PK\6\6" in (tmp_path / "a.npz").read_bytes()
    assert np.array_equal(read(tmp_path / "a.npz")[0], images)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("p1", "p2", "p4"), "lacks p3.npz; expected all 4 parts"),
        (("train-1", "train-2", "test"), "has files of several splits; expected the parts of one set"),
        (("train", "validation"), "has files of several splits"),
    ],
)
def test_a_folder_that_is_not_one_whole_set_is_refused(tmp_path, names, sentence):
    for name in names:
        np.savez(tmp_path / f"{name}.npz", image=np.zeros((2, 4, 4, 1), np.uint8), label=[0, 1])
    with pytest.raises(DmatError, match=re.escape(sentence)), npz_stream.open_released(tmp_path):
        pass


def test_parts_are_read_in_the_order_of_their_numbers(tmp_path):
    images, labels = arrays()
    ends = [0, 5, 6, *range(7, 14), N]
    for number, (start, stop) in enumerate(itertools.pairwise(ends), 1):
        np.savez(tmp_path / f"set_part{number}.npz", image=images[start:stop], label=labels[start:stop])
    (tmp_path / "README.md").write_text("not a part")
    for size in (1, 4, 100):
        read_images, read_labels = read(tmp_path, size)
        assert np.array_equal(read_images, images)
        assert np.array_equal(read_labels, labels)
    with open_released(tmp_path) as released:
        assert [part["name"] for part in released.identity] == [f"set_part{k}.npz" for k in range(1, 11)]
    np.savez(tmp_path / "set_part3.npz", image=images[:, :3], label=labels)
    with pytest.raises(DmatError, match=r"set_part3\.npz holds images \[3, 5, 3\].*expected \[4, 5, 3\].*set_part1"):
        read(tmp_path)


def test_what_is_written_is_read_by_numpy_by_sources_and_again(tmp_path):
    images, labels = arrays()
    names = ["plane", "car", "bird", "čáp"]
    for copy in ("a.npz", "b.npz"):
        with (tmp_path / copy).open("wb") as file:
            blocks = ((images[k : k + 6], labels[k : k + 6]) for k in range(0, N, 6))
            write_released(file, blocks, N, images.shape[1:], names)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert np.array_equal(archive["image"], images)
        assert np.array_equal(archive["label"], labels)
        assert archive["label"].dtype == np.int64
    source = sources.npz(tmp_path / "a.npz")
    assert source.class_names == tuple(names)
    assert np.array_equal(source.images, images)
    with open_released(tmp_path / "a.npz") as released:
        assert released.class_names == tuple(names)
    assert np.array_equal(read(tmp_path / "a.npz")[0], images)


def test_images_without_labels(tmp_path):
    images, _ = arrays()
    np.savez(tmp_path / "a.npz", image=images, label=np.full(N, -1))
    with open_released(tmp_path / "a.npz") as released:
        assert (released.labelled, released.classes, released.class_counts) == (False, 0, [])
    np.savez(tmp_path / "a.npz", image=images, label=np.arange(N) - 1)
    with pytest.raises(DmatError, match="with and without a label"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_does_not_grow_with_the_file(tmp_path, save):
    images, labels = np.zeros((20_000, 16, 16, 3), dtype=np.uint8), np.zeros(20_000, dtype=np.int64)
    save(tmp_path / "a.npz", image=images, label=labels)
    tracemalloc.start()
    try:
        with open_released(tmp_path / "a.npz") as released:
            assert sum(len(block) for block, _ in released.blocks(500)) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 << 20  # of 15 MB: two blocks of 0.4 MB, a chunk of 1 MiB, labels of 80 kB


def npy(array, **changes):
    """The bytes of an array, with some keys of its header changed."""
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {**header, **changes})
    return file.getvalue() + array.tobytes()


def archive(path, image=None, label=None, method=zipfile.ZIP_STORED, **others):
    """An archive of raw members; those that are None are sound."""
    images, labels = arrays()
    members = {"image": npy(images) if image is None else image, "label": npy(labels) if label is None else label}
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in {**members, **others}.items():
            file.writestr(f"{name}.npy", content)
    return path


IMAGES, LABELS = arrays()
PICKLE = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (23,), }".ljust(117) + b"\n"
ENDLESS = b"{'descr': '<i8', 'fortran_order': False, 'shape': (0x" + b"f" * 9000 + b",)}\n"
ENDLESS = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(ENDLESS)) + ENDLESS
HOSTILE = {
    "objects": ({"label": PICKLE + b"\x80\x04N."}, r"label is object \[23\]"),
    "a structure": ({"label": npy(np.zeros(N, dtype=[("a", "i8")]))}, "label is"),
    "text": ({"label": npy(np.full(N, "0"))}, "label is <U1"),
    "numbers with a fraction": ({"label": npy(np.zeros(N))}, "label is float64"),
    "wider images": ({"image": npy(IMAGES.astype(np.uint16))}, "image is uint16"),
    "signed images": ({"image": npy(IMAGES.astype(np.int8))}, "image is int8"),
    "flat images": ({"image": npy(IMAGES.reshape(N, -1))}, r"image is uint8 \[23, 60\]"),
    "planes first": ({"image": npy(IMAGES, shape=(N, 3, 4, 5))}, r"image is uint8 \[23, 3, 4, 5\]"),
    "Fortran order": ({"image": npy(IMAGES, fortran_order=True)}, "in Fortran order"),
    "more images than bytes": ({"image": npy(IMAGES, shape=(1 << 60, 4, 5, 3))}, "do not hold exactly"),
    "fewer images than bytes": ({"image": npy(IMAGES, shape=(2, 4, 5, 3))}, "do not hold exactly"),
    "a negative size": ({"image": npy(IMAGES, shape=(-1, 4, 5, 3))}, "image has an impossible shape"),
    "a length of 9,000 digits": ({"label": ENDLESS}, "label has an impossible shape"),
    "no images": ({"image": npy(IMAGES[:0]), "label": npy(LABELS[:0])}, r"shape \[0, 4, 5, 3\]"),
    "endless rows": ({"image": npy(np.zeros((1, 5000, 1, 1), dtype=np.uint8))}, "at most 4096 x 4096"),
    "fewer labels": ({"label": npy(LABELS[:-1])}, "22 labels for 23 images"),
    "labels that are too large": ({"label": npy(LABELS + 100_000)}, "label goes from 100000 to 100003"),
    "labels beyond int64": ({"label": npy(LABELS.astype(np.uint64) + np.uint64(1 << 63))}, "label goes from 9223"),
    "labels below -1": ({"label": npy(LABELS - 2)}, "label goes from -2"),
    "no array": ({"label": b"not an array, but long enough"}, "label is not an array"),
    "an empty member": ({"label": b""}, "label ends after 0 bytes"),
    "a header that runs": ({"label": npy(LABELS).replace(b"'descr'", b"exit(1)")}, "header of label is unreadable"),
    "an endless header": (
        {"label": b"\x93NUMPY\x02\x00" + struct.pack("<L", 1 << 31) + b" " * 100},
        "label has a header of 2,147,483,648 bytes",
    ),
    "format 3": ({"label": b"\x93NUMPY\x03\x00" + npy(LABELS)[8:]}, "not an array in format 1 or 2"),
    "another packing": ({"method": zipfile.ZIP_LZMA}, "packed by method 14"),
    "the same class twice": ({"class_names": npy(np.array(["a", "b", "a", "d"]))}, "a name twice"),
    "numbers as classes": ({"class_names": npy(np.arange(4))}, "class_names is int64"),
    "empty text": ({"class_names": npy(np.array([], dtype="U1"), descr="<U0", shape=(1 << 40,))}, "class_names is <U0"),
    "an unprintable name": ({"class_names": npy(np.array(["a", "b\n"]))}, "a name twice, empty or unprintable"),
    "half a character": ({"class_names": npy(np.full(1, 0xD800, np.uint32), descr="<U1")}, "empty or unprintable"),
    "no characters": ({"class_names": npy(np.full(4, 0x7FFFFFFF, np.uint32), descr="<U1")}, "class_names is not text"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_arrays_are_refused(tmp_path, case):
    members, sentence = HOSTILE[case]
    path = archive(tmp_path / "a.npz", **members)
    with pytest.raises(DmatError, match=sentence) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "expected uint8 images" in str(error.value)


def test_more_labels_than_class_names(tmp_path):
    path = archive(tmp_path / "a.npz", class_names=npy(np.array(["a", "b"])))
    with pytest.raises(DmatError, match="labels up to 3; expected less than 2"):
        read(path)


def _bytes_of(tmp_path, **members):
    return bytearray(archive(tmp_path / "sound.npz", **members).read_bytes())


def _entry(content, name=b"image.npy"):
    """Offset of a member's entry in the list of members."""
    return content.rindex(b"PK\1\2", 0, content.rindex(name))


def _encrypted(content):
    for offset in (_entry(content) + 8, content.index(b"PK\3\4") + 6):
        content[offset] |= 1
    return content


def _smaller_size(content):
    """The list says that the images unpack to fewer bytes than they do."""
    entry = _entry(content)
    size = struct.unpack_from("<L", content, entry + 24)[0]
    struct.pack_into("<L", content, entry + 24, size - 60)
    return content


def _larger_size(content):
    entry = _entry(content)
    struct.pack_into("<L", content, entry + 24, 0xFFFFFFF0)
    return content


def _flipped(content, at=0.5):
    start, stop = content.index(b"PK\3\4"), content.rindex(b"PK\3\4")
    content[int(start + (stop - start) * at)] ^= 1
    return content


DAMAGE = {
    "cut in the middle": (lambda content: content[: len(content) // 2], "does not end as a zip archive does"),
    "cut at the end": (lambda content: content[:-1], "does not end as a zip archive does"),
    "cut at the start": (lambda content: content[40:], "is not where or what the list|begins outside"),
    "a hole": (lambda content: content[:100] + content[400:], "not where or what|begins outside|cannot be read"),
    "encrypted": (_encrypted, "image is encrypted"),
    "a flipped bit": (_flipped, "image has CRC-32 .*, and the archive says"),
    "a smaller size": (_smaller_size, "do not hold exactly"),
    "a larger size": (_larger_size, "image cannot hold 4,294,967,280 bytes"),
    "two members of one name": (lambda c: c.replace(b"label.npy", b"image.npy"), "two members image.npy"),
    "other members": (lambda c: c.replace(b"label.npy", b"lable.npy"), "holds image, lable and no label"),
    "another name inside": (lambda c: c.replace(b"label.npy", b"lable.npy", 1), "header of label is not where"),
    "no archive": (lambda c: bytearray(b"<html>404</html>"), "does not end as a zip archive does"),
    "nothing": (lambda c: bytearray(), "does not end as a zip archive does"),
    "a name for the terminal": (lambda c: c.replace(b"label.npy", b"l\x1b[1m.npy"), "name is not text of at most 200"),
    "an endless list": (
        lambda c: c[:-10] + struct.pack("<L", 1 << 30) + c[-6:],
        "list of members takes 1,073,741,824 bytes",
    ),
}


@pytest.mark.parametrize("at_the_locator", [True, False])
def test_an_endless_list_of_a_64_bit_archive(tmp_path, monkeypatch, at_the_locator):
    """zipfile takes the record before the locator, others the one that the locator names: neither may be endless."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
    content = _bytes_of(tmp_path)
    record, locator = content.rindex(b"PK\6\6"), content.rindex(b"PK\6\7")
    sound = bytes(content[record:locator])
    if at_the_locator:  # a copy in front, which the locator names, is the endless one
        content[record:record] = sound
        locator += len(sound)
        struct.pack_into("<Q", content, locator + 8, record)
    struct.pack_into("<Q", content, record + 40, 1 << 40)
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DmatError, match="list of members takes 1,099,511,627,776 bytes"):
        read(tmp_path / "a.npz")


def test_a_member_at_an_offset_that_no_file_has(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
    content = _bytes_of(tmp_path)
    extra = content.index(b"\1\0", _entry(content, b"label.npy") + 46 + 9)  # 64-bit sizes, then the offset
    struct.pack_into("<Q", content, extra + 4 + 16, (1 << 64) - 1)
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DmatError, match="label begins outside the members"):
        read(tmp_path / "a.npz")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_archives_are_refused(tmp_path, case):
    damage, sentence = DAMAGE[case]
    path = tmp_path / "a.npz"
    path.write_bytes(damage(_bytes_of(tmp_path)))
    with pytest.raises(DmatError, match=sentence) as error:
        read(path)
    assert str(path) in str(error.value)


def test_no_flipped_bit_of_a_deflated_archive_goes_unnoticed(tmp_path):
    """Whatever breaks (the deflated data, its length or only its checksum), no other image comes out."""
    sound = _bytes_of(tmp_path, method=zipfile.ZIP_DEFLATED)
    header = 30 + len("image.npy")
    refused = 0
    for at in np.linspace(0.1, 0.99, 40):
        (tmp_path / "a.npz").write_bytes(_flipped(bytearray(sound), at))
        with pytest.raises(DmatError, match=r"image|header"):
            read(tmp_path / "a.npz")
        refused += 1
    assert refused == 40
    assert header < len(sound) * 0.1


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_changed_byte_anywhere_is_refused_or_changes_nothing(tmp_path, method):
    """Most bytes matter; dates and the like do not. No other error, no other image."""
    sound = bytes(_bytes_of(tmp_path, method=method, class_names=npy(np.array(["a", "b", "c", "d"]))))
    generator, refused = np.random.default_rng(1), 0
    for _ in range(300):
        content = bytearray(sound)
        for position in generator.integers(0, len(content), generator.integers(1, 4)):
            content[position] = generator.integers(256)
        (tmp_path / "a.npz").write_bytes(content)
        try:
            images, labels = read(tmp_path / "a.npz", 10)
        except DmatError:
            refused += 1
        else:
            assert np.array_equal(images, IMAGES)
            assert np.array_equal(labels, LABELS)
    assert refused > 200


def test_the_checksum_is_compared_before_the_last_block(tmp_path):
    (tmp_path / "a.npz").write_bytes(_flipped(_bytes_of(tmp_path)))
    yielded = []
    with open_released(tmp_path / "a.npz") as released, pytest.raises(DmatError, match="CRC-32"):
        yielded += [len(images) for images, _ in released.blocks(N - 1)]  # the last block has one image
    assert yielded == []  # `+=` never happened, and the second block was never made
    with open_released(tmp_path / "a.npz") as released:
        blocks = released.blocks(N - 1)
        assert len(next(blocks)[0]) == N - 1
        with pytest.raises(DmatError, match="CRC-32"):
            next(blocks)


def test_a_bomb_is_bounded_by_what_deflate_can_do(tmp_path):
    """Labels of 80 MB in 80 kB without the images that they would need: refused before any of them is unpacked."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("image.npy", npy(IMAGES))
        with file.open("label.npy", "w") as member:
            member.write(npy(np.zeros(0, dtype=np.int64), shape=(10_000_000,)))
            for _ in range(10):
                member.write(bytes(8_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(DmatError, match="10,000,000 labels for 23 images"):
            read(tmp_path / "a.npz")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_members_that_share_bytes(tmp_path):
    """The pixels of the images are the member of the labels: a small file would unpack to a large one."""
    labels = npy(LABELS)
    sound = _bytes_of(tmp_path)
    member = bytes(sound[sound.rindex(b"PK\3\4") : sound.index(b"PK\1\2")])
    assert member.endswith(labels)
    pixels = np.frombuffer(member.ljust(IMAGES.size, b"\0"), dtype=np.uint8).reshape(IMAGES.shape)
    content = _bytes_of(tmp_path, image=npy(pixels))
    struct.pack_into("<L", content, _entry(content, b"label.npy") + 42, content.index(member))
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DmatError, match="label overlaps another member"):
        read(tmp_path / "a.npz")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    images, labels = np.zeros((3000, 16, 16, 3), dtype=np.uint8), np.zeros(3000, dtype=np.int64)
    np.savez(tmp_path / "a.npz", image=images, label=labels)
    with open_released(tmp_path / "a.npz") as released:
        blocks = released.blocks(1000)
        next(blocks)
        os.truncate(tmp_path / "a.npz", 1_000_000)
        with pytest.raises(DmatError, match="image is cut"):
            next(blocks)


def test_what_is_not_there_or_no_file(tmp_path):
    for path, sentence in (("none.npz", "does not exist"), (".", "has no .npz file")):
        with pytest.raises(DmatError, match=sentence):
            read(tmp_path / path)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(DmatError, match="not a regular file"):
        read(tmp_path / "pipe.npz")


def test_checksum_of_a_member_is_that_of_zlib(tmp_path):
    path = archive(tmp_path / "a.npz")
    with path.open("rb", buffering=0) as file:
        member = zip_members.read_members(file)["label"]
        stream = zip_members.MemberStream(member)
        assert zlib.crc32(stream.read(member.size)) == member.crc
        stream.finish()
