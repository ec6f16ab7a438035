"""Images of a trial that changes its image set: made once for each distinct value, by the jobs that make all others.

They lie in a small project of their own below the study's folder, so that the artifacts which DVC knows stay as they
are; the work folders are the ordinary ones, so that equal settings are never computed twice.
"""

import dataclasses

import filelock

from dmat import files
from dmat.config import Params, TrialSettings
from dmat.pipeline import STAGES, code_identity, execution, planning
from dmat.tuning.plan import Study
from dmat.workspace import Workspace

_STAGES = ("generate_images", "score_images", "select_images")


def workspace_of(plan: Study, trial: TrialSettings, params: Params, workspace: Workspace) -> Workspace:
    """Where the artifacts lie that a trial trains on. Waits while another worker makes them."""
    if trial.image_set is None or trial.selection is None:
        return workspace
    if (trial.image_set, trial.selection) == (plan.trial.image_set, plan.trial.selection):
        return workspace
    identity = {
        "image_set": trial.image_set.plain(),
        "selection": trial.selection.plain(),
        "inputs": {name: plan.inputs[name]["sha256"] for name in ("denoiser", "scorer")},
        "code": {stage_name: code_identity.read(workspace.root).of(stage_name) for stage_name in _STAGES},
    }
    own = Workspace(plan.folder / "images" / files.fingerprint(identity), workspace.home)
    own.root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(own.root / "lock"):  # ends with its process
        if not (own.root / "made.json").exists():
            _make(plan, trial, params, workspace, own)
            files.write_json(own.root / "made.json", identity)
    return own


def _make(plan: Study, trial: TrialSettings, params: Params, workspace: Workspace, own: Workspace) -> None:
    assert trial.image_set is not None and trial.selection is not None
    selection, name = trial.arm.images, trial.selection.image_set
    changed = dataclasses.replace(
        params,
        image_sets={**params.image_sets, name: trial.image_set},
        selections={**params.selections, selection: trial.selection},
    )
    for path in (code_identity.NAME, *(plan.inputs[wanted]["path"] for wanted in ("denoiser", "scorer"))):
        files.publish(workspace.at(path), own.at(path))
    instances: list[tuple[str, dict[str, str]]] = [
        ("generate_images", {"image_set": name}),
        ("score_images", {"image_set": name}),
        ("select_images", {"selection": selection}),
    ]
    for stage_name, chosen in instances:
        execution.execute(planning.plan(STAGES[stage_name], chosen, changed, own), changed, own, quiet=True)
