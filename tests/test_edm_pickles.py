"""Pickles of diffusion models as the official code writes them: read whole, and nothing in them ever runs."""

import io
import mmap
import pickle
import struct
import sys
import zipfile

import pytest
import torch
from torch import nn

from dmat.diffusion.edm_networks import DhariwalUNet, SongUNet
from dmat.models import edm_pickles, torch_files
from tests import edm_files
from tests.edm_files import SOURCE

NETWORKS = {
    "ddpmpp": lambda: SongUNet(8, 3, 10, 9, 16, (1, 2), 1, (4,)),
    "ncsnpp": lambda: SongUNet(
        8, 3, 10, 9, 16, (1, 2), 1, (4,), embedding="fourier", encoder="residual", taps=(1, 3, 3, 1)
    ),
    "adm": lambda: DhariwalUNet(8, 3, 10, 9, 64, (1, 2), 1, (4,)),
}
ARGUMENTS = {"img_resolution": 8, "img_channels": 3, "label_dim": 10, "model_type": "SongUNet", "sigma_data": 0.5}


def write(path, network, protocol=4, positional=False, key="ema"):
    """A snapshot with ARGUMENTS. positional: the first two by position."""
    keywords = {name: value for name, value in ARGUMENTS.items() if not positional or not name.startswith("img_")}
    edm_files.write(path, network, keywords, protocol, (8, 3) if positional else (), key)

@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_back_whole(tmp_path, monkeypatch, name, protocol):
    monkeypatch.chdir(tmp_path)
    network = NETWORKS[name]()
    write(tmp_path / "network.pkl", network, protocol)
    read = edm_pickles.read(tmp_path / "network.pkl")
    assert (read.class_name, read.arguments) == ("EDMPrecond", ARGUMENTS)
    expected = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    assert read.state.keys() == expected.keys()
    assert all(torch.equal(read.state[name], tensor) for name, tensor in expected.items())
    assert not (tmp_path / "executed").exists()


def test_arguments_by_position_get_their_names(tmp_path):
    write(tmp_path / "network.pkl", NETWORKS["ddpmpp"](), positional=True)
    assert edm_pickles.read(tmp_path / "network.pkl").arguments == ARGUMENTS


@pytest.mark.parametrize("key", ["ema", "net", "model"])
def test_the_network_of_a_snapshot_and_the_names_that_were_not_used(tmp_path, key):
    write(tmp_path / "network.pkl", NETWORKS["ddpmpp"](), key=key)
    read = edm_pickles.read(tmp_path / "network.pkl")
    assert read.class_name == "EDMPrecond"
    assert read.other_names == ["dnnlib.util.EasyDict", "torch.nn.modules.container.ModuleDict"]


# --- nothing runs


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


COMMAND = "touch executed"
SHELL = b"cos\nsystem\n"
CALL = b"(" + _text(COMMAND) + b"t"  # a tuple with the command
SNAPSHOT = b"\x80\x02}" + _text("ema")  # {"ema": <what follows>}
END = b"s."
NAMES = ("os.system", "posix.system", "subprocess.call", "builtins.exec", "builtins.eval", "builtins.__import__",
         "importlib.import_module", "runpy.run_path", "pickle.loads", "torch.load", "torch.serialization.load",
         "torch.storage.UntypedStorage", "numpy.load", "shutil.rmtree", "code.interact", "pty.spawn")  # fmt: skip


def _named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


