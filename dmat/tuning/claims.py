"""Who is at work on what, in the study's own storage: a claim is a row that one worker holds and renews.

A trial must be computed by one worker at a time, on whichever machine, and by another as soon as that one is gone.
Optuna's heartbeat knows the second only, for `optimize` alone, and makes a new trial of it; a file lock ends at the
machine's edge. A claim is free when its holder gave it back, when the holder's process is gone (seen at once on the
same machine), or when it was not renewed for `STALE` seconds by the database's own clock.
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

RENEW = 10.0  # seconds
STALE = 60.0  # seconds after which the holder counts as gone, wherever it is
_TURN = "turn"
_LOOK_EVERY = 0.1  # seconds between two attempts at a turn

_METADATA = MetaData()
_CLAIMS = Table(
    "dmat_claims",
    _METADATA,
    Column("study", String(512), primary_key=True),
    Column("item", String(64), primary_key=True),
    Column("holder", String(64)),  # NULL: nobody
    Column("place", String(512)),  # machine and process namespace: only there the process can be looked at
    Column("pid", Integer),
    Column("born", Float),  # `liveness.started`: the number alone may belong to another process by now
    Column("renewed", Float),  # seconds since 1970 by the database's clock
    Column("deaths", Integer),  # holders that went without giving it back
)


class Claims:
    """Claims of this process in one study. Use as a context: a thread renews what is held until the block ends, and
    then everything is given back."""

    def __init__(self, engine: sqlalchemy.Engine, study: str):
        self._engine, self._study = engine, study
        self._holder, self._machine_id = uuid.uuid4().hex, _machine_id()
        self._born = liveness.started(os.getpid())
        self._held: set[str] = set()
        self._confirmed: dict[str, float] = {}  # item -> when the storage last said that it is ours
        self._closing = threading.Event()
        self._now = (
            sqlalchemy.text("(julianday('now') - 2440587.5) * 86400.0")
            if engine.dialect.name == "sqlite"
            else sqlalchemy.func.extract("epoch", sqlalchemy.func.clock_timestamp())
        )
        try:
            _METADATA.create_all(engine)
        except sqlalchemy.exc.SQLAlchemyError:  # another process makes it at this moment
            time.sleep(0.5)
            _METADATA.create_all(engine)

    def __enter__(self) -> "Claims":
        threading.Thread(target=self._renew_until_closed, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):  # a storage that is away: the claims become stale
            for item in list(self._held):
                self.give_back(item)

    def take(self, item: str) -> bool:
        """Whether this process holds the item now. False: another one, which seems alive, does."""
        mine = {"holder": self._holder, "place": self._machine_id, "pid": os.getpid(), "born": self._born}
        with self._engine.begin() as connection:
            row = connection.execute(_CLAIMS.select().where(*self._key(item))).mappings().first()
            now = connection.execute(sqlalchemy.select(self._now)).scalar_one()
            if row is None:
                values = {"study": self._study, "item": item, "renewed": now, "deaths": 0, **mine}
                try:
                    with connection.begin_nested():
                        connection.execute(_CLAIMS.insert().values(values))
                except sqlalchemy.exc.IntegrityError:
                    return False  # another process was quicker
            else:
                if not self._is_free(row, float(now)):
                    return bool(row["holder"] == self._holder)
                left = row["holder"] is not None
                same = _CLAIMS.c.holder == row["holder"] if left else _CLAIMS.c.holder.is_(None)
                taken = connection.execute(
                    _CLAIMS.update()
                    .where(*self._key(item), same, _CLAIMS.c.renewed == row["renewed"])
                    .values(renewed=now, deaths=row["deaths"] + int(left), **mine)
                )
                if taken.rowcount != 1:
                    return False
        self._held.add(item)
        self._confirmed[item] = _awake_or_not()
        return True

    def holds(self, item: str, within: float = 0.0) -> bool:
        """Renews the claim, and says whether it still is this process's: one that slept for a minute may have lost
        it. within: seconds, well below `STALE`, for which an earlier answer holds; nobody takes a claim in them."""
        asked = _awake_or_not()
        if asked - self._confirmed.get(item, -STALE) < within:
            return True
        with self._engine.begin() as connection:
            renewed = connection.execute(
                _CLAIMS.update().where(*self._key(item), _CLAIMS.c.holder == self._holder).values(renewed=self._now)
            )
        if renewed.rowcount != 1:
            self._confirmed.pop(item, None)
            return False
        self._confirmed[item] = asked
        return True

    def give_back(self, item: str) -> None:
        self._held.discard(item)
        self._confirmed.pop(item, None)
        with self._engine.begin() as connection:
            connection.execute(
                _CLAIMS.update().where(*self._key(item), _CLAIMS.c.holder == self._holder).values(holder=None)
            )

    def lost_workers(self, item: str) -> int:
        """Holders that went without giving the item back."""
        with self._engine.begin() as connection:
            return connection.execute(sqlalchemy.select(_CLAIMS.c.deaths).where(*self._key(item))).scalar() or 0

    def holder(self, item: str) -> str | None:
        """Who holds an item, for people."""
        with self._engine.begin() as connection:
            row = connection.execute(_CLAIMS.select().where(*self._key(item))).mappings().first()
            now = connection.execute(sqlalchemy.select(self._now)).scalar_one()
        if row is None or self._is_free(row, float(now)):
            return None
        return f"process {row['pid']} of {row['place'].partition('/')[0]}"

    def forget(self) -> None:
        """Of a study that is gone."""
        with self._engine.begin() as connection:
            connection.execute(_CLAIMS.delete().where(_CLAIMS.c.study == self._study, _CLAIMS.c.item != _TURN))

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, no other process decides which trial comes next. Short: nothing is computed there."""
        while not self.take(_TURN):
            time.sleep(_LOOK_EVERY)
        try:
            yield
        finally:
            self.give_back(_TURN)

    def _key(self, item: str) -> tuple[Any, ...]:
        return _CLAIMS.c.study == self._study, _CLAIMS.c.item == item

    def _is_free(self, row: Any, now: float) -> bool:
        if row["holder"] is None or now - row["renewed"] > STALE:
            return True
        return bool(row["place"] == self._machine_id and liveness.started(row["pid"]) != row["born"])

    def _renew_until_closed(self) -> None:
        while not self._closing.wait(RENEW):
            for item in list(self._held):
                with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):  # tried again; asked before every report
                    self.holds(item)


def _awake_or_not() -> float:
    """Seconds of a clock that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _machine_id() -> str:
    """This machine since it was started, and this namespace of processes: two containers may have one name.

    "ticks" says what `born` is. A claim of an earlier dmat has a time of day there; it counts as of another machine."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return "/".join([platform.node(), liveness.boot_id(), namespace, "ticks"])
