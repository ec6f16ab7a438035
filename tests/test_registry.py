"""Evaluated models in MLflow's registry, with a real embedded store: champions, fetching, refusals.

Run alone: pytest tests/test_registry.py
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dmat
from dmat import files
from dmat.errors import DmatError
from dmat.tracking import registry, run_record, stores
from dmat.tracking.registry import RegistryCandidate
from dmat.training import weights
from tests import forked

NAME = "digits-3f2a91c0-linf-1_5"
SIDECAR = {"kind": "classifier", "network": {"name": "a"}, "image_shape": [2, 2, 1], "classes": 2}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A project's store; created once, because MLflow takes seconds to create one."""
    home = tmp_path_factory.mktemp("home")
    client, experiment = stores.connect(home)
    return home, client, experiment


def _register(store, name, score, run=None, number=1.0):
    """Registers a model, all weights `number`, of a run; returns the run's id."""
    home, client, experiment = store
    run = run or client.create_run(experiment).info.run_id
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, number)
    path = home / f"{run}.safetensors"
    weights.save(path, layer.state_dict(), SIDECAR)
    assert registry.register(client, run, _candidate(name, path, score)) is None
    return run


def _candidate(name, path, score):
    """A candidate as if the files at `path` had been evaluated."""
    sums = {"weights_sha256": files.sha256(path), "sidecar_sha256": files.sha256(path.with_suffix(".json"))}
    return RegistryCandidate(name, path, {"threat.norm": "linf"}, score, **sums)


def _champion(store, name):
    return next(
        (
            version
            for version in registry.list_versions(store[0])
            if version["name"] == name and version["champion"]
        ),
        None,
    )


def test_names_have_no_character_that_mlflow_refuses():
    assert registry.model_name("digits", "3f2a91c0" + 56 * "0", "linf", "1/5") == NAME
    assert registry.model_name("a:b", 64 * "f", "l2", "128/255") == "a_b-ffffffff-l2-128_255"


def test_the_champion_moves_only_to_a_better_and_checked_model(store):
    """Scores in order, None without a headline, and the champion after each."""
    name, runs, champions = "turns", [], []
    for score in (None, 0.70, 0.65, None, 0.80, 0.80, 0.75):
        runs.append(_register(store, name, score))
        champion = _champion(store, name)
        champions.append(runs.index(champion["run"]) if champion else None)
    assert champions == [None, 1, 1, 1, 4, 4, 4]
    assert len([version for version in registry.list_versions(store[0]) if version["name"] == name]) == 7


def test_names_have_champions_of_their_own(store):
    best = _register(store, "own-a", 0.9)
    other = _register(store, "own-b", 0.1)
    assert (_champion(store, "own-a")["run"], _champion(store, "own-b")["run"]) == (best, other)


def test_registering_again_adds_nothing(store):
    """As after an outage in the middle."""
    run = _register(store, "again", 0.5)
    _register(store, "again", 0.5, run=run)
    (registered,) = [version for version in registry.list_versions(store[0]) if version["name"] == "again"]
    assert (registered["version"], registered["champion"]) == (1, True)


def test_a_fetched_model_is_the_registered_one(store, tmp_path):
    _register(store, NAME, 0.6, number=6.0)
    _register(store, NAME, 0.7, number=7.0)
    _register(store, NAME, None, number=8.0)
    for version, number in (("champion", 7.0), ("1", 6.0), ("3", 8.0)):
        target = tmp_path / f"{version}.safetensors"
        tags = registry.fetch(store[0], f"{NAME}@{version}", target)
        state, sidecar = weights.read(target, "classifier")
        assert torch.equal(state["weight"], torch.full((2, 2), number))
        assert sidecar["sha256"] == files.sha256(target) == tags["weights.sha256"]
        assert tags["threat.norm"] == "linf"


def test_missing_models_and_versions_are_refused(store, tmp_path):
    _register(store, "unchecked", None)
    target = tmp_path / "x.safetensors"
    for reference, pattern in (
        ("unchecked", r"'unchecked' is not a model; expected NAME@champion or NAME@VERSION"),
        ("nothing@champion", r"no model 'nothing' is registered; expected one of .*unchecked"),
        ("unchecked@champion", r"unchecked has no champion: none of its 1 versions has a headline.*unchecked@1"),
        ("unchecked@7", r"unchecked has no version '7'; expected champion or one of 1"),
    ):
        with pytest.raises(DmatError, match=pattern):
            registry.fetch(store[0], reference, target)
    assert "nothing" not in {version["name"] for version in registry.list_versions(store[0])}
    target.write_text("mine")
    with pytest.raises(DmatError, match="exists; expected a new name"):
        registry.fetch(store[0], "unchecked@1", target)
    assert target.read_text() == "mine"


