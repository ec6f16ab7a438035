"""What the machine is busy with while a run goes on, under the names that MLflow's page of system metrics shows."""

import sys

import psutil

_MEGABYTE = 1e6


class SystemMonitor:
    """Processor and memory of the machine and of this process; of the GPU too, once torch uses it."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        psutil.cpu_percent()  # both count from the call before
        self._process.cpu_percent()

    def sample(self) -> dict[str, float]:
        """Since the last sample, or now. Percent of one core may be above 100."""
        memory = psutil.virtual_memory()
        found = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/process_cpu_percentage_of_a_core": self._process.cpu_percent(),
            "system/process_memory_megabytes": self._process.memory_info().rss / _MEGABYTE,
            "system/system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
        }
        return found | self._gpu()

    def _gpu(self) -> dict[str, float]:
        torch = sys.modules.get("torch")  # never loaded for this
        if torch is None or not torch.cuda.is_initialized():
            return {}
        free, total = torch.cuda.mem_get_info()
        return {
            "system/gpu_memory_usage_megabytes": (total - free) / _MEGABYTE,
            "system/gpu_memory_usage_percentage": 100 * (total - free) / total,
        }
