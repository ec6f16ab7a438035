"""Small projects without git and DVC, in which single commands run, are disturbed and are refused."""

import copy
import functools
import shutil
from pathlib import Path

import yaml

from dmat import config, files
from dmat.pipeline import STAGES, code_identity
from tests import forked

ROOT = Path(__file__).parent.parent

# Each stage with the options of one instance, in an order in which they can run.
IN_ORDER = {
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
def own_code() -> code_identity.CodeLock:
    """As `dmat lock` writes it where there was nothing to keep."""
    return code_identity.up_to_date(code_identity.CodeLock({}, {}))


class Project:
    """A folder with params.yaml and artifacts, without git and DVC."""

    def __init__(self, folder, params):
        self.folder, self.params = folder, copy.deepcopy(params)  # tests change theirs
        code_identity.write(folder, own_code())
        self.write({})

    def write(self, changes):
        """params.yaml with some values changed."""
        self.params = config.merge(self.params, changes)
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.params, sort_keys=False))

    def command(self, stage_name, **environment):
        return forked.Command(self.folder, STAGES[stage_name].command, *IN_ORDER[stage_name], "--json", **environment)

    def run(self, stage_name, code=0):
        found, text = self.command(stage_name).wait()
        assert found == code, text
        return text

    def outputs(self, stage_name):
        """Hash of everything that an instance leaves for other stages and for people, provenance apart."""
        folder = self.folder / "artifacts"
        made = (folder / stage_name).glob("*") if (folder / stage_name).exists() else []
        metrics = folder / "metrics" / stage_name
        found = [*sorted(p for p in made if p.name != "none"), *([metrics] if metrics.exists() else [])]
        work = list((self.folder / "runs" / stage_name).glob("*/metrics.jsonl"))
        return {str(p.relative_to(self.folder)): files.checksum(p) for p in [*found, *work]}

    def copy_without(self, stage_name, to):
        """The same project as it was before a stage ran."""
        leave = [f"runs/{stage_name}", f"artifacts/{stage_name}", f"artifacts/metrics/{stage_name}"]
        shutil.copytree(
            self.folder, to, ignore=lambda at, names: {n for n in names if f"{at}/{n}".endswith(tuple(leave))}
        )
        none = Path("artifacts/select_images/none")  # of prepare_data
        if (self.folder / none).exists():
            (to / none).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / none, to / none)
        return Project(to, self.params)
