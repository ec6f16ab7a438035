"""What a person reads first at the run of a whole `dvc repro`: what came out, and every stage instance with its run."""

from collections.abc import Mapping, Sequence
from typing import Any

NOTE = "mlflow.note.content"  # MLflow shows it as the run's description
RESTORED = "restored."  # begins the tag of a stage instance that DVC did not run again; its value is the run
MOST_TAGS = 100


def description(children: Sequence[Any], restored: Mapping[str, str], experiment: str) -> str:
    """Markdown. children: MLflow runs of this parent. restored: stage instance -> the run that made it before."""
    told = [child.data.tags[NOTE] for child in children if NOTE in child.data.tags]
    lines = [*told, "| stage instance | run | seconds |", "|---|---|---|"]
    for title, run in restored.items():
        lines.append(f"| {title} | {link(run, experiment)} | restored by DVC |")
    for child in sorted(children, key=lambda one: one.info.start_time):
        spent = (child.info.end_time - child.info.start_time) / 1000 if child.info.end_time else None
        seconds = "…" if spent is None else f"{spent:.0f}"
        status = "" if child.info.status == "FINISHED" else f", {child.info.status}"
        lines.append(f"| {child.info.run_name} | {link(child.info.run_id, experiment)} | {seconds}{status} |")
    return "\n".join(lines)


def link(run: str, experiment: str) -> str:
    """To the page of a run, from any page of the UI."""
    return f"[{run[:8]}](#/experiments/{experiment}/runs/{run})"
