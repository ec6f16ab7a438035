"""Claims in the storage of a study: rows that say which worker computes which trial. Its holder renews a claim.

One worker at a time may compute a trial, on any machine, and another one as soon as that worker has ended. Optuna's
heartbeat handles only the second, only for `optimize`, and creates a new trial. A file lock works on one machine only.
A claim is free if its holder released it, if the process of the holder has ended (detected at once on the same
machine), or if it was not renewed for `STALE` seconds by the clock of the database.
"""

import contextlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Column, Float, Integer, MetaData, String, Table

from dmat import liveness

RENEW = 10.0  # seconds between two renewals
STALE = 60.0  # seconds without renewal after which the holder counts as ended, on any machine
_QUEUE_LOCK = "turn"  # key of the claim that protects the choice of the next trial
_LOOK_EVERY = 0.1  # seconds between two attempts to take _QUEUE_LOCK

_METADATA = MetaData()
_CLAIMS = Table(
    "dmat_claims",
    _METADATA,
    Column("study", String(512), primary_key=True),
    Column("item", String(64), primary_key=True),
    Column("holder", String(64)),  # NULL: the claim is free
    Column("place", String(512)),  # machine and process namespace, where the process can be checked
    Column("pid", Integer),
    Column("born", Float),  # `liveness.start_time` of the process, because pids are reused
    Column("renewed", Float),  # seconds since 1970 by the clock of the database
    Column("deaths", Integer),  # holders that ended without releasing the claim
)


class Claims:
    """Claims of this process in one study. A context manager: a thread renews the held claims until the block ends;
    then all are released."""

    def __init__(self, engine: sqlalchemy.Engine, study: str):
        self._engine, self._study = engine, study
        self._holder, self._machine_id = uuid.uuid4().hex, _machine_id()
        self._start_time = liveness.start_time(os.getpid())
        self._held: set[str] = set()
        self._confirmed: dict[str, float] = {}  # key -> time of the last confirmation by the storage
        self._closing = threading.Event()
        self._now = (
            sqlalchemy.text("(julianday('now') - 2440587.5) * 86400.0")
            if engine.dialect.name == "sqlite"
            else sqlalchemy.func.extract("epoch", sqlalchemy.func.clock_timestamp())
        )
        try:
            _METADATA.create_all(engine)
        except sqlalchemy.exc.SQLAlchemyError:  # another process is creating the table
            time.sleep(0.5)
            _METADATA.create_all(engine)

    def __enter__(self) -> "Claims":
        threading.Thread(target=self._renew_until_closed, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):  # the storage is unreachable: the claims become stale
            for key in list(self._held):
                self.release(key)

    def take(self, key: str) -> bool:
        """Takes a claim if it is free. Returns whether this process holds it now; False: a running process holds it."""
        claim = {"holder": self._holder, "place": self._machine_id, "pid": os.getpid(), "born": self._start_time}
        with self._engine.begin() as connection:
            row = connection.execute(_CLAIMS.select().where(*self._key(key))).mappings().first()
            now = connection.execute(sqlalchemy.select(self._now)).scalar_one()
            if row is None:
                values = {"study": self._study, "item": key, "renewed": now, "deaths": 0, **claim}
                try:
                    with connection.begin_nested():
                        connection.execute(_CLAIMS.insert().values(values))
                except sqlalchemy.exc.IntegrityError:
                    return False  # another process was quicker
            else:
                if not self._is_free(row, float(now)):
                    return bool(row["holder"] == self._holder)
                was_held = row["holder"] is not None
                same_holder = _CLAIMS.c.holder == row["holder"] if was_held else _CLAIMS.c.holder.is_(None)
                result = connection.execute(
                    _CLAIMS.update()
                    .where(*self._key(key), same_holder, _CLAIMS.c.renewed == row["renewed"])
                    .values(renewed=now, deaths=row["deaths"] + int(was_held), **claim)
                )
                if result.rowcount != 1:
                    return False
        self._held.add(key)
        self._confirmed[key] = _boottime()
        return True

    def holds(self, key: str, within: float = 0.0) -> bool:
        """Renews a claim. Returns whether this process still holds it: after a minute asleep it may have lost it.

        within: seconds, well below `STALE`, for which an earlier confirmation is enough: no process takes a claim then.
        """
        now = _boottime()
        if now - self._confirmed.get(key, -STALE) < within:
            return True
        with self._engine.begin() as connection:
            renewed = connection.execute(
                _CLAIMS.update().where(*self._key(key), _CLAIMS.c.holder == self._holder).values(renewed=self._now)
            )
        if renewed.rowcount != 1:
            self._confirmed.pop(key, None)
            return False
        self._confirmed[key] = now
        return True

    def release(self, key: str) -> None:
        self._held.discard(key)
        self._confirmed.pop(key, None)
        with self._engine.begin() as connection:
            connection.execute(
                _CLAIMS.update().where(*self._key(key), _CLAIMS.c.holder == self._holder).values(holder=None)
            )

    def lost_workers(self, key: str) -> int:
        """Number of holders of a claim that ended without releasing it."""
        with self._engine.begin() as connection:
            return connection.execute(sqlalchemy.select(_CLAIMS.c.deaths).where(*self._key(key))).scalar() or 0

    def holder(self, key: str) -> str | None:
        """The holder of a claim, for messages; None if it is free."""
        with self._engine.begin() as connection:
            row = connection.execute(_CLAIMS.select().where(*self._key(key))).mappings().first()
            now = connection.execute(sqlalchemy.select(self._now)).scalar_one()
        if row is None or self._is_free(row, float(now)):
            return None
        return f"process {row['pid']} of {row['place'].partition('/')[0]}"

    def forget(self) -> None:
        """Deletes the claims of this study, but for _QUEUE_LOCK; for a study that was set aside."""
        with self._engine.begin() as connection:
            connection.execute(_CLAIMS.delete().where(_CLAIMS.c.study == self._study, _CLAIMS.c.item != _QUEUE_LOCK))

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Excludes other processes from choosing the next trial. Keep the block short; compute nothing in it."""
        while not self.take(_QUEUE_LOCK):
            time.sleep(_LOOK_EVERY)
        try:
            yield
        finally:
            self.release(_QUEUE_LOCK)

    def _key(self, key: str) -> tuple[Any, ...]:
        return _CLAIMS.c.study == self._study, _CLAIMS.c.item == key

    def _is_free(self, row: Any, now: float) -> bool:
        if row["holder"] is None or now - row["renewed"] > STALE:
            return True
        return bool(row["place"] == self._machine_id and liveness.start_time(row["pid"]) != row["born"])

    def _renew_until_closed(self) -> None:
        while not self._closing.wait(RENEW):
            for key in list(self._held):
                with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):  # tried again; asked before every report
                    self.holds(key)


def _boottime() -> float:
    """Seconds of a clock that also runs while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _machine_id() -> str:
    """Identifies this machine, its boot, and this process namespace: two containers may have the same host name.

    "ticks" is the unit of `born`. Claims of earlier versions of dmat have a time of day there; they count as claims of
    another machine.
    """
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return "/".join([platform.node(), liveness.boot_id(), namespace, "ticks"])
