"""Samplers and pruners compared by replaying recorded trials: how many images pruning saves, and what it costs.

    dmat tune start --trials 64 --workers 2   # with sampler: random, pruner: none, rerank: 0 in params.yaml
    python benchmarks/tune_replay.py export --to curves.json            # the curves of that study
    python benchmarks/tune_replay.py replay curves.json --repeats 40    # prints one JSON line a variant, then a table

A replayed study asks the sampler for values, takes the nearest recorded trial that it has not had (each dimension
scaled to its range, logarithms where the space has them), and shows its reports to the pruner one by one: the very
functions that `dmat tune` uses. `same` is the share of repeats in which the best trial that was found is within one
standard error of a proportion of the best that the same sampler finds without pruning from the same seed; `regret` is
how far the best is below the best of all recorded trials, mean and standard error over repeats, in points.
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
    """The curves of the study that a parameter file asks for."""
    loaded = config.load(params)
    plan = tuning.plan(loaded, find_workspace(params.resolve().parent))
    study = storage.find(storage.connect(plan.storage), plan.name)
    assert study is not None, f"study {plan.name} was not begun"
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    trials = [
        {"values": trial.params, "reports": {str(step): value for step, value in trial.intermediate_values.items()}}
        for trial in complete
    ]
    about = {"settings": plan.settings.plain(), "validation_images": _validation(loaded), "trials": trials}
    to.write_text(json.dumps(about, indent=1) + "\n")
    print(f"{len(trials)} complete trials in {to}")


def _validation(loaded: config.Params) -> int:
    images: int = loaded.prepare_data.validation
    return images


class Recorded:
    """Full curves of trials, and how far values are from theirs."""

    def __init__(self, path: Path):
        about = json.loads(path.read_text())
        self.settings = Tune.model_validate(about["settings"])
        self.images = about["validation_images"]
        self.values = [trial["values"] for trial in about["trials"]]
        self.reports = [{int(step): value for step, value in trial["reports"].items()} for trial in about["trials"]]
        self.best = [max(reports.values()) for reports in self.reports]
        self.places = np.array([self._place(values) for values in self.values])

    def nearest(self, values: dict[str, Any], had: set[int]) -> int:
        distances = ((self.places - self._place(values)) ** 2).sum(1)
        return next(int(k) for k in np.argsort(distances, kind="stable") if int(k) not in had)

    def _place(self, values: dict[str, Any]) -> list[float]:
        found = []
        for name, wanted in self.settings.space.items():
            assert isinstance(wanted, config.Range), "replay knows ranges alone"
            to = math.log if wanted.scale == "log" else float
            found.append((to(values[name]) - to(wanted.low)) / (to(wanted.high) - to(wanted.low)))
        return found


def replay(recorded: Recorded, settings: Tune, pruned_as: str, trials: int) -> tuple[float, int]:
    """Best full value among trials that were not pruned, and images seen."""
    wanted = {
        name: optuna.distributions.FloatDistribution(one.low, one.high, log=one.scale == "log")
        for name, one in settings.space.items()
        if isinstance(one, config.Range)
    }
    name = f"replay {settings.sampler} {settings.pruner} {settings.seed}"  # hyperband draws brackets by it
    study = optuna.create_study(direction="maximize", pruner=sampling.pruner(settings), study_name=name)
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    had: set[int] = set()
    seen, best = 0, 0.0
    for number in range(trials):
        proposed = sampling.propose(settings, wanted, study.get_trials(deepcopy=False), number, pruned_as)
        chosen = recorded.nearest(proposed, had)
        had.add(chosen)
        study.enqueue_trial(recorded.values[chosen])
        trial = study.ask()
        space.suggest(trial, wanted)
        stopped = False
        for step, value in recorded.reports[chosen].items():
            trial.report(value, step)
            last = step
            if stopped := sampling.should_stop(trial, step, settings):
                break
        seen += last
        if stopped:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, recorded.best[chosen])
            best = max(best, recorded.best[chosen])
    return best, seen


def compare(
    recorded: Recorded, samplers: list[str], repeats: int, trials: int, warmup: int | None
) -> Iterator[dict[str, Any]]:
    """A line for each variant. Repeats differ in the seed of sampler and brackets."""
    without: dict[str, list[tuple[float, int]]] = {}
    error = math.sqrt(max(recorded.best) * (1 - max(recorded.best)) / recorded.images)
    for sampler, pruned_as, pruner in sorted(VARIANTS, key=lambda variant: variant[2] != "none"):
        if sampler not in samplers:
            continue
        found = []
        for seed in range(repeats):
            changes: dict[str, Any] = {"sampler": sampler, "pruner": pruner, "seed": seed}
            if warmup is not None:
                changes["warmup_images"] = warmup
            found.append(replay(recorded, recorded.settings.model_copy(update=changes), pruned_as, trials))
        without.setdefault(sampler, found)
        full = trials * max(recorded.reports[0])
        regrets = [100 * (max(recorded.best) - best) for best, _ in found]
        yield {
            "sampler": sampler,
            "pruner": pruner,
            "pruned_as": pruned_as,
            "saved": round(1 - statistics.mean(seen for _, seen in found) / full, 3),
            "same": round(
                statistics.mean(
                    one >= other - error for (one, _), (other, _) in zip(found, without[sampler], strict=True)
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
    one = commands.add_parser("export")
    one.add_argument("--to", type=Path, required=True)
    one.add_argument("--params", type=Path, default=Path("params.yaml"))
    two = commands.add_parser("replay")
    two.add_argument("curves", type=Path)
    two.add_argument("--samplers", nargs="+", default=["random", "tpe", "gp"])
    two.add_argument("--repeats", type=int, default=40)
    two.add_argument("--trials", type=int, default=30)
    two.add_argument("--warm-up", type=int, default=None)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if args.command == "export":
        export(args.to, args.params)
        return
    rows = []
    for row in compare(Recorded(args.curves), args.samplers, args.repeats, args.trials, args.warmup):
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
