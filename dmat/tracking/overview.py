"""Description of the MLflow run of a whole `dvc repro`: the results, and every stage instance with its run."""

from collections.abc import Mapping, Sequence
from typing import Any

DESCRIPTION_TAG = "mlflow.note.content"  # MLflow shows it as the description of the run
RESTORED_PREFIX = "restored."  # of the tag of a stage instance that DVC restored; its value is the id of the run
MAX_RESTORED_TAGS = 100


def description(children: Sequence[Any], restored: Mapping[str, str], experiment: str) -> str:
    """Markdown: the descriptions of the children, and a table of all stage instances.

    children: MLflow runs of this parent. restored: stage instance -> id of the earlier run that computed it.
    experiment: id of the MLflow experiment.
    """
    descriptions = [child.data.tags[DESCRIPTION_TAG] for child in children if DESCRIPTION_TAG in child.data.tags]
    lines = [*descriptions, "| stage instance | run | seconds |", "|---|---|---|"]
    for title, run in restored.items():
        lines.append(f"| {title} | {link(run, experiment)} | restored by DVC |")
    for child in sorted(children, key=lambda child_run: child_run.info.start_time):
        duration = (child.info.end_time - child.info.start_time) / 1000 if child.info.end_time else None
        seconds = "…" if duration is None else f"{duration:.0f}"
        status = "" if child.info.status == "FINISHED" else f", {child.info.status}"
        lines.append(f"| {child.info.run_name} | {link(child.info.run_id, experiment)} | {seconds}{status} |")
    return "\n".join(lines)


def link(run_id: str, experiment: str) -> str:
    """Markdown link to the page of a run, valid on every page of the MLflow UI."""
    return f"[{run_id[:8]}](#/experiments/{experiment}/runs/{run_id})"
