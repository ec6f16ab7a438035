"""Pools of shards: each generated once, by one process at a time, for sets of any size.

Run alone: pytest tests/test_shard_pool.py
"""

import json
import threading

import filelock
import numpy as np
import pytest

from dmat import files
from dmat.data.shard_pool import ShardPool


def _pool(folder, **options):
    return ShardPool(folder / "pool", {"seed": 1}, ("images", "labels"), **options)


def _arrays(shard, rows=4):
    """Content of the shard with this name, which differs from other shards so that a mix-up is noticed."""
    start = int(shard[:5]) * rows
    return {"images": np.arange(start, start + rows, dtype=np.uint8), "labels": np.arange(start, start + rows)}


def _obtain(pool, shard, generated=None, rows=4):
    def make():
        if generated is not None:
            generated.append(shard)
        return _arrays(shard, rows)

    return pool.obtain(shard, rows, make, lambda: None)


def _link(pool, record, folder):
    targets = {array: folder / record[array] for array in ("images", "labels")}
    pool.link(record, targets)
    return {array: np.load(path) for array, path in targets.items()}


def test_a_shard_is_generated_once_and_sets_are_hard_links(tmp_path):
    generated = []
    for name in ("small", "large"):
        pool = _pool(tmp_path)
        for shard in ("00000", "00001") if name == "small" else ("00000", "00001", "00002"):
            arrays = _link(pool, _obtain(pool, shard, generated), tmp_path / name)
            assert np.array_equal(arrays["images"], _arrays(shard)["images"])
    assert generated == ["00000", "00001", "00002"]
    assert pool.counts == {"made": 1, "pooled": 2, "copied": 0}
    names = {f"{array}-{shard}.npy" for array in ("images", "labels") for shard in ("00000", "00001")}
    _link(_pool(tmp_path), _obtain(_pool(tmp_path), "00000"), tmp_path / "small")  # again: no other file is left
    assert {path.name for path in (tmp_path / "small").iterdir()} == names
    for path in (tmp_path / "small").iterdir():
        assert path.samefile(tmp_path / "large" / path.name)
        assert path.stat().st_mode & 0o222 == 0, "DVC's cache holds the same file: nobody writes into it"
    assert json.loads((tmp_path / "pool/identity.json").read_text()) == {"seed": 1}


def test_a_regenerated_shard_leaves_existing_sets_their_files(tmp_path):
    """A shard is replaced by rename, so the hard links of a set keep the old file."""
    pool = _pool(tmp_path)
    _link(pool, _obtain(pool, "00000"), tmp_path / "set")
    old = (tmp_path / "set/images-00000.npy").stat().st_ino
    fresh_pool, generated = _pool(tmp_path, fresh=True), []
    record = _obtain(fresh_pool, "00000", generated)
    assert generated == ["00000"]
    assert (tmp_path / "set/images-00000.npy").stat().st_ino == old
    fresh_pool.link(record, {"images": tmp_path / "set/images-00000.npy"})
    assert (tmp_path / "set/images-00000.npy").stat().st_ino != old


def test_shards_of_two_lengths_do_not_mix(tmp_path):
    pool, generated = _pool(tmp_path), []
    _obtain(pool, "00000-3", generated, rows=3)
    _obtain(pool, "00000", generated)
    assert _obtain(pool, "00000-3", generated, rows=3)["count"] == 3
    assert generated == ["00000-3", "00000"]


def test_concurrent_pools_generate_each_shard_once(tmp_path):
    generated, shards = [], [f"{k:05d}" for k in range(6)]
    start = threading.Barrier(4)

    def work(pool):
        start.wait()
        for shard in shards:
            _obtain(pool, shard, generated)

    threads = [threading.Thread(target=work, args=(_pool(tmp_path),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(generated) == shards


def test_waiting_for_a_shard_can_be_interrupted(tmp_path):
    pool, pauses = _pool(tmp_path), []

    def pause():
        pauses.append(1)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    with filelock.FileLock(tmp_path / "pool/00000.lock"), pytest.raises(KeyboardInterrupt):
        pool.obtain("00000", 4, lambda: _arrays("00000"), pause)


@pytest.mark.parametrize("harm", ["none", "altered", "missing", "half"])
def test_shards_are_taken_only_from_intact_copies(tmp_path, harm):
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
    clone, generated = ShardPool(tmp_path / "clone", {}, ("images", "labels")), []
    clone.offer("00001", copies)
    obtained = _obtain(clone, "00001", generated)
    assert obtained == record
    assert generated == ([] if harm == "none" else ["00001"])
    assert clone.counts["copied"] == (harm == "none")
    assert files.sha256(clone.folder / obtained["images"]) == record["images_sha256"]
    if harm == "none":
        assert (clone.folder / obtained["images"]).samefile(path), "a hard link, no second copy"


@pytest.mark.parametrize("array", ["images", "labels"])
@pytest.mark.parametrize("harm", ["altered", "missing"])
def test_only_a_damaged_shard_is_generated_again(tmp_path, capsys, array, harm):
    pool = _pool(tmp_path)
    before = {shard: _obtain(pool, shard) for shard in ("00000", "00001")}
    path = pool.folder / before["00001"][array]
    content = path.read_bytes()
    path.unlink()
    if harm == "altered":
        path.write_bytes(content[:-1] + b"x")
    generated = []
    assert {shard: _obtain(_pool(tmp_path), shard, generated) for shard in before} == before
    assert generated == ["00001"]
    assert path.read_bytes() == content
    assert "the shard is computed again" in capsys.readouterr().err
