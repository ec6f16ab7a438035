"""docs/extending.md applied literally to a copy of dmat: everything that it adds can be used for training."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from dmat import config
from tests import fork_server

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
STEP = re.compile(
    r"(?P<how>At the end of|In) `(?P<file>dmat/[^`]+\.py)`:\n\n```python\n(?P<code>.+?)```", re.DOTALL
)
FIELD = re.compile(r"In `(?P<file>[^`]+)` the field `(?P<name>\w+): (?P<record>\w+)` of `Params`, with its import\.")
YAML = re.compile(r"```yaml\n(.+?)```", re.DOTALL)


def _follow(folder: Path) -> None:
    """Applies every addition of the page to a copy of dmat."""
    for name in ("dmat", "cli"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    steps = list(STEP.finditer(PAGE))
    assert len(steps) == PAGE.count("```python") == 9
    for step in steps:
        assert (folder / step["file"]).exists() == (step["how"] == "At the end of")
        with open(folder / step["file"], "a", encoding="utf-8") as file:
            file.write("\n\n" + step["code"])
    (field,) = FIELD.finditer(PAGE)
    path = folder / field["file"]
    text = path.read_text().replace("\nclass Params:\n", f"\nclass Params:\n    {field['name']}: {field['record']}\n")
    line = f"from dmat.config.{field['name']} import {field['record']}\n"
    path.write_text(text.replace("from dmat.config.compute", f"{line}from dmat.config.compute", 1))


def test_the_steps_of_the_page_work(tmp_path, tiny_params):
    _follow(tmp_path)
    network, entry = map(yaml.safe_load, YAML.findall(PAGE))
    params = config.merge(tiny_params, network) | {"count_classes": {"few": 101}}
    params = config.merge(
        params,
        {
            "prepare_data": {"source": "stripes", "train": 200, "validation": 100, "test": 100},
            "train_robust": {"loss": "half_and_half", "beta": 1.0, "images_seen": 2560, "threat": {"epsilon": "1/20"}},
        },
    )
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for arguments in (
        ["lock"],
        ["prepare-data"],
        ["count-classes"],
        ["mix-images", "--arm", "real_only"],
        ["train-robust", "--arm", "real_only", "--seed", "1"],
    ):
        done = subprocess.run(
            [fork_server.folder() / "dmat", *arguments, *(["--json"] if arguments != ["lock"] else [])],
            cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": "", "DMAT_TRACKING": "off"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        if arguments == ["count-classes"]:
            assert json.loads(done.stdout) == {"few": 2}
            assert json.loads((tmp_path / "artifacts/count_classes/counts/counts.json").read_text()) == [100, 100]
    assert json.loads(done.stdout)["best_validation_robust"] > 0.8
    script = """
import json, sys, types
import torch
from dmat.robust import attacks, networks
assert "small_net" in networks.NETWORKS
torch.manual_seed(0)
images, labels = torch.rand(60, 1, 8, 8), torch.arange(60) % 4
weight = torch.randn(4, 64)
model = lambda x: x.flatten(1) @ weight.T
ball, start = attacks.Ball("linf", 0.05), torch.zeros_like(images)
adversarial = attacks.pgd(model, images, attacks.probability_margin(labels), ball, start, 20, 0.01)
before, after = (attacks.logit_margin(model(x), labels) for x in (images, adversarial))
right = before > 0
assert right.sum() > 8
assert (after < before)[right].float().mean() > 0.9, (before, after)

from dmat.diffusion import samplers
spread, errors = 0.5, []
denoiser = lambda noisy, sigma, labels: noisy * spread**2 / (spread**2 + sigma.view(-1, 1, 1, 1)**2)
for steps in (18, 36):  # images of a normal distribution, whose paths are known
    levels = types.SimpleNamespace(steps=steps, sigma_min=0.002, sigma_max=80.0, rho=7.0, schedule="edm", s_churn=0.0)
    end = latents = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    made = samplers.SAMPLERS["midpoint"](denoiser, latents, None, levels)
    end = latents * 80.0 * spread / (spread**2 + 80.0**2) ** 0.5
    errors.append(((made - end).norm() / end.norm()).item())
assert errors[1] < errors[0] / 3 and errors[1] < 0.01, errors

from dmat.pipeline import STAGES
stage, entry = STAGES["count_classes"], json.loads(sys.argv[1])["count_classes"]
assert entry["cmd"] == f"dmat {stage.command}"
assert entry["deps"] == [*stage.inputs(None).values()]
assert entry["outs"] == [*stage.outputs(None).values(), stage.provenance_path({}), stage.metrics_path({})]
assert entry["params"] == [{"code.yaml": [stage.name]}, stage.name]
"""
    arguments = [sys.executable, "-c", script, json.dumps(entry)]
    subprocess.run(arguments, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, check=True)
