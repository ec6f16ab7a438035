"""Members of a zip archive as a stream, with everything compared that the archive says of itself.

zipfile reads the list of members; the rest is here, because zipfile unpacks through several layers and trusts sizes.
Refuses encrypted members, packing other than deflate, two members of one name, members that overlap, sizes that cannot
be true, and bytes of another CRC-32.
"""

import dataclasses
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from typing import IO, cast

from dmat.errors import first_line

_MAX_DIRECTORY = 1 << 20  # bytes of the list of members
_MAX_RATIO = 1032  # of deflate: 258 bytes from 2 bits (RFC 1951)
_MAX_NAME = 200  # characters
_CHUNK = 1 << 20  # bytes
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # zip's specification (APPNOTE), sections 4.3.7, 4.3.16, 4.3.14 and 4.3.15
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_ENCRYPTED, _PATCHED, _STRONGLY_ENCRYPTED, _UTF_8 = 1 << 0, 1 << 5, 1 << 6, 1 << 11  # flags of a member, 4.4.4


class DamagedArchive(Exception):
    """A member of an archive is not what its archive says; the message has no path."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A member of an archive. offset: of its first byte in the file; size: in bytes as stored, then as unpacked."""

    name: str
    handle: int
    offset: int
    stored_size: int
    size: int
    crc: int
    deflated: bool


class MemberStream:
    """Reads a member once, from its first byte, and compares its CRC-32 at its end.

    Reads by position, so that several streams may share the file.
    """

    def __init__(self, member: Member):
        self.member, self.position, self._crc = member, 0, 0
        self._stored_position, self._pending = 0, b""
        self._decompressor = zlib.decompressobj(-zlib.MAX_WBITS)

    def read(self, count: int) -> bytes:
        """The next `count` bytes, for small pieces. Raises DamagedArchive if the member ends before."""
        piece = bytearray(count)
        self.fill(memoryview(piece))
        return bytes(piece)

    def fill(self, target: memoryview) -> None:
        """Fills `target`, bytes, with what comes next. Raises DamagedArchive if the member ends before."""
        if self.position + len(target) > self.member.size:
            raise DamagedArchive(f"{self.member.name} ends after {self.member.size} bytes")
        for start in range(0, len(target), _CHUNK):
            piece = target[start : start + _CHUNK]  # small enough to be in the processor's cache for its checksum
            (self._inflate if self.member.deflated else self._copy)(piece)
            self._crc = zlib.crc32(piece, self._crc)
        self.position += len(target)

    def finish(self) -> None:
        """Raises DamagedArchive unless the whole member was read and has the checksum of the archive."""
        if self.position != self.member.size:
            raise DamagedArchive(f"{self.member.name} has {self.member.size - self.position} bytes after its array")
        if self._crc != self.member.crc:
            raise DamagedArchive(
                f"{self.member.name} has CRC-32 {self._crc:08x}, and the archive says {self.member.crc:08x}"
            )

    def _copy(self, target: memoryview) -> None:
        filled = 0
        while filled < len(target):
            count = os.preadv(self.member.handle, [target[filled:]], self.member.offset + self._stored_position)
            if not count:
                raise DamagedArchive(f"{self.member.name} is cut")
            filled += count
            self._stored_position += count

    def _inflate(self, target: memoryview) -> None:
        filled = 0
        while filled < len(target):
            if not self._pending:
                rest = self.member.stored_size - self._stored_position
                self._pending = os.pread(
                    self.member.handle, min(_CHUNK, rest), self.member.offset + self._stored_position
                )
                self._stored_position += len(self._pending)
            try:
                piece = self._decompressor.decompress(self._pending, len(target) - filled)
            except zlib.error as error:
                raise DamagedArchive(f"{self.member.name} is not deflated data ({error})") from None
            if not piece and (self._decompressor.eof or not self._pending):
                raise DamagedArchive(f"{self.member.name} unpacks to fewer bytes than the archive says")
            self._pending = self._decompressor.unconsumed_tail
            target[filled : filled + len(piece)] = piece
            filled += len(piece)


