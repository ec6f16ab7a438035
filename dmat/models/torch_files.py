"""Reads files that torch.save wrote without executing anything in them.

Such a file holds a pickle, which is a program, and the bytes of its tensors. The program runs here on a stack that can
make numbers, text, tuples, lists and dictionaries. It can import nothing and call nothing: the name of a class or
function stays a name (`UnknownObject`), whatever the program does with it. Only the names of a tensor, of a parameter
and of an OrderedDict have a meaning. A tensor becomes a `StoredTensor`; its position in the file is checked before a
byte is read.

Two formats: a zip archive (torch 1.6 and later), and a sequence of pickles followed by bytes (earlier). Both are read
by memory map. Raises ValueError and other exceptions for files that torch.save did not write.
"""

import dataclasses
import io
import math
import mmap
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

_ZIP = b"PK\x03\x04"
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older format
_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_STORAGES = {f"{module}.{name}": dtype for module in ("torch", "torch.cuda") for name, dtype in _TYPES.items()}
_DICTIONARY = "collections.OrderedDict"
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_LITERAL = re.compile(  # instructions that put their own argument on the stack
    r"(BIN)?(INT[12]?|FLOAT)|LONG[14]?|(SHORT_)?(BIN)?(STRING|UNICODE8?)|(SHORT_)?BINBYTES8?|BYTEARRAY8"
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_RECOGNISED_NAMES = {*_STORAGES, _DICTIONARY, *_TENSORS, *_PARAMETERS}

Key = str | bytes | int | float | None  # of a dictionary in a file


def _text(value: object) -> str:
    """Returns a part of a name. Raises ValueError for anything but text: converting nested values may never end."""
    if not isinstance(value, str):
        raise ValueError(f"a name that is a {type(value).__name__}")
    return value


@dataclasses.dataclass(frozen=True)
class UnknownObject:
    """A class or function that the file names, or anything that the file creates with it. name: with its module."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A piece of a file that holds numbers. length: in numbers, not in bytes."""

    file: "TorchFile"
    key: str
    dtype: torch.dtype
    length: int

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.length * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in the file: a view of one of its pieces.

    offset and strides: in numbers, not in bytes.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of a copy in bytes. A view that repeats numbers claims more than the file has."""
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def tensor(self) -> Tensor:
        """Reads the tensor, of any shape. It shares memory with the file and with other views of the same piece.

        Raises ValueError if the piece is too small.
        """
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.storage.dtype)
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if last >= self.storage.length:
            raise ValueError(f"a tensor ends at number {last} of a storage of {self.storage.length}")
        whole = self.storage.file.piece(self.storage).view(self.storage.dtype)
        return whole.as_strided(self.shape, self.strides, self.offset)


class TorchFile:
    """The bytes of a file, the positions of its pieces, and what the names in its program mean.

    A subclass may give meaning to more names. unread_names: names that the file uses and that have no meaning here.
    """

    recognised_names = _RECOGNISED_NAMES

    def __init__(self, content: mmap.mmap):
        self.content = content
        self.extents: dict[str, tuple[int, int]] = {}  # key of a piece -> (first byte, number of bytes)
        self.storages: dict[str, Storage] = {}
        self.pieces: dict[str, Tensor] = {}
        self.bytes_left = len(content)
        self.unread_names: set[str] = set()

    def add_piece(self, key: str, start: int, nbytes: int) -> None:
        """Records the position of a piece. Raises ValueError if it is not inside the file."""
        if not 0 <= start <= start + nbytes <= len(self.content):
            raise ValueError(f"piece {key} ends beyond the file")
        self.extents[key] = start, nbytes

    def piece(self, storage: Storage) -> Tensor:
        """The bytes of a storage: uint8 [N]. Raises ValueError if all pieces together are larger than the file.

        So pieces cannot overlap.
        """
        if storage.key not in self.pieces:
            start, nbytes = self.extents[storage.key]
            self.bytes_left -= nbytes
            if nbytes < storage.nbytes or self.bytes_left < 0:
                raise ValueError(f"piece {storage.key} has {nbytes} bytes and claims {storage.nbytes}")
            buffer = torch.frombuffer(self.content, dtype=torch.uint8, count=nbytes, offset=start)
            self.pieces[storage.key] = buffer if start % 8 == 0 else buffer.clone()  # tensors need aligned memory
        return self.pieces[storage.key][: storage.nbytes]

    def resolve_storage(self, identity: object) -> object:
        """The storage that the program requests by a persistent identity."""
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            return UnknownObject("an object outside the pickle")
        _, kind, key, _, length = identity[:5]
        if not isinstance(kind, UnknownObject) or kind.name not in _STORAGES:
            return kind
        if any(view is not None for view in identity[5:]) or not isinstance(key, str) or not _are_sizes((length,)):
            raise ValueError("a storage without key and length")
        return self.storages.setdefault(key, Storage(self, key, _STORAGES[kind.name], length))

    def resolve_name(self, name: str) -> UnknownObject:
        """A placeholder for a class or function. Records names that have no meaning here."""
        if name not in self.recognised_names:
            self.unread_names.add(name)
        return UnknownObject(name)

    def resolve_call(self, maker: object, arguments: object) -> object:
        """The value that the program gets for a call. Nothing is called."""
        if not isinstance(maker, UnknownObject) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is not a name")
        if maker.name == _DICTIONARY:
            return to_dictionary(pair for pairs in arguments[:1] for pair in pairs)
        if maker.name in _PARAMETERS and arguments:
            return arguments[0]
        if maker.name in _TENSORS and len(arguments) >= 4 and isinstance(arguments[0], Storage):
            storage, offset, shape, strides = arguments[:4]
            if not (_are_sizes((offset,)) and _are_sizes(shape) and _are_sizes(strides) and len(shape) == len(strides)):
                raise ValueError("a tensor without offset, shape and strides")
            return StoredTensor(storage, offset, shape, strides)
        return maker

    def resolve_state(self, target: object, state: object) -> None:
        """Receives the state of an object. Drops it, because no object was created."""

    def resolve_items(self, target: object, items: list[object]) -> None:
        """Receives key, value, key, value ... of an object that is not a dictionary. Drops them."""


def read(path: Path) -> tuple[object, list[str]]:
    """Reads the value that a file holds. Returns it with the names in the file that have no meaning here.

    Tensors are `StoredTensor`s.
    """
    with open(path, "rb") as stream:
        if not path.stat().st_size:
            raise ValueError("it is empty")
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    file = TorchFile(content)
    value = _read_zip(file, path) if content[:4] == _ZIP else read_legacy(file)
    return value, sorted(file.unread_names)


def _read_zip(file: TorchFile, path: Path) -> object:
    """Reads the format of torch 1.6 and later: a zip archive with data.pkl and one member per piece."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
    programs = [name for name in members if name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise ValueError("a zip archive without one data.pkl")
    base = programs[0].removesuffix("data.pkl")
    for name, member in members.items():
        if name.startswith(base):
            file.add_piece(name.removeprefix(f"{base}data/"), _first_byte(file.content, member), member.file_size)
    _expect_little_endian(_piece_bytes(file, f"{base}byteorder") in (b"", b"little"))
    return run_pickle(io.BytesIO(_piece_bytes(file, programs[0])), file)


def _piece_bytes(file: TorchFile, key: str) -> bytes:
    start, nbytes = file.extents.get(key, (0, 0))
    return file.content[start : start + nbytes]


def _first_byte(content: mmap.mmap, member: zipfile.ZipInfo) -> int:
    """Position of the first byte of a member. The bytes are stored as they are, because torch does not compress."""
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise ValueError(f"{member.filename} is compressed")
    name, extra = struct.unpack_from("<HH", content, member.header_offset + 26)
    return member.header_offset + 30 + name + extra


def read_legacy(file: TorchFile) -> object:
    """Reads the older format: five pickles, then the pieces.

    The program is the fourth pickle; the fifth one lists the pieces in their order.
    """
    content = cast(IO[bytes], file.content)  # a memory map reads like a file; each pickle leaves it at its own end
    if run_pickle(content, file) != _MAGIC:
        raise ValueError("a pickle that torch.save did not write")
    run_pickle(content, file)  # version of the format
    system = run_pickle(content, file)
    _expect_little_endian(isinstance(system, dict) and system.get("little_endian") is not False)
    value, keys = run_pickle(content, file), run_pickle(content, file)
    for key in keys:
        if key not in file.storages:
            raise ValueError("a storage of a type that is not read")
        (length,) = struct.unpack("<q", content.read(8))
        nbytes = length * file.storages[key].dtype.itemsize
        file.add_piece(key, content.tell(), nbytes)
        content.seek(nbytes, io.SEEK_CUR)
    return value


def _expect_little_endian(is_little: bool) -> None:
    if not is_little:
        raise ValueError("its numbers are in big-endian order")


def _are_sizes(numbers: object) -> bool:
    return isinstance(numbers, tuple) and all(type(n) is int and 0 <= n < 2**48 for n in numbers)


def to_dictionary(pairs: Iterable[tuple[object, object]]) -> dict[Key, object]:
    """A dictionary of the pairs whose key is text or a number: hashing other keys could be slow or recurse deeply."""
    return {key: value for key, value in pairs if isinstance(key, str | bytes | int | float | None)}


def run_pickle(program: IO[bytes], file: TorchFile) -> Any:
    """Runs one pickle up to its end. Raises ValueError for instructions that no file of weights needs."""
    stack: list[object] = []
    marks: list[int] = []
    memo: dict[object, object] = {}  # numbers, or whatever the program names them by

    def since_mark() -> list[object]:
        """Takes all items above the last mark from the stack."""
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def last(count: int) -> list[object]:
        """Takes the last `count` items from the stack."""
        if count > len(stack):
            raise ValueError("it takes more from its stack than the stack holds")
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    def put(items: list[object]) -> None:
        """Adds items to the list on top of the stack; if it is not a list, drops them."""
        if isinstance(stack[-1], list):
            stack[-1].extend(items)

    def put_entries(items: list[object]) -> None:
        """Adds key, value, key, value ... to the dictionary or object on top of the stack."""
        if isinstance(stack[-1], dict):
            stack[-1].update(to_dictionary(zip(items[::2], items[1::2], strict=True)))
        else:
            file.resolve_items(stack[-1], items)

    for opcode, argument, _ in pickletools.genops(program):
        match opcode.name:
            case name if _LITERAL.fullmatch(name):
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(since_mark())
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = since_mark()
                stack.append(to_dictionary(zip(items[::2], items[1::2], strict=True)))
            case "EMPTY_SET":
                stack.append(UnknownObject("set"))
            case "FROZENSET":
                since_mark()
                stack.append(UnknownObject("frozenset"))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple(last(int(name[-1]))))
            case "APPEND":
                put(last(1))
            case "APPENDS" | "ADDITEMS":
                put(since_mark())
            case "SETITEM":
                put_entries(last(2))
            case "SETITEMS":
                put_entries(since_mark())
            case "DUP":
                stack.append(stack[-1])
            case "POP":
                last(1)
            case "POP_MARK":
                since_mark()
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(file.resolve_name(str(argument).replace(" ", ".")))
            case "STACK_GLOBAL":
                stack.append(file.resolve_name(".".join(map(_text, last(2)))))
            case "BINPERSID":
                stack.append(file.resolve_storage(*last(1)))
            case "REDUCE" | "NEWOBJ":
                stack.append(file.resolve_call(*last(2)))
            case "NEWOBJ_EX":
                stack.append(file.resolve_call(*last(3)[:2]))
            case "INST":
                stack.append(file.resolve_call(file.resolve_name(str(argument).replace(" ", ".")), tuple(since_mark())))
            case "OBJ":
                maker, *arguments = since_mark()
                stack.append(file.resolve_call(maker, tuple(arguments)))
            case "BUILD":
                (state,) = last(1)
                file.resolve_state(stack[-1], state)
            case "STOP":
                return stack[-1]
            case name:
                raise ValueError(f"it holds the instruction {name}")
    raise ValueError("it has no end")
