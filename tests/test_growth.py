"""A set of images that grows, through DVC: in place and in a fresh clone.

Run alone: pytest tests/test_growth.py
"""


import numpy as np
import pytest

from dmat.data import shards
from tests.conftest import ROOT
from tests.test_pipeline import Clone, Project

pytestmark = pytest.mark.timeout(2000)  # several `dvc repro` on a machine that is busy with other work


def _shard_counts(project, stage_name):
    """Number of shards of an instance that were computed, taken from the pool and taken from DVC's cache."""
    measured = project.json(f"artifacts/provenance/{stage_name}/more.json")["measured"]
    return [int(measured[f"shards_{source}"]) for source in ("made", "pooled", "copied")]


def _inodes(folder):
    return {path.name: path.stat().st_ino for path in sorted(folder.glob("images-*.npy"))}


def test_a_larger_image_set_computes_only_new_shards_in_place_and_in_a_clone(tiny_params, tmp_path):
    """Shards of 50: with a set of 100, one of 150 computes one more; in a clone after `dvc pull` 200 computes one."""
    project = Project(tmp_path / "project", ROOT, tiny_params)
    project.run("dvc", "repro", "score_images@edm18")
    project.params["image_sets"]["more"] = {"generator": "edm", "source": "none", "images": 150}
    project.write()
    project.run("dvc", "repro", "score_images@more")
    assert _shard_counts(project, "generate_images") == _shard_counts(project, "score_images") == [1, 2, 0]
    edm18_inodes = _inodes(project.folder / "artifacts/generate_images/edm18")
    more = project.folder / "artifacts/generate_images/more"
    assert _inodes(more).items() >= edm18_inodes.items()
    objects = project.folder / ".dvc/cache/files/md5"
    cache_inodes = {path.stat().st_ino for path in objects.rglob("*") if path.is_file()}
    assert set(_inodes(more).values()) <= cache_inodes, "each file is stored once: pool, set and DVC's cache link it"

    project.params["image_sets"]["more"]["images"] = 170
    project.write()
    project.run("dvc", "repro", "score_images@more")
    assert _shard_counts(project, "generate_images") == _shard_counts(project, "score_images") == [1, 3, 0]
    project.run("dvc", "remote", "add", "-f", "-d", "here", str(tmp_path / "remote"))
    project.run("dvc", "push", "-q")
    project.commit("more images")
    clone = Clone(tmp_path / "clone", project)
    clone.run("dvc", "pull", "-q", "--allow-missing")  # most stages never ran
    clone.params["image_sets"]["more"] = {"generator": "edm", "source": "none", "images": 200}
    clone.write()
    clone.run("dvc", "repro", "score_images@more")
    assert _shard_counts(clone, "generate_images") == [1, 0, 3]
    assert _shard_counts(clone, "score_images") == [1, 0, 3]
    grown = shards.open_shards(clone.folder / "artifacts/generate_images/more").all()
    before = shards.open_shards(more).all()
    assert all(np.array_equal(new[:170], old) for new, old in zip(grown, before, strict=True))
    objects = len([path for path in (tmp_path / "remote").rglob("*") if path.is_file()])
    clone.run("dvc", "push", "-q", "artifacts/generate_images/more")
    pushed = len([path for path in (tmp_path / "remote").rglob("*") if path.is_file()]) - objects
    assert pushed <= 4, "two new files, their listing and the manifest"
