"""Damages every kind of file of a finished project, and kills whole `dvc repro`s: no traceback, hang or wrong record.

`python -m tests.torture` writes a table. Damage: commands read copies of a tiny project with one file damaged as in
tests/fuzzing.py. A command may repair, compute again or refuse (exit code 2, one sentence); a stage that ends with
exit code 0 must have the bytes of the sound project. Kills: all processes of a `dvc repro` are killed at random times,
until one ends; its results must be those of a project that nobody killed. What is damaged and when follows from a seed.
"""

import argparse
import contextlib
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import psutil

from dmat import dvc_lock, files
from dmat.pipeline import STAGES, code_identity
from tests import conftest, forked, fuzzing, test_pipeline
from tests.projects import STAGE_OPTIONS, Project, current_code_lock

SECONDS = 120.0  # for a command that would take two on a quiet machine
OTHERS = (["doctor"], ["runs", "list"], ["runs", "lineage", "evaluate_robust/generated-1"], ["clean"])
_VOLATILE = ("provenance", "write_report", "pictures")  # times and speeds; the report shows them


def finished_project(folder: Path) -> Project:
    """A project in which every stage but the report has run, with a database of runs."""
    project = Project(folder, conftest._tiny_params())
    for stage_name in STAGE_OPTIONS:
        project.run(stage_name)
    fuzzing._write_database(project.folder)
    return project


def kinds(project: Project) -> dict[str, list[Path]]:
    """Files by kind: the path without names of instances, fingerprints and numbers."""
    grouped = defaultdict(list)
    for top in ("artifacts", "runs", "mlruns"):
        for path in sorted((project.folder / top).rglob("*")):
            if path.is_file() and not path.name.endswith(".lock") and path.name != "lock":
                parts = path.relative_to(project.folder).parts
                stage_parts = [part if part in STAGES or k in (0, 1) else "*" for k, part in enumerate(parts[:-1])]
                grouped["/".join([*stage_parts, re.sub(r"[0-9a-f]{8,}|\d+", "*", path.name)])].append(path)
    return grouped


def torment(project: Project, kind: str, generator: np.random.Generator, folder: Path) -> tuple[str, str]:
    """Damages one file of a kind in a copy, in which three commands run. Returns the outcome, and a failure or ""."""
    paths = kinds(project)[kind]
    target = paths[generator.integers(len(paths))].relative_to(project.folder)
    copied = project.copy_without("nothing", folder)
    way = fuzzing.damage(copied.folder / target, generator)
    names = list(STAGE_OPTIONS)
    own = next((part for part in target.parts if part in STAGE_OPTIONS), names[generator.integers(len(names))])
    consumers = names[names.index(own) :]
    outcome = ""
    for stage_name in (own, consumers[generator.integers(len(consumers))], None):
        if stage_name is None:
            arguments = OTHERS[generator.integers(len(OTHERS))]
        else:
            arguments = [STAGES[stage_name].command, *STAGE_OPTIONS[stage_name], "--json"]
        label = f"{target} {way}, dmat {' '.join(arguments)}"
        try:
            code, text = forked.Command(copied.folder, *arguments).wait(SECONDS)
        except TimeoutError:
            return "hang", f"{label}: more than {SECONDS} s"
        if code not in (0, 2) or "Traceback" in text:
            return "traceback", f"{label}: exit code {code}\n{text[-1500:]}"
        if code == 2 and not text.strip():
            return "silence", f"{label}: exit code 2 without a sentence"
        if code == 0 and stage_name and (wrong := _differing(project, copied, stage_name)):
            return "wrong record", f"{label}: {wrong} differ from the sound project"
        outcome = outcome or ("refused" if code else "repaired or not read")
    return outcome, ""


def _differing(sound: Project, copied: Project, stage_name: str) -> list[str]:
    """Published files of a stage that are not those of the sound project."""
    mine, theirs = copied.outputs(stage_name), sound.outputs(stage_name)
    return [name for name, checksum in theirs.items() if name.startswith("artifacts/") and mine.get(name) != checksum]


def _pipeline(folder: Path) -> test_pipeline.Project:
    """A clone of the repository with tiny parameters, whose code.yaml is of the code here, accepted or not."""
    project = test_pipeline.Project(folder, conftest.ROOT, conftest._tiny_params())
    code_identity.write(folder, current_code_lock())
    project.commit("the code here")
    return project


def kill_until_done(folder: Path, kills: int, generator: random.Random) -> tuple[list[str], int]:
    """Kills `dvc repro` of the whole tiny pipeline `kills` times, then lets it end. Returns failures and its kills."""
    sound = _pipeline(folder / "sound")
    started = time.monotonic()
    sound.run("dvc", "repro")
    duration = time.monotonic() - started
    killed = _pipeline(folder / "killed")
    failures, count = [], 0
    for _ in range(kills):
        process = killed.start("dvc", "repro")
        with contextlib.suppress(subprocess.TimeoutExpired):
            text, _ = process.communicate(timeout=generator.uniform(0.1, duration / 2))
            if process.returncode == 0:
                break
            failures.append(f"dvc repro after {count} kills: exit code {process.returncode}\n{text[-1500:]}")
            break
        for descendant in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.Error):
                descendant.send_signal(signal.SIGKILL)
        process.communicate()
        count += 1
        dvc_lock.restore(killed.folder, killed.folder)  # as `make repro` begins
    if not failures:
        killed.run("dvc", "repro")
        mine, theirs = (_results(project.folder) for project in (killed, sound))
        failures += [f"{name} differs after {count} kills" for name in theirs if mine.get(name) != theirs[name]]
    return failures, count


def _results(folder: Path) -> dict[str, str]:
    """Checksum of every result that must not depend on kills."""
    checksums = files.checksums(folder / "artifacts")
    return {name: digest for name, digest in checksums.items() if not name.startswith(_VOLATILE)}


def main() -> None:
    """Runs both campaigns and writes a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=8.0, help="of damage")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a Markdown file for the tables")
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)
    outcomes, failures = defaultdict(Counter), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sound").mkdir()
        project = finished_project(folder / "sound")
        names = sorted(kinds(project))
        deadline, number = time.monotonic() + 60 * options.minutes, 0
        while time.monotonic() < deadline:
            kind = names[number % len(names)]
            outcome, failure = torment(project, kind, generator, folder / f"{number}")
            outcomes[kind][outcome] += 1
            failures += [failure] if failure else []
            print(kind, outcome, failure, flush=True)
            shutil.rmtree(folder / f"{number}")
            number += 1
        kill_failures, kills = [], 0
        if options.kills:
            kill_failures, kills = kill_until_done(folder, options.kills, random.Random(options.seed))
    failures += kill_failures
    columns = ("repaired or not read", "refused", "traceback", "hang", "silence", "wrong record")
    text = (
        f"{number} damaged files of {len(names)} kinds, three commands each, and {kills} kills of a whole `dvc repro`, "
        f"seed {options.seed}: {len(failures)} failures. Made by `make torture`.\n\n"
        f"| kind of file | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n"
        + "".join(f"| `{kind}` | {' | '.join(str(outcomes[kind][c]) for c in columns)} |\n" for kind in outcomes)
    )
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    print(text, *failures, sep="\n")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
