"""docs/tutorial.md: its commands and its blocks of parameters work on small images.

`dvc repro` is planned by DVC here and not run; tests/test_pipeline.py runs it.
"""

import re
import shlex

import numpy as np
import yaml
from PIL import Image

from dmat import config
from dmat.pipeline import code_identity, dvc_graph
from tests.projects import ROOT, current_code_lock

PAGE = (ROOT / "docs/tutorial.md").read_text()


def _blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_commands_and_parameters_of_the_tutorial_work(tmp_path, monkeypatch, call):
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(250):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{k}.png")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.chdir(tmp_path)
    own, arm = (yaml.safe_load(block) for block in _blocks("yaml"))
    commands = [line for block in _blocks("sh")[1:] for line in block.splitlines()]
    assert commands[0] == "dmat init mine --recipe digits"
    assert call(*shlex.split(commands[0])[1:])[0] == 0
    assert commands[1:3] == ["cd mine", "ln -s /data/my-images sources/mine"]
    project = tmp_path / "mine"
    monkeypatch.chdir(project)
    (project / "sources/mine").symlink_to(tmp_path / "images")
    code_identity.write(project, current_code_lock())
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["prepare_data"] = own.pop("prepare_data")
    assert own == {}
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    assert commands[3] == "dmat prepare-data"
    code, out, err = call(*shlex.split(commands[3])[1:])
    assert code == 0, err
    assert "train 300, classes 2" in out + err
    assert commands[-1] == "dvc repro"
    first = {*dvc_graph.instances_to_run(project, [])}
    values = config.merge(values, arm)
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    added = {*dvc_graph.instances_to_run(project, [])} - first
    assert added == {"mix_images@gentle", "train_robust@gentle-1", "evaluate_robust@gentle-1"}
    assert len(commands) == 6