MODULE = b"ctorch.nn\nModule\n)\x81}"  # an object of this class and the beginning of its state
RECONSTRUCT = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n("


def _description(kind: str) -> bytes:
    """What the official function is called with, without the state."""
    entries = _text("type") + _text(kind) + _text("module_src") + _text(SOURCE)
    return RECONSTRUCT + b"}(" + entries + b"utR"


def _storage(content: bytes) -> bytes:
    """A call of `_load_from_bytes` with these bytes."""
    return b"ctorch.storage\n_load_from_bytes\n(B" + struct.pack("<I", len(content)) + content + b"tR"


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", SHELL + CALL + b"R.")
    return stream.getvalue()


def _shared_modules() -> bytes:
    """Modules of which each holds the next one ten times, 30 levels deep: 10^30 paths."""
    make = MODULE + _text("_modules") + b"}"
    program = b"ctorch.nn\nModule\n)\x81q\x00"
    for level in range(30):
        entries = b"".join(_text(f"m{k}") + b"h" + bytes([level]) for k in range(10))
        program += make + b"(" + entries + b"us" + b"bq" + bytes([level + 1])
    return b"\x80\x02" + program + b"."


HOSTILE = {
    **{f"reduce {name}": SNAPSHOT + _named(name) + CALL + b"R" + END for name in NAMES},
    "reduce, stack global": b"\x80\x04}" + _text("ema") + _text("os") + _text("system") + b"\x93" + CALL + b"R" + END,
    "newobj": SNAPSHOT + SHELL + CALL + b"\x81" + END,
    "newobj_ex": b"\x80\x04}" + _text("ema") + SHELL + CALL + b"}\x92" + END,
    "inst": SNAPSHOT + b"(" + _text(COMMAND) + b"ios\nsystem\n" + END,
    "obj": SNAPSHOT + b"(" + SHELL + _text(COMMAND) + b"o" + END,
    "build with a state": SNAPSHOT + SHELL + CALL + b"R}" + _text("__setstate__") + SHELL + b"sb" + END,
    "build of a name": SNAPSHOT + SHELL + CALL + b"b" + END,
    "extension 1": SNAPSHOT + b"\x82\x01" + END,
    "extension 2": SNAPSHOT + b"\x83\x01\x00" + END,
    "extension 4": SNAPSHOT + b"\x84\x01\x00\x00\x00" + END,
    "persistent identity as text": SNAPSHOT + b"Pos.system\n" + END,
    "persistent identity": SNAPSHOT + SHELL + b"Q" + END,
    "persistent identity of a storage":
        SNAPSHOT + b"(" + _text("storage") + SHELL + _text("0") + _text("cpu") + b"K\x01tQ" + END,
    "key of a dictionary": b"\x80\x02}" + SHELL + CALL + b"RK\x01s.",
    "inside a storage": SNAPSHOT + _storage(SHELL + CALL + b"R.") + END,
    "inside a storage, torch's zip": SNAPSHOT + _storage(_zip()) + END,
    "inside a storage in a storage": SNAPSHOT + _storage(b"\x80\x02" + _storage(SHELL + CALL + b"R.") + b".") + END,
    "inside the state": SNAPSHOT + MODULE + _text("_parameters") + b"}" + _text("w") + SHELL + CALL + b"Rssb" + END,
    "inside the arguments": SNAPSHOT + MODULE + _text("_init_args") + b"}" + _text("a") + SHELL + CALL + b"Rssb" + END,
    "the official function on a call": SNAPSHOT + RECONSTRUCT + SHELL + CALL + b"RtR" + END,
    "the official function on a module": SNAPSHOT + _description("module") + END,
    "the official function with source alone": SNAPSHOT + _description("class") + END,
    "a tensor of a number":
        SNAPSHOT + b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00(J\xff\xff\xff\x7ft(K\x00ttR" + END,
    "modules shared on 10^30 paths": _shared_modules(),
    "no network": b"\x80\x02}.",
    "a text": b"\x80\x02" + _text("ema") + b".",
    "nothing": b"\x80\x02N.",
    "cut": SNAPSHOT + SHELL,
    "empty stack": b"\x80\x02R.",
    "a memo that is not there": b"\x80\x02h\x07.",
    "10,000 tuples in each other": b"\x80\x02)" + b"\x85" * 10_000 + b".",
}  # fmt: skip


# What Python's own reader does with them can be seen by an audit hook: names that are resolved, and what runs.
EVENTS = {"pickle.find_class", "import", "exec", "compile"}
EVENTS |= {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"}
_events: list[str] | None = None


def _record_event(event: str, arguments: tuple) -> None:
    if _events is not None and (event in EVENTS or event.startswith(("shutil.", "os.remove", "os.rename"))):
        _events.append(event)


sys.addaudithook(_record_event)  # a hook cannot be taken away again, so it listens only inside `recorded`


def recorded(action) -> tuple[object, Exception | None, list[str]]:
    """Result or exception of an action, and the events in it that would show code running."""
    global _events
    _events, result, error = [], None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    events, _events = _events, None
    return result, error, events


RUNS_ELSEWHERE = [name for name in HOSTILE if name.split(",")[0].startswith(("reduce ", "newobj", "inst", "build"))]


@pytest.mark.parametrize("name", ["reduce os.system", "reduce builtins.eval", "reduce pickle.loads", "inst", "newobj"])
def test_the_audit_hook_hears_what_a_pickle_runs(tmp_path, monkeypatch, name):
    """With Python's own reader, which only here reads a file that is meant to do harm (it creates an empty file)."""
    monkeypatch.chdir(tmp_path)
    assert "pickle.find_class" in recorded(lambda: pickle.loads(HOSTILE[name]))[2]


def test_there_are_enough_hostile_files():
    assert len(HOSTILE) >= 30
    assert len(RUNS_ELSEWHERE) >= 16


# Why a file is refused, where it is not one of the many ways to be no network.
REASONS = {
    "the official function on a call": "a persistent object that is not of a class",
    "the official function on a module": "a persistent object that is not of a class",
    "the official function with source alone": "a persistent object without class_name and state",
    "inside the state": "w is not a tensor",
    "inside a storage": "a pickle that torch.save did not write",
    "persistent identity as text": "it holds the instruction PERSID",
    "extension 1": "it holds the instruction EXT1",
    "modules shared on 10^30 paths": "is a module that appeared before",
    "no network": "it holds no network",
    "a text": "it holds no network",
    "nothing": "it holds no network",
    "empty stack": "it takes more from its stack than the stack holds",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "network.pkl"
    path.write_bytes(HOSTILE[name])
    network, error, events = recorded(lambda: edm_pickles.read(path))
    assert events == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["network.pkl"]
    assert network is None or not network.state
    if name in REASONS:
        assert isinstance(error, ValueError)
        assert REASONS[name] in str(error)


def test_a_tensor_cannot_claim_more_than_the_file_has(tmp_path):
    """A view that repeats one number a million times."""
    network = nn.Linear(1, 1)
    network.weight = nn.Parameter(torch.zeros(1).expand(1000, 1000))
    write(tmp_path / "network.pkl", network)
    with pytest.raises(ValueError, match="its tensors claim more bytes than it has"):
        edm_pickles.read(tmp_path / "network.pkl")


@pytest.mark.parametrize("encoded", [False, True], ids=["bytes", "protocol 2"])
def test_bytes_that_are_repeated_are_not_copied_again_and_again(tmp_path, encoded):
    """A storage of a megabyte, which the program names a thousand times in a few kilobytes."""
    stream = io.BytesIO()
    numbers = torch.zeros(250_000).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=numbers, dtype=torch.float32, _internal=True)
    torch.save(storage, stream, _use_new_zipfile_serialization=False)
    content = stream.getvalue()
    if encoded:
        text = content.decode("latin1").encode()
        data = b"c_codecs\nencode\n(X" + struct.pack("<I", len(text)) + text + b"q\x01" + _text("latin1") + b"tR0"
        again = b"c_codecs\nencode\n(h\x01" + _text("latin1") + b"tR0"
    else:
        data = b"B" + struct.pack("<I", len(content)) + content + b"q\x010"
        again = b"ctorch.storage\n_load_from_bytes\n(h\x01tR0"
    (tmp_path / "network.pkl").write_bytes(b"\x80\x02" + data + 1000 * again + b"N.")
    with pytest.raises(ValueError, match="its storages claim more bytes than it has"):
        edm_pickles.read(tmp_path / "network.pkl")


def test_entries_of_a_list_are_no_entries_of_an_object(tmp_path):
    """APPENDS on an object is not a way to give it a state."""
    program = b"\x80\x02cdnnlib.util\nEasyDict\n)\x81(" + _text("a") + b"K\x01e."
    reader = edm_pickles._SnapshotReader(mmap.mmap(-1, 1))
    value = torch_files.run_pickle(io.BytesIO(program), reader)
    assert (value.name, value.items) == ("dnnlib.util.EasyDict", {})
