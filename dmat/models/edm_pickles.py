"""Reads the pickles of diffusion models that the official code of Karras et al. 2022 writes, without running them.

Such a file holds the source text of the network's classes, which that code executes when it loads the file. Here the
pickle runs on the stack of `torch_files`, which can import and call nothing. What remains are the constructor
arguments, parameters and buffers of each module.
"""

import dataclasses
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from torch import Tensor

from dmat.models import torch_files
from dmat.models.torch_files import Key, Storage, StoredTensor, TorchFile, UnknownObject

# The one function whose argument describes an object: its class, the text of its module, and its state.
_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_STORAGE_FROM_BYTES = "torch.storage._load_from_bytes"
_BYTES_AS_TEXT = "_codecs.encode"  # how protocol 2 writes bytes: as text of as many characters
_NETWORK_KEYS = ("ema", "net", "model")  # keys of a snapshot that hold a network, best first


@dataclasses.dataclass
class PickledObject:
    """An object that the pickle describes. It was not created.

    name: its class, without module where the official code describes it.
    """

    name: str
    state: dict[Key, object] = dataclasses.field(default_factory=dict)
    items: dict[Key, object] = dataclasses.field(default_factory=dict)  # of a class derived from dict


@dataclasses.dataclass(frozen=True)
class PublishedNetwork:
    """A preconditioned network in a file.

    class_name: of the preconditioning, as "EDMPrecond". arguments: of its constructor. state: names -> tensors of any
    shape, parameters and buffers. other_names: classes and functions in the file that have no meaning here.
    """

    class_name: str
    arguments: dict[str, object]
    state: dict[str, Tensor]
    other_names: list[str]


class _SnapshotReader(TorchFile):
    """Gives meaning to the few names that describe modules. All others stay names."""

    recognised_names = TorchFile.recognised_names | {_PERSISTENT, _STORAGE_FROM_BYTES, _BYTES_AS_TEXT}

    def __init__(self, content: mmap.mmap):
        super().__init__(content)
        self._bytes_left = dict[str, int]()  # by the function that copies them

    def resolve_call(self, maker: object, arguments: object) -> object:
        if isinstance(maker, UnknownObject) and isinstance(arguments, tuple):
            if maker.name == _PERSISTENT and len(arguments) == 1:
                return _persistent_object(arguments[0])
            if maker.name == _STORAGE_FROM_BYTES and len(arguments) == 1 and isinstance(arguments[0], bytes):
                self._charge(maker.name, arguments[0])
                return _storage(arguments[0])
            if maker.name == _BYTES_AS_TEXT and arguments[1:] == ("latin1",) and isinstance(arguments[0], str):
                self._charge(maker.name, arguments[0])
                return arguments[0].encode("latin1")
            if maker.name not in self.recognised_names:
                return PickledObject(maker.name)
        return super().resolve_call(maker, arguments)

    def _charge(self, purpose: str, data: bytes | str) -> None:
        """Counts bytes that are copied. Raises ValueError if they are more than the file has: it repeats them."""
        self._bytes_left[purpose] = self._bytes_left.get(purpose, len(self.content)) - len(data)
        if self._bytes_left[purpose] < 0:
            raise ValueError("its storages claim more bytes than it has")

    def resolve_state(self, target: object, state: object) -> None:
        if isinstance(target, PickledObject) and isinstance(state, dict):
            target.state |= state

    def resolve_items(self, target: object, items: list[object]) -> None:
        if isinstance(target, PickledObject):
            target.items |= torch_files.to_dictionary(zip(items[::2], items[1::2], strict=True))


def read(path: Path) -> PublishedNetwork:
    """Reads a network and its constructor arguments. Raises ValueError and other exceptions for any other file."""
    with open(path, "rb") as stream:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    reader = _SnapshotReader(content)
    value = torch_files.run_pickle(cast(IO[bytes], content), reader)
    network = next((value[key] for key in _NETWORK_KEYS if value.get(key)), None) if isinstance(value, dict) else value
    if not isinstance(network, PickledObject):
        raise ValueError("it holds no network")
    state, nbytes = dict[str, Tensor](), 0
    for name, stored in _tensors(network, "", set()):
        nbytes += stored.nbytes
        if nbytes > len(content):
            raise ValueError("its tensors claim more bytes than it has")
        state[name] = stored.tensor()
    return PublishedNetwork(network.name, _arguments(network), state, sorted(reader.unread_names))


def _persistent_object(description: object) -> PickledObject:
    """The object that `_reconstruct_persistent_obj` would create. Raises ValueError for another kind of object."""
    values = description.items if isinstance(description, PickledObject) else description
    if not isinstance(values, dict) or values.get("type") != "class":
        raise ValueError("a persistent object that is not of a class")
    name, state = values.get("class_name"), values.get("state")
    if not isinstance(name, str) or not isinstance(state, dict):
        raise ValueError("a persistent object without class_name and state")
    return PickledObject(name, dict(state))


def _storage(data: bytes) -> Storage:
    """The storage in bytes that torch.save wrote. It stays in them."""
    content = mmap.mmap(-1, max(1, len(data)))
    content.write(data)
    content.seek(0)
    file = TorchFile(content)
    value = torch_files.read_legacy(file)
    if not isinstance(value, Storage):
        raise ValueError("bytes that are not a storage")
    return value


def _tensors(module: object, prefix: str, visited: set[int]) -> Iterator[tuple[str, StoredTensor]]:
    """Parameters and buffers of a module and its children, by dotted names. Raises ValueError for a repeated module."""
    if not isinstance(module, PickledObject):
        raise ValueError(f"{prefix or 'the network'} is not a module")
    if id(module) in visited:  # shared modules could be reached on more paths than anyone can walk
        raise ValueError(f"{prefix} is a module that appeared before")
    visited.add(id(module))
    for kind in ("_parameters", "_buffers"):
        for name, tensor in _mapping(module.state.get(kind)).items():
            if isinstance(tensor, StoredTensor):
                yield f"{prefix}{name}", tensor
            elif tensor is not None:
                raise ValueError(f"{prefix}{name} is not a tensor")
    for name, child in _mapping(module.state.get("_modules")).items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.", visited)


def _mapping(value: object) -> dict[str, object]:
    """The entries of a dictionary, or of an object derived from it, whose key is text."""
    if isinstance(value, PickledObject):
        value = value.items
    return {name: entry for name, entry in value.items() if isinstance(name, str)} if isinstance(value, dict) else {}


def _arguments(module: PickledObject) -> dict[str, object]:
    """Constructor arguments by name. Positional ones get the names img_resolution, img_channels, label_dim."""
    positional = module.state.get("_init_args")
    names = ("img_resolution", "img_channels", "label_dim")
    if not isinstance(positional, tuple):
        positional = ()
    if len(positional) > len(names):
        raise ValueError(f"{len(positional)} arguments without a name, of which dmat knows {', '.join(names)}")
    by_position, by_name = dict(zip(names, positional, strict=False)), _mapping(module.state.get("_init_kwargs"))
    if twice := by_position.keys() & by_name.keys():
        raise ValueError(f"the argument {min(twice)} twice")
    return by_position | by_name
