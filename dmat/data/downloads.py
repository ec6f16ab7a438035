"""Downloads published data sets with torchvision: its addresses, its checksums, its downloader.

torchvision's classes themselves would unpickle CIFAR; here only their tables are read.
"""

import dataclasses
import http.client
import tarfile
from pathlib import Path

from dmat.data import data_sets
from dmat.data.data_sets import DATA_SETS
from dmat.errors import DmatError, first_line


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file to download. urls: addresses of the same bytes, in the order in which they are tried. md5: hex digits."""

    urls: tuple[str, ...]
    name: str
    md5: str


def remote_files(name: str) -> list[RemoteFile]:
    """The files of a data set as torchvision lists them. Raises DmatError if it has none for this name."""
    if name not in DATA_SETS:
        raise DmatError(
            f"the data set is {name!r}; expected one of {', '.join(DATA_SETS)}; `dmat sources list` lists them"
        )
    data_set = DATA_SETS[name]
    if not data_set.layouts:
        raise DmatError(f"{name} needs no files: scikit-learn brings them; expected a data set that has files")
    if not data_set.torchvision:
        raise DmatError(
            f"torchvision does not download {data_set.title}; expected another way; {data_sets.where_to_put(name)}"
        )
    from torchvision import datasets  # type: ignore[import-untyped]  # 2 s to import: only where it is used

    kind = getattr(datasets, data_set.torchvision)
    if issubclass(kind, datasets.CIFAR10):
        return [RemoteFile((kind.url,), kind.filename, kind.tgz_md5)]
    if issubclass(kind, datasets.MNIST):
        return [RemoteFile(tuple(f"{site}{file}" for site in kind.mirrors), file, md5) for file, md5 in kind.resources]
    return [RemoteFile((url,), file, md5) for url, file, md5 in (kind.split_list[split] for split in ("train", "test"))]


def download(name: str, folder: Path) -> Path:
    """Downloads a data set into the sub-folder `name` of a folder and returns it; an existing one stays as it is.

    The sub-folder appears by one rename, complete, its archives unpacked. After a failure the same call resumes with
    the file that failed. Raises DmatError if a file cannot be downloaded or has another checksum.
    """
    remote, target = remote_files(name), folder / name
    if target.exists():
        return target
    partial = folder / f".{name}.partial"
    for file in remote:
        _fetch(name, file, partial)
    for path in [path for file in remote if tarfile.is_tarfile(path := partial / file.name)]:
        with tarfile.open(path) as archive:
            archive.extractall(partial, filter="data")
        path.unlink()
    partial.rename(target)
    return target


def _fetch(name: str, file: RemoteFile, folder: Path) -> None:
    """Downloads one file from the first address that gives it, unless it is there with the right checksum."""
    from torchvision.datasets.utils import download_url  # type: ignore[import-untyped]

    causes = []
    for url in file.urls:
        try:
            download_url(url, folder, file.name, file.md5)
            return
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: another checksum
            causes.append(f"{url}: {first_line(error, url)}")
    raise DmatError(
        f"{file.name} cannot be downloaded ({'; '.join(causes)}); expected its bytes with MD5 {file.md5}; "
        f"{data_sets.where_to_put(name)}, or try again"
    )
