"""Queries for tracked runs, without the seconds that the import of MLflow takes.

The embedded store is read directly as a SQLite file, read-only. A server, and a file with another schema, are read
through MLflow.
"""

import contextlib
import dataclasses
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmat.errors import DmatError, first_line
from dmat.tracking import stores
from dmat.tracking.run_record import SYSTEM, WORK, as_written, read_tracking
from dmat.workspace import sqlite_path

_SHORT_ID_LENGTH = 8  # characters of a run id in output for people


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """MLflow run. started, ended: seconds since 1970; ended is None while the run is active. metrics: last values."""

    id: str
    name: str
    status: str
    started: float
    ended: float | None
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]

    @property
    def stage(self) -> str:
        return self.tags.get("dmat.stage", "")

    @property
    def instance_name(self) -> str:
        return self.tags.get("dmat.instance", "")

    @property
    def seconds(self) -> float | None:
        return None if self.ended is None else self.ended - self.started

    def plain(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "seconds": self.seconds}


def recent(home: Path, stage: str | None = None, status: str | None = None, limit: int = 30) -> list[TrackedRun]:
    """The newest runs first, of one stage or one status if these are given. limit: at most so many; 0: all."""
    tags = {"dmat.stage": stage} if stage else {}
    return _select_runs(home, tags, status, limit)


def best(home: Path, metric: str, stage: str | None = None, limit: int = 30) -> list[TrackedRun]:
    """The runs that have a metric, the largest value first. limit: at most so many; 0: all.

    Raises DmatError if no run has the metric.
    """
    candidates = [run for run in recent(home, stage, limit=0) if metric in run.metrics]
    if not candidates:
        metric_names = sorted({name for run in recent(home, stage, limit=200) for name in run.metrics})
        raise DmatError(
            f"no run has the metric {metric!r}; expected one of {', '.join(metric_names[:20]) or '(none)'}; "
            f"`dmat runs show RUN` lists those of a run"
        )
    return sorted(candidates, key=lambda run: -run.metrics[metric])[: limit or None]


def find_run(home: Path, reference: str) -> TrackedRun:
    """The run whose id begins with `reference` (four characters or more), or the newest run of that name.

    reference may also be "stage/instance", "instance", or the full name of a run in MLflow. Raises DmatError if no run,
    or more than one id, fits.
    """
    if not reference:
        raise DmatError("the name of the run is empty; expected an id, or stage/instance; `dmat runs list` shows them")
    runs = recent(home, limit=0)
    id_matches = [run for run in runs if len(reference) >= 4 and run.id.startswith(reference)]
    if len(id_matches) == 1:
        return id_matches[0]
    if id_matches:
        raise DmatError(
            f"{len(id_matches)} runs begin with {reference!r}; expected one; give more characters of its id"
        )
    name_matches = [
        run for run in runs if reference in (f"{run.stage}/{run.instance_name}", run.instance_name, run.name)
    ]
    if not name_matches:
        raise DmatError(
            f"no run {reference!r}; expected the first four characters of an id or more, or stage/instance such as "
            f"train_robust/generated-1; `dmat runs list` shows them"
        )
    return name_matches[0]


def work_folder(home: Path, run: TrackedRun) -> Path | None:
    """The work folder of a run by its tag, if it still exists, also when it was set aside since; else None.

    Runs of earlier versions of dmat have no such tag: the folder of a stage's run follows from its fingerprint.
    """
    by_fingerprint = home / "runs" / run.stage / f"{run.instance_name}-{run.tags.get('dmat.fingerprint', '')}"
    work = home / run.tags[WORK] if WORK in run.tags else by_fingerprint
    earlier_folders = [*work.glob("before-*"), *work.parent.glob(f"before-*/{work.name}")]
    for folder in (work, *sorted(earlier_folders)):
        if read_tracking(folder).get("run") == run.id:
            return folder
    tracking = read_tracking(work)
    other_run = tracking.get("run") is not None and tracking.get("store") == stores.identity(home)
    return work if work.is_dir() and not other_run else None


