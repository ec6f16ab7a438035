"""Evaluated models in MLflow's registry: a name for each set of test images and threat model, a version an evaluation.

A version holds the weights as safetensors and their sidecar. The alias `champion` moves to a version only if it has a
headline (standard AutoAttack, all images, every check passed) and is more robust than the champion so far.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmat import files
from dmat.errors import DmatError
from dmat.tracking import stores

CHAMPION = "champion"
_FOLDER = "model"  # below a run's artifacts
_SCORE, _HEADLINE, _SHA256 = "auto_attack", "headline", "weights.sha256"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model that a run wants registered. weights: its .safetensors, the sidecar beside it; both may be anywhere.

    tags: what people look for, JSON values. score: AutoAttack accuracy as a share of 1, or None without a headline.
    """

    name: str
    weights: Path
    tags: Mapping[str, Any]
    score: float | None

    def plain(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "weights": str(self.weights), "tags": dict(self.tags)}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Candidate":
        return cls(plain["name"], Path(plain["weights"]), plain["tags"], plain["score"])


def name_of(data: str, images_sha256: str, norm: str, epsilon: str) -> str:
    """MLflow takes neither / nor : in a name: digits-3f2a91c0-linf-1_5.

    Of the images' checksum eight digits: accuracies on other images do not compare, so they have champions apart.
    """
    return f"{data}-{images_sha256[:8]}-{norm}-{epsilon}".replace("/", "_").replace(":", "_")


def register(client: Any, run: str, candidate: Candidate) -> None:
    """Sends a model once, however often it is called: a run has one version of a name."""
    _make(client, candidate.name)
    mine = [found for found in _versions(client, candidate.name) if found.run_id == run]
    if not mine:
        if not candidate.weights.is_file():
            return  # was removed since: nothing to register
        for path in (candidate.weights, candidate.weights.with_suffix(".json")):
            client.log_artifact(run, str(path), _FOLDER)
        tags = {name: str(value) for name, value in candidate.tags.items()}
        tags |= {_SHA256: files.sha256(candidate.weights), _HEADLINE: "yes" if candidate.score is not None else "no"}
        if candidate.score is not None:
            tags[_SCORE] = repr(candidate.score)
        source = f"{client.get_run(run).info.artifact_uri}/{_FOLDER}"
        mine = [client.create_model_version(candidate.name, source, run, tags=tags)]
    champion = _champion(client, candidate.name)
    if candidate.score is not None and (champion is None or float(champion.tags[_SCORE]) < candidate.score):
        client.set_registered_model_alias(candidate.name, CHAMPION, mine[0].version)


def listed(home: Path) -> list[dict[str, Any]]:
    """Every version of every name, the newest first: name, version, champion, run, tags."""
    client, _ = stores.reach(home)
    found = []
    for model in client.search_registered_models():
        champion = _champion(client, model.name)
        found += [
            {
                "name": model.name,
                "version": int(one.version),
                "champion": champion is not None and champion.version == one.version,
                "run": one.run_id,
                "tags": dict(one.tags),
            }
            for one in _versions(client, model.name)
        ]
    return sorted(found, key=lambda one: (one["name"], -one["version"]))


def fetch(home: Path, wanted: str, target: Path) -> dict[str, Any]:
    """Weights and sidecar of "NAME@champion" or "NAME@3" at `target` (.safetensors), verified. Returns the tags.

    Raises DmatError if there is no such model or its file is not the one that was registered.
    """
    name, at, which = wanted.partition("@")
    if not at or not which:
        raise DmatError(
            f"{wanted!r} is no model; expected NAME@{CHAMPION} or NAME@VERSION; `dmat models list` has them"
        )
    client, _ = stores.reach(home)
    version = _version(client, name, which, home)
    if target.exists():
        raise DmatError(f"{target} exists; expected a new name; give one with --to")
    with tempfile.TemporaryDirectory() as folder:
        local = Path(client.download_artifacts(version.run_id, _FOLDER, folder))
        weights = next(local.glob("*.safetensors"), None)
        if weights is None or files.sha256(weights) != version.tags[_SHA256]:
            raise DmatError(
                f"the file of {name} version {version.version} is missing or not the one that was registered; expected "
                f"checksum {version.tags[_SHA256][:12]}; take another version"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(weights.with_suffix(".json"), target.with_suffix(".json"))
        with files.writing(target) as out, open(weights, "rb") as source:
            shutil.copyfileobj(source, out)
    return {"version": int(version.version), "run": version.run_id, **version.tags}


def _version(client: Any, name: str, which: str, home: Path) -> Any:
    found = {str(one.version): one for one in _versions(client, name)}
    if not found:
        known = ", ".join(sorted({one["name"] for one in listed(home)})) or "(none)"
        raise DmatError(f"no model {name!r} is registered; expected one of {known}; an evaluation registers its model")
    if which == CHAMPION:
        champion = _champion(client, name)
        if champion is None:
            raise DmatError(
                f"{name} has no champion: none of its {len(found)} versions has a headline; expected a version; say "
                f"{name}@{max(map(int, found))}"
            )
        return champion
    if which not in found:
        raise DmatError(f"{name} has no version {which!r}; expected {CHAMPION} or one of {', '.join(sorted(found))}")
    return found[which]


def _make(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _versions(client: Any, name: str) -> list[Any]:
    """All versions of a name; none if nobody registered it."""
    return list(client.search_model_versions(f"name = '{name}'"))


def _champion(client: Any, name: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
