"""A set of images that grows, through DVC: in place and in a fresh clone.

Run alone: pytest tests/test_growth.py
"""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from dmat.data import shards
from tests.conftest import ROOT
from tests.test_pipeline import Project

pytestmark = pytest.mark.timeout(2000)  # several `dvc repro` on a machine that is busy with other work


class Clone(Project):
    """A `git clone` of a project."""

    def __init__(self, folder: Path, of: Project):
        subprocess.run(["git", "clone", "-q", of.folder, folder], check=True)
        self.folder, self.params = folder, yaml.safe_load((folder / "params.yaml").read_text())


def _made(project, word):
    """How many shards of an instance were made, taken from the pool and from DVC's cache."""
    measured = project.json(f"artifacts/provenance/{word}/more.json")["measured"]
    return [int(measured[f"shards_{how}"]) for how in ("made", "pooled", "copied")]


def _inodes(folder):
    return {path.name: path.stat().st_ino for path in sorted(folder.glob("images-*.npy"))}


def test_an_image_set_grows_by_what_is_new_in_place_and_in_a_clone(tiny_params, tmp_path):
    """Shards of 50: a set of 100 is there; one of 150 makes one more, and in a clone after `dvc pull` 200 makes one."""
    project = Project(tmp_path / "project", ROOT, tiny_params)
    project.run("dvc", "repro", "score_images@edm18")
    project.params["image_sets"]["more"] = {"generator": "edm", "images": 150}
    project.write()
    project.run("dvc", "repro", "score_images@more")
    assert _made(project, "generate_images") == _made(project, "score_images") == [1, 2, 0]
    small = _inodes(project.folder / "artifacts/generate_images/edm18")
    more = project.folder / "artifacts/generate_images/more"
    assert _inodes(more).items() >= small.items()
    objects = project.folder / ".dvc/cache/files/md5"
    kept = {path.stat().st_ino for path in objects.rglob("*") if path.is_file()}
    assert set(_inodes(more).values()) <= kept, "no byte twice: pool, set and DVC's cache have one file"

    project.params["image_sets"]["more"]["images"] = 170
    project.write()
    project.run("dvc", "repro", "score_images@more")
    assert _made(project, "generate_images") == _made(project, "score_images") == [1, 3, 0]
    project.run("dvc", "remote", "add", "-f", "-d", "here", str(tmp_path / "remote"))
    project.run("dvc", "push", "-q")
    project.commit("more images")
    clone = Clone(tmp_path / "clone", project)
    clone.run("dvc", "pull", "-q", "--allow-missing")  # the study of tune/dvc.yaml never ran
    clone.params["image_sets"]["more"] = {"generator": "edm", "images": 200}
    clone.write()
    clone.run("dvc", "repro", "score_images@more")
    assert _made(clone, "generate_images") == [1, 0, 3]
    assert _made(clone, "score_images") == [1, 0, 3]
    grown = shards.open_shards(clone.folder / "artifacts/generate_images/more").all()
    before = shards.open_shards(more).all()
    assert all(np.array_equal(new[:170], old) for new, old in zip(grown, before, strict=True))
    objects = len([path for path in (tmp_path / "remote").rglob("*") if path.is_file()])
    clone.run("dvc", "push", "-q", "artifacts/generate_images/more")
    pushed = len([path for path in (tmp_path / "remote").rglob("*") if path.is_file()]) - objects
    assert pushed <= 4, "two new files, their listing and the manifest"
