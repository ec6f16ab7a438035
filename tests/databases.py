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


@contextlib.contextmanager
def server():
    """A PostgreSQL server without a password on 127.0.0.1, stopped at the end; yields its URL up to the database."""
    folder, port, binaries = Path(tempfile.mkdtemp(prefix="dmat-postgres-")), free_port(), program_folder()
    user_options = {}
    if os.getuid() == 0:  # the server refuses to run as root
        owner = pwd.getpwnam("postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        user_options = {"user": "postgres", "group": owner.pw_gid, "extra_groups": []}
    folder.chmod(0o700)

    def call(*command):
        subprocess.run(
            [binaries / command[0], *command[1:]], check=True, cwd="/", stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, **user_options,
        )  # fmt: skip

    data = folder / "data"
    options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
    try:
        call("initdb", "-D", str(data), "-A", "trust", "-U", "dmat", "--no-sync")
        call("pg_ctl", "-D", str(data), "-w", "-o", options, "-l", str(folder / "log"), "start")
        yield f"postgresql+psycopg://dmat@127.0.0.1:{port}"
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            call("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def database_url(store, request, folder):
    """URL of a new, empty storage. Without PostgreSQL its tests are skipped; `.ci/run` installs it."""
    if store == "sqlite":
        return f"sqlite:///{folder}/studies.db"
    if program_folder() is None:
        pytest.skip("PostgreSQL is not installed")
    base = request.getfixturevalue("postgres")
    import psycopg

    name = f"t{uuid.uuid4().hex[:12]}"
    with psycopg.connect(f"{base.replace('+psycopg', '')}/postgres", autocommit=True) as connection:
        connection.execute(f"create database {name}")
    return f"{base}/{name}"
