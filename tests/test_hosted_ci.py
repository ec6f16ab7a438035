"""The workflow of the hosted CI: its commands exist, and it can change nothing."""

import re
import tomllib

import pytest
import yaml


@pytest.fixture
def workflow(root):
    return yaml.safe_load((root / ".github/workflows/test.yml").read_text())


@pytest.fixture
def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_its_make_targets_exist_and_take_its_variables(root, workflow):
    makefile, commands = (root / "Makefile").read_text(), []
    for job in workflow["jobs"].values():
        commands += job["strategy"]["matrix"].get("command", [])
        commands += [step["run"] for step in job["steps"] if step.get("run", "").startswith("make ")]
    assert {command.split()[1] for command in commands} == {"test", "test-services", "fuzz"}
    for command in commands:
        _, target, *variables = command.split()
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), command
        for variable in variables:
            name = variable.partition("=")[0]
            assert re.search(rf"^{name} \?= ", makefile, re.MULTILINE), command
            assert f"$({name})" in makefile, command


def test_it_may_only_read_and_its_actions_are_commits(workflow, steps):
    assert workflow["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in workflow["jobs"].values())
    actions = [step for step in steps if "uses" in step]
    assert len(actions) == len(workflow["jobs"])
    for step in actions:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"])
        assert step["with"]["persist-credentials"] is False


def test_its_versions_of_python_are_those_that_the_package_names(root, workflow):
    classifiers = tomllib.loads((root / "pyproject.toml").read_text())["project"]["classifiers"]
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12"]
    assert {f"Programming Language :: Python :: {version}" for version in versions} <= {*classifiers}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
