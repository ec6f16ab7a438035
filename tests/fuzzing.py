"""Damaged and hostile files for every reader of dmat: each is read or refused in a sentence, in little time and memory.

`python -m tests.fuzzing --inputs 20000` writes a table; a short form is tests/test_fuzzing.py. The inputs follow from
the seed alone.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import struct
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors.torch
import torch
import yaml

from dmat import config, files
from dmat.data import mixes, mixtures, npz_stream, scores, selections, set_inspection, shards, sources
from dmat.diffusion.formulations import EDM
from dmat.diffusion.networks import DenoiserSpec
from dmat.errors import DmatError
from dmat.evaluation import progress, table, work
from dmat.models import denoisers, importing, loading, predicting, published_denoisers
from dmat.pipeline import work_folder
from dmat.robust.networks import NETWORKS, DataSpec
from dmat.tracking import open_runs, queries
from dmat.tracking.run_record import read_tracking
from dmat.training import checkpoints, weights
from dmat.workspace import Provenance
from tests import cifar_files

SECONDS = 5.0  # per input
MEMORY = 2 << 30  # bytes that an input may add to the address space of the process
ABSURD = (
    *(None, True, -1, 0, 10**6, 6_000_004, 10**18, 10**400, 1e308, -1.5),
    *("", "x" * 300, "../../x", "%?{}", [], {}, [[]]),
)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A way to read files. write: makes sound ones in a folder. damaged: pattern of those that are damaged."""

    write: Callable[[Path], object]
    read: Callable[[Path], object]
    damaged: str


class Hang(BaseException):
    """An input took too long; no reader catches it."""


def _images(count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 8, 8, 3] and labels int64 [N] of three classes."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), np.arange(count) % 3


def _write_shards(folder: Path) -> None:
    shards.write_set(folder, *_images(), class_names=list("abc"), metadata={"licence": "CC0", "seed": 1})


def _write_npz(folder: Path) -> None:
    images, labels = _images()
    np.savez_compressed(folder / "a.npz", image=images, label=labels, class_names=np.array(["a", "b", "c"]))


def _write_selection(folder: Path) -> None:
    _write_shards(folder / "artifacts/generate_images/set")
    record = {
        "image_set": "set", "shape": [8, 8, 3], "classes": 3, "pool": 12, "kept": 4,
        "manifest_sha256": files.sha256(folder / "artifacts/generate_images/set" / shards.MANIFEST),
    }  # fmt: skip
    selections.write_selection(folder / "selected", np.arange(4), record)
    own = {**record, "path": "selected", **selections.checksums(folder / "selected", record)}
    mix = {"generated_images": 4, "batch": 4, "generated_share": 0.5, "generated_sampling": "without_replacement",
           "copies": 1, "reshuffle_steps": 0, "images_seen": 8, "selection": own}  # fmt: skip
    files.write_json(folder / "mix.json", mix)
    mixture = {"shape": [8, 8, 3], "classes": 3, "kept": 4, "rotate": "none", "shares": {"own": 1.0},
               "selections": {"own": own}}  # fmt: skip
    files.write_json(folder / "mixture.json", mixture)


def _read_mix(folder: Path) -> None:
    real = shards.open_shards(folder / "artifacts/generate_images/set")
    mix, generated = mixes.open_mix(folder, real, folder)
    assert mix.steps(8) > 0
    assert generated is None or len(generated)
    mixtures.read_mixture(folder)


def _write_scores(folder: Path) -> None:
    _write_shards(folder / "set")
    (entry,) = shards.open_shards(folder / "set").manifest["shards"]
    name = scores.score_file(entry)
    np.save(folder / name, np.ones((12, 3), np.float32))
    record = {"file": name, "count": 12, "sha256": files.sha256(folder / name)}
    files.write_json(folder / shards.MANIFEST, {"shards": [record]})


def _write_checkpoint(folder: Path) -> None:
    header = {"images_seen": 8, "precision": "fp32", "threads": 1}
    checkpoints.save(folder / "checkpoint.dmat", header, {"a": torch.zeros(3), "b": [1, {"c": "d"}]})


def _network() -> torch.nn.Module:
    return NETWORKS["wide_resnet"](DataSpec(10, 3, (0.5,) * 3, (0.25,) * 3), 10, 1, "silu")


def _write_classifier(folder: Path) -> None:
    sidecar = {
        "kind": "classifier", "network": {"name": "wide_resnet", "depth": 10, "width": 1, "activation": "silu"},
        "classes": 10, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3, "image_shape": [32, 32, 3],
        "class_names": [str(k) for k in range(10)], "threat": {"norm": "linf", "epsilon": "8/255"},
    }  # fmt: skip
    weights.save(folder / "a.safetensors", _network().state_dict(), sidecar)


