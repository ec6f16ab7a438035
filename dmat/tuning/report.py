"""The report of a study: summary, table, pictures, and one interactive page that needs no network."""

import csv
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from dmat import config, files
from dmat.metrics import study_pictures
from dmat.tuning import ranking, space, storage
from dmat.tuning.plan import OBJECTIVE, Study

MINIMUM_FOR_IMPORTANCES = 4  # complete trials
_SHOWN = 10  # trials in the description of the MLflow run


def summary(plan: Study, study: optuna.Study) -> dict[str, Any]:
    """Counts, cost and the best trial. `trials` counts imported ones too, `imported` how many they are."""
    ended = storage.ended(study)
    seen = sum(images_seen(trial) for trial in storage.own_trials(ended))
    full = sum(trial.state != TrialState.FAIL for trial in storage.own_trials(ended)) * plan.settings.images_seen
    seen_of_sound = sum(images_seen(trial) for trial in storage.own_trials(ended) if trial.state != TrialState.FAIL)
    best = ranking.best(plan, study)
    ranks = ranking.auto_attack_results(study)
    return {
        "trials": len(ended),
        **{state.name.lower(): sum(trial.state == state for trial in ended) for state in storage.ENDED},
        "imported": len(ended) - len(storage.own_trials(ended)),
        "images_seen": seen,
        "images_saved_by_pruning": max(0.0, 1 - seen_of_sound / full) if full else 0.0,
        "longest_trial_seconds": max((trial.user_attrs.get("seconds", 0.0) for trial in ended), default=0.0),
        "report_seconds": max((trial.user_attrs.get("report_seconds", 0.0) for trial in ended), default=0.0),
        "ranked": sorted(ranks),
        "auto_attack": {str(number): ranks[number] for number in sorted(ranks)},
        "best": best and {"trial": best.number, OBJECTIVE: best.value, **best.params},
    }


def images_seen(trial: FrozenTrial) -> int:
    return max(trial.intermediate_values, default=0)


def course(study: optuna.Study) -> Iterator[tuple[int, dict[str, float]]]:
    """The best value and its parameters after each ended trial, by their number: the study's own curve."""
    best: FrozenTrial | None = None
    for count, trial in enumerate(storage.ended(study), 1):
        if trial.state == TrialState.COMPLETE and (best is None or (trial.value or 0.0) > (best.value or 0.0)):
            best = trial
        numbers = {name: value for name, value in (best.params if best else {}).items() if _is_number(value)}
        yield count, ({f"best_{OBJECTIVE}": best.value or 0.0, **numbers} if best else {})


def in_words(trial: FrozenTrial) -> str:
    values = ", ".join(
        f"{name} {value:.3g}" if _is_number(value) else f"{name} {value}" for name, value in trial.params.items()
    )
    return f"best {100 * (trial.value or 0):.1f} % with {values}"


def write(plan: Study, study: optuna.Study) -> tuple[dict[str, Any], list[Path]]:
    """Writes the report into the result folder of the study. Returns the summary and the files for people."""
    folder, result = plan.folder / "result", summary(plan, study)
    files.write_text(folder / "trials.csv", table(plan, study))
    files.write_json(folder / "summary.json", {**result, **plan.describe()})
    pictures = _pictures(plan, study, folder, result["complete"])
    files.write_text(folder / "study.html", _page(plan, study, result["complete"]))
    return result, [*pictures, folder / "study.html", folder / "trials.csv", folder / "summary.json"]


def _pictures(plan: Study, study: optuna.Study, folder: Path, complete: int) -> list[Path]:
    trials = [_plot_point(trial) for trial in storage.ended(study)]
    scales = {name: dimension.scale for name, dimension in _ranges(plan).items()}
    names = ["history", "curves"]
    study_pictures.history(folder / "history.png", trials)
    study_pictures.curves(folder / "curves.png", trials)
    parameter_scales = {name: scales.get(name, "names") for name in plan.settings.space}
    study_pictures.slices(folder / "slices.png", trials, parameter_scales)
    names.append("slices")
    shares = _importances(study, complete)
    if shares:
        study_pictures.importances(folder / "importances.png", shares, complete)
        names.append("importances")
    pair = [name for name in shares or scales if name in scales][:2]
    if len(pair) == 2 and complete:
        study_pictures.contour(folder / "contour.png", trials, (pair[0], pair[1]), scales)
        names.append("contour")
    return [folder / f"{name}.png" for name in names]


def _ranges(plan: Study) -> dict[str, config.Range]:
    return {name: dimension for name, dimension in plan.settings.space.items() if isinstance(dimension, config.Range)}


