"""Evaluated models in MLflow's registry: a name for each set of test images and threat model, a version an evaluation.

A version holds the weights as safetensors and their sidecar: the very files that were evaluated. Their checksums are
taken when an evaluation loads them, since its run may be sent hours later. The alias `champion` moves to a version only
if it has a headline (standard AutoAttack, all images, every check passed) and is more robust than the champion so far.
"""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmat import files
from dmat.errors import DmatError, first_line
from dmat.tracking import stores

CHAMPION = "champion"
_FOLDER = "model"  # below a run's artifacts
SIDECAR = "sidecar.sha256"  # a tag, which versions of earlier dmat lack
_SCORE, _HEADLINE, _WEIGHTS = "auto_attack", "headline", "weights.sha256"


@dataclasses.dataclass(frozen=True)
class RegistryCandidate:
    """A model that a run wants registered. weights: its .safetensors, the sidecar beside it; both may be anywhere.

    tags: what people look for, JSON values. score: AutoAttack accuracy as a share of 1, or None without a headline.
    weights_sha256, sidecar_sha256: hex SHA-256 of the two files as they were evaluated; None in what an earlier version
    of dmat remembered.
    """

    name: str
    weights: Path
    tags: Mapping[str, Any]
    score: float | None
    weights_sha256: str | None
    sidecar_sha256: str | None

    def plain(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "weights": str(self.weights), "tags": dict(self.tags)}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "RegistryCandidate":
        known = {"weights_sha256": None, "sidecar_sha256": None, **plain}
        return cls(**known | {"weights": Path(plain["weights"])})


def name_of(data: str, images_sha256: str, norm: str, epsilon: str) -> str:
    """MLflow takes neither / nor : in a name: digits-3f2a91c0-linf-1_5.

    Of the images' checksum eight digits: accuracies on other images do not compare, so they have champions apart.
    """
    return f"{data}-{images_sha256[:8]}-{norm}-{epsilon}".replace("/", "_").replace(":", "_")


def register(client: Any, run: str, candidate: RegistryCandidate) -> str | None:
    """Sends a model once, however often it is called: a run has one version of a name.

    Returns None, or a sentence that says why nothing is registered: other files lie there than were evaluated.
    """
    mine = [found for found in _versions(client, candidate.name) if found.run_id == run]
    if not mine:
        if refused := _refused(candidate):
            return refused
        _make(client, candidate.name)
        for path in (candidate.weights, candidate.weights.with_suffix(".json")):
            client.log_artifact(run, str(path), _FOLDER)
        if refused := _refused(candidate):  # replaced while it was sent
            return refused
        tags = {name: str(value) for name, value in candidate.tags.items()}
        tags |= {_WEIGHTS: str(candidate.weights_sha256), SIDECAR: str(candidate.sidecar_sha256)}
        tags[_HEADLINE] = "yes" if candidate.score is not None else "no"
        if candidate.score is not None:
            tags[_SCORE] = repr(candidate.score)
        source = f"{client.get_run(run).info.artifact_uri}/{_FOLDER}"
        mine = [client.create_model_version(candidate.name, source, run, tags=tags)]
    champion = _champion(client, candidate.name)
    if candidate.score is not None and (champion is None or float(champion.tags.get(_SCORE, "-inf")) < candidate.score):
        client.set_registered_model_alias(candidate.name, CHAMPION, mine[0].version)
    return None


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

    Raises DmatError if there is no such model, one of its files is not the one that was registered, or one of the two
    is at `target` already; then nothing is written.
    """
    name, at, which = wanted.partition("@")
    if not at or not which:
        raise DmatError(
            f"{wanted!r} is no model; expected NAME@{CHAMPION} or NAME@VERSION; `dmat models list` has them"
        )
    client, _ = stores.reach(home)
    version = _version(client, name, which, home)
    for path in (target, target.with_suffix(".json")):
        if path.exists():
            raise DmatError(f"{path} exists; expected a new name; give one with --to")
    with tempfile.TemporaryDirectory() as folder:
        _write_pair(_verified(client, version, Path(folder)), target)
    return {"version": int(version.version), "run": version.run_id, **version.tags}


def _refused(candidate: RegistryCandidate) -> str | None:
    """What keeps the files of a candidate from being those that were evaluated, as a sentence; None if nothing does."""
    for path, evaluated in (
        (candidate.weights, candidate.weights_sha256),
        (candidate.weights.with_suffix(".json"), candidate.sidecar_sha256),
    ):
        if evaluated is None:
            return (
                f"{path} was evaluated by an earlier version of dmat, which kept no checksum of it; expected one, so "
                f"{candidate.name} gets no version; evaluate it again with --fresh"
            )
        try:
            state = f"has checksum {found[:12]}" if (found := files.sha256(path)) != evaluated else ""
        except (DmatError, OSError):  # what cannot be read must not keep the run from ending
            state = "is gone or cannot be read"
        if state:
            return (
                f"{path} {state}; expected {evaluated[:12]}, which was evaluated, so {candidate.name} gets no version; "
                f"evaluate what lies there now, or bring the file back and evaluate it again with --fresh"
            )
    return None


def _verified(client: Any, version: Any, folder: Path) -> Path:
    """The weights of a version, fetched to `folder` with the sidecar beside them.

    Raises DmatError if one of the two is not what was registered. Versions of earlier dmat have no checksum of the
    sidecar; then it must be one of these weights.
    """
    named = f"{version.name} version {version.version}"
    try:
        fetched = Path(client.download_artifacts(version.run_id, _FOLDER, str(folder)))
    except Exception as error:
        raise DmatError(
            f"the files of {named} cannot be fetched ({first_line(error)}); expected weights and sidecar in the store; "
            f"take another version"
        ) from error
    expected = str(version.tags.get(_WEIGHTS))
    path = next((one for one in fetched.glob("*.safetensors") if one.is_file() and files.sha256(one) == expected), None)
    if path is None:
        raise DmatError(
            f"the file of {named} is missing or not the one that was registered; expected checksum {expected[:12]}; "
            f"take another version"
        )
    if not _is_its_sidecar(path, expected, version.tags.get(SIDECAR)):
        raise DmatError(
            f"the sidecar of {named} is missing or not the one that was registered; expected checksum "
            f"{version.tags.get(SIDECAR, 'unknown')[:12]} and a description of weights {expected[:12]}; take another "
            f"version"
        )
    return path


def _is_its_sidecar(path: Path, weights_sha256: str, sidecar_sha256: str | None) -> bool:
    beside = path.with_suffix(".json")
    if not beside.is_file() or sidecar_sha256 not in (None, files.sha256(beside)):
        return False
    from dmat.training import weights  # not above: it loads torch

    try:
        return bool(weights.read_sidecar(path, "classifier")["sha256"] == weights_sha256)
    except (DmatError, RecursionError):
        return False


def _write_pair(weights: Path, target: Path) -> None:
    """Both files or none: both are on disk under other names before one gets its own."""
    beside = target.with_suffix(".json")
    try:
        with files.writing(target) as out, files.writing(beside) as sidecar:
            for source, file in ((weights, out), (weights.with_suffix(".json"), sidecar)):
                with open(source, "rb") as data:
                    shutil.copyfileobj(data, file)
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        if not target.exists():
            beside.unlink(missing_ok=True)
        raise


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
