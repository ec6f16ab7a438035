"""Where a run computes and in which precision: resolved once, then passed along as a value."""

import contextlib
import dataclasses
import functools
import os
import time
from typing import Any

import numpy as np
import torch

from dmat import processes
from dmat.errors import DmatError
from dmat.processes import World

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclasses.dataclass(frozen=True)
class Compute:
    """A resolved device and precision. Weights, losses and attack updates stay float32 in either precision."""

    device: torch.device
    precision: str  # "fp32" or "bf16"
    reason: str  # why this precision, for people
    threads: int
    world: World = dataclasses.field(default_factory=World)  # the processes that compute together

    def exact(self) -> "Compute":
        """The same device in float32: what reported accuracies are computed in. On CUDA the shorter TF32, which torch
        takes for convolutions by itself, is switched off for the whole process."""
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        return dataclasses.replace(self, precision="fp32", reason="evaluation is in fp32")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Matrix products and convolutions in bfloat16 inside the block, if that is the precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; images [B, C, H, W] in channels-last memory."""
        layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
        return tensor.to(self.device, memory_format=layout, non_blocking=True)

    def ready(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor in memory that a GPU reads by itself: `to_device` then copies asynchronously. Images [B, C, H, W]
        become channels-last."""
        if tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def model_to_device(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.to(self.device).to(memory_format=torch.channels_last)

    def describe(self) -> dict[str, Any]:
        """What a number computed here must be reported with."""
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device)
            if cuda
            else f"cpu ({torch.backends.cpu.get_cpu_capability()})",
            "precision": self.precision,
            "precision_reason": self.reason,
            "threads": self.threads,
            "processes": self.world.size,
            "torch": torch.__version__,
        }


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The numbers on the device, without waiting for what it computes."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def resolve(device: str = "auto", precision: str = "auto", threads: int = 0) -> Compute:
    """Chooses what "auto" means here and sets the number of threads (0: as many as cores this process may use)."""
    if device not in DEVICES:
        raise DmatError(f"device is {device!r}; expected one of {', '.join(DEVICES)}")
    if precision not in PRECISIONS:
        raise DmatError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise DmatError("device is 'cuda' but torch finds no CUDA device; install a driver or say device: auto")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    native, reason = _native_bf16(kind)
    chosen = ("bf16" if native else "fp32") if precision == "auto" else precision
    together = processes.world()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // here))
    where = torch.device("cuda", together.local) if kind == "cuda" and together.size > 1 else torch.device(kind)
    why = reason if precision == "auto" else "asked for"
    return Compute(where, chosen, why, torch.get_num_threads(), together)


@functools.cache
def matrix_peak(compute: Compute) -> float:
    """FLOP/s that a large matrix product reaches here in the precision of `compute`: measured, best of 5. What model
    FLOPs utilisation is a share of."""
    size = 8192 if compute.device.type == "cuda" else 1024
    dtype = torch.bfloat16 if compute.precision == "bf16" else torch.float32
    left, right = (torch.ones(size, size, device=compute.device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):  # the first one prepares
        started = time.perf_counter()
        left @ right
        if compute.device.type == "cuda":
            torch.cuda.synchronize(compute.device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times[1:])


def _native_bf16(kind: str) -> tuple[bool, str]:
    """Whether the hardware multiplies bfloat16 itself; emulated bfloat16 is slower than float32."""
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return major >= 8, f"CUDA capability {major}.{minor}"
    for name, check in (("AMX", "_is_amx_tile_supported"), ("AVX512_BF16", "_is_avx512_bf16_supported")):
        # Private names of torch.cpu: absent in some versions, in which case the safe answer is float32.
        if getattr(torch.cpu, check, lambda: False)():
            return True, f"CPU has {name}"
    return False, "no native bfloat16 multiplication"
