"""Evaluated models in MLflow's registry. One model name per set of test images and threat model, one version per
evaluation.

A version holds the evaluated files: the weights as safetensors and their sidecar, and an `MLmodel` by which
`mlflow.pyfunc.load_model` reads them (`dmat.models.logged_model`). The checksums are taken when an evaluation loads
the files, because its run may be sent hours later. The alias `champion` moves to a version only if that has a headline
(standard AutoAttack, all images, every check passed) and is more robust than the champion so far.
"""

import dataclasses
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmat import files
from dmat.errors import DmatError, first_line
from dmat.tracking import stores

CHAMPION = "champion"
_ARTIFACT_FOLDER = "model"  # in the artifacts of a run
SIDECAR_TAG = "sidecar.sha256"  # missing in versions that an earlier dmat registered
_SCORE_TAG, _HEADLINE_TAG, _WEIGHTS_TAG = "auto_attack", "headline", "weights.sha256"


@dataclasses.dataclass(frozen=True)
class RegistryCandidate:
    """A model that a run wants to register.

    weights: path of its .safetensors file, with the sidecar beside it; both may be anywhere. tags: JSON values, for
    searches. score: AutoAttack accuracy in [0, 1], or None without a headline. weights_sha256, sidecar_sha256: hex
    SHA-256 of the two files as they were evaluated; None in records of earlier versions of dmat.
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
    def from_plain(cls, plain: Mapping[str, Any]) -> "RegistryCandidate":
        defaults = {"weights_sha256": None, "sidecar_sha256": None, **plain}
        return cls(**defaults | {"weights": Path(plain["weights"])})


def model_name(data: str, images_sha256: str, norm: str, epsilon: str) -> str:
    """Name of a registered model, such as digits-3f2a91c0-linf-1_5. MLflow allows neither / nor : in it.

    It holds eight digits of the checksum of the test images: accuracies on other images are not comparable, so each set
    of images has its own champion.
    """
    return f"{data}-{images_sha256[:8]}-{norm}-{epsilon}".replace("/", "_").replace(":", "_")


def register(client: Any, run: str, candidate: RegistryCandidate) -> str | None:
    """Registers a model and moves the champion alias if the model is better. Idempotent: one version per run and name.

    Returns None, or a sentence about why nothing is registered: the files are not those that were evaluated.
    """
    versions = [model_version for model_version in _versions(client, candidate.name) if model_version.run_id == run]
    if not versions:
        if problem := _file_problem(candidate):
            return problem
        _create_model(client, candidate.name)
        for path in (candidate.weights, candidate.weights.with_suffix(".json")):
            client.log_artifact(run, str(path), _ARTIFACT_FOLDER)
        client.log_text(run, _mlmodel(run, candidate.weights.with_suffix(".json")), f"{_ARTIFACT_FOLDER}/MLmodel")
        if problem := _file_problem(candidate):  # the files were replaced during the upload
            return problem
        tags = {name: str(value) for name, value in candidate.tags.items()}
        tags |= {_WEIGHTS_TAG: str(candidate.weights_sha256), SIDECAR_TAG: str(candidate.sidecar_sha256)}
        tags[_HEADLINE_TAG] = "yes" if candidate.score is not None else "no"
        if candidate.score is not None:
            tags[_SCORE_TAG] = repr(candidate.score)
        source = f"{client.get_run(run).info.artifact_uri}/{_ARTIFACT_FOLDER}"
        versions = [client.create_model_version(candidate.name, source, run, tags=tags)]
    champion = _champion(client, candidate.name)
    if candidate.score is not None and (
        champion is None or float(champion.tags.get(_SCORE_TAG, "-inf")) < candidate.score
    ):
        client.set_registered_model_alias(candidate.name, CHAMPION, versions[0].version)
    return None


def list_versions(home: Path) -> list[dict[str, Any]]:
    """Every version of every model, by name, the newest first. Keys: name, version, champion (bool), run, tags."""
    client, _ = stores.connect_or_raise(home)
    rows = []
    for model in client.search_registered_models():
        champion = _champion(client, model.name)
        rows += [
            {
                "name": model.name,
                "version": int(model_version.version),
                "champion": champion is not None and champion.version == model_version.version,
                "run": model_version.run_id,
                "tags": dict(model_version.tags),
            }
            for model_version in _versions(client, model.name)
        ]
    return sorted(rows, key=lambda row: (row["name"], -row["version"]))


def fetch(home: Path, reference: str, target: Path) -> dict[str, Any]:
    """Downloads weights and sidecar of "NAME@champion" or "NAME@3" to `target` (.safetensors) and verifies them.

    Returns version, run and the tags. Raises DmatError if there is no such model, if a file is not the registered one,
    or if a file exists at `target`; then nothing is written.
    """
    name, separator, version_or_alias = reference.partition("@")
    if not separator or not version_or_alias:
        raise DmatError(
            f"{reference!r} is not a model; expected NAME@{CHAMPION} or NAME@VERSION; `dmat models list` shows them"
        )
    client, _ = stores.connect_or_raise(home)
    version = _find_version(client, name, version_or_alias, home)
    for path in (target, target.with_suffix(".json")):
        if path.exists():
            raise DmatError(f"{path} exists; expected a new name; give one with --to")
    with tempfile.TemporaryDirectory() as folder:
        _copy_pair(_download_verified(client, version, Path(folder)), target)
    return {"version": int(version.version), "run": version.run_id, **version.tags}


def _mlmodel(run: str, sidecar_path: Path) -> str:
    """Text of the file MLmodel: the signature, and the module that loads the files beside it without unpickling."""
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    sidecar = files.read_json(sidecar_path)
    height, width, channels = sidecar["image_shape"]
    dtype = np.dtype("float32")
    signature = ModelSignature(
        inputs=Schema([TensorSpec(dtype, (-1, channels, height, width))]),
        outputs=Schema([TensorSpec(dtype, (-1, sidecar["classes"]))]),
    )
    model = Model(artifact_path=_ARTIFACT_FOLDER, run_id=run, signature=signature)
    model.add_flavor(
        "python_function", loader_module="dmat.models.logged_model", python_version=platform.python_version()
    )
    return str(model.to_yaml())


def _file_problem(candidate: RegistryCandidate) -> str | None:
    """A sentence about how the files of a candidate differ from the evaluated ones; None if they are the same."""
    for path, expected in (
        (candidate.weights, candidate.weights_sha256),
        (candidate.weights.with_suffix(".json"), candidate.sidecar_sha256),
    ):
        if expected is None:
            return (
                f"{path} was evaluated by an earlier version of dmat, which recorded no checksum; expected one, so "
                f"{candidate.name} gets no version; evaluate it again with --fresh"
            )
        try:
            state = f"has checksum {checksum[:12]}" if (checksum := files.sha256(path)) != expected else ""
        except (DmatError, OSError):  # an unreadable file must not keep the run from ending
            state = "is missing or cannot be read"
        if state:
            return (
                f"{path} {state}; expected {expected[:12]}, which was evaluated, so {candidate.name} gets no version; "
                f"evaluate the present file, or restore the evaluated one and evaluate it again with --fresh"
            )
    return None


def _download_verified(client: Any, version: Any, folder: Path) -> Path:
    """Downloads the files of a version to `folder`. Returns the path of the weights; the sidecar is beside them.

    Raises DmatError if a file is not the registered one. Versions that an earlier dmat registered have no checksum of
    the sidecar; then the sidecar must describe these weights.
    """
    title = f"{version.name} version {version.version}"
    try:
        downloaded = Path(client.download_artifacts(version.run_id, _ARTIFACT_FOLDER, str(folder)))
    except Exception as error:
        raise DmatError(
            f"the files of {title} cannot be downloaded ({first_line(error)}); expected weights and sidecar in the "
            f"store; take another version"
        ) from error
    expected = str(version.tags.get(_WEIGHTS_TAG))
    path = next(
        (file for file in downloaded.glob("*.safetensors") if file.is_file() and files.sha256(file) == expected), None
    )
    if path is None:
        raise DmatError(
            f"the file of {title} is missing or not the one that was registered; expected checksum {expected[:12]}; "
            f"take another version"
        )
    if not _is_sidecar_of(path, expected, version.tags.get(SIDECAR_TAG)):
        raise DmatError(
            f"the sidecar of {title} is missing or not the one that was registered; expected checksum "
            f"{version.tags.get(SIDECAR_TAG, 'unknown')[:12]} and a description of weights {expected[:12]}; take "
            f"another version"
        )
    return path


def _is_sidecar_of(weights_path: Path, weights_sha256: str, sidecar_sha256: str | None) -> bool:
    sidecar = weights_path.with_suffix(".json")
    if not sidecar.is_file() or sidecar_sha256 not in (None, files.sha256(sidecar)):
        return False
    from dmat.training import weights  # imported here because it loads torch

    try:
        return bool(weights.read_sidecar(weights_path, "classifier")["sha256"] == weights_sha256)
    except (DmatError, RecursionError):
        return False


def _copy_pair(weights: Path, target: Path) -> None:
    """Copies weights and sidecar to `target`, both or none: each is complete on disk under a temporary name first."""
    sidecar_target = target.with_suffix(".json")
    try:
        with files.writing(target) as weights_file, files.writing(sidecar_target) as sidecar_file:
            for source, file in ((weights, weights_file), (weights.with_suffix(".json"), sidecar_file)):
                with open(source, "rb") as source_file:
                    shutil.copyfileobj(source_file, file)
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        if not target.exists():
            sidecar_target.unlink(missing_ok=True)
        raise


def _find_version(client: Any, name: str, version_or_alias: str, home: Path) -> Any:
    versions = {str(model_version.version): model_version for model_version in _versions(client, name)}
    if not versions:
        names = ", ".join(sorted({row["name"] for row in list_versions(home)})) or "(none)"
        raise DmatError(f"no model {name!r} is registered; expected one of {names}; an evaluation registers its model")
    if version_or_alias == CHAMPION:
        champion = _champion(client, name)
        if champion is None:
            raise DmatError(
                f"{name} has no champion: none of its {len(versions)} versions has a headline; expected a version; say "
                f"{name}@{max(map(int, versions))}"
            )
        return champion
    if version_or_alias not in versions:
        raise DmatError(
            f"{name} has no version {version_or_alias!r}; expected {CHAMPION} or one of {', '.join(sorted(versions))}"
        )
    return versions[version_or_alias]


def _create_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _versions(client: Any, name: str) -> list[Any]:
    """All versions of a registered model; empty for an unknown name."""
    return list(client.search_model_versions(f"name = '{name}'"))


def _champion(client: Any, name: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