def read_members(file: io.FileIO) -> dict[str, Member]:
    """The members of an archive by the names of their arrays. Raises DamagedArchive if the archive is damaged."""
    _expect_short_directory(file)
    try:
        with zipfile.ZipFile(cast(IO[bytes], file)) as archive:
            entries, directory = archive.infolist(), archive.start_dir
    except Exception as error:  # hostile bytes may raise any exception; none of them is a bug of dmat
        raise DamagedArchive(
            f"its list of members cannot be read ({type(error).__name__}: {first_line(error)})"
        ) from None
    members: dict[str, Member] = {}
    for entry in entries:
        name = entry.filename.removesuffix(".npy")
        if len(name) > _MAX_NAME or not name.isprintable():
            raise DamagedArchive(f"it has a member whose name is not text of at most {_MAX_NAME} characters")
        if name in members:
            raise DamagedArchive(f"it has two members {entry.filename}")
        members[name] = _member(name, entry, file.fileno(), directory)
    return members


def _expect_short_directory(file: io.FileIO) -> None:
    """Raises DamagedArchive unless the file ends as an archive does, with a list of few members.

    The list is read into memory at once, and its size is whatever the file says.
    """
    size = os.fstat(file.fileno()).st_size
    start = max(0, size - _END.size - 0xFFFF)  # a comment of up to 65,535 bytes may follow
    tail = os.pread(file.fileno(), size - start, start)
    position = tail.rfind(b"PK\5\6")
    if position < 0 or len(tail) - position < _END.size:
        raise DamagedArchive("it does not end as a zip archive does: it is cut, or something else")
    sizes = [_END.unpack_from(tail, position)[5]]
    if position >= _LOCATOR_64.size:
        signature, _, offset, _ = _LOCATOR_64.unpack_from(tail, position - _LOCATOR_64.size)
        if signature == b"PK\6\7":
            # Where the locator says, and right before it: readers differ in where they look.
            offsets = (offset, start + position - _LOCATOR_64.size - _END_64.size)
            sizes_64 = [stated for at in offsets if (stated := _directory_size_64(file, at)) is not None]
            sizes = sizes_64 + [stated for stated in sizes if stated != 0xFFFFFFFF or not sizes_64]
    if max(sizes) > _MAX_DIRECTORY:
        raise DamagedArchive(f"its list of members takes {max(sizes):,} bytes, and few members are expected")


def _directory_size_64(file: io.FileIO, offset: int) -> int | None:
    """Bytes of the list of members that the 64-bit record at `offset` states; None if no such record is there."""
    if not 0 <= offset < 1 << 63:
        return None
    record = os.pread(file.fileno(), _END_64.size, offset)
    return int(_END_64.unpack(record)[8]) if record[:4] == b"PK\6\6" and len(record) == _END_64.size else None


def _member(name: str, entry: zipfile.ZipInfo, handle: int, directory: int) -> Member:
    """A member, after a look at its own header in the file. directory: offset of the list of members."""
    if entry.flag_bits & (_ENCRYPTED | _PATCHED | _STRONGLY_ENCRYPTED):
        raise DamagedArchive(f"{name} is encrypted or a patch")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DamagedArchive(f"{name} is packed by method {entry.compress_type}, and only deflate is read")
    if not 0 <= entry.header_offset <= directory - _LOCAL_HEADER.size:
        raise DamagedArchive(f"{name} begins outside the members")
    header = os.pread(handle, _LOCAL_HEADER.size, entry.header_offset)
    signature, _, _, method, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    local_name = os.pread(handle, name_length, entry.header_offset + _LOCAL_HEADER.size)
    if signature != b"PK\3\4" or method != entry.compress_type or local_name != _encoded_name(entry):
        raise DamagedArchive(f"the header of {name} is not where or what the list of members says")
    offset = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if offset + entry.compress_size > directory:
        raise DamagedArchive(f"{name} reaches beyond the end of the members")
    deflated = entry.compress_type == zipfile.ZIP_DEFLATED
    if entry.file_size > entry.compress_size * (_MAX_RATIO if deflated else 1):
        raise DamagedArchive(f"{name} cannot hold {entry.file_size:,} bytes in {entry.compress_size:,}")
    return Member(name, handle, offset, entry.compress_size, entry.file_size, entry.CRC, deflated)


def _encoded_name(entry: zipfile.ZipInfo) -> bytes:
    """The name of a member as its own header has it."""
    return entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF_8 else "cp437")


def expect_apart(members: Iterable[Member]) -> None:
    """Raises DamagedArchive if members share bytes of the file: a small archive would unpack to a large one."""
    end = 0
    for member in sorted(members, key=lambda member: member.offset):
        if member.offset < end:
            raise DamagedArchive(f"{member.name} overlaps another member")
        end = member.offset + member.stored_size
