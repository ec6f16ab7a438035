"""`dmat sources`: the table, and downloads with torchvision's addresses and checksums; nothing here uses a network.

Oracle: torchvision's own download_url, which compares checksums; only its connection is replaced. Run alone:
pytest tests/test_downloads.py
"""

import hashlib
import http.client
import io
import json
import sys
import tarfile
import urllib.error

import numpy as np
import pytest
from torchvision import datasets
from torchvision.datasets import utils

from cli.main import main
from dmat.data import downloads, sources
from dmat.data.data_sets import DATA_SETS
from dmat.errors import DmatError
from tests import cifar_files, test_formats


def _dmat(monkeypatch, capsys, *arguments):
    """Exit code, stdout and stderr of a command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["dmat", "sources", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    captured = capsys.readouterr()
    return exit_info.value.code, captured.out, captured.err


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder that is the current one."""
    folder = tmp_path / "project"
    (folder / "sources").mkdir(parents=True)
    (folder / "params.yaml").touch()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def network(monkeypatch):
    """Replaces the network: a dictionary address -> bytes. torchvision still compares checksums."""
    contents, requested = {}, []

    def retrieve(url, path, *_):
        requested.append(url)
        if url not in contents:
            raise urllib.error.URLError("no network in tests")
        if isinstance(contents[url], Exception):
            raise contents[url]
        with open(path, "wb") as file:
            file.write(contents[url])

    monkeypatch.setattr(utils, "_urlretrieve", retrieve)
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, max_hops: url)
    contents["requested"] = requested
    return contents


def _md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _archive(folder):
    """The bytes of a .tar.gz of a folder."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.add(folder, folder.name)
    return file.getvalue()


def _serve_cifar10(tmp_path, network, monkeypatch):
    """Puts a small CIFAR-10 on the network; returns its training and test pair."""
    pairs = cifar_files.write(tmp_path / "made/cifar-10-batches-py")
    content = _archive(tmp_path / "made/cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", _md5(content))
    network[datasets.CIFAR10.url] = content
    return pairs


def test_what_is_downloaded_are_the_files_that_the_readers_expect():
    for name, data_set in DATA_SETS.items():
        if data_set.torchvision:
            names = {file.name.removesuffix(".gz") for file in downloads.remote_files(name)}
            archives = {"cifar10": {"cifar-10-python.tar"}, "cifar100": {"cifar-100-python.tar"}}
            assert names == archives.get(name, set(data_set.layouts[0]))
            for file in downloads.remote_files(name):
                assert len(bytes.fromhex(file.md5)) == 16
                assert all(url.startswith("http") and url.endswith(file.name) for url in file.urls)
    assert sum(bool(data_set.torchvision) for data_set in DATA_SETS.values()) == 5


def test_cifar_is_downloaded_unpacked_and_read(tmp_path, project, network, monkeypatch, capsys):
    train, test = _serve_cifar10(tmp_path, network, monkeypatch)
    code, out, _ = _dmat(monkeypatch, capsys, "download", "cifar10")
    assert (code, out) == (
        0,
        "sources/cifar10 is complete; params.yaml names it by prepare_data: {source: cifar10, path: cifar10}\n",
    )
    source = sources.load("cifar10", project / "sources/cifar10")
    assert np.array_equal(source.images, train[0])
    assert np.array_equal(source.test[1], test[1])
    assert [path.name for path in (project / "sources").iterdir()] == ["cifar10"]
    code, out, _ = _dmat(monkeypatch, capsys, "download", "cifar10")
    assert (code, len(network["requested"])) == (0, 1)
    assert out.startswith("sources/cifar10 exists already and stays as it is; move it away to download again;")


def test_files_that_arrived_are_not_downloaded_again_and_mirrors_are_tried(tmp_path, project, network, monkeypatch):
    test_formats.write_idx(tmp_path / "made")
    names = [file for file, _ in datasets.FashionMNIST.resources]
    contents = {name: (tmp_path / "made" / name.removesuffix(".gz")).read_bytes() for name in names}
    monkeypatch.setattr(datasets.FashionMNIST, "resources", [(name, _md5(contents[name])) for name in names])
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", ["http://a/", "http://b/"])
    network |= {f"http://{'b' if name == names[0] else 'a'}/{name}": contents[name] for name in names[:3]}
    network["http://a/" + names[3]], network["http://b/" + names[3]] = b"<html>", http.client.IncompleteRead(b"")
    with pytest.raises(DmatError) as refused:
        downloads.download("fashion_mnist", project / "sources")
    assert str(refused.value).startswith(
        f"{names[3]} cannot be downloaded (http://a/{names[3]}: File not found or corrupted.; http://b/{names[3]}: "
        f"IncompleteRead(0 bytes read)); expected its bytes with MD5 {_md5(contents[names[3]])}; put train-images-"
    )
    assert not (project / "sources/fashion_mnist").exists()
    network["http://a/" + names[3]] = contents[names[3]]
    network["requested"].clear()
    folder = downloads.download("fashion_mnist", project / "sources")
    assert network["requested"] == ["http://a/" + names[3]]
    assert len(sources.load("fashion_mnist", folder).labels) == 20


def test_an_archive_cannot_write_outside_its_folder(tmp_path, project, network, monkeypatch):
    """Its checksum would have to be that of torchvision; the folder is safe even then."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../evil"))
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", _md5(file.getvalue()))
    network[datasets.CIFAR10.url] = file.getvalue()
    with pytest.raises(tarfile.TarError):
        downloads.download("cifar10", project / "sources")
    assert not (project / "sources/evil").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar100", "cifar-100-python.tar.gz cannot be downloaded (https://www.cs.toronto.edu/~kriz/cifar-100-python."
         "tar.gz: <urlopen error no network in tests>); expected its bytes with MD5 eb9058c3a382ffc7106e4002c42a8d85; "
         "put cifar-100-python or cifar-100-binary, from https://www.cs.toronto.edu/~kriz/cifar.html, into "
         "sources/cifar100, or try again"),
        ("tinyimagenet", "torchvision does not download TinyImageNet; expected another way; put tiny-imagenet-200 or "
         "train.npz and val.npz, from http://cs231n.stanford.edu/tiny-imagenet-200.zip, into sources/tinyimagenet"),
        ("digits", "digits needs no files: scikit-learn brings them; expected a data set that has files"),
        ("imagenet", "the data set is 'imagenet'; expected one of digits, cifar10, "),
    ],
)  # fmt: skip
def test_what_cannot_be_downloaded_is_refused_with_what_to_put_where(
    project, network, monkeypatch, capsys, name, message
):
    code, out, err = _dmat(monkeypatch, capsys, "download", name)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")


def test_the_list_shows_every_data_set(monkeypatch, capsys):
    code, out, _ = _dmat(monkeypatch, capsys, "list")
    head, *rows = out.splitlines()
    assert code == 0
    assert [row.split()[0] for row in rows] == list(DATA_SETS)
    columns = {name: head.index(name) for name in ("threat", "augmentation", "licence")}
    cifar100 = next(row for row in rows if row.startswith("cifar100"))
    assert cifar100[columns["threat"] : columns["augmentation"]].strip() == "linf 8/255"
    assert cifar100[columns["augmentation"] : columns["licence"]].strip() == "crop4_flip_rotate15"
    _, out, _ = _dmat(monkeypatch, capsys, "list", "--json")
    assert json.loads(out)["svhn"]["layouts"] == [["train_32x32.mat", "test_32x32.mat"]]
