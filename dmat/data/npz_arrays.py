"""The arrays of an .npz file: headers, and whole arrays for files that fit into memory.

Nothing in a file is run or trusted: the archive, its headers, its sizes and its CRC-32 checksums are compared before
anything that they describe is used, and no header asks for more memory than its member unpacks to.
"""

import contextlib
import dataclasses
import io
import math
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from dmat.data import zip_members
from dmat.data.zip_members import DamagedArchive, Member, MemberStream
from dmat.errors import DmatError, first_line

_MAX_HEADER = 10_000  # bytes, numpy's own limit for the header of an array
_MAX_LENGTH = 1 << 62  # of one dimension
_NUMBERS_AND_TEXT = "biufcSU"  # numpy's letters of the types that `read_arrays` reads


@dataclasses.dataclass(frozen=True)
class ArrayHeader:
    """Type and shape of an array in a member. start: number of bytes before its first item."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the items."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: MemberStream, kinds: str = _NUMBERS_AND_TEXT) -> ArrayHeader:
    """Reads the header of an array. kinds: numpy's letters of the types that it may have.

    Raises DamagedArchive for another type, an impossible shape, and a size that is not the member's.
    """
    name, size = stream.member.name, stream.member.size
    prefix = stream.read(8)
    width = {b"\x01\x00": 2, b"\x02\x00": 4}.get(prefix[6:])  # of the length of the header, by version
    if prefix[:6] != b"\x93NUMPY" or width is None:
        raise DamagedArchive(f"{name} is not an array in format 1 or 2 of numpy")
    length_bytes = stream.read(width)
    length = int.from_bytes(length_bytes, "little")
    if length > _MAX_HEADER:
        raise DamagedArchive(f"{name} has a header of {length:,} bytes")
    content = io.BytesIO(length_bytes + stream.read(length))
    read = np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
    try:
        shape, fortran_order, dtype = read(content, max_header_size=_MAX_HEADER)
    except Exception as error:  # hostile bytes may raise any exception; none of them is a bug of dmat
        raise DamagedArchive(
            f"the header of {name} is unreadable ({type(error).__name__}: {first_line(error)})"
        ) from None
    if not all(type(length) is int and 0 <= length < _MAX_LENGTH for length in shape):  # True is an int to numpy
        raise DamagedArchive(f"{name} has an impossible shape")
    header = ArrayHeader(dtype, shape, fortran_order, stream.position)
    if dtype.kind not in kinds or not dtype.itemsize:
        raise DamagedArchive(described(name, header))
    if header.start + header.nbytes != size:
        raise DamagedArchive(f"{described(name, header)}, which {size:,} bytes do not hold exactly")
    return header


def described(name: str, header: ArrayHeader) -> str:
    """An array for messages: name, type and shape."""
    return f"{name} is {str(header.dtype)[:80]} {list(header.shape)[:8]}"


def read_headers(path: Path, names: Collection[str]) -> dict[str, ArrayHeader]:
    """The headers of those arrays of a file that have one of the names. Raises DmatError as `read_arrays` does."""
    with _open_members(path, names) as members:
        return {name: read_header(MemberStream(member)) for name, member in members.items()}


def read_arrays(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Those arrays of a file, of any shape, that have one of the names; None: all.

    Raises DmatError if the file is missing, damaged, or holds something else than arrays of numbers and text.
    """
    with _open_members(path, names) as members:
        return {name: _read_array(MemberStream(member)) for name, member in members.items()}


def _read_array(stream: MemberStream) -> np.ndarray:
    """The array of a member, of any shape."""
    header = read_header(stream)
    content = bytearray(header.nbytes)
    stream.fill(memoryview(content))
    stream.finish()
    return np.frombuffer(content, header.dtype).reshape(header.shape, order="F" if header.fortran_order else "C")


@contextlib.contextmanager
def _open_members(path: Path, names: Collection[str] | None) -> Iterator[dict[str, Member]]:
    """The members of an archive by name, in the order of the archive."""
    try:
        if not path.is_file():  # opening a pipe would wait for its other end
            raise DamagedArchive("it is not a file")
        with path.open("rb", buffering=0) as file:
            members = zip_members.read_members(file)
            members = {name: member for name, member in members.items() if names is None or name in names}
            zip_members.expect_apart(members.values())
            yield members
    except (DamagedArchive, OSError, MemoryError) as error:
        cause = getattr(error, "strerror", None) or first_line(error)
        raise DmatError(
            f"{path} is incomplete or not an .npz of numbers ({cause}); expected what numpy.savez writes; bring back "
            f"a good copy, or save it again"
        ) from None
