"""Writes files that appear complete or not at all, and computes checksums of files and folders.

Deletes nothing: existing files are replaced by rename.
"""

import contextlib
import errno
import functools
import glob
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from dmat import SOURCES, checksum_cache
from dmat.errors import DmatError, first_line

if TYPE_CHECKING:
    import numpy as np
    import pydantic

Record = TypeVar("Record")  # a TypedDict

_CHUNK_SIZE = 1 << 20
_MAX_JSON_SIZE = 1 << 28  # bytes: manifests of a million shards
_MAX_DIGITS = 20  # of a whole number of 64 bits
_MAX_JSON_DEPTH = 50  # assumed: what stages write has less than ten levels
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)  # CIFS, shared folders of VirtualBox and some FUSE file systems


def missing(path: Path) -> DmatError:
    """The error for a file or folder that is not there: of a stage, or of external data."""
    state = "is a link to nothing" if path.is_symlink() else "does not exist"
    if SOURCES in path.parts and "artifacts" not in path.parts:
        return DmatError(f"{path} {state}; expected external data there; put it into {SOURCES}/, or a link to it")
    return DmatError(f"{path} {state}; run the stage that makes it, or `dvc repro`")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file that replaces `path` when the block ends without an error: temporary name, fsync, rename.

    Raises DmatError if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # numpy gives no errno if the system wrote fewer bytes than it was given
        cause = error.strerror or f"the disk or the quota is full: {error}"
        raise DmatError(
            f"{path}: could not be written ({cause}); free or unlock the folder and run the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable, so that they survive a power cut, where the file system can do that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8."""
    with writing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: object) -> None:
    """Writes JSON with sorted keys and a final newline: equal values give equal files. Raises ValueError for NaN."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """The content of a file. Raises DmatError if it is missing, cannot be read or has more than `limit` bytes."""
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise DmatError(f"{path} has {size:,} bytes; expected at most {limit:,}; delete it and run its stage again")
        return file.read()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file. Raises DmatError if it is missing, not a file, or cannot be read, now or in the block."""
    try:
        if not path.is_file() and path.exists():  # opening a FIFO would wait for a writer
            raise DmatError(f"{path} is not a file; expected one; remove it, and `dvc checkout` or run its stage again")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise DmatError(f"{path} cannot be read ({error.strerror}); expected a file; make it readable") from None


def read_json(path: Path) -> Any:
    """Reads a JSON value that `write_json` may have written.

    Raises DmatError if the file is missing or cannot be read, is larger than 256 MiB, is not JSON, or holds what no
    stage writes: NaN, infinite numbers, whole numbers of more than 20 digits, lists in lists to a depth of 50.
    """
    data = read_bytes(path, _MAX_JSON_SIZE)
    try:
        return parse_json(data)
    except ValueError as error:
        raise DmatError(f"{path} is not valid JSON ({error}); delete it and run its stage again") from None


def parse_json(data: bytes) -> Any:
    """Parses UTF-8 text as JSON. Raises ValueError for anything else, and for the values that `read_json` refuses."""
    try:
        value = json.loads(data.decode(), parse_int=_parse_int, parse_float=_parse_float, parse_constant=_parse_float)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(_MAX_JSON_DEPTH):
        containers = [entry for entry in level if isinstance(entry, dict | list)]
        if not containers:
            return value
        level = [child for entry in containers for child in (entry.values() if isinstance(entry, dict) else entry)]
    raise ValueError("nested too deeply")


def _parse_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"the number {text[:_MAX_DIGITS]}... has {len(text)} digits")
    return int(text)


def _parse_float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def read_record(path: Path, schema: type[Record]) -> Record:
    """Reads a JSON object of the keys and types of a TypedDict. Other keys stay as they are in the file.

    schema: of `typing_extensions`: pydantic does not read those of `typing` before Python 3.12. Raises DmatError as
    `read_json` does, and if the file holds anything else.
    """
    record = read_json(path)
    if problems := schema_problems(record, schema):
        raise DmatError(
            f"{path} lacks keys or has values of another type ({problems}); expected what its stage wrote; delete it "
            f"and run its stage again, or `dvc checkout`"
        )
    return cast(Record, record)


def schema_problems(value: object, schema: object) -> str:
    """How a value differs from a type, such as a TypedDict, in words: the first three places; "" if it does not."""
    import pydantic  # not above: `dmat --help` needs this module, and not pydantic

    try:
        _validator(schema).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))[:60] or 'all of it'}: {problem['msg'][:80]}"
            for problem in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        return "; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if problems[3:] else "")
    return ""


