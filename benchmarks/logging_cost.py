"""What tracking costs a fast run: equal steps without tracking, with the embedded store, with a server 50 ms away.

Each round runs the three ways one after the other in fresh processes; ratios are taken within a round. What a run
costs once, however long it is (the start of the sending process), is in the first half of the loop; the second half
shows what metrics cost. The stores are there before, as in a project that is in use.

    python benchmarks/logging_cost.py --rounds 5 --seconds 24
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

DELAY = 0.05  # seconds of a round trip to the server
EVERY = 0.25  # seconds between two records of a fast run
VALUES = 9  # in a record, as a training of dmat writes


def work(home: Path, seconds: float, steps: int | None) -> dict:
    """Steps of matrix products on one thread with a record about every EVERY seconds. steps: do so many; None: as many
    as fit into the seconds."""
    import torch

    from dmat import tracking
    from dmat.training.long_run import MetricsLog

    torch.set_num_threads(1)
    a = torch.rand(256, 256)
    step = lambda: [(a @ a).relu_() for _ in range(8)]  # noqa: E731
    for _ in range(50):
        step()
    folder = home / "runs" / "one"
    folder.mkdir(parents=True)
    opened = time.perf_counter()
    run = tracking.open_run(home, folder, stage="train_robust", instance_name="one", settings={}, inputs={}, compute={})
    with run:
        started = time.perf_counter()
        done, recorded, half = 0, 0, started
        with MetricsLog(folder / "metrics.jsonl") as log:
            while (done < steps) if steps else (time.perf_counter() - started < seconds):
                step()
                done += 1
                if steps and done == steps // 2:
                    half = time.perf_counter()
                if time.perf_counter() - started > (recorded + 1) * EVERY:
                    recorded += 1
                    log.write(recorded, {f"value_{k}": float(done + k) for k in range(VALUES)})
        ended = time.perf_counter()
    left = time.perf_counter()
    return {
        "first": half - started,
        "second": ended - half,
        "outside": started - opened + left - ended,
        "steps": done,
        "records": recorded,
    }


def measure(uri: str | None, seconds: float, steps: int | None) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        if uri == "":
            make = f"import pathlib, dmat.tracking; dmat.tracking.connect(pathlib.Path({folder!r}))"
            subprocess.run([sys.executable, "-c", make], check=True, env=os.environ | {"MLFLOW_TRACKING_URI": ""})
        environment = os.environ | {"DMAT_TRACKING": "off" if uri is None else "on", "MLFLOW_TRACKING_URI": uri or ""}
        words = [sys.executable, __file__, "--work", folder, "--seconds", str(seconds), "--steps", str(steps or 0)]
        answer = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        found = json.loads(answer.stdout.splitlines()[-1])
        notes = list(Path(folder).glob("mlruns/active/*.json"))
        return found | {"owed": len(notes)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(folder: Path) -> tuple[subprocess.Popen, int]:
    port = free_port()
    words = ["mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination"]
    words += [f"{folder}/artifacts", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen([sys.executable, "-m", *words], stdout=quiet, stderr=quiet, start_new_session=True)
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return server, port
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")


def far_away(port: int) -> int:
    """Another port of the same server, DELAY there and back."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await asyncio.sleep(DELAY / 2)
            writer.write(data)
            await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(carry(reader, there[1]), carry(there[0], writer), return_exceptions=True)

    far = free_port()

    async def serve() -> None:
        server = await asyncio.start_server(accept, "127.0.0.1", far)
        await server.serve_forever()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    return far


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        print(json.dumps(work(chosen.work, chosen.seconds, chosen.steps or None)))
        return
    with tempfile.TemporaryDirectory() as folder:
        server, port = start_server(Path(folder))
        try:
            uris = {"off": None, "embedded": "", "server 50 ms away": f"http://127.0.0.1:{far_away(port)}"}
            steps = measure(None, chosen.seconds, None)["steps"]
            rounds = []
            for number in range(chosen.rounds):
                order = list(uris) if number % 2 == 0 else list(uris)[::-1]
                found = {name: measure(uris[name], chosen.seconds, steps) for name in order}
                rounds.append(found)
                print(json.dumps(found), flush=True)
        finally:
            os.killpg(server.pid, signal.SIGTERM)  # it has a dozen processes of its own
            server.wait()
    for name in uris:
        told = []
        for part in ("first", "second"):
            ratios = [one[name][part] / one["off"][part] for one in rounds]
            told.append(f"{statistics.median(ratios):.4f} ({', '.join(f'{ratio:.4f}' for ratio in ratios)})")
        lost = statistics.median(one[name]["first"] - one["off"]["first"] for one in rounds)
        outside = statistics.median(one[name]["outside"] for one in rounds)
        print(
            f"{name:18s} times of off: first half {told[0]}, {lost:+.2f} s; second half {told[1]}; "
            f"before and after the loop {outside:.2f} s"
        )


if __name__ == "__main__":
    main()