def _select_runs(home: Path, tags: Mapping[str, str], status: str | None, limit: int) -> list[TrackedRun]:
    if (path := sqlite_path(stores.store_uri(home))) is not None:
        if not path.exists():
            return []
        try:
            if not path.is_file():  # opening a FIFO would wait for a writer
                raise ValueError("not a file")
            return _from_file(path, tags, status, limit)
        except (sqlite3.DatabaseError, ValueError, TypeError, AttributeError, OverflowError) as error:
            if isinstance(error, sqlite3.OperationalError) and str(error).startswith("no such"):
                return _from_mlflow(home, tags, status, limit)  # a schema that the query does not fit
            raise DmatError(
                f"{path} is damaged ({first_line(error)}); expected the database of MLflow; restore it from a backup, "
                f"or move it away: a new one is made, and no result of a stage depends on it"
            ) from None
    return _from_mlflow(home, tags, status, limit)


def _from_file(path: Path, tags: Mapping[str, str], status: str | None, limit: int) -> list[TrackedRun]:
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as database:
        conditions, values = ["r.lifecycle_stage = 'active'", "e.name = ?"], [stores.EXPERIMENT]
        for key, value in tags.items():
            conditions.append(
                "exists (select 1 from tags t where t.run_uuid = r.run_uuid and t.key = ? and t.value = ?)"
            )
            values += [key, value]
        if status:
            conditions.append("r.status = ?")
            values.append(status)
        mappings = [
            f"(select json_group_object(key, {value}) from {table} where run_uuid = r.run_uuid)"
            # a number as text: SQLite writes 15 of its 17 digits into JSON
            for table, value in (("tags", "value"), ("params", "value"), ("latest_metrics", "printf('%!.17g', value)"))
        ]
        rows = database.execute(
            f"select r.run_uuid, r.name, r.status, r.start_time, r.end_time, {', '.join(mappings)} from runs r join "
            "experiments e on e.experiment_id = r.experiment_id "
            f"where {' and '.join(conditions)} order by r.start_time desc limit ?",
            [*values, limit or -1],
        ).fetchall()
    return [
        TrackedRun(
            id_, name or "", status_, started / 1000, ended / 1000 if ended else None, json.loads(tags_),
            _as_written(json.loads(params)), {key: float(value) for key, value in json.loads(metrics).items()},
        )
        for id_, name, status_, started, ended, tags_, params, metrics in rows
    ]  # fmt: skip


def _from_mlflow(home: Path, tags: Mapping[str, str], status: str | None, limit: int) -> list[TrackedRun]:
    client, experiment = stores.connect_or_raise(home)
    conditions = [f"tags.`{key}` = '{value}'" for key, value in tags.items()]
    conditions += [f"attributes.status = '{status}'"] if status else []
    return [
        TrackedRun(
            run.info.run_id,
            run.info.run_name or "",
            run.info.status,
            run.info.start_time / 1000,
            run.info.end_time / 1000 if run.info.end_time else None,
            run.data.tags,
            _as_written(run.data.params),
            run.data.metrics,
        )
        for run in stores.search_runs(client, experiment, " and ".join(conditions), limit)
    ]


def _as_written(params: Mapping[str, str]) -> dict[str, str]:
    """Parameters as runs of all versions of dmat have them."""
    return {name: as_written(value) for name, value in params.items()}


def short_id(id_: str) -> str:
    """The first characters of a run id, for output."""
    return id_[:_SHORT_ID_LENGTH]


def differences(runs: Sequence[TrackedRun]) -> tuple[dict[str, list[str | None]], list[str]]:
    """Values that differ between the runs, and the names of those that are the same in all. Without times and ids.

    Returns name -> the value of each run (None where a run has none), and names.
    """
    tables = [_comparable_values(run) for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table))
    differing = {name: [table.get(name) for table in tables] for name in names}
    return (
        {name: values for name, values in differing.items() if len(set(values)) > 1},
        [name for name, values in differing.items() if len(set(values)) == 1],
    )


def _comparable_values(run: TrackedRun) -> dict[str, str]:
    """Parameters, data, code, machine and metrics of a run by the names that people see."""
    compared = ("input.", "git.", "compute.", "evaluation.", "code.", "dvc.exp")
    tags = {name: value for name, value in run.tags.items() if name.startswith(compared)}
    metrics = {f"metric {name}": f"{value:.6g}" for name, value in _without_system_metrics(run.metrics.items())}
    return {"stage": run.stage, "instance": run.instance_name, "status": run.status, **run.params, **tags, **metrics}


def _without_system_metrics(metrics: Iterable[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    for name, value in metrics:
        if not name.startswith(SYSTEM):
            yield name, value