@functools.cache
def _validator(schema: object) -> "pydantic.TypeAdapter[object]":
    import pydantic

    return pydantic.TypeAdapter[object](schema)  # type: ignore[arg-type]  # any type


def load_array(path: Path, mapped: bool = False) -> "np.ndarray":
    """Reads a .npy file, an array of any shape. Raises DmatError if it is missing, incomplete or something else.

    The size of the file bounds the memory, whatever its header says. mapped: maps the file into memory instead, so that
    it takes none of the process's own.
    """
    import numpy as np  # not above: `dmat --help` needs this module, and not numpy

    if not path.exists():
        raise missing(path)
    try:
        if not path.is_file():  # opening a FIFO would wait for a writer
            raise ValueError("not a file")
        with np.errstate(over="raise"):  # of the number of items
            array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # damaged or hostile bytes may raise any exception; none of them is a bug of dmat
        raise DmatError(
            f"{path} is incomplete or not an array ({type(error).__name__}: {first_line(error)}); delete its folder "
            f"and run its stage again, or `dvc checkout`"
        ) from None
    return array if mapped else np.array(array)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks of 1 MiB. Raises DmatError if the file is missing.

    While inode, size and times stay the same, a file is read once per process and a large file once per machine: inputs
    are hashed before and after the work, and at each start.
    """
    with reading(path) as file:
        state = os.fstat(file.fileno())
        if (cached := checksum_cache.recall(state)) is not None:
            return cached
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK_SIZE):
            digest.update(chunk)
    checksum_cache.remember(state, digest.hexdigest())
    return digest.hexdigest()


def checksum(path: Path) -> str:
    """SHA-256 of a file or folder.

    The checksum of a folder is that of its relative file names and their checksums; hidden files are left out. Raises
    DmatError if the path does not exist.
    """
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        raise missing(path)
    lines = [f"{digest}  {name}" for name, digest in checksums(path).items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Maps the relative name of every visible file below `folder` to its SHA-256; empty if there is no folder."""
    visible = visible_files(folder) if folder.is_dir() else []
    return {file.relative_to(folder).as_posix(): sha256(file) for file in visible}


def visible_files(folder: Path) -> list[Path]:
    """Every file below `folder` that is not hidden, sorted by the parts of its path.

    Follows links. Leaves out names that start with a dot (such as the .gitignore that DVC writes) and the extra entries
    of macOS archives. Raises DmatError for an entry that is neither a file nor a folder, and for a link to a folder
    that contains it.
    """
    return list(_walk(folder, frozenset()))


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is not data: it starts with a dot or is an extra entry of macOS."""
    return name.startswith((".", "__MACOSX"))


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Yields the visible files below `folder`. above: device and inode of every folder that contains `folder`."""
    try:
        status = folder.stat()
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if not hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise DmatError(
            f"{folder} cannot be listed ({error.strerror}); expected a folder that may be read; allow it or remove it"
        ) from None
    ancestors = above | {(status.st_dev, status.st_ino)}
    if ancestors == above:
        raise DmatError(f"{folder} is a link to a folder that holds it; expected no such loop; remove the link")
    for entry in visible:
        path = folder / entry.name  # unlike the entry, it answers for a link to itself too
        if path.is_dir():
            yield from _walk(path, ancestors)
        elif path.is_file():
            yield path
        elif os.path.lexists(entry.path):  # otherwise it was removed meanwhile
            raise DmatError(
                f"{entry.path} is neither a file nor a folder, or a link to nothing; expected files; restore or "
                f"remove it"
            )


def fingerprint(value: object) -> str:
    """Twelve hex digits that identify a JSON value."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def publish(source: Path, target: Path) -> None:
    """Makes `target` the same file or folder as `source` by hard links, or by copies across file systems.

    The folder appears by one rename. An existing target is moved aside first and removed last, so one of the two is on
    disk at any moment.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("new", "old"):  # of a process that was killed here; the result is still in its work folder
        for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.{suffix}"):
            _remove(leftover)
    staged = target.with_name(f".{target.name}.{os.getpid()}.new")
    if source.is_dir():
        for file in visible_files(source):
            copy = staged / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            link(file, copy)
    else:
        link(source, staged)
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(staged, target)
    sync_folder(target.parent)
    _remove(old)


def link(source: Path, target: Path) -> None:
    """Makes `target` a hard link to a file, or a copy across file systems. It appears by rename."""
    staged = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    staged.unlink(missing_ok=True)
    try:
        os.link(source, staged)
    except OSError:
        shutil.copy2(source, staged)
    os.replace(staged, target)
    staged.unlink(missing_ok=True)  # a rename between two names of one file leaves both


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
