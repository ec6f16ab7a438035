"""What tracking costs a fast run: equal steps without tracking, with the embedded store, with a server 50 ms away.

Each round runs the three variants one after the other in fresh processes; ratios are taken within a round. The first
half of the loop contains the fixed cost of a run (the start of the sending process); the second half shows the cost of
metrics. The stores exist beforehand, as in a project that is in use.

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

ROUND_TRIP = 0.05  # seconds, to the server and back
INTERVAL = 0.25  # seconds between two records of a fast run
VALUES = 9  # per record, as a training of dmat writes


def work(home: Path, seconds: float, steps: int | None) -> dict:
    """Computes matrix products on one thread and writes a record about every INTERVAL seconds.

    steps: number of steps; None: as many as fit into `seconds`. Returns the seconds of the first and the second half of
    the loop and of everything outside it, steps and records.
    """
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
        completed, recorded, half = 0, 0, started
        with MetricsLog(folder / "metrics.jsonl") as log:
            while (completed < steps) if steps else (time.perf_counter() - started < seconds):
                step()
                completed += 1
                if steps and completed == steps // 2:
                    half = time.perf_counter()
                if time.perf_counter() - started > (recorded + 1) * INTERVAL:
                    recorded += 1
                    log.write(recorded, {f"value_{k}": float(completed + k) for k in range(VALUES)})
        ended = time.perf_counter()
    closed = time.perf_counter()
    return {
        "first": half - started,
        "second": ended - half,
        "outside": started - opened + closed - ended,
        "steps": completed,
        "records": recorded,
    }


def measure(uri: str | None, seconds: float, steps: int | None) -> dict:
    """Runs `work` in a fresh process. uri: address of the server; "": embedded store; None: no tracking.

    Returns the result of `work` and the number of runs that still owe their store something.
    """
    with tempfile.TemporaryDirectory() as folder:
        if uri == "":
            create = f"import pathlib, dmat.tracking; dmat.tracking.connect(pathlib.Path({folder!r}))"
            subprocess.run([sys.executable, "-c", create], check=True, env=os.environ | {"MLFLOW_TRACKING_URI": ""})
        environment = os.environ | {"DMAT_TRACKING": "off" if uri is None else "on", "MLFLOW_TRACKING_URI": uri or ""}
        command = [sys.executable, __file__, "--work", folder, "--seconds", str(seconds), "--steps", str(steps or 0)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        result = json.loads(process.stdout.splitlines()[-1])
        markers = list(Path(folder).glob("mlruns/active/*.json"))
        return result | {"owed": len(markers)}


def free_port() -> int:
    """Returns a TCP port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(folder: Path) -> tuple[subprocess.Popen, int]:
    """Starts an MLflow server and waits until it is healthy. Returns its process and port."""
    port = free_port()
    arguments = ["mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination"]
    arguments += [f"{folder}/artifacts", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen([sys.executable, "-m", *arguments], stdout=quiet, stderr=quiet, start_new_session=True)
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return server, port
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")


def start_slow_proxy(port: int) -> int:
    """Starts a proxy in front of the server that adds ROUND_TRIP seconds, and returns the port of the proxy."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await asyncio.sleep(ROUND_TRIP / 2)
            writer.write(data)
            await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(forward(reader, upstream[1]), forward(upstream[0], writer), return_exceptions=True)

    proxy_port = free_port()

    async def serve() -> None:
        server = await asyncio.start_server(accept, "127.0.0.1", proxy_port)
        await server.serve_forever()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    return proxy_port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work(args.work, args.seconds, args.steps or None)))
        return
    with tempfile.TemporaryDirectory() as folder:
        server, port = start_server(Path(folder))
        try:
            uris = {"off": None, "embedded": "", "server 50 ms away": f"http://127.0.0.1:{start_slow_proxy(port)}"}
            steps = measure(None, args.seconds, None)["steps"]
            results = []
            for number in range(args.rounds):
                order = list(uris) if number % 2 == 0 else list(uris)[::-1]
                result = {name: measure(uris[name], args.seconds, steps) for name in order}
                results.append(result)
                print(json.dumps(result), flush=True)
        finally:
            os.killpg(server.pid, signal.SIGTERM)  # it has a dozen processes of its own
            server.wait()
    for name in uris:
        ratio_texts = []
        for half in ("first", "second"):
            ratios = [times[name][half] / times["off"][half] for times in results]
            ratio_texts.append(f"{statistics.median(ratios):.4f} ({', '.join(f'{ratio:.4f}' for ratio in ratios)})")
        extra = statistics.median(times[name]["first"] - times["off"]["first"] for times in results)
        outside = statistics.median(times[name]["outside"] for times in results)
        print(
            f"{name:18s} times as long as off: first half {ratio_texts[0]}, {extra:+.2f} s; second half "
            f"{ratio_texts[1]}; before and after the loop {outside:.2f} s"
        )


if __name__ == "__main__":
    main()
