"""Samplers and pruners compared by replaying recorded trials: how many images pruning saves, and what it costs.

    dmat tune start --trials 64 --workers 2   # with sampler: random, pruner: none, rerank: 0 in params.yaml
    python benchmarks/tune_replay.py export --to curves.json            # the curves of that study
    python benchmarks/tune_replay.py replay curves.json --repeats 40    # prints one JSON line per variant, then a table

A replayed study asks the sampler for values, takes the nearest recorded trial that it has not used yet (each dimension
scaled to its range, logarithms where the space has them), and shows its reports to the pruner one by one. Sampler and
pruner are the functions that `dmat tune` uses. `same` is the fraction of repeats whose best trial is within one
standard error of a proportion of the best that the same sampler finds without pruning from the same seed. `regret` is
how far the best is below the best of all recorded trials, in percentage points: mean and standard error over repeats.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from dmat import config, tuning
from dmat.config import Tune
from dmat.tuning import sampling, space, storage
from dmat.workspace import find_workspace

VARIANTS = [
    *(("random", "nothing", pruner) for pruner in ("none", "median", "hyperband")),
    *(("tpe", shown, pruner) for pruner in ("median", "hyperband") for shown in sampling.PRUNED_AS),
    ("tpe", "nothing", "none"),
    *(("gp", shown, pruner) for pruner in ("median", "hyperband") for shown in ("nothing", "last", "extended")),
    ("gp", "nothing", "none"),
]


def export(to: Path, params: Path) -> None:
    """Writes the learning curves of the complete trials of the study that a parameter file describes."""
    loaded = config.load(params)
    plan = tuning.plan(loaded, find_workspace(params.resolve().parent))
    study = storage.find(storage.connect(plan.storage), plan.name)
    assert study is not None, f"study {plan.name} was not begun"
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    trials = [
        {"values": trial.params, "reports": {str(step): value for step, value in trial.intermediate_values.items()}}
        for trial in complete
    ]
    content = {"settings": plan.settings.plain(), "validation_images": _validation(loaded), "trials": trials}
    to.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{len(trials)} complete trials in {to}")


def _validation(loaded: config.Params) -> int:
    images: int = loaded.prepare_data.validation
    return images


class Recorded:
    """Complete learning curves of recorded trials, and the search for the trial nearest to given values."""

    def __init__(self, path: Path):
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = config.with_new_names(content["settings"])
        settings.setdefault("images_seen", settings.pop("images", None))  # the name of the length in the first studies
        settings["overrides"] = config.with_new_names(settings["overrides"])
        self.settings = Tune.model_validate(settings)
        self.images = content["validation_images"]
        self.values = [trial["values"] for trial in content["trials"]]
        self.reports = [{int(step): value for step, value in trial["reports"].items()} for trial in content["trials"]]
        self.best = [max(reports.values()) for reports in self.reports]
        self.positions = np.array([self._position(values) for values in self.values])  # [trials, dimensions]

    def nearest(self, values: dict[str, Any], used: set[int]) -> int:
        """Returns the index of the nearest recorded trial that is not in `used`."""
        distances = ((self.positions - self._position(values)) ** 2).sum(1)  # [trials]
        return next(int(k) for k in np.argsort(distances, kind="stable") if int(k) not in used)

    def _position(self, values: dict[str, Any]) -> list[float]:
        """Scales each dimension of the space to [0, 1]."""
        position = []
        for name, limits in self.settings.space.items():
            assert isinstance(limits, config.Range), "replay supports ranges only"
            transform = math.log if limits.scale == "log" else float
            position.append(
                (transform(values[name]) - transform(limits.low)) / (transform(limits.high) - transform(limits.low))
            )
        return position


def replay(recorded: Recorded, settings: Tune, pruned_as: str, trials: int) -> tuple[float, int]:
    """Replays a study. Returns the best final value among trials that were not pruned, and the images seen by all."""
    dimensions = {
        name: optuna.distributions.FloatDistribution(limits.low, limits.high, log=limits.scale == "log")
        for name, limits in settings.space.items()
        if isinstance(limits, config.Range)
    }
    name = f"replay {settings.sampler} {settings.pruner} {settings.seed}"  # Hyperband derives brackets from it
    study = optuna.create_study(direction="maximize", pruner=sampling.pruner(settings), study_name=name)
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    used: set[int] = set()
    images_seen, best = 0, 0.0
    for number in range(trials):
        proposed = sampling.propose(settings, dimensions, study.get_trials(deepcopy=False), number, pruned_as)
        index = recorded.nearest(proposed, used)
        used.add(index)
        study.enqueue_trial(recorded.values[index])
        trial = study.ask()
        space.suggest(trial, dimensions)
        stopped = False
        for step, value in recorded.reports[index].items():
            trial.report(value, step)
            last = step
            if stopped := sampling.should_stop(trial, step, settings):
                break
        images_seen += last
        if stopped:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, recorded.best[index])
            best = max(best, recorded.best[index])
    return best, images_seen


def compare(
    recorded: Recorded, samplers: list[str], repeats: int, trials: int, warmup: int | None
) -> Iterator[dict[str, Any]]:
    """Yields a record for each variant. Repeats differ in the seed of sampler and brackets."""
    unpruned: dict[str, list[tuple[float, int]]] = {}  # sampler -> results without pruning
    error = math.sqrt(max(recorded.best) * (1 - max(recorded.best)) / recorded.images)
    for sampler, pruned_as, pruner in sorted(VARIANTS, key=lambda variant: variant[2] != "none"):
        if sampler not in samplers:
            continue
        results = []
        for seed in range(repeats):
            changes: dict[str, Any] = {"sampler": sampler, "pruner": pruner, "seed": seed}
            if warmup is not None:
                changes["warmup_images"] = warmup
            results.append(replay(recorded, recorded.settings.model_copy(update=changes), pruned_as, trials))
        unpruned.setdefault(sampler, results)
        full = trials * max(recorded.reports[0])
        regrets = [100 * (max(recorded.best) - best) for best, _ in results]
        yield {
            "sampler": sampler,
            "pruner": pruner,
            "pruned_as": pruned_as,
            "saved": round(1 - statistics.mean(images_seen for _, images_seen in results) / full, 3),
            "same": round(
                statistics.mean(
                    best_pruned >= best_unpruned - error
                    for (best_pruned, _), (best_unpruned, _) in zip(results, unpruned[sampler], strict=True)
                ),
                3,
            ),
            "regret": round(statistics.mean(regrets), 2),
            "regret_error": round(statistics.stdev(regrets) / math.sqrt(repeats), 2),
            "within_one_error": round(statistics.mean(regret <= 100 * error for regret in regrets), 3),
            "trials": trials,
            "recorded": len(recorded.values),
            "repeats": repeats,
            "warmup_images": recorded.settings.warmup_images if warmup is None else warmup,
            "standard_error": round(100 * error, 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    export_parser = commands.add_parser("export")
    export_parser.add_argument("--to", type=Path, required=True)
    export_parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    replay_parser = commands.add_parser("replay")
    replay_parser.add_argument("curves", type=Path)
    replay_parser.add_argument("--samplers", nargs="+", default=["random", "tpe", "gp"])
    replay_parser.add_argument("--repeats", type=int, default=40)
    replay_parser.add_argument("--trials", type=int, default=30)
    replay_parser.add_argument("--warm-up", type=int, default=None)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if args.command == "export":
        export(args.to, args.params)
        return
    rows = []
    for row in compare(Recorded(args.curves), args.samplers, args.repeats, args.trials, args.warm_up):
        print(json.dumps(row), flush=True)
        rows.append(row)
    print("\n| sampler | pruner | pruned trials shown as | images saved | same best | regret, points |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        regret = f"{row['regret']:.2f} ± {row['regret_error']:.2f}"
        print(
            f"| {row['sampler']} | {row['pruner']} | {row['pruned_as']} | {100 * row['saved']:.0f} % | "
            f"{100 * row['same']:.0f} % | {regret} |"
        )


if __name__ == "__main__":
    main()
