"""What `dmat doctor --bench` measures, and who uses it."""

import dataclasses
import json
import multiprocessing

import pytest
import torch
from typer.testing import CliRunner

from cli.images import _plan_lines
from cli.main import app
from dmat import devices, machine_speed
from dmat.errors import DmatError
from dmat.jobs import train_robust
from dmat.machine_speed import MachineSpeed
from dmat.upkeep import bench


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder without a measurement."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine_speed.matrix_peak.cache_clear()
    yield
    machine_speed.matrix_peak.cache_clear()


@pytest.fixture
def cpu():
    return devices.resolve("cpu", "fp32", 1)


def speed(compute, **changes) -> MachineSpeed:
    record = compute.describe()
    values = {
        "device": record["device"],
        "torch": record["torch"],
        "matrix_peaks": {machine_speed.peak_key(compute): 1e18},
        "process_throughput": 1.6,
        "disk_write": 1e9,
        "disk_read": 2e9,
        "measured": "2026-11-29T12:00:00Z",
    }
    return MachineSpeed(**(values | changes))


def test_bench_measures_and_records_this_machine(tmp_path, monkeypatch):
    for name, value in {"_PEAK_SECONDS": 0.01, "_ROUNDS": 1, "_TRAINING_SECONDS": 0.05, "_DISK_BYTES": 8 << 20}.items():
        monkeypatch.setattr(bench, name, value)
    fork = multiprocessing.get_context("fork")  # spawned processes import torch for seconds
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda method: fork)
    disk, disk_speeds = [], bench._disk_speeds
    monkeypatch.setattr(bench, "_disk_speeds", lambda folder: disk.append(disk_speeds(folder)) or disk[0])
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    result = CliRunner().invoke(app, ["doctor", "--bench", "--json"])
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    shown = json.loads(result.stdout)
    assert dataclasses.asdict(machine_speed.read()) == shown
    assert "fp32, threads: 1" in shown["matrix_peaks"] and min(shown["matrix_peaks"].values()) > 1e6
    assert shown["device"] == devices.resolve().describe()["device"]
    if torch.cuda.is_available():
        assert shown["process_throughput"] is None
    else:
        assert 0.1 < shown["process_throughput"] < 3
    assert (shown["disk_write"], shown["disk_read"]) == disk[0] and min(disk[0]) > 1e5
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # nothing is left on the disk


def test_a_folder_without_room_is_one_sentence(tmp_path):
    with pytest.raises(DmatError, match=r"could not be measured .*No such file.*expected room for 512 MiB"):
        bench._disk_speeds(tmp_path / "missing")


def test_a_utilisation_refers_to_the_highest_peak(cpu, monkeypatch):
    monkeypatch.setattr(devices, "matrix_peak", lambda compute: 1e9)
    measured = train_robust._speed(10.0, 1000, cpu)["model_flops_utilisation"]
    assert measured == 10.0 * 1000 / 1e9
    machine_speed.write(speed(cpu))
    machine_speed.matrix_peak.cache_clear()
    assert train_robust._speed(10.0, 1000, cpu)["model_flops_utilisation"] == 10.0 * 1000 / 1e18


@pytest.mark.parametrize(
    "changes", [{"device": "another"}, {"torch": "1.0"}, {"matrix_peaks": {"bf16, threads: 8": 1e18}}]
)
def test_a_peak_of_something_else_is_not_used(cpu, monkeypatch, changes):
    monkeypatch.setattr(devices, "matrix_peak", lambda compute: 1e9)
    machine_speed.write(speed(cpu, **changes))
    assert machine_speed.matrix_peak(cpu) == 1e9


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"device": 3}', "\0"])
def test_a_damaged_measurement_counts_as_none(cpu, text):
    assert machine_speed.read() is None
    machine_speed.write(speed(cpu))
    assert machine_speed.read() == speed(cpu)
    machine_speed.path().write_text(text)
    assert machine_speed.read() is None


def test_a_plan_divides_by_the_throughput_of_two_processes(cpu):
    plan = {"images": 100, "shards": 1, "disk_bytes": 1, "free_bytes": 1, "reused_bytes": 0, "memory_bytes": 1}
    plan |= {"hours": 3.2, "images_per_second": 1.0, "device_memory_bytes": None, "device": "cpu"}
    assert "two at once" not in dict(_plan_lines(plan))["time"]
    machine_speed.write(speed(cpu))
    assert "3.20 hours of one process, 2.00 of two at once" in dict(_plan_lines(plan))["time"]
