"""Small CIFAR folders with random pixels in the published formats: pickles as Python 2 wrote them, and the binary
version."""

import io
import pickle
import struct
from typing import ClassVar

import numpy as np

TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HUNDRED = tuple(f"thing_{k:02d}" for k in range(100))
NAMES = {"cifar10": TEN, "cifar100": HUNDRED}
FOLDERS = {
    ("cifar10", "python"): "cifar-10-batches-py",
    ("cifar10", "binary"): "cifar-10-batches-bin",
    ("cifar100", "python"): "cifar-100-python",
    ("cifar100", "binary"): "cifar-100-binary",
}


class Python2(pickle._Pickler):
    """Writes text and bytes as one type, as Python 2 did."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_str(self, value):
        value = value.encode("latin-1") if isinstance(value, str) else value
        if not self.bin:
            self.write(b"S" + repr(value)[1:].encode() + b"\n")
        elif len(value) < 256:
            self.write(b"U" + bytes([len(value)]) + value)
        else:
            self.write(b"T" + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_str


def python2(value, protocol=2):
    """The bytes that Python 2 and numpy 1 would have pickled."""
    file = io.BytesIO()
    Python2(file, protocol).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def random_images(count, classes, seed):
    """Random images uint8 [count, 32, 32, 3] and labels int64 [count] that cycle through the classes."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return images, np.arange(count, dtype=np.int64) % classes


def write(folder, data="cifar10", version="python", *, train=60, test=40, protocol=2, pickled=python2):
    """Writes a CIFAR folder (CIFAR-10: `train` a multiple of 5) and returns its training and test pair."""
    folder.mkdir(parents=True)
    names = NAMES[data]
    pairs = random_images(train, len(names), 1), random_images(test, len(names), 2)
    parts = 5 if data == "cifar10" else 1
    stems = [f"data_batch_{k + 1}" for k in range(parts)] if parts > 1 else ["train"]
    pieces = [tuple(array[k * train // parts : (k + 1) * train // parts] for array in pairs[0]) for k in range(parts)]
    for stem, (images, labels) in zip(
        [*stems, "test_batch" if parts > 1 else "test"], [*pieces, pairs[1]], strict=True
    ):
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        if version == "binary":
            before = [np.full(len(labels), 7), labels] if data == "cifar100" else [labels]  # 7: a coarse label
            content = np.column_stack([*(column.astype(np.uint8) for column in before), rows]).tobytes()
            (folder / f"{stem}.bin").write_bytes(content)
        else:
            as_list = [int(label) for label in labels]
            batch = {b"data": np.ascontiguousarray(rows), b"batch_label": b"a part"}
            batch |= {b"filenames": [f"{k}.png".encode() for k in range(len(labels))]}
            batch |= (
                {b"labels": as_list} if parts > 1 else {b"fine_labels": as_list, b"coarse_labels": [7 for _ in as_list]}
            )
            (folder / stem).write_bytes(pickled(batch, protocol))
    _write_names(folder, data, version, train // parts if train // parts == test else None, protocol, pickled)
    return pairs


def _write_names(folder, data, version, count, protocol, pickled):
    names = NAMES[data]
    if version == "binary":
        file = "batches.meta.txt" if data == "cifar10" else "fine_label_names.txt"
        (folder / file).write_text("\n".join(names) + "\n\n")
    elif data == "cifar10":
        meta = {b"label_names": [name.encode() for name in names], b"num_vis": 3072}
        meta |= {} if count is None else {b"num_cases_per_batch": count}
        (folder / "batches.meta").write_bytes(pickled(meta, protocol))
    else:
        meta = {b"fine_label_names": [name.encode() for name in names], b"coarse_label_names": [b"things"]}
        (folder / "meta").write_bytes(pickled(meta, protocol))
