"""Pickles of diffusion models as the official code writes them: read whole, and nothing in them ever runs."""

import io
import pickle
import pickletools
import struct
import sys
import types
import zipfile

import pytest
import torch
from torch import nn

from dmat.diffusion.edm_networks import DhariwalUNet, SongUNet
from dmat.models import edm_pickles

NETWORKS = {
    "ddpmpp": lambda: SongUNet(8, 3, 10, 9, 16, (1, 2), 1, (4,)),
    "ncsnpp": lambda: SongUNet(
        8, 3, 10, 9, 16, (1, 2), 1, (4,), embedding="fourier", encoder="residual", taps=(1, 3, 3, 1)
    ),
    "adm": lambda: DhariwalUNet(8, 3, 10, 9, 64, (1, 2), 1, (4,)),
}
ARGUMENTS = {"img_resolution": 8, "img_channels": 3, "label_dim": 10, "model_type": "SongUNet", "sigma_data": 0.5}
SOURCE = "import pathlib\npathlib.Path('executed').touch()\n"  # text of a module, which the official code executes


def _reconstruct_persistent_obj(meta):
    raise AssertionError("it was called")


class EasyDict(dict):
    """A dictionary with its entries as attributes, as dnnlib has it."""


class Persistent(nn.Module):
    """A module that pickles itself as class name, source text and state."""

    def __init__(self, class_name: str, module: nn.Module | None = None, **state):
        super().__init__()
        if module is not None:
            self._parameters, self._buffers = module._parameters, module._buffers
            self._modules = {name: _persistent(child) for name, child in module.named_children()}
        self.__dict__ |= state
        self._class_name = class_name

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self._class_name}
        return _reconstruct_persistent_obj, (EasyDict(meta, state=dict(self.__dict__)),)


def _persistent(module: nn.Module) -> nn.Module:
    """A module as the official code would hold it: containers of torch stay what they are."""
    if isinstance(module, nn.ModuleDict):
        return nn.ModuleDict({name: _persistent(child) for name, child in module.items()})
    return Persistent(type(module).__name__, module)


@pytest.fixture
def official(monkeypatch):
    """The modules that the pickles of the official code name."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    persistence._reconstruct_persistent_obj, util.EasyDict = _reconstruct_persistent_obj, EasyDict
    for value, module in ((_reconstruct_persistent_obj, persistence), (EasyDict, util)):
        monkeypatch.setattr(value, "__module__", module.__name__)
    for name, module in {
        "torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": persistence,
        "dnnlib": types.ModuleType("dnnlib"), "dnnlib.util": util,
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    return monkeypatch


def write(path, network, protocol=4, positional=False):
    """A snapshot with the network under "ema", beside it what else a snapshot holds."""
    arguments = (8, 3) if positional else ()
    keywords = {name: value for name, value in ARGUMENTS.items() if not positional or not name.startswith("img_")}
    preconditioned = Persistent(
        "EDMPrecond", sigma_data=0.5, training=False, _init_args=arguments, _init_kwargs=EasyDict(keywords)
    )
    preconditioned._modules = {"model": _persistent(network)}
    snapshot = {"ema": preconditioned, "loss_fn": EasyDict(name="EDMLoss"), "augment_pipe": None}
    path.write_bytes(pickle.dumps(snapshot, protocol))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_back_whole(official, tmp_path, monkeypatch, name, protocol):
    monkeypatch.chdir(tmp_path)
    network = NETWORKS[name]()
    write(tmp_path / "network.pkl", network, protocol)
    for module in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
        monkeypatch.delitem(sys.modules, module)
    read = edm_pickles.read(tmp_path / "network.pkl")
    assert (read.class_name, read.arguments) == ("EDMPrecond", ARGUMENTS)
    expected = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    assert list(read.state) == list(expected) or read.state.keys() == expected.keys()
    assert all(torch.equal(read.state[name], tensor) for name, tensor in expected.items())
    assert not (tmp_path / "executed").exists()


def test_arguments_by_position_get_their_names(official, tmp_path):
    write(tmp_path / "network.pkl", NETWORKS["ddpmpp"](), positional=True)
    assert edm_pickles.read(tmp_path / "network.pkl").arguments == ARGUMENTS


# --- nothing runs


def _text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


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


def test_there_are_enough_hostile_files_and_they_are_hostile(tmp_path, monkeypatch):
    """Python's own reader executes the command in most of those that it can read at all."""
    assert len(HOSTILE) >= 30
    monkeypatch.chdir(tmp_path)
    pickle.loads(HOSTILE["reduce os.system"])
    assert (tmp_path / "executed").exists()
    for content in (HOSTILE["newobj"], HOSTILE["inst"], HOSTILE["obj"]):
        pickletools.dis(content, out=io.StringIO())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "network.pkl"
    path.write_bytes(HOSTILE[name])
    before, listing = set(sys.modules), sorted(tmp_path.iterdir())
    try:
        read = edm_pickles.read(path)
    except Exception:  # the importer makes a sentence of any of them
        read = None
    assert read is None or not read.state
    assert sorted(tmp_path.iterdir()) == listing
    assert not {module for module in set(sys.modules) - before if module.split(".")[0] in ("pty", "code", "runpy")}


def test_a_tensor_cannot_claim_more_than_the_file_has(official, tmp_path):
    """A view that repeats one number a million times."""
    network = nn.Linear(1, 1)
    network.weight = nn.Parameter(torch.zeros(1).expand(1000, 1000))
    write(tmp_path / "network.pkl", network)
    with pytest.raises(ValueError, match="claim more bytes than it has"):
        edm_pickles.read(tmp_path / "network.pkl")
