"""Files that appear whole or not at all, and checksums of files and folders.

Refuses to delete anything: what is replaced is replaced by rename.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dmat import checksum_cache
from dmat.errors import DmatError

if TYPE_CHECKING:
    import numpy as np

_READ_SIZE = 1 << 20


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DmatError(
            f"{path}: could not be written ({error.strerror}); free or unlock the folder and run the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with writing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Sorted keys and a final newline, so equal values are equal files. NaN is refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises DmatError if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DmatError(f"{path} does not exist; run the stage that makes it, or `dvc repro`") from None
    except ValueError as error:
        raise DmatError(f"{path} is not valid JSON ({error}); delete it and run its stage again") from None


def read_record(path: Path, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """A JSON object with a value of the given kind under each key. Raises DmatError if the file is anything else."""
    record = read_json(path)
    if not isinstance(record, dict):
        raise DmatError(f"{path} holds {type(record).__name__}; expected an object; delete it and run its stage again")
    wrong = [key for key, kind in kinds.items() if key not in record or not isinstance(record[key], kind)]
    if wrong:
        raise DmatError(
            f"{path} lacks {', '.join(wrong)}, or has something else there; expected what its stage wrote; run its "
            f"stage again, or `dvc checkout`"
        )
    return record


def load_array(path: Path) -> "np.ndarray":
    """A whole .npy file. Raises DmatError if it is missing or cut."""
    import numpy as np  # not above: `dmat --help` needs this module, and not numpy

    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DmatError(f"{path} does not exist; run the stage that makes it, or `dvc repro`") from None
    except (ValueError, EOFError) as error:
        raise DmatError(
            f"{path} is not a whole array ({error}); delete its folder and run its stage again, or `dvc checkout`"
        ) from None
    return array


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces of 1 MiB.

    A file is read once in a process, a large one once on a machine, as long as inode, size and times stay: inputs are
    hashed before and after the work, and at each start.
    """
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            if (known := checksum_cache.recall(state)) is not None:
                return known
            digest = hashlib.sha256()
            while piece := file.read(_READ_SIZE):
                digest.update(piece)
    except FileNotFoundError:
        raise DmatError(f"{path} does not exist; run the stage that makes it, or `dvc repro`") from None
    checksum_cache.remember(state, digest.hexdigest())
    return digest.hexdigest()


def checksum(path: Path) -> str:
    """SHA-256 of a file; of a folder: of its relative names and their checksums, hidden files left out."""
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        raise DmatError(f"{path} does not exist; run the stage that makes it, or `dvc repro`")
    lines = [f"{digest}  {name}" for name, digest in checksums(path).items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of every visible file below `folder`; empty where there is no folder."""
    found = visible_files(folder) if folder.is_dir() else []
    return {file.relative_to(folder).as_posix(): sha256(file) for file in found}


def visible_files(folder: Path) -> list[Path]:
    """Every file below `folder` that is not hidden, in the order of the parts of its path.

    Follows links. Leaves out names that start with a dot (such as the .gitignore that DVC writes) and what archives of
    macOS add. Raises DmatError for what is neither a file nor a folder, and for a folder inside itself.
    """
    return list(_walk(folder, frozenset()))


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is nobody's data."""
    return name.startswith((".", "__MACOSX"))


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """above: device and inode of every folder around `folder`."""
    try:
        own = folder.stat()
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if not hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise DmatError(
            f"{folder} cannot be listed ({error.strerror}); expected a folder that may be read; allow it or remove it"
        ) from None
    inside = above | {(own.st_dev, own.st_ino)}
    if inside == above:
        raise DmatError(f"{folder} is a link to a folder that holds it; expected folders that end; remove the link")
    for entry in visible:
        if entry.is_dir():
            yield from _walk(folder / entry.name, inside)
        elif entry.is_file():
            yield folder / entry.name
        elif os.path.lexists(entry.path):  # else it went away while we looked
            raise DmatError(
                f"{entry.path} is neither a file nor a folder, or a link to nothing; expected files; restore or "
                f"remove it"
            )


def fingerprint(value: Any) -> str:
    """Twelve hex digits that name a JSON value."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def publish(source: Path, target: Path) -> None:
    """Makes `target` the same file or folder as `source` by hard links, copies across file systems.

    The folder appears by one rename. A target that is there already is moved aside first and removed last, so
    that no moment exists in which neither is on disk.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}.new")
    _remove(staged)
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
    """Makes `target` a hard link to a file, by rename; a copy across file systems."""
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