def _importances(study: optuna.Study, complete: int) -> dict[str, float]:
    """Name -> importance, largest first; empty for too few trials or equal values."""
    values = {trial.value for trial in storage.ended(study) if trial.state == TrialState.COMPLETE}
    if complete < MINIMUM_FOR_IMPORTANCES or len(values) < 2:
        return {}
    return dict(optuna.importance.get_param_importances(study))


def _plot_point(trial: FrozenTrial) -> study_pictures.TrialPoint:
    """A trial for the pictures; a pruned one has its last value."""
    last = trial.intermediate_values.get(images_seen(trial))
    value = last if trial.state == TrialState.PRUNED else trial.value
    return study_pictures.TrialPoint(trial.number, trial.state.name, trial.params, value, trial.intermediate_values)


def table(plan: Study, study: optuna.Study) -> str:
    """CSV table with one line per trial."""
    text, ranks = io.StringIO(), ranking.auto_attack_results(study)
    names = ["trial", "state", *plan.settings.space, OBJECTIVE, "auto_attack", "images_seen", "seconds"]
    names += ["imported_from", "reason"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for trial in storage.ended(study):
        origin = trial.user_attrs.get(space.ORIGIN)
        writer.writerow(
            {
                "trial": trial.number,
                "state": trial.state.name,
                **trial.params,
                OBJECTIVE: trial.value if trial.state == TrialState.COMPLETE else None,
                "auto_attack": ranks[trial.number]["value"] if trial.number in ranks else None,
                "images_seen": images_seen(trial),
                "seconds": trial.user_attrs.get("seconds"),
                "imported_from": f"{origin['study']} trial {origin['trial']}" if origin else None,
                "reason": trial.user_attrs.get("reason"),
            }
        )
    return text.getvalue()


def markdown(plan: Study, study: optuna.Study) -> str:
    """The best trials and how the study went, for MLflow's page of the run."""
    result, ranks = summary(plan, study), ranking.auto_attack_results(study)
    saved = 100 * result["images_saved_by_pruning"]
    lines = [
        f"{result['trials']} trials of {plan.settings.images_seen:,} images from arm `{plan.settings.arm}`: "
        f"{result['complete']} complete, {result['pruned']} pruned, {result['fail']} failed; pruning saved "
        f"{saved:.0f} % of the images.",
        "",
        f"| trial | {' | '.join(plan.settings.space)} | PGD, validation | AutoAttack, validation |",
        "|" + "---|" * (3 + len(plan.settings.space)),
    ]
    complete = [trial for trial in storage.ended(study) if trial.state == TrialState.COMPLETE]
    best = ranking.best(plan, study)
    for trial in sorted(complete, key=lambda trial: -(trial.value or 0.0))[:_SHOWN]:
        values = [f"{v:.4g}" if _is_number(v) else str(v) for v in (trial.params[name] for name in plan.settings.space)]
        rank = f"{100 * ranks[trial.number]['value']:.1f} %" if trial.number in ranks else "–"
        mark = f"**{trial.number}**" if best is not None and trial.number == best.number else str(trial.number)
        lines.append(f"| {mark} | {' | '.join(values)} | {100 * (trial.value or 0):.1f} % | {rank} |")
    return "\n".join(lines)


def _page(plan: Study, study: optuna.Study, complete: int) -> str:
    """Optuna's charts in one HTML page that needs no network."""
    plots = optuna.visualization
    charts = [
        plots.plot_optimization_history(study, target_name="PGD accuracy on validation"),
        plots.plot_intermediate_values(study),
        plots.plot_slice(study, target_name="PGD accuracy on validation"),
        plots.plot_parallel_coordinate(study, target_name="PGD accuracy on validation"),
    ]
    if len(plan.settings.space) > 1:
        charts.append(plots.plot_contour(study, target_name="PGD accuracy on validation"))
    if _importances(study, complete):
        charts.append(plots.plot_param_importances(study, target_name="PGD accuracy on validation"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        parts = [
            chart.to_html(
                full_html=False, include_plotlyjs=k == 0, default_height="480px", config={"displaylogo": False}
            )
            for k, chart in enumerate(charts)
        ]
    head = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>Study {plan.name}</title><style>body{{font-family:sans-serif;max-width:1100px;margin:auto;"
        f"padding:0 1em}}</style><h1>Study {plan.name}</h1>"
    )
    return head + "\n".join(f"<section>{part}</section>" for part in parts) + "</html>\n"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
