"""The processes of one run: one by default, several under `torchrun`, as one value.

Several processes compute what one would with the same global batch: each takes its rows of it, and sums go through
`World.sum`. Only the leading process (rank 0) writes; state reaches the others as the bytes of its files.
"""

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from dmat.errors import DmatError

_RESTARTS = 3  # of all processes, after one was lost
_PATIENCE = datetime.timedelta(minutes=10)  # that a process waits for the others: an evaluation may lie in between


@dataclasses.dataclass(frozen=True)
class World:
    """rank of this process among `size`; local: its number on this machine, which names its GPU."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def local_rows(self, count: int) -> slice:
        """This process's rows of `count`: contiguous, disjoint, nearly equal, together all."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place. This and what follows raise DmatError if another process is gone."""
        if self.size > 1:
            with self._speaking():
                torch.distributed.all_reduce(tensor)
        return tensor

    def sum_gradients(self, model: nn.Module, values: Tensor) -> Tensor:
        """Sums gradients in place and returns the sum of `values` [V], all in one exchange."""
        if self.size == 1:
            return values
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = self.sum(torch.cat([*(g.flatten() for g in gradients), values]))
        parts = flat.split([*(g.numel() for g in gradients), len(values)])
        for gradient, part in zip(gradients, parts, strict=False):
            gradient.copy_(part.view_as(gradient))
        return parts[-1]

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Everyone takes the leading process's buffers, as `nn.DataParallel` does."""
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if self.size > 1 and buffers:
            flat = self._broadcast_tensor(torch.cat([buffer.flatten() for buffer in buffers]))
            for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(part.view_as(buffer))

    def broadcast(self, data: bytes | None) -> bytes | None:
        """The leading process's bytes (or None) in every process."""
        if self.size == 1:
            return data
        device = _device(self)
        length = int(self._broadcast_tensor(torch.tensor([-1 if data is None else len(data)], device=device)))
        if length < 1:
            return None if length < 0 else b""
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(length, dtype=torch.uint8)
        return self._broadcast_tensor(mine.to(device)).cpu().numpy().tobytes()

    def _broadcast_tensor(self, tensor: Tensor) -> Tensor:
        with self._speaking():
            torch.distributed.broadcast(tensor, 0)
        return tensor

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise DmatError(
                f"process {self.rank} of {self.size} lost another one ({str(error).splitlines()[0]}); the same command "
                f"goes on from the last checkpoint (torchrun --max-restarts does so by itself)"
            ) from error


def wanted() -> int:
    """How many processes `torchrun` started; 1 without it. Joins none of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


# Of a process that is to run dmat's own `cli`, whatever the folder that it starts in holds under this name.
OWN_MODULES = {"PYTHONSAFEPATH": "1"}


def launcher(count: int) -> list[str]:
    """Words after `python` that run a module (`-m NAME ...`, to be added) in `count` processes of this machine."""
    together = ["--standalone", f"--nproc-per-node={count}", f"--max-restarts={_RESTARTS}"]
    return ["-m", "torch.distributed.run", *together]


def world() -> World:
    """The processes that `torchrun` started, joined at the first call; one process without it."""
    size = wanted()
    if size == 1:
        return World()
    found = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(found.local)
        # Addresses of an earlier attempt may still be in torchrun's store: each attempt has names of its own.
        store, _, _ = next(rendezvous("env://", found.rank, size, timeout=_PATIENCE))
        own = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        torch.distributed.init_process_group(
            "nccl" if gpu else "gloo", store=own, rank=found.rank, world_size=size, timeout=_PATIENCE
        )
    return found


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes: mean and variance, and their gradients, are summed over them.

    torch's own refuses the CPU. All processes must hold equally many images. Statistics in float32.
    """

    world = World()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.world.size == 1:
            return super().forward(x)
        values = x.float()
        count = self.world.size * values.numel() / values.shape[1]
        mean = self._total(values.sum((0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = self._total((centred**2).sum((0, 2, 3))) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum or 0.0)
                self.running_var.lerp_(variance * (count / (count - 1)), self.momentum or 0.0)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _total(self, tensor: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(tensor, self.world)
        return total


def synchronise_batch_norm(model: nn.Module, world: World) -> None:
    """Makes every batch norm of a model one over all processes; parameters, buffers and names stay."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = SynchronisedBatchNorm2d
            layer.world = world  # type: ignore[assignment]


class _Sum(Function):
    """Sum over the processes; the gradient of a sum of losses reaches every process's share."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, world: World) -> Tensor:
        context.world = world
        return world.sum(tensor.clone())

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return context.world.sum(gradients[0].clone()), None


def _device(world: World) -> torch.device:
    return torch.device("cuda", world.local) if torch.distributed.get_backend() == "nccl" else torch.device("cpu")
