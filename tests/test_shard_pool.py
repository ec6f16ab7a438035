"""Pools of shards: made once, by one process at a time, for sets of any size.

Run alone: pytest tests/test_shard_pool.py
"""

import json
import threading

import filelock
import numpy as np
import pytest

from dmat import files
from dmat.data.shard_pool import ShardPool


def _pool(folder, **more):
    return ShardPool(folder / "pool", {"seed": 1}, ("images", "labels"), **more)


def _arrays(shard, rows=4):
    """What a shard of this name holds: known, so that a mixed-up one is seen."""
    start = int(shard[:5]) * rows
    return {"images": np.arange(start, start + rows, dtype=np.uint8), "labels": np.arange(start, start + rows)}


def _obtain(pool, shard, made=None, rows=4):
    def make():
        if made is not None:
            made.append(shard)
        return _arrays(shard, rows)

    return pool.obtain(shard, rows, make, lambda: None)


def _link(pool, record, folder):
    targets = {array: folder / record[array] for array in ("images", "labels")}
    pool.link(record, targets)
    return {array: np.load(path) for array, path in targets.items()}


def test_a_shard_is_made_once_and_a_set_is_hard_links(tmp_path):
    made = []
    for name in ("small", "large"):
        pool = _pool(tmp_path)
        for shard in ("00000", "00001") if name == "small" else ("00000", "00001", "00002"):
            found = _link(pool, _obtain(pool, shard, made), tmp_path / name)
            assert np.array_equal(found["images"], _arrays(shard)["images"])
    assert made == ["00000", "00001", "00002"]
    assert pool.counts == {"made": 1, "pooled": 2, "copied": 0}
    names = {f"{array}-{shard}.npy" for array in ("images", "labels") for shard in ("00000", "00001")}
    _link(_pool(tmp_path), _obtain(_pool(tmp_path), "00000"), tmp_path / "small")  # again: nothing is left beside it
    assert {path.name for path in (tmp_path / "small").iterdir()} == names
    for path in (tmp_path / "small").iterdir():
        assert path.samefile(tmp_path / "large" / path.name)
        assert path.stat().st_mode & 0o222 == 0, "DVC's cache holds the same file: nobody writes into it"
    assert json.loads((tmp_path / "pool/identity.json").read_text()) == {"seed": 1}


def test_a_shard_made_anew_takes_no_set_its_file(tmp_path):
    """By rename: what a set has by hard link stays as it was."""
    pool = _pool(tmp_path)
    _link(pool, _obtain(pool, "00000"), tmp_path / "set")
    old = (tmp_path / "set/images-00000.npy").stat().st_ino
    again, made = _pool(tmp_path, fresh=True), []
    record = _obtain(again, "00000", made)
    assert made == ["00000"]
    assert (tmp_path / "set/images-00000.npy").stat().st_ino == old
    again.link(record, {"images": tmp_path / "set/images-00000.npy"})
    assert (tmp_path / "set/images-00000.npy").stat().st_ino != old


def test_shards_of_two_lengths_do_not_mix(tmp_path):
    pool, made = _pool(tmp_path), []
    _obtain(pool, "00000-3", made, rows=3)
    _obtain(pool, "00000", made)
    assert _obtain(pool, "00000-3", made, rows=3)["count"] == 3
    assert made == ["00000-3", "00000"]


def test_many_at_once_make_each_shard_once(tmp_path):
    made, shards = [], [f"{k:05d}" for k in range(6)]
    start = threading.Barrier(4)

    def work(pool):
        start.wait()
        for shard in shards:
            _obtain(pool, shard, made)

    threads = [threading.Thread(target=work, args=(_pool(tmp_path),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == shards


def test_who_waits_for_a_shard_can_be_stopped(tmp_path):
    pool, looks = _pool(tmp_path), []

    def pause():
        looks.append(1)
        if len(looks) == 3:
            raise KeyboardInterrupt

    with filelock.FileLock(tmp_path / "pool/00000.lock"), pytest.raises(KeyboardInterrupt):
        pool.obtain("00000", 4, lambda: _arrays("00000"), pause)


@pytest.mark.parametrize("harm", ["none", "altered", "missing", "half"])
def test_shards_come_from_copies_that_are_whole(tmp_path, harm):
    pool = _pool(tmp_path)
    record = _obtain(pool, "00001")
    _link(pool, record, tmp_path / "cache")
    copies = {key: (tmp_path / "cache" / record[key], record[f"{key}_sha256"]) for key in ("images", "labels")}
    path = tmp_path / "cache/images-00001.npy"
    if harm == "altered":
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[:-1] + b"x")
    elif harm == "missing":
        path.unlink()
    elif harm == "half":
        copies.pop("labels")
    clone, made = ShardPool(tmp_path / "clone", {}, ("images", "labels")), []
    clone.offer("00001", copies)
    again = _obtain(clone, "00001", made)
    assert again == record
    assert made == ([] if harm == "none" else ["00001"])
    assert clone.counts["copied"] == (harm == "none")
    assert files.sha256(clone.folder / again["images"]) == record["images_sha256"]
    if harm == "none":
        assert (clone.folder / again["images"]).samefile(path), "a hard link, no second copy"


@pytest.mark.parametrize("array", ["images", "labels"])
@pytest.mark.parametrize("harm", ["altered", "missing"])
def test_a_damaged_shard_is_made_again_alone(tmp_path, capsys, array, harm):
    pool = _pool(tmp_path)
    before = {shard: _obtain(pool, shard) for shard in ("00000", "00001")}
    path = pool.folder / before["00001"][array]
    content = path.read_bytes()
    path.unlink()
    if harm == "altered":
        path.write_bytes(content[:-1] + b"x")
    made = []
    assert {shard: _obtain(_pool(tmp_path), shard, made) for shard in before} == before
    assert made == ["00001"]
    assert path.read_bytes() == content
    assert "it is made again" in capsys.readouterr().err
