"""The pipeline and a study on the services of docker-compose.yml, which run on this machine without containers.

While they compute, a worker is killed, the database restarts and the object store is away: nothing is lost, and nothing
is there twice. `make test-services` runs this file; it needs PostgreSQL's programs and some minutes.
"""

import collections
import concurrent.futures
import contextlib
import json

import optuna
import pytest

from dmat import files
from dmat.pipeline import STAGES
from tests import servers
from tests.conftest import ROOT
from tests.forked import until
from tests.services import ADMIN, BUCKETS, PASSWORD, PATIENCE, Services, kill_processes_in, status
from tests.test_pipeline import Clone, Project

pytestmark = [pytest.mark.services, pytest.mark.timeout(5400)]
INSTANCES = 11  # of one arm and one seed
TRIALS = 4


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    folder = tmp_path_factory.mktemp("services")
    running = Services(folder)
    try:
        yield running
    finally:
        running.stop()
        kill_processes_in(folder)


@pytest.fixture(scope="module")
def project(services, tmp_path_factory, tiny_params_once):
    """A project whose stages ran on two workers while every service failed at least once.

    states: how often each state of an instance was reported.
    """
    del tiny_params_once["arms"]["real_only"]
    tiny_params_once["write_report"]["baseline"] = "generated"
    tiny_params_once["compute"]["save_every_seconds"] = 0.05
    tiny_params_once["train_robust"]["images_seen"] = 2560  # long enough to be killed in the middle
    project = Project(tmp_path_factory.mktemp("project"), ROOT, tiny_params_once)
    for arguments in (
        ["add", "--default", "store", f"s3://{BUCKETS[1]}/project"],
        ["modify", "store", "endpointurl", services.store.url],
    ):
        project.run("dvc", "remote", *arguments)
    project.run("dmat", "lock")  # whether code.yaml is stale is for tests/test_lock.py to say
    project.commit("the remote")
    services.cluster.start_workers(2, _environment(services) | {"PYTHONPATH": str(project.folder)})
    try:
        _reproduce_with_failures(services, project)
        project.run("dmat", "runs", "sync", real=True, **_environment(services))
        yield project
    finally:
        kill_processes_in(project.folder)


def _reproduce_with_failures(services, project):
    """`dmat repro` on the cluster. Each service fails while the instance that is named here runs."""
    failures = {
        "train_scorer": lambda: _kill_worker(services, process, "train_scorer"),
        "train_diffusion@edm": lambda: _away(services.store, project, process, "train_diffusion/edm"),
        "generate_images@edm18": lambda: _away(services.database, project, process, "generate_images/edm18"),
        "train_robust@generated-1": lambda: _kill_worker(services, process, "train_robust@generated-1"),
        "evaluate_robust@generated-1": lambda: _away(services.mlflow, project, process, "evaluate_robust/generated-1"),
    }
    project.states, lines = collections.Counter(), []
    process = project.start(
        "dmat", "repro", "--cluster", services.cluster.address, "--json", real=True, **_environment(services)
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        failing = []
        try:
            for line in process.stdout:
                lines.append(line)
                if not line.startswith("{"):
                    continue
                event = json.loads(line)
                project.states[event["instance"], event["state"]] += 1
                if event["state"] == "started" and (failure := failures.pop(event["instance"], None)):
                    failing.append(pool.submit(failure))
            process.wait()
        finally:
            servers.kill(process)
    for future in failing:
        future.result()
    assert process.returncode == 0, "".join(lines)
    assert not failures


def _environment(services):
    return {**services.environment, "DVC_NO_ANALYTICS": "1"}


def _away(service, project, process, work):
    """Stops a service until a run notices, which its record says. work: start of the path of its work folder."""
    service.stop()

    def noticed():
        return any(files.read_json(path)["problem"] for path in project.folder.glob(f"runs/{work}-*/tracking.json"))

    until(lambda: noticed() or process.poll() is not None, PATIENCE)
    service.start()


def _kill_worker(services, process, instance):
    """Kills the worker that computes an instance, once its command runs."""
    workers = []

    def computes():
        workers.extend(filter(None, [services.cluster.worker_of(f"--single-item {instance}")]))
        return workers or process.poll() is not None

    until(computes, PATIENCE)
    for worker in workers:
        worker.kill()


def test_mlflow_lets_only_users_in(services):
    url = f"{services.mlflow.url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    assert [status(url), status(url, ADMIN, "wrong"), status(url, ADMIN, PASSWORD)] == [401, 401, 200]


def test_the_object_store_refuses_another_key(services):
    from botocore.exceptions import ClientError

    _bucket(services).put_object(Bucket=BUCKETS[1], Key="probe", Body=b"x")
    with pytest.raises(ClientError, match=r"SignatureDoesNotMatch|AccessDenied|InvalidAccessKeyId"):
        _bucket(services, "wrong").get_object(Bucket=BUCKETS[1], Key="probe")
    _bucket(services).delete_object(Bucket=BUCKETS[1], Key="probe")


def test_every_instance_ran_once_although_workers_were_killed(project):
    ended = [instance for (instance, state), _ in project.states.items() if state in ("done", "unchanged")]
    assert len(ended) == len({*ended}) == INSTANCES
    for instance in ("train_scorer", "train_robust@generated-1"):
        assert project.states[instance, "started"] >= 2, "its worker was not killed"


def test_mlflow_has_every_run_once_with_every_point_once(services, project, monkeypatch):
    client, runs = _runs(services, project, monkeypatch)
    instances = collections.Counter(run.info.run_name for run in runs)
    assert {*instances.values()} == {1}, instances
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if run.data.tags["dmat.stage"] == "dvc"]
    stages = [run for run in runs if run is not parent]
    assert {run.data.tags.get("mlflow.parentRunId") for run in stages} == {parent.info.run_id}
    assert len(stages) == INSTANCES
    histories = 0
    for run in stages:
        points = collections.defaultdict(list)
        for line in _lines(project.folder / run.data.tags["dmat.work"] / "metrics.jsonl"):
            for name in line.keys() - {"images_seen"}:
                points[name].append((line["images_seen"], line[name]))
        for name, expected in points.items():
            history = client.get_metric_history(run.info.run_id, name)
            assert sorted((point.step, point.value) for point in history) == expected, (run.info.run_name, name)
            histories += 1
    assert histories > 20