def _write_foreign(folder: Path) -> None:
    safetensors.torch.save_file(_network().state_dict(), folder / "a.safetensors")
    torch.save({"model_state_dict": _network().state_dict()}, folder / "a.pt")
    arguments = {"data": "cifar10", "model": "wrn-10-1-swish", "tau": 0.995, "beta": 5}
    (folder / "args.txt").write_text(json.dumps(arguments))


def _import(folder: Path) -> None:
    for name, args in (("a.safetensors", None), ("a.pt", folder / "args.txt")):
        importing.import_model(folder / name, args, data=None if args else "cifar10", target=folder / "out.safetensors")
        shutil.rmtree(folder / "out.safetensors", ignore_errors=True)
        for path in folder.glob("out.*"):
            path.unlink()


def _write_denoiser(folder: Path) -> None:

    network = config.denoiser_network({"name": "unet", "channels": 8, "multipliers": [1], "blocks": 1, "dropout": 0.0})
    model = denoisers.new_denoiser(network, DenoiserSpec(8, 8, 3, 3, 0), EDM(0.5), seed=0)
    sidecar = {
        "kind": "denoiser", "network": network.plain(), "image_shape": [8, 8, 3], "label_dim": 3, "augment_dim": 0,
        "formulation": "edm", "sigma_data": 0.5, "sigma_range": [0.0, None], "class_names": ["a", "b", "c"],
        "training": {"images_seen": 8},
    }  # fmt: skip
    weights.save(folder / "a.safetensors", model.state_dict(), sidecar)


def _write_snapshot(folder: Path) -> None:
    from tests import edm_files, test_published_denoisers

    arguments, make = test_published_denoisers.PUBLISHED["ddpmpp"]
    edm_files.write(folder / "m.pkl", make(), arguments)


def _write_folder(folder: Path) -> None:
    from tests import test_diffusers_folders  # it imports diffusers, which takes seconds

    test_diffusers_folders.save(folder / "m")


def _write_table(folder: Path) -> None:
    columns = {"clean": np.arange(9) % 2 == 0, "label": np.arange(9), "broken_by": np.array(["apgd"] * 9)}
    table.write_table(folder / table.PER_IMAGE, columns)


def _task(folder: Path) -> work.ShardTask:
    columns = {"auto_attack": np.arange(4) % 2 == 0, "index": np.arange(4)}
    return work.ShardTask(folder / "shard-0", 4, 8, {"weights": "a"}, lambda report: columns, suite=True)


def _read_task(folder: Path) -> None:
    monitor = work.Monitor([_task(folder)])
    monitor.estimate()
    if _task(folder).done:
        _task(folder).read()
    progress.read(folder / "shard-0")


def _write_records(folder: Path) -> None:
    provenance = {
        "stage": "mix_images", "instance": "a", "fingerprint": "f" * 12, "code": "c", "settings": {}, "seconds": 1.0,
        "inputs": {"train": {"path": "artifacts/x", "sha256": "0" * 64}}, "measured": {}, "outputs": {"a": "b"},
        "compute": {"device": "cpu", "precision": "fp32", "precision_reason": "", "threads": 1, "processes": 1,
                    "torch": "2"},
        "mlflow_run": None, "mlflow_parent": None, "work": "runs/x", "finished": "now", "host_cores": 2,
    }  # fmt: skip
    files.write_json(folder / "provenance.json", provenance)
    record = {"metrics": {"a": 1.0}, "notes": [], "code": "c", "files": {}, "provenance": provenance}
    work_folder.write_finished(folder, record)
    files.write_json(folder / "tracking.json", {"run": "a", "seconds": 1.0, "store": "embedded"})
    open_runs.write(folder, folder / "runs" / "x", os.getpid())


