"""Image sets in the formats of other projects: what comes out is what went in, bit for bit, or nothing comes out.

Oracles: numpy, pyarrow, Pillow, tarfile, dmat's own reader of image folders, and mlcroissant. Run alone:
pytest tests/test_image_exchange.py
"""

import functools
import hashlib
import io
import json
import os
import shutil
import tarfile

import mlcroissant
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dmat import files
from dmat.data import croissant, image_export, image_import, licences, set_inspection, shards, sources
from dmat.data.image_export import export
from dmat.data.image_import import import_released
from dmat.errors import DmatError
from tests.test_set_inspection import edit, flip, write_set

COUNT, NAMES = 18, ["cat", "dog", "owl"]
OLD_RDFLIB = pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated:DeprecationWarning")  # by mlcroissant


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("sets") / "sound")


@pytest.fixture(scope="module")
def arrays(sound):
    return shards.open_shards(sound).all()


@pytest.fixture
def small_blocks(monkeypatch):
    """Limits so small that 18 images fill several blocks, files and tars."""
    monkeypatch.setattr(image_export, "_BLOCK", 4)
    monkeypatch.setattr(image_export, "_PARQUET_BYTES", 2 * 4 * 60)
    monkeypatch.setattr(image_export, "_TAR_IMAGES", 8)


def pixels(content):
    image = np.asarray(Image.open(io.BytesIO(content)))
    return image if image.ndim == 3 else image[..., None]


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- export


def test_npz(sound, arrays, tmp_path):
    reports = []
    count = export(sound, tmp_path / "a.npz", "npz", "the card", progress=lambda *report: reports.append(report))
    assert count == COUNT
    assert reports == [(COUNT, COUNT)]
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert np.array_equal(archive["image"], arrays[0])
        assert np.array_equal(archive["label"], arrays[1])
        assert archive["class_names"].tolist() == NAMES
    assert names(tmp_path) == ["a.md", "a.npz"]
    assert (tmp_path / "a.md").read_text() == "the card"


@pytest.mark.usefixtures("small_blocks")
def test_parquet_as_datasets_writes_it(sound, arrays, tmp_path):
    export(sound, tmp_path / "out", "parquet", "the card")
    assert names(tmp_path / "out") == ["README.md", *(f"data/train-0000{k}-of-00003.parquet" for k in range(3))]
    tables = [pq.ParquetFile(path) for path in sorted((tmp_path / "out/data").iterdir())]
    assert [table.metadata.num_rows for table in tables] == [8, 8, 2]
    assert [table.metadata.row_group(0).num_rows for table in tables] == [4, 4, 2]
    schema = tables[0].schema_arrow
    assert str(schema.field("image").type) == "struct<bytes: binary, path: string>"
    assert str(schema.field("label").type) == "int64"
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": NAMES}}
    rows = [row for table in tables for row in table.read().to_pylist()]
    assert np.array_equal([pixels(row["image"]["bytes"]) for row in rows], arrays[0])
    assert np.array_equal([row["label"] for row in rows], arrays[1])
    assert [row["image"]["path"] for row in rows] == [f"{k:08d}.png" for k in range(COUNT)]


