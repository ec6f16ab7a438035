"""Images of trials that change the image set or selection: generated once per distinct value, by the ordinary jobs.

They lie in a small project of their own below the folder of the study, so that the artifacts of DVC do not change. The
work folders are the ordinary ones, so that equal settings are never computed twice.
"""

import dataclasses

import filelock

from dmat import files
from dmat.config import Params, TrialSettings
from dmat.pipeline import STAGES, code_identity, execution, planning
from dmat.tuning.plan import Study
from dmat.workspace import Instance, Workspace

_INPUTS = {"denoiser", "source", "scorer"}  # of these stages, where there are
_STAGES = ("generate_images", "score_images", "select_images")


def workspace_of(plan: Study, trial: TrialSettings, params: Params, workspace: Workspace) -> Workspace:
    """The workspace with the artifacts that a trial trains on; generates them if needed. Waits while another worker
    generates them."""
    if trial.image_set is None or trial.selection is None:
        return workspace
    if (trial.image_set, trial.selection) == (plan.trial.image_set, plan.trial.selection):
        return workspace
    identity = {
        "image_set": trial.image_set.plain(),
        "selection": trial.selection.plain(),
        "inputs": {name: plan.inputs[name]["sha256"] for name in _INPUTS & plan.inputs.keys()},
        "code": {stage_name: code_identity.read(workspace.root).identity_of(stage_name) for stage_name in _STAGES},
    }
    trial_workspace = Workspace(plan.folder / "images" / files.fingerprint(identity), workspace.home)
    trial_workspace.root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(trial_workspace.root / "lock"):  # released when its process ends
        if not (trial_workspace.root / "made.json").exists():
            _make(plan, trial, params, workspace, trial_workspace)
            files.write_json(trial_workspace.root / "made.json", identity)
    return trial_workspace


def _make(plan: Study, trial: TrialSettings, params: Params, workspace: Workspace, trial_workspace: Workspace) -> None:
    assert trial.image_set is not None and trial.selection is not None
    selection, name = trial.arm.images, trial.selection.image_set
    changed = dataclasses.replace(
        params,
        image_sets={**params.image_sets, name: trial.image_set},
        selections={**params.selections, selection: trial.selection},
    )
    inputs = sorted(plan.inputs[input_name]["path"] for input_name in _INPUTS & plan.inputs.keys())
    for path in (code_identity.NAME, *inputs):
        files.publish(workspace.at(path), trial_workspace.at(path))
    instances: list[tuple[str, Instance]] = [
        ("generate_images", {"image_set": name}),
        ("score_images", {"image_set": name}),
        ("select_images", {"selection": selection}),
    ]
    for stage_name, instance in instances:
        execution.execute(
            planning.plan(STAGES[stage_name], instance, changed, trial_workspace), changed, trial_workspace, quiet=True
        )
