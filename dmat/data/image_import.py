"""Released images (.npz) -> an image set on disk: shards, a manifest and a Croissant description.

Shards are written to a hidden folder beside the target, which appears by one rename when the whole source was read and
its checksums are right. Run again, an interrupted import keeps the shards that it finished.
"""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dmat import files
from dmat.data import croissant, shards
from dmat.data.npz_stream import ReleasedImages, open_released
from dmat.data.shard_pool import ShardPool
from dmat.data.shards import ARRAYS, ArrayName, SetMetadata, read_manifest
from dmat.errors import DmatError

MAX_SHARD = 2 << 30  # bytes of the images of a shard; two of them are in memory at a time


def import_released(
    source: Path,
    target: Path,
    shard: int,
    licence: str = "unknown",
    like: Path | None = None,
    progress: Callable[[int, int], object] = lambda images, total: None,
) -> ReleasedImages:
    """Imports an archive, or a folder of archives, as the set in the folder `target`.

    shard: images per shard. like: folder of a set with the same classes, whose names the classes get. progress: called
    with the number of images so far and of all. Returns what was read. Raises DmatError if the target exists, if the
    source is damaged, and if it does not fit `like`.
    """
    if os.path.lexists(target):
        raise DmatError(f"{target} exists; expected a name for a new folder; choose another, or move it away")
    with open_released(source) as released:
        size = shard * int(np.prod(released.shape))
        if size > MAX_SHARD:
            raise DmatError(
                f"a shard of {shard:,} images takes {size:,} bytes; expected at most {MAX_SHARD:,}; ask for fewer "
                f"images per shard"
            )
        names = class_names(released, source, like)
        metadata: SetMetadata = {"licence": licence, "origin": f"Imported from {source.name}"}
        if not released.labelled:
            metadata["unlabelled"] = True
        # An archive that was damaged and is repaired says the same checksums of itself, but it was written later.
        modified = [part.path.stat().st_mtime_ns for part in released.parts]
        identity = {"source": released.identity, "modified": modified, "shard": shard}
        work = target.with_name(f".{target.name}.import-{files.fingerprint(identity)}")
        pool, staged, entries, done = ShardPool(work / "shards", identity, tuple(ARRAYS)), work / "set", [], 0
        for number, (images, labels) in enumerate(_sound_blocks(released, shard, work)):
            arrays: dict[ArrayName, np.ndarray] = {"images": images, "labels": labels}
            record = pool.obtain(f"{number:05d}", len(labels), functools.partial(dict, arrays), lambda: None)
            entry = shards.entry(number, record)
            pool.link(record, {key: staged / entry[key] for key in ARRAYS})
            entries.append(entry)
            done += len(labels)
            progress(done, len(released))
        counts = np.zeros(len(names), dtype=np.int64)
        counts[: released.classes] = released.class_counts
        shards.write_manifest(
            staged,
            entries,
            shape=released.shape,
            class_names=names,
            class_counts=counts,
            metadata=metadata,
        )
        croissant.write(staged, target.name)
        os.replace(staged, target)
        files.sync_folder(target.parent)
        shutil.rmtree(work)
        return released


def _sound_blocks(released: ReleasedImages, size: int, work: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the blocks of an archive, images uint8 [B, H, W, C] and labels int64 [B] with B = `size`.

    The work folder is removed if the archive turns out to be damaged: its shards are wrong. Raises DmatError then.
    """
    try:
        yield from released.blocks(size)
    except DmatError:
        shutil.rmtree(work)
        raise


def class_names(released: ReleasedImages, source: Path, like: Path | None) -> tuple[str, ...]:
    """Names of the classes: those of the set in the folder `like`, else of the source.

    A source that does not name its classes may have fewer. Raises DmatError if images or classes of the two do not fit.
    """
    if like is None:
        return released.class_names
    manifest = read_manifest(like)
    if tuple(manifest["shape"]) != released.shape or len(manifest["class_names"]) < released.classes:
        raise DmatError(
            f"{source} holds images {list(released.shape)} of {released.classes} classes; expected "
            f"{manifest['shape']} of {len(manifest['class_names'])}, as in {like}; name a set of the same data"
        )
    names, own = tuple(manifest["class_names"]), released.parts[0].class_names
    if own not in (None, names):
        raise DmatError(
            f"{source} names its classes {', '.join(own[:3])}, ...; expected {', '.join(names[:3])}, ... as in {like}: "
            f"their labels may mean other classes; name a set of the same data, or none"
        )
    return names
