"""The processes of a run: one by default, several under `torchrun`.

Several processes compute what one would with the same global batch: each takes its rows of the batch, and sums go
through `World.sum`. Only the main process (rank 0) writes files; the others get their bytes by broadcast.
Shapes: B batch per process, C channels, H height, W width, V values, T elements of a flattened tensor.
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

_MAX_RESTARTS = 3  # of all processes, after one was lost
_TIMEOUT = datetime.timedelta(minutes=10)  # of waiting for the others, which may evaluate in between


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them."""

    rank: int = 0  # of this process among `size`
    size: int = 1
    local: int = 0  # rank on this machine, the index of its GPU

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files: rank 0."""
        return self.rank == 0

    def local_rows(self, count: int) -> slice:
        """Returns this process's rows of a batch of `count`: contiguous, disjoint, nearly equal, together all rows."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor of any shape over the processes, in place.

        Like all exchanges below it raises DmatError if another process is lost.
        """
        if self.size > 1:
            with self._lost_process_errors():
                torch.distributed.all_reduce(tensor)
        return tensor

    def sum_gradients(self, model: nn.Module, values: Tensor) -> Tensor:
        """Sums the gradients of the model in place, and returns the sum of `values` [V], in one exchange."""
        if self.size == 1:
            return values
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = self.sum(torch.cat([*(g.flatten() for g in gradients), values]))  # [T + V]
        chunks = flat.split([*(g.numel() for g in gradients), len(values)])
        for gradient, chunk in zip(gradients, chunks, strict=False):
            gradient.copy_(chunk.view_as(gradient))
        return chunks[-1]

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Copies the main process's floating-point buffers to all processes, as `nn.DataParallel` does."""
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if self.size > 1 and buffers:
            flat = self._broadcast_tensor(torch.cat([buffer.flatten() for buffer in buffers]))  # [T]
            for buffer, chunk in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(chunk.view_as(buffer))

    def broadcast(self, data: bytes | None) -> bytes | None:
        """Returns the main process's bytes, or None, in every process. data: ignored in the others."""
        if self.size == 1:
            return data
        device = _device(self)
        length = int(self._broadcast_tensor(torch.tensor([-1 if data is None else len(data)], device=device)))
        if length < 1:
            return None if length < 0 else b""
        buffer = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(length, dtype=torch.uint8)
        )
        return self._broadcast_tensor(buffer.to(device)).cpu().numpy().tobytes()

    def _broadcast_tensor(self, tensor: Tensor) -> Tensor:  # any shape, in place
        with self._lost_process_errors():
            torch.distributed.broadcast(tensor, 0)
        return tensor

    @contextlib.contextmanager
    def _lost_process_errors(self) -> Iterator[None]:
        """Turns errors of torch.distributed inside the block into a DmatError."""
        try:
            yield
        except RuntimeError as error:
            raise DmatError(
                f"process {self.rank} of {self.size} lost another process ({str(error).splitlines()[0]}); run the same "
                f"command again: it resumes from the last checkpoint (torchrun --max-restarts does so automatically)"
            ) from error


def torchrun_processes() -> int:
    """Returns how many processes `torchrun` started; 1 without it. Does not join them.

    `torchrun` sets RANK and WORLD_SIZE; a scheduler may set one of them alone.
    """
    return int(os.environ.get("WORLD_SIZE") or "1") if os.environ.get("RANK") else 1


# Environment of a process that must run dmat's own `cli`, even if the folder it starts in has a module of this name.
OWN_MODULES = {"PYTHONSAFEPATH": "1"}


def launcher(count: int) -> list[str]:
    """Returns the arguments of `python` that run a module in `count` processes of this machine.

    The caller appends the module and its arguments: `-m NAME ...`.
    """
    options = ["--standalone", f"--nproc-per-node={count}", f"--max-restarts={_MAX_RESTARTS}"]
    return ["-m", "torch.distributed.run", *options]


def world() -> World:
    """Returns the processes that `torchrun` started, and joins them at the first call; one process without it."""
    size = torchrun_processes()
    if size == 1:
        return World()
    joined = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK") or "0"))
    if not torch.distributed.is_initialized():
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(joined.local)
        # Addresses of an earlier attempt may still be in torchrun's store, so each attempt has its own prefix.
        store, _, _ = next(rendezvous("env://", joined.rank, size, timeout=_TIMEOUT))
        attempt_store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        torch.distributed.init_process_group(
            "nccl" if gpu else "gloo", store=attempt_store, rank=joined.rank, world_size=size, timeout=_TIMEOUT
        )
    return joined


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes: mean and variance, and their gradients, are computed from sums over
    all processes.

    torch's own synchronised batch norm does not run on the CPU. All processes must hold equally many images.
    Statistics are float32.
    """

    world = World()

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        if not self.training or self.world.size == 1:
            return super().forward(x)
        values = x.float()
        count = self.world.size * values.numel() / values.shape[1]
        mean = self._total(values.sum((0, 2, 3))) / count  # [C]
        centred = values - mean[:, None, None]
        variance = self._total((centred**2).sum((0, 2, 3))) / count  # [C]
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum or 0.0)
                self.running_var.lerp_(variance * (count / (count - 1)), self.momentum or 0.0)
        scale = self.weight * (variance + self.eps).rsqrt()  # [C]
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _total(self, tensor: Tensor) -> Tensor:  # [C] -> [C], summed over processes
        total: Tensor = _Sum.apply(tensor, self.world)
        return total


def synchronise_batch_norm(model: nn.Module, world: World) -> None:
    """Turns every batch norm of a model into one over all processes. Parameters, buffers and names stay."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = SynchronisedBatchNorm2d
            layer.world = world  # type: ignore[assignment]


class _Sum(Function):
    """Sum over the processes. Its gradient is summed over them too, because every process has a part of the loss."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, world: World) -> Tensor:  # any shape, the same out
        context.world = world
        return world.sum(tensor.clone())

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # any shape, the same out
        return context.world.sum(gradients[0].clone()), None


def _device(world: World) -> torch.device:
    return torch.device("cuda", world.local) if torch.distributed.get_backend() == "nccl" else torch.device("cpu")