@pytest.mark.usefixtures("small_blocks")
def test_webdataset(sound, arrays, tmp_path):
    export(sound, tmp_path / "out", "webdataset", "the card")
    assert names(tmp_path / "out") == ["README.md", *(f"train-00000{k}.tar" for k in range(3))]
    members = []
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            members += [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    assert [member.name for member, _ in members] == [f"{k:08d}.{end}" for k in range(COUNT) for end in ("png", "cls")]
    assert np.array_equal([pixels(content) for _, content in members[::2]], arrays[0])
    assert np.array_equal([int(content) for _, content in members[1::2]], arrays[1])
    assert {(member.mtime, member.uid, member.uname, member.mode) for member, _ in members} == {(0, 0, "", 0o644)}


def test_folder_of_images(sound, arrays, tmp_path):
    export(sound, tmp_path / "out", "folder", "the card")
    images, labels = arrays
    expected = {f"{NAMES[labels[k]]}/{k:06d}.png": images[k] for k in range(COUNT)}
    assert names(tmp_path / "out") == sorted(["README.md", *expected])
    for name, image in expected.items():
        assert np.array_equal(pixels((tmp_path / "out" / name).read_bytes()), image)
    source = sources.folder(tmp_path / "out")  # sorted by class
    order = np.argsort(labels, kind="stable")
    assert source.class_names == tuple(NAMES)
    assert np.array_equal(source.images, images[order])
    assert np.array_equal(source.labels, labels[order])


@pytest.mark.parametrize("format_name", image_export.FORMATS)
def test_an_export_of_the_first_images_is_the_same_every_time(sound, tmp_path, format_name):
    for name in ("a.npz", "b.npz"):
        assert export(sound, tmp_path / name, format_name, "card", first=7) == 7
    assert files.checksum(tmp_path / "a.npz") == files.checksum(tmp_path / "b.npz")
    if format_name == "folder":
        assert len(names(tmp_path / "a.npz")) == 7 + 1


def test_grey_images_and_images_without_labels(tmp_path):
    grey = np.arange(6 * 3 * 2, dtype=np.uint8).reshape(6, 3, 2, 1)
    metadata = {"licence": "MIT", "unlabelled": True}
    shards.write_manifest(
        tmp_path / "set", [shards.write_shard(tmp_path / "set", 0, grey, np.full(6, -1))],
        shape=(3, 2, 1), class_names=["a", "b"], class_counts=[0, 0], metadata=metadata,
    )  # fmt: skip
    for format_name in image_export.FORMATS:
        export(tmp_path / "set", tmp_path / f"{format_name}.npz", format_name, "card")
    rows = pq.read_table(tmp_path / "parquet.npz/data").to_pylist()
    assert [row["label"] for row in rows] == [-1] * 6
    assert np.array_equal([pixels(row["image"]["bytes"]) for row in rows], grey)
    with tarfile.open(tmp_path / "webdataset.npz/train-000000.tar") as tar:
        assert [member.name for member in tar.getmembers()] == [f"{k:08d}.png" for k in range(6)]
    assert names(tmp_path / "folder.npz") == ["README.md", *(f"unlabelled/{k:06d}.png" for k in range(6))]
    import_released(tmp_path / "npz.npz", tmp_path / "again", 4)
    again = shards.open_shards(tmp_path / "again")
    assert not again.labelled
    assert again.manifest["class_names"] == ["a", "b"]
    assert np.array_equal(again.all()[0], grey)
    assert set_inspection.verify(tmp_path / "again").intact


@pytest.mark.parametrize("name", ["../out", "a/b", ".", "..", ".git", "a\nb", "x" * 200, "C:"])
def test_a_class_name_that_is_no_folder(name, sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "set")
    edit(folder, class_names=["cat", name, "owl"])
    export(folder, tmp_path / "below/out", "folder", "card")
    assert {path.parts[-2] for path in (tmp_path / "below").rglob("*.png")} == {"0", "1", "2"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "set"]


@pytest.mark.parametrize("format_name", image_export.FORMATS)
def test_an_export_appears_whole_or_not_at_all(sound, tmp_path, format_name, monkeypatch):
    def stop(images, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(sound, tmp_path / "a.npz", format_name, "card", progress=stop)
    assert names(tmp_path) in ([], ["a.md"])
    (tmp_path / "a.md").unlink(missing_ok=True)
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(DmatError, match=r"a\.npz exists; expected a new name"):
        export(sound, tmp_path / "a.npz", format_name, "card")
    assert names(tmp_path) == []


def test_damaged_sets_and_unknown_formats(sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "set")
    with pytest.raises(DmatError, match="--format is 'tfrecord'; expected one of npz, parquet, webdataset, folder"):
        export(folder, tmp_path / "out", "tfrecord", "card")
    flip(folder / "images-00002.npy")
    with pytest.raises(DmatError, match=r"images-00002\.npy has checksum"):
        export(folder, tmp_path / "out", "parquet", "card")
    assert not (tmp_path / "out").exists()


# --- import


@pytest.fixture
def archive(sound, tmp_path):
    export(sound, tmp_path / "released.npz", "npz", "card")
    return tmp_path / "released.npz"


@pytest.mark.parametrize("shard", [1, 5, 18, 50_000])
def test_an_import_is_the_set_again(archive, arrays, tmp_path, shard):
    reports = []
    import_released(archive, tmp_path / "set", shard, "CC BY 4.0", None, lambda *report: reports.append(report))
    assert reports[-1] == (COUNT, COUNT)
    assert len(reports) == -(-COUNT // shard)
    imported = shards.open_shards(tmp_path / "set")
    assert np.array_equal(imported.all()[0], arrays[0])
    assert np.array_equal(imported.all()[1], arrays[1])
    manifest = imported.manifest
    assert manifest["class_counts"] == np.bincount(arrays[1], minlength=3).tolist()
    assert (manifest["licence"], manifest["origin"]) == ("CC BY 4.0", "Imported from released.npz")
    assert manifest["class_names"] == NAMES
    assert set_inspection.verify(tmp_path / "set").intact
    assert sorted(path.name for path in tmp_path.iterdir()) == ["released.md", "released.npz", "set"]


def test_an_interrupted_import_keeps_its_shards(archive, arrays, tmp_path, monkeypatch):
    def stop(images, total):
        if images == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_released(archive, tmp_path / "set", 5, progress=stop)
    assert not (tmp_path / "set").exists()
    made = []
    write = image_import.ShardPool._write
    monkeypatch.setattr(image_import.ShardPool, "_write", lambda *args: made.append(args[1]) or write(*args))
    import_released(archive, tmp_path / "set", 5)
    assert made == ["00002", "00003"]
    assert np.array_equal(shards.open_shards(tmp_path / "set").all()[0], arrays[0])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_other_images_do_not_mix_with_an_interrupted_import(archive, arrays, tmp_path):
    """The same name and size, another content: the archive's own checksums tell them apart."""
    with pytest.raises(KeyboardInterrupt):
        import_released(archive, tmp_path / "set", 5, progress=_interrupt)
    np.savez(archive, image=255 - arrays[0], label=arrays[1], class_names=np.array(NAMES))
    import_released(archive, tmp_path / "set", 5)
    assert np.array_equal(shards.open_shards(tmp_path / "set").all()[0], 255 - arrays[0])


def _interrupt(images, total):
    raise KeyboardInterrupt


@pytest.mark.parametrize("killed", [False, True])
def test_a_repaired_archive_takes_no_shard_of_the_damaged_one(archive, arrays, tmp_path, killed):
    """Both say the same checksums of themselves, and the damage shows only where the archive ends."""
    good = archive.read_bytes()
    at = good.index(arrays[0][2].tobytes())
    archive.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    times = archive.stat().st_atime_ns, archive.stat().st_mtime_ns
    with pytest.raises(KeyboardInterrupt if killed else DmatError):
        import_released(archive, tmp_path / "set", 5, progress=_interrupt if killed else lambda images, total: None)
    archive.write_bytes(good)
    os.utime(archive, ns=(times[0], times[1] + killed))
    import_released(archive, tmp_path / "set", 5)
    assert np.array_equal(shards.open_shards(tmp_path / "set").all()[0], arrays[0])


def test_nothing_appears_of_a_damaged_archive(archive, tmp_path):
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\3\4", 10) - 1] ^= 1  # the last pixel
    archive.write_bytes(content)
    with pytest.raises(DmatError, match="image has CRC-32"):
        import_released(archive, tmp_path / "set", 5)
    assert not (tmp_path / "set").exists()


def test_class_names_of_another_set(sound, arrays, tmp_path):
    np.savez(tmp_path / "a.npz", image=arrays[0], label=arrays[1])  # as released: without names
    import_released(tmp_path / "a.npz", tmp_path / "bare", 50)
    assert shards.open_shards(tmp_path / "bare").manifest["class_names"] == ["0", "1", "2"]
    import_released(tmp_path / "a.npz", tmp_path / "named", 50, like=sound)
    named = shards.open_shards([sound, tmp_path / "named"])  # which compares shape and classes
    assert len(named) == 2 * COUNT
    np.savez(tmp_path / "b.npz", image=arrays[0], label=arrays[1], class_names=np.array(["dog", "cat", "owl"]))
    np.savez(tmp_path / "c.npz", image=arrays[0][:, :3], label=arrays[1])
    np.savez(tmp_path / "d.npz", image=arrays[0], label=arrays[1] + 1)
    for name, sentence in (
        ("b", r"names its classes dog, cat, owl.*expected cat, dog, owl"),
        ("c", r"holds images \[3, 5, 3\] of 3 classes; expected \[4, 5, 3\] of 3"),
        ("d", r"holds images \[4, 5, 3\] of 4 classes; expected \[4, 5, 3\] of 3"),
    ):
        with pytest.raises(DmatError, match=sentence):
            import_released(tmp_path / f"{name}.npz", tmp_path / "new", 50, like=sound)


def test_targets_and_shards_that_cannot_be(archive, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    with pytest.raises(DmatError, match="set exists; expected a name for a new folder"):
        import_released(archive, tmp_path / "set", 5)
    monkeypatch.setattr(image_import, "MAX_SHARD", 1000)
    with pytest.raises(DmatError, match="a shard of 17 images takes 1,020 bytes; expected at most 1,000"):
        import_released(archive, tmp_path / "new", 17)
    assert not (tmp_path / "new").exists()


# --- Croissant


@OLD_RDFLIB
def test_mlcroissant_accepts_the_description(sound, tmp_path, caplog):
    folder = shutil.copytree(sound, tmp_path / "set")
    assert croissant.write(folder, "three animals") == folder / "croissant.json"
    data_set = mlcroissant.Dataset(jsonld=str(folder / "croissant.json"))
    metadata = data_set.metadata
    assert not metadata.ctx.issues.errors
    recommended = {"citeAs", "datePublished", "version"}  # what nobody can derive from a set
    assert all(any(name in warning for name in recommended) for warning in metadata.ctx.issues.warnings)
    assert str(metadata.ctx.conforms_to.value) == "http://mlcommons.org/croissant/1.1"
    assert metadata.name == "three animals"
    assert metadata.license == ["https://spdx.org/licenses/CC-BY-4.0.html"]
    listed = {node.content_url: node for node in metadata.distribution if hasattr(node, "content_url")}
    on_disk = {path.name for path in folder.iterdir()} - {"croissant.json"}
    assert set(listed) == on_disk
    for name, node in listed.items():
        content = (folder / name).read_bytes()
        assert node.sha256 == hashlib.sha256(content).hexdigest()
        assert node.content_size == f"{len(content)} B"
    records = [(row["classes/label"], row["classes/name"]) for row in data_set.records("classes")]
    assert records == [*enumerate(NAMES)]
    fields = {field.id: field for record_set in metadata.record_sets for field in record_set.fields}
    assert fields["shards/image"].array_shape == "-1,4,5,3"
    assert fields["shards/label"].array_shape == "-1"


def test_the_description_is_deterministic_and_says_when_it_is_old(sound, tmp_path):
    contents = set()
    for place in ("here", "there"):
        folder = shutil.copytree(sound, tmp_path / place)
        contents.add(croissant.write(folder, "animals").read_bytes())
        assert croissant.is_current(folder)
    assert len(contents) == 1
    edit(folder, licence="MIT")
    assert not croissant.is_current(folder)
    (folder / "labels-00000.npy").unlink()
    with pytest.raises(DmatError, match=r"labels-00000\.npy does not exist"):
        croissant.write(folder, "animals")


@OLD_RDFLIB
def test_a_description_without_labels_and_with_a_generator(tmp_path):
    folder = write_set(tmp_path / "set", labels=np.full(18, -1), unlabelled=True, generator_sha256="ab" * 32,
                       sampler={"name": "heun"}, seed=3, licence="ask me")  # fmt: skip
    data_set = mlcroissant.Dataset(jsonld=str(croissant.write(folder, "generated")))
    assert not data_set.metadata.ctx.issues.errors
    assert data_set.metadata.license == ["ask me"]
    assert data_set.metadata.description == (
        "18 images of 4 x 5 pixels and 3 channels, without labels. Generated by the diffusion model with SHA-256 "
        "abababababab, sampler heun, seed 3."
    )


@pytest.mark.parametrize(
    ("licence", "identifier"),
    [
        ("CC BY 4.0", "CC-BY-4.0"),
        ("CC BY-NC-SA 4.0", "CC-BY-NC-SA-4.0"),
        ("apache-2.0", "Apache-2.0"),
        ("MIT", "MIT"),
        ("unknown", None),
        ("CC BY 4.0, with thanks", None),
        ("", None),
    ],
)
def test_licences(licence, identifier):
    assert licences.spdx(licence) == identifier


def test_writing_needs_no_more_space_than_the_set(archive, tmp_path, monkeypatch):
    """Shards are linked into the set, not copied."""
    links = []
    link = functools.partial(os.link)
    monkeypatch.setattr(os, "link", lambda *paths: links.append(paths) or link(*paths))
    import_released(archive, tmp_path / "set", 9)
    assert len(links) == 4
