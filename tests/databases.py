"""Storages of studies in tests: the embedded file, and a real PostgreSQL server in a temporary folder."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

import pytest

from tests.servers import free_port

STORES = ("sqlite", "postgresql")


def program_folder():
    """Folder of PostgreSQL's programs, or None."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return installed[-1].parent if installed else Path(on_path).parent if on_path else None


class PostgreSQL:
    """A server without a password on 127.0.0.1, in a temporary folder. It keeps its port and its data when restarted.

    url: up to the database.
    """

    def __init__(self):
        self._folder, self._port = Path(tempfile.mkdtemp(prefix="dmat-postgres-")), free_port()
        self._user_options = {}
        if os.getuid() == 0:  # the server refuses to run as root
            owner = pwd.getpwnam("postgres")
            os.chown(self._folder, owner.pw_uid, owner.pw_gid)
            self._user_options = {"user": "postgres", "group": owner.pw_gid, "extra_groups": []}
        self._folder.chmod(0o700)
        self.url = f"postgresql+psycopg://dmat@127.0.0.1:{self._port}"
        self._call("initdb", "-A", "trust", "-U", "dmat", "--no-sync")

    def start(self):
        options = f"-c listen_addresses=127.0.0.1 -p {self._port} -k {self._folder} -c fsync=off"
        self._call("pg_ctl", "-w", "-o", options, "-l", str(self._folder / "log"), "start")

    def stop(self):
        """Ends the server at once, as a crash does: it loses nothing that was committed."""
        self._call("pg_ctl", "-m", "immediate", "stop")

    def remove(self):
        with contextlib.suppress(subprocess.CalledProcessError):
            self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def create_database(self, name):
        import psycopg

        with psycopg.connect(f"{self.url.replace('+psycopg', '')}/postgres", autocommit=True) as connection:
            connection.execute(f"create database {name}")
        return f"{self.url}/{name}"

    def _call(self, program, *arguments):
        subprocess.run(
            [program_folder() / program, "-D", str(self._folder / "data"), *arguments], check=True, cwd="/",
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self._user_options,
        )  # fmt: skip


@contextlib.contextmanager
def server():
    """A running PostgreSQL server, stopped at the end."""
    database = PostgreSQL()
    try:
        database.start()
        yield database
    finally:
        database.remove()


def database_url(store, request, folder):
    """URL of a new, empty storage. Without PostgreSQL its tests are skipped; `.ci/run` installs it."""
    if store == "sqlite":
        return f"sqlite:///{folder}/studies.db"
    if program_folder() is None:
        pytest.skip("PostgreSQL is not installed")
    return request.getfixturevalue("postgres").create_database(f"t{uuid.uuid4().hex[:12]}")