def _read_records(folder: Path) -> None:
    work_folder.read_finished(folder)
    work_folder.holder(folder)
    open_runs.read(folder)
    open_runs.damaged(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_tracking(folder)
    files.read_record(folder / "provenance.json", Provenance)


def _write_database(folder: Path) -> None:
    (folder / "mlruns").mkdir()
    with contextlib.closing(sqlite3.connect(folder / "mlruns/mlflow.db")) as database:
        for statement in (
            "create table experiments (experiment_id int, name text)",
            "create table runs (run_uuid text, name text, status text, start_time int, end_time int, experiment_id int,"
            " lifecycle_stage text)",
            *(f"create table {name} (run_uuid text, key text, value text)" for name in ("tags", "params")),
            "create table latest_metrics (run_uuid text, key text, value real)",
            "insert into experiments values (1, 'dmat')",
            "insert into runs values ('a', 'b', 'FINISHED', 1, 2, 1, 'active')",
            "insert into tags values ('a', 'dmat.stage', 'x')",
            "insert into latest_metrics values ('a', 'm', 0.5)",
        ):
            database.execute(statement)
        database.commit()


def _read_database(folder: Path) -> None:
    """Reads it as `dmat runs` does, without MLflow, which is asked where the tables are others."""
    with mock.patch.object(queries, "_from_mlflow", side_effect=DmatError("MLflow is asked")):
        queries.recent(folder)


def _write_params(folder: Path) -> None:
    shutil.copy(Path(__file__).parent.parent / "params.yaml", folder)


FOLDER = "folder of diffusers"
READERS = {
    "shards": Reader(_write_shards, lambda f: (set_inspection.verify(f), shards.open_shards(f).all()), "*"),
    "npz as a source": Reader(_write_npz, lambda f: sources.load("npz", f / "a.npz"), "*.npz"),
    "npz as a stream": Reader(_write_npz, lambda f: _stream(f / "a.npz"), "*.npz"),
    "unverified shards": Reader(_write_shards, lambda f: shards.open_shards(f, verify=False).all(), "*"),
    "selection": Reader(_write_selection, _read_mix, "**/*.*"),
    "mix": Reader(_write_selection, _read_mix, "mi*.json"),
    "scores": Reader(_write_scores, lambda f: scores.read_scores(f, shards.open_shards(f / "set"), "margin"), "*.*"),
    "checkpoint": Reader(_write_checkpoint, lambda f: checkpoints.load(f / "checkpoint.dmat"), "*"),
    "classifier": Reader(_write_classifier, lambda f: (loading.kind(f / "a.safetensors"),
                                                       loading.open_classifier(f / "a.safetensors")), "*"),
    "sidecar": Reader(_write_classifier, lambda f: loading.describe(f / "a.safetensors"), "*.json"),
    "denoiser": Reader(_write_denoiser, lambda f: denoisers.describe(f / "a.safetensors"), "*.json"),
    "import": Reader(_write_foreign, _import, "*"),
    "snapshot of EDM": Reader(_write_snapshot, lambda f: published_denoisers.read(f / "m.pkl"), "*.pkl"),
    FOLDER: Reader(_write_folder, lambda f: published_denoisers.read(f / "m"), "m/**/*.*"),
    "table": Reader(_write_table, lambda f: table.read_table(f / table.PER_IMAGE), "*"),
    "evaluated shard": Reader(lambda f: _task(f).compute(), _read_task, "*"),
    "records": Reader(_write_records, _read_records, "**/*.json"),
    "MLflow's database": Reader(_write_database, _read_database, "**/*.db"),
    "params.yaml": Reader(_write_params, lambda f: config.load(f / "params.yaml"), "*.yaml"),
    "cifar": Reader(lambda f: cifar_files.write(f / "c", train=50, test=10), lambda f: sources.load("cifar10", f / "c"),
                    "c/*"),
    "array": Reader(lambda f: np.save(f / "a.npy", np.zeros((3, 2))), lambda f: (
        files.load_array(f / "a.npy"), predicting._open_array(f / "a.npy", "images")), "*"),
}  # fmt: skip


def _stream(path: Path) -> None:
    with npz_stream.open_released(path) as released:
        for _ in released.blocks(5):
            pass


def damage(path: Path, generator: np.random.Generator) -> str:
    """Damages a file in one of many ways. Returns which."""
    kinds: list[Callable[[Path, np.random.Generator], None]] = [_cut, _flip, _insert, _empty, _other_kind, _number]
    if path.suffix in (".json", ".txt", ".dmat"):
        kinds += [_values] * 6 + [_top]
    if path.suffix == ".npz":
        kinds += [_member] * 6
    if path.suffix == ".npy":
        kinds += [_header] * 3
    if path.suffix == ".yaml":
        kinds += [_values] * 3
    if path.suffix == ".safetensors":
        kinds += [_tensor_header] * 3
    if path.suffix == ".db":
        kinds += [_rows] * 3
    kind = kinds[generator.integers(len(kinds))]
    kind(path, generator)
    return kind.__name__.removeprefix("_")


def _cut(path: Path, generator: np.random.Generator) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: generator.integers(len(content) + 1)])