def test_an_altered_file_is_not_fetched(store, tmp_path):
    run = _register(store, "altered", 0.5)
    (path,) = stores.artifact_folder(store[0]).rglob(f"{run}.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DmatError, match="not the one that was registered"):
        registry.fetch(store[0], "altered@1", tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def _overwrite_weights(path, number):
    """Writes weights of another training to `path`."""
    weights.save(path, {"weight": torch.full((2, 2), number)}, SIDECAR)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "other-weights",
            lambda path: _overwrite_weights(path, 2.0),
            r"m\.safetensors has checksum .*; expected .* evaluated",
        ),
        ("other-sidecar", lambda path: _flip(path.with_suffix(".json")), r"m\.json has checksum .*; expected .* which"),
        ("no-weights", lambda path: path.unlink(), r"m\.safetensors is missing or cannot be read; expected"),
        ("no-sidecar", lambda p: p.with_suffix(".json").unlink(), r"m\.json is missing or cannot be read; expected"),
    ],
)
def test_files_that_were_not_evaluated_are_never_registered(store, tmp_path, name, change, message):
    """The store was unreachable when the evaluation ended; the files changed before the run was sent; it still ends."""
    home, client, _ = store
    _overwrite_weights(tmp_path / "m.safetensors", 1.0)
    candidate = _candidate(name, tmp_path / "m.safetensors", 0.9)
    change(tmp_path / "m.safetensors")
    run = _send_waiting_run(home, tmp_path / "run", candidate.plain(), message)
    assert client.get_run(run).info.status == "FINISHED"
    assert "gets no version" in client.get_run(run).data.tags["dmat.not_registered"]
    assert name not in {model.name for model in client.search_registered_models()}


def test_a_candidate_recorded_without_checksums_is_not_registered(store, tmp_path):
    _overwrite_weights(tmp_path / "m.safetensors", 1.0)
    candidate = _candidate("old", tmp_path / "m.safetensors", 0.9).plain()
    candidate = {name: value for name, value in candidate.items() if not name.endswith("_sha256")}
    _send_waiting_run(
        store[0],
        tmp_path / "run",
        candidate,
        "evaluated by an earlier version of dmat.* evaluate it again with --fresh",
    )
    assert "old" not in {model.name for model in store[1].search_registered_models()}


def _send_waiting_run(home, folder, model, message):
    """Sends the recorded end of a run later; returns the run's id."""
    folder.mkdir()
    record = run_record.RunRecord(folder, stores.identity(home))
    about = {"name": "one", "tags": {}, "settings": {}, "started": 1.0, "parent": None}
    end = {"status": "FINISHED", "error": "", "metrics": {}, "pictures": [], "models": [model], "ended": 2.0}
    record.update(about=about, ending=end)
    uploader = run_record.RunUploader(home, record)
    with uploader.exclusive():
        uploader.connect()
        uploader.send_end("FINISHED", record["ending"])
    (warning,) = record["warnings"]
    assert re.search(message, warning)
    return record["run"]


