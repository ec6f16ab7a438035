"""DVC's cache read without DVC: which image sets of a pool it holds. Run alone: pytest tests/test_dvc_cache.py"""

import hashlib
import json

import pytest
import yaml

from dmat.data import dvc_cache


@pytest.fixture
def project(tmp_path):
    """A project whose cache has a set of pool `a` and one of pool `b`, of two files each, as DVC lays them out."""
    stages = {}
    for name, pool in (("one", "a"), ("two", "b")):
        inside = {"manifest.json": json.dumps({"set": name}), "images-00000.npy": f"images of {name}"}
        listing = [{"md5": _add(tmp_path, text), "relpath": path} for path, text in inside.items()]
        outs = [
            {"path": f"artifacts/generate_images/{name}", "md5": _add(tmp_path, json.dumps(listing), ".dir")},
            {
                "path": f"artifacts/provenance/generate_images/{name}.json",
                "md5": _add(tmp_path, f'{{"pools": ["{pool}"]}}'),
            },
        ]
        stages[f"generate_images@{name}"] = {"cmd": "x", "outs": outs}
    stages["score_images@one"] = stages["generate_images@one"]
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    return tmp_path


def _add(root, text, end=""):
    md5 = hashlib.md5(text.encode()).hexdigest()
    path = root / ".dvc/cache/files/md5" / md5[:2] / f"{md5[2:]}{end}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return f"{md5}{end}"


def _sets(project, pool):
    return [manifest["set"] for manifest, _ in dvc_cache.sets_of_pool(project, "generate_images", pool)]


def test_sets_of_a_pool_are_found_by_their_provenance(project):
    assert _sets(project, "a") == ["one"]
    assert _sets(project, "b") == ["two"]
    assert _sets(project, "c") == []
    ((_, files),) = dvc_cache.sets_of_pool(project, "generate_images", "a")
    assert {name: path.read_text() for name, path in files.items()}["images-00000.npy"] == "images of one"


def test_a_project_without_dvc_has_no_sets(tmp_path):
    assert _sets(tmp_path, "a") == []
    (tmp_path / "dvc.lock").write_text("<<<<<<< HEAD\n: {")
    assert _sets(tmp_path, "a") == []


def test_the_cache_may_be_elsewhere(project, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("cache") / "dvc"
    (project / ".dvc/cache").rename(elsewhere)
    assert _sets(project, "a") == []
    (project / ".dvc/config.local").write_text(f"[cache]\n    dir = {elsewhere}\n")
    assert _sets(project, "a") == ["one"]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'"x"', b"\xff{", None], ids=["empty", "list", "text", "bytes", "gone"]
)
@pytest.mark.parametrize("kind", ["list of files", "manifest", "provenance"])
def test_damaged_or_missing_sets_are_left_out(project, kind, content):
    """The stage then computes the shards; the other set stays."""
    objects = project / ".dvc/cache/files/md5"
    texts = {path: path.read_text() for path in objects.rglob("*") if path.is_file()}
    marker = {"list of files": "relpath", "manifest": '{"set": "one"}', "provenance": '{"pools": ["a"]}'}[kind]
    (path,) = [path for path, text in texts.items() if marker in text and (kind != "list of files" or _lists_one(text))]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert _sets(project, "a") == []
    assert _sets(project, "b") == ["two"]


def _lists_one(text):
    return hashlib.md5(b"images of one").hexdigest() in text
