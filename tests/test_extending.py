"""docs/extending.md followed word by word on a copy of dmat: what it adds can be trained with."""

import json
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import yaml

from dmat import config
from dmat.config.prepare_data import NORMALISATION
from dmat.data import augmentation, sources
from dmat.robust import losses, networks

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
STEP = re.compile(r"At the end of `(?P<file>[^`]+)`:\n\n```python\n(?P<code>.+?)```", re.DOTALL)
NAME = re.compile(
    r'In `(?P<file>dmat/config/\w+\.py)` add `"(?P<name>\w+)"` to the names of `(?P<record>\w+)\.(?P<field>\w+)`'
)


def test_names_in_the_configuration_are_those_of_the_tables():
    for record, field, table in (
        (config.Network, "name", networks.NETWORKS),
        (config.ClassifierTraining, "loss", losses.LOSSES),
        (config.ClassifierTraining, "augmentation", augmentation.AUGMENTATIONS),
        (config.PrepareData, "source", sources.SOURCES),
    ):
        assert set(typing.get_args(record.model_fields[field].annotation)) == set(table)
    assert set(typing.get_args(NORMALISATION)) == {"measured", *sources.NORMALISATIONS}


def test_the_page_can_be_followed(tmp_path, tiny_params):
    for folder in ("dmat", "cli"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    steps = list(STEP.finditer(PAGE))
    assert len(steps) == 4
    for step in steps:
        with open(tmp_path / step["file"], "a") as file:
            file.write("\n\n" + step["code"])
    names = list(NAME.finditer(PAGE))
    assert len(names) == 3
    for found in names:
        text = (tmp_path / found["file"]).read_text()
        start = text.index(f"    {found['field']}: Literal[", text.index(f"class {found['record']}(")) + len(
            f"    {found['field']}: Literal["
        )
        (tmp_path / found["file"]).write_text(f'{text[:start]}"{found["name"]}", {text[start:]}')
    (network,) = re.findall(r"```yaml\n(.+?)```", PAGE, re.DOTALL)
    params = config.merge(tiny_params, yaml.safe_load(network))
    params = config.merge(
        params,
        {
            "prepare_data": {"source": "stripes", "train": 200, "validation": 100, "test": 100},
            "train_robust": {"loss": "half_and_half", "beta": 1.0, "images_seen": 2560, "threat": {"epsilon": "1/20"}},
        },
    )
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for words in (
        ["lock"],
        ["prepare-data"],
        ["mix-images", "--arm", "real_only"],
        ["train-robust", "--arm", "real_only", "--seed", "1"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *words, *(["--json"] if words != ["lock"] else [])],
            cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": "", "DMAT_TRACKING": "off"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best_validation_robust"] > 0.8
    attack = """
import torch
from dmat.robust import attacks, networks
assert "small_net" in networks.NETWORKS
torch.manual_seed(0)
images, labels = torch.rand(60, 1, 8, 8), torch.arange(60) % 4
weight = torch.randn(4, 64)
model = lambda x: x.flatten(1) @ weight.T
ball, start = attacks.Ball("linf", 0.05), torch.zeros_like(images)
found = attacks.pgd(model, images, attacks.logit_ratio(labels), ball, start, 20, 0.01)
before, after = (attacks.logit_margin(model(x), labels) for x in (images, found))
right = before > 0
assert right.sum() > 8
assert (after < before)[right].float().mean() > 0.9, (before, after)
"""
    subprocess.run([sys.executable, "-c", attack], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, check=True)
