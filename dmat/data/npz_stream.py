"""Generated images as Wang et al. 2023 released them: .npz archives that are read and written as a stream.

An archive holds `image`, uint8 [N, H, W, C], and `label`, integers [N]; `class_names`, text [K], is optional. A large
set is a folder of such archives, one part after another. Blocks of images come straight from the file, so memory does
not grow with it. Nothing in a file is run or trusted: the archive, its headers, its sizes and its CRC-32 checksums are
compared before anything that they describe is used.

Shapes: N images, B images of a block, H height, W width, C channels, K classes.
"""

import contextlib
import dataclasses
import functools
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, BinaryIO, TypedDict

import numpy as np

from dmat.data import npz_arrays, zip_members
from dmat.data.formats import split_files
from dmat.data.image_source import MAX_CLASSES
from dmat.data.npz_arrays import ArrayHeader
from dmat.data.shards import NO_LABEL
from dmat.data.zip_members import DamagedArchive, Member, MemberStream
from dmat.errors import DmatError, first_line

MAX_IMAGES = 1_000_000_000  # per archive: their labels take 4 GB of memory
MAX_SIDE = 4096  # pixels
_MAX_NAMES = 16 << 20  # bytes of the names of all classes
_CHUNK = 1 << 20  # bytes
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date of a member: equal images give equal archives
IMAGE, LABEL, CLASS_NAMES = "image", "label", "class_names"


class PartIdentity(TypedDict):
    """What tells one archive from another without reading it."""

    name: str  # of the file
    bytes: int
    members: dict[str, list[int]]  # name -> size in bytes and CRC-32


@dataclasses.dataclass(frozen=True)
class _Part:
    """One archive. class_names: None if the archive has none. ignored: names of other members."""

    path: Path
    images: Member
    header: ArrayHeader  # of the images
    class_names: tuple[str, ...] | None
    ignored: tuple[str, ...]
    identity: PartIdentity


