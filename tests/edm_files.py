"""Writes pickles of diffusion models as the official code of Karras et al. 2022 does."""

import contextlib
import pickle
import sys
import types

from torch import nn

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


@contextlib.contextmanager
def official_modules():
    """The modules that the pickles of the official code name."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    persistence._reconstruct_persistent_obj, util.EasyDict = _reconstruct_persistent_obj, EasyDict
    modules = {
        "torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": persistence,
        "dnnlib": types.ModuleType("dnnlib"), "dnnlib.util": util,
    }  # fmt: skip
    homes = {value: value.__module__ for value in (_reconstruct_persistent_obj, EasyDict)}
    _reconstruct_persistent_obj.__module__, EasyDict.__module__ = persistence.__name__, util.__name__
    sys.modules |= modules
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        for value, home in homes.items():
            value.__module__ = home


def write(path, network, arguments, protocol=4, positional=(), key="ema", class_name="EDMPrecond", buffers=()):
    """A snapshot with the network under a key, beside it what else a snapshot holds.

    arguments, positional: of the constructor of the preconditioning. buffers: its own tensors by name.
    """
    preconditioned = Persistent(
        class_name, sigma_data=0.5, training=False, _init_args=positional, _init_kwargs=EasyDict(arguments)
    )
    preconditioned._buffers = dict(buffers)
    preconditioned._modules = {"model": _persistent(network)}
    snapshot = {"ema": None, key: preconditioned, "loss_fn": EasyDict(name="EDMLoss"), "augment_pipe": None}
    with official_modules():
        path.write_bytes(pickle.dumps(snapshot, protocol))
