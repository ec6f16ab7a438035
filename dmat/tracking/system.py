"""System metrics during a run, by the names that MLflow shows on its page of system metrics."""

import sys

import psutil

_MEGABYTE = 1e6


class SystemMonitor:
    """Samples processor and memory of the machine and of this process, and GPU memory once torch uses the GPU."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        psutil.cpu_percent()  # both measure since their previous call
        self._process.cpu_percent()

    def sample(self) -> dict[str, float]:
        """Name -> value: processor use since the last sample, memory now. Megabytes are 10^6 bytes.

        The percentage of a core is above 100 for a process that uses several.
        """
        memory = psutil.virtual_memory()
        metrics = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/process_cpu_percentage_of_a_core": self._process.cpu_percent(),
            "system/process_memory_megabytes": self._process.memory_info().rss / _MEGABYTE,
            "system/system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
        }
        return metrics | self._gpu()

    def _gpu(self) -> dict[str, float]:
        torch = sys.modules.get("torch")  # not imported for this
        if torch is None or not torch.cuda.is_initialized():
            return {}
        free, total = torch.cuda.mem_get_info()
        return {
            "system/gpu_memory_usage_megabytes": (total - free) / _MEGABYTE,
            "system/gpu_memory_usage_percentage": 100 * (total - free) / total,
        }