@dataclasses.dataclass(frozen=True)
class ReleasedImages:
    """The images of opened archives, in the order of the parts.

    shape: H, W, C. labels: int32 [N]; NO_LABEL for every image if they have no labels. class_names: of the archive,
    else the numbers of the classes. ignored: names of members that are not read. identity: of each part, for whoever
    resumes an import.
    """

    parts: tuple[_Part, ...]
    shape: tuple[int, int, int]
    labels: np.ndarray
    class_names: tuple[str, ...]
    ignored: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return bool(self.labels[0] != NO_LABEL)

    @property
    def named(self) -> bool:
        """Whether the archives name the classes."""
        return self.parts[0].class_names is not None

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @functools.cached_property
    def class_counts(self) -> list[int]:
        """Images per class, [K]; zeros if the images have no labels."""
        labels = self.labels if self.labelled else self.labels[:0]
        return np.bincount(labels, minlength=self.classes).tolist()

    @property
    def identity(self) -> list[PartIdentity]:
        """What tells these archives from others: name, size and checksums of each, as the archive says them."""
        return [part.identity for part in self.parts]

    def blocks(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields all images uint8 [B, H, W, C] and labels int64 [B] in order. B is `size`, or less in the last block.

        Each block is an array of its own. Raises DmatError if an archive is damaged: before the block in which its
        last image would be. Whoever stops earlier has not compared the checksum of that archive.
        """
        streams = (self._stream(part) for part in self.parts)
        part, stream, rest = next(streams)
        for start in range(0, len(self), size):
            images = np.empty((min(size, len(self) - start), *self.shape), dtype=np.uint8)
            filled = 0
            while filled < len(images):
                if not rest:
                    part, stream, rest = next(streams)
                count = min(rest, len(images) - filled)
                with _refusing(part.path):
                    stream.fill(images[filled : filled + count].reshape(-1).data)
                    filled, rest = filled + count, rest - count
                    if not rest:
                        stream.finish()
            yield images, self.labels[start : start + len(images)].astype(np.int64)

    @staticmethod
    def _stream(part: _Part) -> tuple[_Part, MemberStream, int]:
        """A part, a stream at its first image, and its number of images."""
        stream = MemberStream(part.images)
        with _refusing(part.path):
            stream.read(part.header.start)
        return part, stream, part.header.shape[0]


@contextlib.contextmanager
def open_released(path: Path) -> Iterator[ReleasedImages]:
    """Opens an archive, or the archives (*.npz) of a folder in the order of their names, numbers in them as numbers.

    Reads headers and labels. Raises DmatError if a file is not such an archive, is damaged, or does not fit the others.
    """
    with contextlib.ExitStack() as stack:
        parts, labels_of_parts = zip(*(_open_part(part, stack) for part in _part_paths(path)), strict=True)
        first = parts[0]
        for part in parts[1:]:
            if part.header.shape[1:] != first.header.shape[1:] or part.class_names != first.class_names:
                raise DmatError(
                    f"{part.path} holds images {list(part.header.shape[1:])} and "
                    f"{len(part.class_names or ())} class names; expected {list(first.header.shape[1:])} and "
                    f"{len(first.class_names or ())}, the same as in {first.path}; move the parts of other sets away"
                )
        labels = np.concatenate(labels_of_parts)
        del labels_of_parts
        highest, lowest = int(labels.max()), int(labels.min())
        if lowest == NO_LABEL < highest:
            raise DmatError(
                f"{path} has images with and without a label ({NO_LABEL}); expected labels for all or for none; "
                f"separate them"
            )
        height, width, channels = first.header.shape[1:]
        names = first.class_names if first.class_names is not None else tuple(str(k) for k in range(highest + 1))
        if highest >= len(names):
            raise DmatError(
                f"{path} has labels up to {highest}; expected less than {len(names)}, as `{CLASS_NAMES}` has a name "
                f"for each class; correct one of the two"
            )
        ignored = tuple(dict.fromkeys(name for part in parts for name in part.ignored))
        yield ReleasedImages(parts, (height, width, channels), labels, names, ignored)


def _part_paths(path: Path) -> list[Path]:
    """The archives of a path. Raises DmatError if there are none."""
    if not path.exists():
        raise DmatError(f"{path} does not exist; expected an .npz file or a folder of them; give its path")
    if not path.is_dir():
        return [path]

    splits, unread = split_files.files_of_splits(path, ".npz")
    if len(splits) > 1 or unread:
        raise DmatError(
            f"{path} has files of several splits; expected the parts of one set of generated images alone; move the "
            f"others away"
        )
    return splits["train"]


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turns a damaged member into an error that names the archive."""
    try:
        yield
    except DamagedArchive as error:
        raise DmatError(
            f"{path} is damaged or not an archive of images: {error}; expected uint8 images [N, H, W, 1 or 3] under "
            f"`{IMAGE}` and one integer for each under `{LABEL}`, as numpy.savez writes them; fetch or save it again"
        ) from None
    except OSError as error:
        raise DmatError(f"{path} cannot be read ({error.strerror}); expected an .npz file; look at the disk") from None


def _open_part(path: Path, stack: contextlib.ExitStack) -> tuple[_Part, np.ndarray]:
    """Opens one archive and reads its headers, class names and labels, int32 [N]. stack: closes the file."""
    with _refusing(path):
        if not path.is_file():  # opening a pipe would wait for its other end
            raise DamagedArchive("it is not a regular file")
        file = stack.enter_context(path.open("rb", buffering=0))
        members = zip_members.read_members(file)
        missing = [name for name in (IMAGE, LABEL) if name not in members]
        if missing:
            raise DamagedArchive(
                f"it holds {', '.join(list(members)[:5]) or 'nothing'} and no {' and no '.join(missing)}"
            )
        read = {IMAGE, LABEL, CLASS_NAMES} & members.keys()
        zip_members.expect_apart(members[name] for name in read)
        header = _read_image_header(MemberStream(members[IMAGE]))
        labels = _read_labels(MemberStream(members[LABEL]), header.shape[0])
        names = _read_names(MemberStream(members[CLASS_NAMES])) if CLASS_NAMES in members else None
        identity = PartIdentity(
            name=path.name,
            bytes=os.fstat(file.fileno()).st_size,
            members={name: [members[name].size, members[name].crc] for name in sorted(read)},
        )
        part = _Part(path, members[IMAGE], header, names, tuple(sorted(members.keys() - read)), identity)
        return part, labels


def _read_header(stream: MemberStream, kinds: str, dimensions: int) -> ArrayHeader:
    """Reads the header of an array. kinds: numpy's letters of the types that it may have. dimensions: their number.

    Raises DamagedArchive for another type or number of dimensions, Fortran order, and a size that is not the member's.
    """
    header = npz_arrays.read_header(stream, kinds)
    if len(header.shape) != dimensions:
        raise DamagedArchive(npz_arrays.described(stream.member.name, header))
    if header.fortran_order and dimensions > 1:
        raise DamagedArchive(
            f"{npz_arrays.described(stream.member.name, header)} in Fortran order, in which an image is in no one place"
        )
    return header


def _read_image_header(stream: MemberStream) -> ArrayHeader:
    """Reads the header of the images. Raises DamagedArchive unless they are uint8 of a size that images have."""
    header = _read_header(stream, "u", 4)
    count, height, width, channels = header.shape
    if header.dtype.itemsize != 1 or channels not in (1, 3):
        raise DamagedArchive(f"{IMAGE} is {header.dtype} {list(header.shape)}")
    if not (1 <= count <= MAX_IMAGES and 1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise DamagedArchive(
            f"{IMAGE} has shape {list(header.shape)}, and 1 to {MAX_IMAGES:,} images of at most {MAX_SIDE} x "
            f"{MAX_SIDE} are read"
        )
    return header


def _read_labels(stream: MemberStream, count: int) -> np.ndarray:
    """Labels int32 [N], N = `count`, from integers of any size. Raises DamagedArchive if they are something else."""
    header = _read_header(stream, "iu", 1)
    if header.shape != (count,):
        raise DamagedArchive(f"{LABEL} holds {header.shape[0]:,} labels for {count:,} images")
    labels = np.empty(count, dtype=np.int32)
    step = _CHUNK // header.dtype.itemsize
    for start in range(0, count, step):
        stop = min(start + step, count)
        piece = np.frombuffer(stream.read((stop - start) * header.dtype.itemsize), header.dtype)
        if piece.max() >= MAX_CLASSES or piece.min() < NO_LABEL:
            raise DamagedArchive(
                f"{LABEL} goes from {piece.min()} to {piece.max()}, and 0 to {MAX_CLASSES - 1} is read"
            )
        labels[start:stop] = piece
    stream.finish()
    return labels


def _read_names(stream: MemberStream) -> tuple[str, ...]:
    """Names of the classes, [K]. Raises DamagedArchive unless they are printable text, all different."""
    if stream.member.size > _MAX_NAMES:
        raise DamagedArchive(f"{CLASS_NAMES} takes {stream.member.size:,} bytes")
    header = _read_header(stream, "U", 1)
    content = stream.read(stream.member.size - stream.position)
    stream.finish()
    try:
        names = tuple(np.frombuffer(content, header.dtype).tolist())
    except (ValueError, SystemError) as error:  # numbers that are no characters
        raise DamagedArchive(f"{CLASS_NAMES} is not text ({first_line(error)})") from None
    if len(set(names)) < len(names) or not all(name and name.isprintable() for name in names):
        raise DamagedArchive(f"{CLASS_NAMES} has a name twice, empty or unprintable")
    return names


def write_released(
    file: BinaryIO,
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    count: int,
    shape: Sequence[int],
    class_names: Sequence[str],
) -> None:
    """Writes images as an archive that numpy.load and `open_released` read. Equal images give equal archives.

    blocks: images uint8 [B, H, W, C] and labels int64 [B], `count` in all. shape: H, W, C.
    """
    labels = np.empty(count, dtype=np.int64)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with _new_member(archive, IMAGE) as member:
            _write_header(member, np.dtype(np.uint8), (count, *shape))
            written = 0
            for images, block_labels in blocks:
                member.write(np.ascontiguousarray(images).data)
                labels[written : written + len(images)] = block_labels
                written += len(images)
        for name, array in ((LABEL, labels), (CLASS_NAMES, np.array(class_names, dtype=np.str_))):
            with _new_member(archive, name) as member:
                _write_header(member, array.dtype, array.shape)
                member.write(array.tobytes())


def _new_member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    return archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True)


def _write_header(member: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Writes the header of an array of any shape, in C order."""
    np.lib.format.write_array_header_1_0(
        member, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