def test_artifacts_are_in_the_object_store(services, project, monkeypatch, tmp_path):
    client, runs = _runs(services, project, monkeypatch)
    pages = _bucket(services).get_paginator("list_objects_v2").paginate(Bucket=BUCKETS[0])
    keys = {item["Key"] for page in pages for item in page.get("Contents", ())}
    names = {run.info.run_id: run.info.run_name for run in runs if run.data.tags["dmat.stage"] in STAGES}
    with_artifacts = {names[run] for run in names if any(f"/{run}/artifacts/" in key for key in keys)}
    without = {name.split()[0] for name in names.values()} - {name.split()[0] for name in with_artifacts}
    assert without <= {"mix_images", "select_images"}  # they have no pictures
    (run,) = [run for run in names if names[run].startswith("train_diffusion")]
    pictures = [*(project.folder / "artifacts/pictures/train_diffusion/edm").iterdir()]
    copies = [client.download_artifacts(run, path.name, str(tmp_path)) for path in pictures]
    assert [files.sha256(path) for path in pictures] == [files.sha256(path) for path in copies]


def test_a_second_clone_pulls_and_reruns_nothing(services, project, tmp_path):
    environment = _environment(services)
    project.run("dvc", "push", **environment)
    project.commit("results")
    clone = Clone(tmp_path / "clone", project)
    clone.run("dvc", "pull", "dvc.yaml", **environment)
    text = clone.run("dmat", "repro", "--json", real=True, **environment)
    assert json.loads(text.splitlines()[-1]) == {"instances": 0}
    for name in ("train_robust", "evaluate_robust", "write_report"):
        assert files.checksum(clone.folder / "artifacts" / name) == files.checksum(project.folder / "artifacts" / name)


def test_a_study_on_two_workers_survives_the_database_and_a_worker(services, project):
    environment = _environment(services)
    command = ("dmat", "tune", "start", "--trials", str(TRIALS), "--cluster", services.cluster.address, "--json")
    storage = optuna.storages.RDBStorage(services.studies, engine_kwargs={"pool_pre_ping": True})

    def ended():
        with contextlib.suppress(ValueError):  # there is no study yet
            (study,) = storage.get_all_studies()
            return sum(trial.state.is_finished() for trial in storage.get_all_trials(study._study_id))
        return 0

    process = project.start(*command, real=True, **environment)
    try:
        until(lambda: ended() or process.poll() is not None, PATIENCE)
        services.cluster.worker_processes()[0].kill()
        services.database.stop()
        text, _ = process.communicate(timeout=PATIENCE)
    finally:
        servers.kill(process)
    services.database.start()
    assert process.returncode == 2, text
    project.run(*command, real=True, **environment)
    (study,) = storage.get_all_studies()
    trials = storage.get_all_trials(study._study_id)
    assert [trial.number for trial in trials] == [*range(TRIALS)]
    assert {trial.state for trial in trials} <= {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED}
    rows = (project.folder / "artifacts/tune/generated/trials.csv").read_text().splitlines()[1:]
    assert sorted(int(row.partition(",")[0]) for row in rows) == [*range(TRIALS)]


def _bucket(services, secret=PASSWORD):
    import boto3  # of the extra `services`, which only these tests need

    return boto3.client(
        "s3", endpoint_url=services.store.url, region_name="us-east-1", aws_access_key_id="dmat",
        aws_secret_access_key=secret,
    )  # fmt: skip


def _runs(services, project, monkeypatch):
    """A client with a login, and the MLflow runs of the pipeline."""
    for name, value in services.mlflow.environment.items():
        monkeypatch.setenv(name, value)
    from mlflow import MlflowClient

    client = MlflowClient(services.mlflow.url)
    runs = client.search_runs([client.get_experiment_by_name("dmat").experiment_id])
    return client, [run for run in runs if run.data.tags["dmat.stage"] in {*STAGES, "dvc"}]


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
