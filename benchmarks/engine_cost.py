"""What a training step costs more in a worker of the engine than in a plain process.

    python benchmarks/engine_cost.py --repeats 15

TRADES steps of the digits' network, which are short, so that a worker's other threads matter most. A plain process
without Dask and a worker of a local cluster take turns, each for some seconds, on one thread each; the worker's task
looks in every step whether it should stop, as trainings do. Prints one JSON line: the median of the ratios of images
per second, worker to plain, and their range.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import engine_cost  # this file by its name: a worker imports it
from trades_step import DATA_SPEC, our_step

from dmat import devices
from dmat.engine import EngineOptions, Task, open_engine
from dmat.robust.networks import wide_resnet

BATCH, SIZE = 128, 8


def images_per_second(context, seconds: float) -> float:
    """Trains for some seconds. context: of the engine's task; None in a plain process."""
    compute = devices.resolve("cpu", "auto", 1)
    torch.manual_seed(0)
    model = compute.model_to_device(wide_resnet(DATA_SPEC, 10, 1, "silu"))
    optimiser = torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True)
    x, y = torch.rand(BATCH, 3, SIZE, SIZE), torch.randint(10, (BATCH,))
    start = torch.zeros_like(x)
    for _ in range(3):  # warm-up
        our_step(model, optimiser, x, y, start, compute)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        if context is not None:
            context.check_interruption()
        our_step(model, optimiser, x, y, start, compute)
        count += BATCH
    return count / (time.perf_counter() - started)


def answer(pipe) -> None:
    """The plain process."""
    while True:
        pipe.send(images_per_second(None, pipe.recv()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=4.0)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipe, there = context.Pipe()
    process = context.Process(target=engine_cost.answer, args=(there,), daemon=True)
    process.start()
    results: list[float] = []
    with open_engine(EngineOptions(workers=1)) as engine:

        def in_worker() -> float:
            tasks = [Task("training", engine_cost.images_per_second, (args.seconds,))]
            engine.run(
                lambda: tasks.pop() if tasks else None, on_outcome=lambda outcome: results.append(outcome.result)
            )
            return results.pop()

        def plain() -> float:
            pipe.send(args.seconds)
            return pipe.recv()

        in_worker(), plain()  # both have imported torch now
        ratios = []
        for repeat in range(args.repeats):
            first, second = (plain, in_worker) if repeat % 2 else (in_worker, plain)
            rates = {function: function() for function in (first, second)}
            ratios.append(rates[in_worker] / rates[plain])
    process.terminate()
    print(
        json.dumps(
            {
                "ratio": round(statistics.median(ratios), 4),
                "range": [round(min(ratios), 4), round(max(ratios), 4)],
                "repeats": args.repeats,
                **devices.resolve("cpu", "auto", 1).describe(),
            }
        )
    )


if __name__ == "__main__":
    main()
