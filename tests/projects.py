"""Small projects without git and DVC, in which tests run, interrupt and reject single commands."""

import copy
import functools
import shutil
from pathlib import Path

import yaml

from dmat import config, files
from dmat.pipeline import STAGES, code_identity
from tests import forked

ROOT = Path(__file__).parent.parent

# Stage -> command-line options of one instance, in an order in which the stages can run.
STAGE_OPTIONS = {
    "prepare_data": [],
    "train_scorer": [],
    "train_diffusion": ["--generator", "edm"],
    "generate_images": ["--image-set", "edm18"],
    "score_images": ["--image-set", "edm18"],
    "select_images": ["--selection", "edm18_best"],
    "measure_images": ["--selection", "edm18_best"],
    "mix_images": ["--arm", "generated"],
    "train_robust": ["--arm", "generated", "--seed", "1"],
    "evaluate_robust": ["--arm", "generated", "--seed", "1"],
}


@functools.cache
def current_code_lock() -> code_identity.CodeLock:
    """The lock that `dmat lock` writes where there is none yet."""
    return code_identity.lock_current_code(code_identity.CodeLock({}, {}))


class Project:
    """A folder with params.yaml and artifacts, without git and DVC. is_new: params.yaml and code.yaml are written."""

    def __init__(self, folder, params, is_new=True):
        self.folder, self.params = folder, copy.deepcopy(params)  # tests change their copy
        if is_new:
            code_identity.write(folder, current_code_lock())
            self.write({})

    def write(self, changes):
        """Merges some values into params.yaml and writes it."""
        self.params = config.merge(self.params, changes)
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.params, sort_keys=False))

    def command(self, stage_name, **environment):
        return forked.Command(
            self.folder, STAGES[stage_name].command, *STAGE_OPTIONS[stage_name], "--json", **environment
        )

    def run(self, stage_name, code=0):
        exit_code, text = self.command(stage_name).wait()
        assert exit_code == code, text
        return text

    def outputs(self, stage_name):
        """Checksum of everything that an instance writes for other stages and for people, except its provenance."""
        folder = self.folder / "artifacts"
        artifacts = (folder / stage_name).glob("*") if (folder / stage_name).exists() else []
        metrics = folder / "metrics" / stage_name
        paths = [*sorted(p for p in artifacts if p.name != "none"), *([metrics] if metrics.exists() else [])]
        metrics_logs = list((self.folder / "runs" / stage_name).glob("*/metrics.jsonl"))
        return {str(p.relative_to(self.folder)): files.checksum(p) for p in [*paths, *metrics_logs]}

    def copy_without(self, stage_name, to):
        """A copy of the project as it was before a stage ran."""
        excluded = [f"runs/{stage_name}", f"artifacts/{stage_name}", f"artifacts/metrics/{stage_name}"]
        shutil.copytree(
            self.folder, to, ignore=lambda base, names: {n for n in names if f"{base}/{n}".endswith(tuple(excluded))}
        )
        empty_selection = Path("artifacts/select_images/none")  # of prepare_data
        if (self.folder / empty_selection).exists():
            (to / empty_selection).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / empty_selection, to / empty_selection)
        return Project(to, self.params)
