"""The device and precision of a run: resolved once, then passed on as a value."""

import dataclasses
import os
import time

import numpy as np
import torch

from dmat import processes
from dmat.errors import DmatError
from dmat.processes import World
from dmat.workspace import ComputeRecord

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
COMPILE = ("auto", "on", "off")


@dataclasses.dataclass(frozen=True)
class Compute:
    """A resolved device and precision. Weights, losses and attack updates are float32 in both precisions."""

    device: torch.device
    precision: str  # "fp32" or "bf16"
    reason: str  # why this precision, for people
    threads: int  # of torch on the CPU
    world: World = dataclasses.field(default_factory=World)  # the processes that compute together
    compile: str = "off"  # whether trainings of classifiers compile their steps: "auto", "on" or "off"

    def exact(self) -> "Compute":
        """Returns the same device in float32, the precision of reported accuracies.

        On CUDA it also switches off TF32, which torch uses for convolutions by default, for the whole process.
        """
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        return dataclasses.replace(self, precision="fp32", reason="evaluation is in fp32")

    def autocast(self) -> torch.autocast:
        """Returns a block in which matrix products and convolutions use bfloat16, if that is the precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copies a tensor of any shape to the device, asynchronously from pinned memory.

        Images [B, C, H, W] of floating-point numbers get channels-last memory; bytes [B, H, W, C] have it already.
        """
        layout = torch.channels_last if _is_float_images(tensor) else torch.preserve_format
        return tensor.to(self.device, memory_format=layout, non_blocking=True)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pins the memory of a CPU tensor of any shape if the device is a GPU: `to_device` then copies asynchronously.

        Images [B, C, H, W] of floating-point numbers get channels-last memory.
        """
        if _is_float_images(tensor):
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor.pin_memory() if self.device.type == "cuda" and tensor.device.type == "cpu" else tensor

    def model_to_device(self, model: torch.nn.Module) -> torch.nn.Module:
        """Moves the model to the device, its weights in channels-last memory."""
        return model.to(self.device).to(memory_format=torch.channels_last)

    def synchronise(self) -> None:
        """Waits until a GPU has computed what it was given; the CPU has."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def describe(self) -> ComputeRecord:
        """Returns device, precision, threads, processes and torch version, to report beside results."""
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


def _is_float_images(tensor: torch.Tensor) -> bool:  # of any shape
    return tensor.ndim == 4 and tensor.is_floating_point()


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies an array of any shape to the device, without waiting for what the device computes."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def resolve(device: str = "auto", precision: str = "auto", threads: int = 0, compilation: str = "off") -> Compute:
    """Resolves "auto" for this machine and sets torch's number of threads.

    threads=0 means one per core that this process may use, divided among the processes on this machine. Joins the other
    processes of `torchrun`. compilation="auto" stays: each training decides it. Raises DmatError for an unknown device,
    precision or compilation, or if CUDA is not available.
    """
    if device not in DEVICES:
        raise DmatError(f"device is {device!r}; expected one of {', '.join(DEVICES)}")
    if precision not in PRECISIONS:
        raise DmatError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    if compilation not in COMPILE:
        raise DmatError(f"compile is {compilation!r}; expected one of {', '.join(COMPILE)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise DmatError("device is 'cuda' but torch finds no CUDA device; install a driver or set device: auto")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    native, hardware_reason = _native_bf16(kind)
    resolved_precision = ("bf16" if native else "fp32") if precision == "auto" else precision
    joined_world = processes.world()
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE") or "1")
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_processes))
    torch_device = (
        torch.device("cuda", joined_world.local) if kind == "cuda" and joined_world.size > 1 else torch.device(kind)
    )
    reason = hardware_reason if precision == "auto" else "asked for"
    return Compute(torch_device, resolved_precision, reason, torch.get_num_threads(), joined_world, compilation)


def matrix_peak(compute: Compute) -> float:
    """Measures the FLOP/s of a large matrix product in the precision of `compute`, best of 5."""
    size = 8192 if compute.device.type == "cuda" else 1024
    dtype = torch.bfloat16 if compute.precision == "bf16" else torch.float32
    a, b = (torch.ones(size, size, device=compute.device, dtype=dtype) for _ in range(2))  # [size, size] each
    times = []
    for _ in range(6):  # the first product is a warm-up
        started = time.perf_counter()
        a @ b
        compute.synchronise()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times[1:])


def _native_bf16(kind: str) -> tuple[bool, str]:
    """Returns whether the hardware multiplies bfloat16 natively, and the reason. Emulation is slower than float32."""
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return major >= 8, f"CUDA capability {major}.{minor}"
    for name, check in (("AMX", "_is_amx_tile_supported"), ("AVX512_BF16", "_is_avx512_bf16_supported")):
        # Private names of torch.cpu: absent in some versions, in which case the safe answer is float32.
        if getattr(torch.cpu, check, lambda: False)():
            return True, f"CPU has {name}"
    return False, "no native bfloat16 multiplication"