def _flip(path: Path, generator: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(generator.integers(1, 8)):
        edge = min(len(content), 512)  # headers and lists of members are at the ends
        position = generator.integers(edge) * generator.choice([-1, 1]) - (generator.random() < 0.5)
        if content:
            content[int(position) % len(content)] = generator.integers(256)
    path.write_bytes(content)


def _insert(path: Path, generator: np.random.Generator) -> None:
    content = path.read_bytes()
    position = int(generator.integers(len(content) + 1))
    path.write_bytes(content[:position] + generator.bytes(int(generator.integers(1, 64))) + content[position:])


def _number(path: Path, generator: np.random.Generator) -> None:
    """Four or eight bytes near an end become a large or odd number."""
    content = bytearray(path.read_bytes())
    numbers = (("<I", 0xFFFFFFFF), ("<I", 0x7FFFFFFF), (">I", 10**9), ("<Q", 1 << 62), ("<q", -1))
    form, value = numbers[generator.integers(len(numbers))]
    size = struct.calcsize(form)
    if len(content) > size:
        start = int(generator.integers(min(256, len(content) - size)))
        start = start if generator.random() < 0.5 else len(content) - size - start
        struct.pack_into(form, content, start, value)
    path.write_bytes(content)


def _empty(path: Path, generator: np.random.Generator) -> None:
    path.write_bytes(b"")


def _other_kind(path: Path, generator: np.random.Generator) -> None:
    """A folder, a FIFO, a link to itself, a link to nothing, another file of the set, or nothing."""
    others = [other for other in sorted(path.parent.iterdir()) if other.is_file()]
    other = others[generator.integers(len(others))].read_bytes()
    path.unlink()
    match generator.integers(6):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(path.name)
        case 3:
            path.symlink_to("nowhere")
        case 4:
            path.write_bytes(other)


def _top(path: Path, generator: np.random.Generator) -> None:
    """JSON that is a list, null, a number, text, or nested deeply."""
    depth = int(generator.integers(40, 100_000))
    deep = "[" * depth + "]" * depth, '{"a":' * 500 + "1" + "}" * 500
    texts = ("[]", "null", "1", '"x"', "{}", *deep, "1e999", "NaN", '{"a": 1, "a": 2}', "9" * 5000, "\ufeff{}")
    rest = path.read_bytes().partition(b"\n")[2] if path.suffix == ".dmat" else b""
    path.write_bytes(texts[generator.integers(len(texts))].encode() + b"\n" + rest)


def _values(path: Path, generator: np.random.Generator) -> None:
    """A value of the file, at any depth, becomes absurd or is removed."""
    head, newline, rest = path.read_bytes(), b"", b""
    if path.suffix == ".dmat":  # a line of JSON before the state
        head, newline, rest = head.partition(b"\n")
    value = yaml.safe_load(head) if path.suffix == ".yaml" else json.loads(head)
    for _ in range(generator.integers(1, 3)):
        _change(value, generator)
    if path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    else:
        path.write_bytes(json.dumps(value).encode() + newline + rest)


def _change(value: object, generator: np.random.Generator) -> None:
    places = list(_places(value))
    if not places:
        return
    container, key = places[generator.integers(len(places))]
    if generator.random() < 0.2:
        del container[key]
    else:
        container[key] = copy.deepcopy(ABSURD[generator.integers(len(ABSURD))])


def _places(value: object) -> Iterator[tuple[dict | list, object]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in entries:
        yield value, key
        yield from _places(child)


def _npy(generator: np.random.Generator) -> bytes:
    """The bytes of an array whose header says something absurd, or of none."""
    types = ("|u1", "<i8", "<f4", "|O", "<U3", "|V4", "|b1", "<M8[s]", "<c16", "<U100000000")
    shapes = ((10**12, 8, 8, 3), (True, 8, 8, 3), (-1,), (), (0,), (12,), (12, 8, 8, 3), (1 << 62, 1 << 62), (2,) * 40)
    file = io.BytesIO()
    header = {"descr": types[generator.integers(len(types))], "fortran_order": bool(generator.integers(2)),
              "shape": shapes[generator.integers(len(shapes))]}  # fmt: skip
    text = repr(header) if generator.random() < 0.9 else "[" * 3000
    file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n")
    file.write(generator.bytes(int(generator.choice([0, 8, 96, 2304]))))
    return file.getvalue()


def _header(path: Path, generator: np.random.Generator) -> None:
    path.write_bytes(_npy(generator))


def _member(path: Path, generator: np.random.Generator) -> None:
    """A member of an archive becomes another array, text, encrypted, doubled, or is packed otherwise."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = sorted(members)[generator.integers(len(members))]
    members[name] = _npy(generator) if generator.random() < 0.8 else b"hello"
    method = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)[generator.choice(3, p=[0.6, 0.3, 0.1])]
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        warnings.simplefilter("ignore")
        for key, content in members.items():
            archive.writestr(key, content)
        if generator.random() < 0.1:
            archive.writestr(name, members[name])
    if generator.random() < 0.1:  # the flag of encryption, in both headers
        content = bytearray(path.read_bytes())
        content[6] |= 1
        content[content.index(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(content)


def _tensor_header(path: Path, generator: np.random.Generator) -> None:
    """The JSON header of a .safetensors file has an absurd value, or length."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    _change(header, generator)
    text = json.dumps(header).encode()
    length = len(text) if generator.random() < 0.8 else int(generator.choice([0, 1 << 40, (1 << 63) - 1]))
    path.write_bytes(struct.pack("<Q", length) + text + content[8 + len(text) :])


def _rows(path: Path, generator: np.random.Generator) -> None:
    """A table of the database has other values, or is missing."""
    statements = (
        "update runs set start_time = null", "update runs set start_time = 'x'", "update runs set status = null",
        "drop table tags", "update latest_metrics set value = 'nan'", "update latest_metrics set value = null",
        "update tags set key = null", "update runs set end_time = 1e300", "update tags set value = x'ff00'",
        "delete from experiments",
    )  # fmt: skip
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(statements[generator.integers(len(statements))])
        database.commit()


@contextlib.contextmanager
def _bounds() -> Iterator[None]:
    """Inside the block an input that takes too long, or too much memory, raises."""

    def stop(number: int, frame: object) -> None:
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclasses.dataclass
class Tally:
    """What became of the inputs of a reader. failures: one text per input that was neither read nor refused."""

    read: int = 0
    refused: int = 0
    slowest: float = 0.0  # seconds
    failures: list[str] = dataclasses.field(default_factory=list)


def fuzz(name: str, inputs: int, seed: int, folder: Path) -> Tally:
    """Gives `inputs` damaged files to a reader, in a folder of its own."""
    reader, tally = READERS[name], Tally()
    generator = np.random.default_rng([seed, *name.encode()])
    sound = folder / "sound"
    sound.mkdir(parents=True)
    reader.write(sound)
    targets = [path.relative_to(sound) for path in sorted(sound.glob(reader.damaged)) if path.is_file()]
    assert targets
    shutil.copytree(sound, folder / "first")
    reader.read(folder / "first")  # sound files are read
    for number in range(inputs):
        copied = folder / f"{number}"
        shutil.copytree(sound, copied)
        target = targets[generator.integers(len(targets))]
        kind = damage(copied / target, generator)
        started = time.monotonic()
        try:
            with _bounds():
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                reader.read(copied)
            tally.read += 1
        except DmatError as error:
            tally.refused += 1
            if re.search(r"Traceback|MemoryError|^\s*$", str(error)) or len(str(error)) > 3000:
                tally.failures.append(f"{name}, input {number}, {target} {kind}: the message is {str(error)[:300]!r}")
        except (Exception, Hang) as error:
            place = "".join(traceback.format_tb(error.__traceback__)[-3:])
            tally.failures.append(f"{name}, input {number}, {target} {kind}: {type(error).__name__}: {error}\n{place}")
        tally.slowest = max(tally.slowest, time.monotonic() - started)
        shutil.rmtree(copied)
    return tally


def main() -> None:
    """Fuzzes every reader and writes a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reader", action="append", choices=READERS, help="these alone, each with its part of inputs")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    each = -(-options.inputs // len(READERS))
    lines = ["| reader | inputs | read | refused in a sentence | failures | slowest, s |", "|---|---|---|---|---|---|"]
    failures = []
    names = options.reader or list(READERS)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            tally = fuzz(name, each, options.seed, Path(folder))
        failures += tally.failures
        cells = (name, each, tally.read, tally.refused, len(tally.failures), f"{tally.slowest:.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
        print(lines[-1], *tally.failures[:3], sep="\n", flush=True)
    text = (
        f"{each * len(names):,} damaged or hostile inputs, seed {options.seed}: {len(failures)} failures. An input "
        f"fails if it takes more than {SECONDS:.0f} s or {MEMORY >> 30} GiB, or ends in another exception than "
        f"DmatError. Made by `make fuzz`.\n\n" + "\n".join(lines) + "\n"
    )
    if options.out:
        options.out.write_text(text)
    print(text)
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
