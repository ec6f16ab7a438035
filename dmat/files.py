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
    """Hex SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(_READ_SIZE):
                digest.update(piece)
    except FileNotFoundError:
        raise DmatError(f"{path} does not exist; run the stage that makes it, or `dvc repro`") from None
    return digest.hexdigest()


def checksum(path: Path) -> str:
    """SHA-256 of a file; of a folder: of its relative names and their checksums, hidden files left out."""
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        raise DmatError(f"{path} does not exist; run the stage that makes it, or `dvc repro`")
    lines = [f"{sha256(file)}  {file.relative_to(path).as_posix()}" for file in visible_files(path)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def visible_files(folder: Path) -> list[Path]:
    """Every file below `folder` in sorted order, except hidden ones such as the .gitignore that DVC writes."""
    found = (file for file in folder.rglob("*") if file.is_file())
    return sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts))


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
            _link(file, copy)
    else:
        _link(source, staged)
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(staged, target)
    sync_folder(target.parent)
    _remove(old)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