def test_files_replaced_while_they_are_sent_make_no_version(store, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    _overwrite_weights(path, 1.0)
    candidate, send = _candidate("replaced", path, 0.9), type(store[1]).log_artifact

    def log_artifact(client, run, file, folder):
        send(client, run, file, folder)
        _overwrite_weights(path, 2.0)

    monkeypatch.setattr(type(store[1]), "log_artifact", log_artifact)
    run = store[1].create_run(store[2]).info.run_id
    assert "has checksum" in registry.register(store[1], run, candidate)
    assert [version for version in registry.list_versions(store[0]) if version["name"] == "replaced"] == []


@pytest.mark.parametrize("tagged", [True, False], ids=["tagged", "of an earlier version"])
def test_a_damaged_sidecar_is_not_fetched(store, tmp_path, tagged):
    home, client, _ = store
    name = f"sidecar-{tagged}"
    run = _register(store, name, 0.5)
    if not tagged:
        client.delete_model_version_tag(name, "1", "sidecar.sha256")
    (path,) = stores.artifact_folder(home).rglob(f"{run}.json")
    good = path.read_bytes()
    damages = [b"", b"{}", b"[]", b"null", good[:-20], good.decode().encode("utf-16"), 9999 * b"[", b"\xff" + good]
    damages += [good.replace(b"classifier", b"denoiser"), good.replace(b"sha256", b"sha257")]
    damages += [good.replace(b'"a"', b'"b"'), good + b" "] if tagged else []
    for number, damaged in enumerate(damages):
        path.write_bytes(damaged)
        with pytest.raises(
            DmatError, match=r"the sidecar of sidecar-.* version 1 is missing or not the one that was reg"
        ):
            registry.fetch(home, f"{name}@1", tmp_path / f"{number}/x.safetensors")
    path.unlink()
    with pytest.raises(DmatError, match="the sidecar of"):
        registry.fetch(home, f"{name}@1", tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
    path.write_bytes(good)
    assert ("sidecar.sha256" in registry.fetch(home, f"{name}@1", tmp_path / "x.safetensors")) is tagged
    assert (tmp_path / "x.json").read_bytes() == good


def test_a_pair_is_written_completely_or_not_at_all(store, tmp_path, monkeypatch):
    _register(store, "pair", 0.5)
    (tmp_path / "x.json").write_text("mine")
    with pytest.raises(DmatError, match=r"x\.json exists; expected a new name"):
        registry.fetch(store[0], "pair@1", tmp_path / "x.safetensors")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    os_replace = files.os.replace

    def full_disk(source, target):
        if str(target).endswith("y.safetensors"):
            raise OSError(28, "No space left on device")
        os_replace(source, target)

    monkeypatch.setattr(files.os, "replace", full_disk)
    with pytest.raises(DmatError, match=r"y\.safetensors: could not be written"):
        registry.fetch(store[0], "pair@1", tmp_path / "y.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning")  # of MLflow's own code
def test_an_evaluation_registers_its_model(finished, tmp_path, put_store):
    """The stage with tracking on: version, tags, no champion without a headline, and `dmat models list` and `get`."""
    project = finished.copy_without("evaluate_robust", tmp_path / "project")
    project.write({"evaluate_robust": {"images": 10}})
    put_store(project.folder)
    command = project.command("evaluate_robust", DMAT_TRACKING="on")
    assert command.wait()[0] == 0
    client, experiment = stores.connect(project.folder)
    (run,) = client.search_runs([experiment], "params.beta = '5' and params.arm = 'generated' and params.seed = '1'")
    assert run.data.params["generated_share"] == "0.7"
    assert "auto_attack" not in run.data.metrics  # ten images give no headline
    (version,) = registry.list_versions(project.folder)
    tags = version["tags"]
    name = f"digits-{tags['data.test.sha256'][:8]}-linf-1_5"
    assert (version["name"], version["champion"]) == (name, False)
    assert (tags["threat.norm"], tags["threat.epsilon"], tags["dmat.arm"]) == ("linf", "1/5", "generated")
    assert tags["evaluation.measure"] == "auto_attack_subset"
    assert tags["accuracy.n"] == "10"
    sidecar = project.folder / "artifacts/train_robust/generated-1/best.json"
    assert tags["weights.sha256"] == files.read_json(sidecar)["sha256"]
    assert tags["sidecar.sha256"] == files.sha256(sidecar)
    assert "[" in tags["accuracy.auto_attack_subset"]
    output = _dmat(project.folder, "list", "--json")
    assert json.loads(output)[0]["version"] == 1
    _loads_as_pyfunc(project.folder, f"models:/{name}/1")
    _dmat(project.folder, "get", f"{name}@1", "--to", "back.safetensors")
    best = project.folder / "artifacts/train_robust/generated-1/best.safetensors"
    assert (project.folder / "back.safetensors").read_bytes() == best.read_bytes()
    project.write({"evaluate_robust": {"images": 0}})  # all: a headline
    assert project.command("evaluate_robust", DMAT_TRACKING="on").wait()[0] == 0
    (whole,) = client.search_runs([experiment], "params.beta = '5' and metrics.auto_attack >= 0")
    assert whole.data.metrics["auto_attack"] == whole.data.metrics["best_auto_attack"]
    assert [version["champion"] for version in registry.list_versions(project.folder)] == [True, False]


def _loads_as_pyfunc(folder, uri):
    """From safetensors by dmat's own module: the model has no pickle, and its signature refuses other images."""
    import mlflow

    mlflow.set_tracking_uri(stores.store_uri(folder))
    try:
        path = Path(mlflow.artifacts.download_artifacts(uri))
        # MLflow's download adds where the files are from
        assert {*path.iterdir()} - {path / "registered_model_meta"} == {
            path / name for name in ("MLmodel", "best.safetensors", "best.json")
        }
        loaded = mlflow.pyfunc.load_model(uri)
    finally:
        mlflow.set_tracking_uri(None)
    images = np.random.default_rng(1).random((3, 1, 8, 8), np.float32)
    model = dmat.load_model(folder / "artifacts/train_robust/generated-1/best.safetensors")
    expected = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(loaded.predict(images), expected, atol=1e-4)  # other threads round differently
    assert loaded.metadata.signature.outputs.inputs[0].shape == (-1, 10)
    with pytest.raises(mlflow.exceptions.MlflowException, match="enforce schema"):
        loaded.predict(images[:, :, :5])
    with pytest.raises(DmatError, match=r"the images have values from 1.* to [12].*; expected \[0, 1\]; divide"):
        loaded.predict(images + 1)


def _dmat(folder, *arguments):
    code, text = forked.Command(folder, "models", *arguments, DMAT_TRACKING="on").wait()
    assert code == 0, text
    return text
