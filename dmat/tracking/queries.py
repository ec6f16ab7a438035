"""Runs as people ask for them, without the seconds that MLflow's import takes.

The embedded store is read as the SQLite file that it is, read-only; a server, and a file of another layout, through
MLflow itself.
"""

import contextlib
import dataclasses
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmat.errors import DmatError
from dmat.tracking import stores
from dmat.tracking.run_record import WORK, remembered

_PAGE = 900  # names in one question; SQLite takes 999 at least
_SHORT = 8  # characters of an id that people see


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """started, ended: seconds since 1970; ended is None while it goes on. metrics: the last value of each."""

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
    """The newest runs first. limit: at most so many; 0: all."""
    wanted = {"dmat.stage": stage} if stage else {}
    return _ask(home, wanted, status, limit)


def best(home: Path, metric: str, stage: str | None = None, limit: int = 30) -> list[TrackedRun]:
    """The runs that have a metric, the largest value first."""
    having = [run for run in recent(home, stage, limit=0) if metric in run.metrics]
    if not having:
        known = sorted({name for run in recent(home, stage, limit=200) for name in run.metrics})
        raise DmatError(
            f"no run has the metric {metric!r}; expected one of {', '.join(known[:20]) or '(none)'}; "
            f"`dmat runs show RUN` lists those of a run"
        )
    return sorted(having, key=lambda run: -run.metrics[metric])[: limit or None]


def one(home: Path, wanted: str) -> TrackedRun:
    """The run whose id begins so, or the newest of "stage/instance" or "instance"."""
    if not wanted:
        raise DmatError("a run was named by nothing; expected an id, or stage/instance; `dmat runs list` shows them")
    runs = recent(home, limit=0)
    by_id = [run for run in runs if len(wanted) >= 4 and run.id.startswith(wanted)]
    if len(by_id) == 1:
        return by_id[0]
    if by_id:
        raise DmatError(f"{len(by_id)} runs begin with {wanted!r}; expected one; give more characters of its id")
    named = [run for run in runs if wanted in (f"{run.stage}/{run.instance_name}", run.instance_name, run.name)]
    if not named:
        raise DmatError(
            f"no run {wanted!r}; expected the first four characters of an id or more, or stage/instance such as "
            f"train_robust/generated-1; `dmat runs list` shows them"
        )
    return named[0]


def work_folder(home: Path, run: TrackedRun) -> Path | None:
    """Where a run did its work, as its tag says, if that is still there; what was set aside since is found too.

    Runs of an earlier dmat have no such tag: those of a stage are where their fingerprint says.
    """
    named = home / "runs" / run.stage / f"{run.instance_name}-{run.tags.get('dmat.fingerprint', '')}"
    work = home / run.tags[WORK] if WORK in run.tags else named
    aside = [*work.glob("before-*"), *work.parent.glob(f"before-*/{work.name}")]
    for folder in (work, *sorted(aside)):
        if remembered(folder).get("run") == run.id:
            return folder
    known = remembered(work)
    another = known.get("run") is not None and known.get("store") == stores.identity(home)
    return work if work.is_dir() and not another else None


def _ask(home: Path, tags: Mapping[str, str], status: str | None, limit: int) -> list[TrackedRun]:
    address = stores.store(home)
    if address.startswith("sqlite:///"):
        path = Path(address.removeprefix("sqlite:///"))
        if not path.exists():
            return []
        with contextlib.suppress(sqlite3.OperationalError):  # a layout that this file does not know
            return _from_file(path, tags, status, limit)
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
        question = (
            "select r.run_uuid, r.name, r.status, r.start_time, r.end_time from runs r join experiments e "
            f"on e.experiment_id = r.experiment_id where {' and '.join(conditions)} order by r.start_time desc"
        )
        rows = database.execute(f"{question} limit {int(limit)}" if limit else question, values).fetchall()
        ids = [row[0] for row in rows]
        found = {
            table: _by_run(database, table, columns, ids)
            for table, columns in (("tags", "value"), ("params", "value"), ("latest_metrics", "value"))
        }
    return [
        TrackedRun(
            id_, name or "", status_, started / 1000, ended / 1000 if ended else None,
            found["tags"].get(id_, {}), found["params"].get(id_, {}), found["latest_metrics"].get(id_, {}),
        )
        for id_, name, status_, started, ended in rows
    ]  # fmt: skip


def _by_run(database: sqlite3.Connection, table: str, column: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for some in _pages(ids):
        marks = ",".join("?" * len(some))
        for run, key, value in database.execute(
            f"select run_uuid, key, {column} from {table} where run_uuid in ({marks})", some
        ):
            found.setdefault(run, {})[key] = value
    return found


def _pages(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), _PAGE):
        yield ids[start : start + _PAGE]


def _from_mlflow(home: Path, tags: Mapping[str, str], status: str | None, limit: int) -> list[TrackedRun]:
    client, experiment = stores.reach(home)
    conditions = [f"tags.`{key}` = '{value}'" for key, value in tags.items()]
    conditions += [f"attributes.status = '{status}'"] if status else []
    found: list[Any] = []
    token = None
    while True:
        size = min(1000, limit - len(found)) if limit else 1000
        page = client.search_runs(
            [experiment], " and ".join(conditions), max_results=size, order_by=["start_time DESC"], page_token=token
        )
        found += page
        token = page.token
        if not token or (limit and len(found) >= limit):
            return [_of_mlflow(run) for run in found]


def _of_mlflow(run: Any) -> TrackedRun:
    info, data = run.info, run.data
    ended = info.end_time / 1000 if info.end_time else None
    return TrackedRun(
        info.run_id,
        info.run_name or "",
        info.status,
        info.start_time / 1000,
        ended,
        data.tags,
        data.params,
        data.metrics,
    )


def short(id_: str) -> str:
    return id_[:_SHORT]


def differences(runs: Sequence[TrackedRun]) -> tuple[dict[str, list[str | None]], list[str]]:
    """What is not the same in all runs, value by value, and the names of what is. Times and ids are left out."""
    tables = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table))
    differing = {name: [table.get(name) for table in tables] for name in names}
    return (
        {name: values for name, values in differing.items() if len(set(values)) > 1},
        [name for name, values in differing.items() if len(set(values)) == 1],
    )


def _facts(run: TrackedRun) -> dict[str, str]:
    """Parameters, data, code, machine and metrics under the names that people see."""
    kept = ("input.", "git.", "compute.", "evaluation.", "code.", "dvc.exp")
    tags = {name: value for name, value in run.tags.items() if name.startswith(kept)}
    metrics = {f"metric {name}": f"{value:.6g}" for name, value in _numbers(run.metrics.items())}
    return {"stage": run.stage, "instance": run.instance_name, "status": run.status, **run.params, **tags, **metrics}


def _numbers(metrics: Iterable[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    for name, value in metrics:
        if not name.startswith("system/"):
            yield name, value
