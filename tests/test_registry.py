"""Evaluated models in MLflow's registry, with a real embedded store: champions, fetching, what is refused.

Run alone: pytest tests/test_registry.py
"""

import json

import pytest
import torch
from torch import nn

from dmat import files
from dmat.errors import DmatError
from dmat.tracking import registry, stores
from dmat.tracking.registry import Candidate
from dmat.training import weights
from tests import forked

NAME = "digits-3f2a91c0-linf-1_5"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A project's store; made once, since MLflow takes seconds to make one."""
    home = tmp_path_factory.mktemp("home")
    client, experiment = stores.connect(home)
    return home, client, experiment


def _register(store, name, score, run=None, number=1.0):
    """A run with a model of which all weights are `number`; returns the run's id."""
    home, client, experiment = store
    run = run or client.create_run(experiment).info.run_id
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, number)
    path = home / f"{run}.safetensors"
    weights.save(path, layer.state_dict(), {"kind": "classifier", "network": {"name": "a"}})
    registry.register(client, run, Candidate(name, path, {"threat.norm": "linf"}, score))
    return run


def _champion(store, name):
    return next((one for one in registry.listed(store[0]) if one["name"] == name and one["champion"]), None)


def test_names_have_no_character_that_mlflow_refuses():
    assert registry.name_of("digits", "3f2a91c0" + 56 * "0", "linf", "1/5") == NAME
    assert registry.name_of("a:b", 64 * "f", "l2", "128/255") == "a_b-ffffffff-l2-128_255"


def test_the_champion_moves_only_to_a_better_and_checked_model(store):
    """Scores in turn, None without a headline, and who is champion after each."""
    name, runs, champions = "turns", [], []
    for score in (None, 0.70, 0.65, None, 0.80, 0.80, 0.75):
        runs.append(_register(store, name, score))
        found = _champion(store, name)
        champions.append(runs.index(found["run"]) if found else None)
    assert champions == [None, 1, 1, 1, 4, 4, 4]
    assert len([one for one in registry.listed(store[0]) if one["name"] == name]) == 7


def test_names_have_champions_of_their_own(store):
    best = _register(store, "own-a", 0.9)
    other = _register(store, "own-b", 0.1)
    assert (_champion(store, "own-a")["run"], _champion(store, "own-b")["run"]) == (best, other)


def test_registering_again_adds_nothing(store):
    """As after an outage in the middle."""
    run = _register(store, "again", 0.5)
    _register(store, "again", 0.5, run=run)
    (only,) = [one for one in registry.listed(store[0]) if one["name"] == "again"]
    assert (only["version"], only["champion"]) == (1, True)


def test_a_model_comes_back_as_it_was(store, tmp_path):
    _register(store, NAME, 0.6, number=6.0)
    _register(store, NAME, 0.7, number=7.0)
    _register(store, NAME, None, number=8.0)
    for wanted, number in (("champion", 7.0), ("1", 6.0), ("3", 8.0)):
        target = tmp_path / f"{wanted}.safetensors"
        found = registry.fetch(store[0], f"{NAME}@{wanted}", target)
        state, sidecar = weights.read(target, "classifier")
        assert torch.equal(state["weight"], torch.full((2, 2), number))
        assert sidecar["sha256"] == files.sha256(target) == found["weights.sha256"]
        assert found["threat.norm"] == "linf"


def test_what_is_not_there_is_refused(store, tmp_path):
    _register(store, "unchecked", None)
    target = tmp_path / "x.safetensors"
    for wanted, words in (
        ("unchecked", r"'unchecked' is no model; expected NAME@champion or NAME@VERSION"),
        ("nothing@champion", r"no model 'nothing' is registered; expected one of .*unchecked"),
        ("unchecked@champion", r"unchecked has no champion: none of its 1 versions has a headline.*unchecked@1"),
        ("unchecked@7", r"unchecked has no version '7'; expected champion or one of 1"),
    ):
        with pytest.raises(DmatError, match=words):
            registry.fetch(store[0], wanted, target)
    assert "nothing" not in {one["name"] for one in registry.listed(store[0])}
    target.write_text("mine")
    with pytest.raises(DmatError, match="exists; expected a new name"):
        registry.fetch(store[0], "unchecked@1", target)
    assert target.read_text() == "mine"


def test_an_altered_file_is_not_handed_out(store, tmp_path):
    run = _register(store, "altered", 0.5)
    (path,) = stores.artifact_folder(store[0]).rglob(f"{run}.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DmatError, match="not the one that was registered"):
        registry.fetch(store[0], "altered@1", tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_evaluation_registers_its_model(finished, tmp_path):
    """The stage with tracking on: version, tags, no champion without a headline, and `dmat models list` and `get`."""
    project = finished.copy_without("evaluate_robust", tmp_path / "project")
    project.write({"evaluate_robust": {"images": 10}})
    command = project.command("evaluate_robust", DMAT_TRACKING="on")
    assert command.wait()[0] == 0
    (found,) = registry.listed(project.folder)
    tags = found["tags"]
    name = f"digits-{tags['data.test.sha256'][:8]}-linf-1_5"
    assert (found["name"], found["champion"]) == (name, False)
    assert (tags["threat.norm"], tags["threat.epsilon"], tags["dmat.arm"]) == ("linf", "1/5", "generated")
    assert tags["evaluation.measure"] == "auto_attack_subset"
    assert tags["accuracy.n"] == "10"
    assert "[" in tags["accuracy.auto_attack_subset"]
    said = _dmat(project.folder, "list", "--json")
    assert json.loads(said)[0]["version"] == 1
    _dmat(project.folder, "get", f"{name}@1", "--to", "back.safetensors")
    best = project.folder / "artifacts/train_robust/generated-1/best.safetensors"
    assert (project.folder / "back.safetensors").read_bytes() == best.read_bytes()


def _dmat(folder, *words):
    code, text = forked.Command(folder, "models", *words, DMAT_TRACKING="on").wait()
    assert code == 0, text
    return text
