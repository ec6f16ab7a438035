"""Lineage of a result: the chain of stage instances that it comes from, with the hash of every input.

Read from `artifacts/provenance`, which each stage writes. A link holds if the file still has the hash that the next
stage read. If a link does not hold, the chain is not the history of the result, and the link is reported as broken.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dmat import files, tracking
from dmat.errors import DmatError
from dmat.metrics import pictures
from dmat.workspace import FINISHED, Provenance, Workspace, provenance_path

_SHORT_LENGTH = 8  # characters of hashes and ids in output for people


@dataclasses.dataclass(frozen=True)
class LineageLink:
    """An input of a stage. makers: the stage instances that wrote it; empty if no stage did."""

    name: str
    path: str
    sha256: str
    holds: bool  # `path` still has this hash; True where it was not verified
    makers: tuple["LineageStep", ...]


@dataclasses.dataclass(frozen=True)
class LineageStep:
    """A finished stage instance and its inputs."""

    stage: str
    instance_name: str
    fingerprint: str
    run: str | None  # of MLflow
    parent: str | None  # of the run
    commit: str | None
    links: tuple[LineageLink, ...]
    rank: int  # position of its stage in the pipeline

    @property
    def title(self) -> str:
        """Stage and instance, as in "train_robust generated-1"."""
        return f"{self.stage} {self.instance_name}"

    def steps(self) -> list["LineageStep"]:
        """This step and all its ancestors, each once, in the order of the stages."""
        return ancestors([self])

    @property
    def broken(self) -> list[str]:
        """A sentence for each link that does not hold."""
        return [
            f"{step.title} read {link.path} as {link.sha256[:_SHORT_LENGTH]}, but it is missing or different now"
            for step in self.steps()
            for link in step.links
            if not link.holds
        ]

    def plain(self) -> list[dict[str, object]]:
        """The steps with their inputs, as JSON can hold them."""
        return [
            {
                "stage": step.stage,
                "instance": step.instance_name,
                **{name: getattr(step, name) for name in ("fingerprint", "run", "commit")},
                "inputs": {
                    link.name: {
                        "path": link.path,
                        "sha256": link.sha256,
                        "holds": link.holds,
                        "from": [maker.title for maker in link.makers],
                    }
                    for link in step.links
                },
            }
            for step in self.steps()
        ]


def mlflow_runs(provenance: Provenance, home: Path) -> tuple[str | None, str | None]:
    """The MLflow run that made a result, and its parent run; None where there is none.

    If the store was unreachable when the result was finished, the run was created later. Then the ids come from the
    record in the work folder, or in the folder to which that work was set aside.
    """
    if provenance.get("mlflow_run") or not provenance.get("work"):
        return provenance.get("mlflow_run"), provenance.get("mlflow_parent")
    work = home / provenance["work"]
    for folder in (work, *sorted(work.glob("before-*"))):
        finished_path = folder / FINISHED
        with contextlib.suppress(DmatError):  # missing or damaged
            if files.read_record(finished_path, dict[str, object]).get("provenance") == provenance:
                return tracking.recorded_runs(folder)
    return None, None


def ancestors(results: Sequence[LineageStep]) -> list[LineageStep]:
    """The results and all steps that they come from, each once, in the order of the stages."""
    steps_by_title: dict[str, LineageStep] = {}

    def visit(step: LineageStep) -> None:
        if step.title not in steps_by_title:
            steps_by_title[step.title] = step
            for link in step.links:
                for maker in link.makers:
                    visit(maker)

    for result in results:
        visit(result)
    return sorted(steps_by_title.values(), key=lambda step: (step.rank, step.instance_name))


Makers = Mapping[str, tuple[str, str]]  # path of an output -> stage, instance; in the order of the stages


class Chain:
    """Reads steps and links from provenance, each step once.

    verify: read every input, which may be millions of images, and compare its hash.
    """

    def __init__(self, makers: Makers, workspace: Workspace, verify: bool):
        self._makers, self._workspace, self._verify = makers, workspace, verify
        self._ranks = {
            stage_name: rank
            for rank, stage_name in enumerate(dict.fromkeys(stage_name for stage_name, _ in makers.values()))
        }
        self._steps: dict[str, LineageStep] = {}

    def step(self, stage_name: str, instance_name: str) -> LineageStep:
        """The step of a stage instance, with all its ancestors. Raises DmatError where its provenance is missing."""
        title = f"{stage_name} {instance_name}"
        if title not in self._steps:
            provenance = files.read_record(self._workspace.at(provenance_path(stage_name, instance_name)), Provenance)
            links = tuple(self.link(name, **entry) for name, entry in provenance["inputs"].items())
            run, parent = mlflow_runs(provenance, self._workspace.home)
            self._steps[title] = LineageStep(
                stage_name,
                instance_name,
                provenance["fingerprint"],
                run,
                parent,
                provenance.get("git_commit"),
                links,
                self._ranks[stage_name],
            )
        return self._steps[title]

    def link(self, name: str, path: str, sha256: str) -> LineageLink:
        """The link of an input that was read from `path` with this hash."""
        maker_names = dict.fromkeys(
            maker for output, maker in self._makers.items() if output == path or output.startswith(f"{path}/")
        )
        maker_steps = tuple(
            self.step(*maker_name)
            for maker_name in maker_names
            if self._workspace.at(provenance_path(*maker_name)).exists()
        )
        target = self._workspace.at(path)
        holds = not self._verify or (target.exists() and files.checksum(target) == sha256)
        return LineageLink(name, path, sha256, holds, maker_steps)


def lines(results: Sequence[LineageStep]) -> list[str]:
    """The chain as indented lines, one tree per result. A step that occurs again is shown without its inputs."""
    shown = set[str]()
    return [line for result in results for line in _lines(result, "", shown)]


def _lines(step: LineageStep, indent: str, shown: set[str]) -> Iterator[str]:
    run, commit = (value[:_SHORT_LENGTH] if value else "–" for value in (step.run, step.commit))
    if step.title in shown:
        yield f"{indent}{step.title} (above)"
        return
    shown.add(step.title)
    yield f"{indent}{step.title}  fingerprint {step.fingerprint}, run {run}, commit {commit}"
    for link in step.links:
        mark = "" if link.holds else "  CHANGED SINCE"
        yield f"{indent}  {link.name}: {link.path} {link.sha256[:_SHORT_LENGTH]}{mark}"
        for maker in link.makers:
            yield from _lines(maker, f"{indent}    ", shown)


def draw(results: Sequence[LineageStep], path: Path, title: str) -> None:
    """Draws the chain to a PNG file: a column per stage, an arrow from each step to its readers, red if changed."""
    steps = ancestors(results)
    columns = list(dict.fromkeys(step.stage for step in steps))
    rows = {stage_name: [step for step in steps if step.stage == stage_name] for stage_name in columns}
    tallest = max(len(column_steps) for column_steps in rows.values())
    figure, axes = pictures.new_figure(1.75 * len(columns), 0.95 * tallest + 0.9)
    positions = {
        step.title: (column, (tallest - 1) / 2 - row + (len(rows[stage_name]) - 1) / 2)
        for column, stage_name in enumerate(columns)
        for row, step in enumerate(rows[stage_name])
    }
    for step in steps:
        for link in step.links:
            for maker in link.makers:
                colour = pictures.PALETTE[0] if link.holds else "#c92a2a"
                axes.annotate(
                    "", positions[step.title], positions[maker.title],
                    arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 36, "shrinkB": 40, "linewidth": 1,
                                "connectionstyle": "arc3,rad=0.12"},
                )  # fmt: skip
    for step in steps:
        stage_name, instance_name = (
            step.stage.replace("_", "\n"),
            step.instance_name if step.instance_name != "all" else "",
        )
        run = f"run {step.run[:_SHORT_LENGTH]}" if step.run else "not tracked"
        axes.text(
            *positions[step.title], "\n".join(filter(None, (stage_name, instance_name, run))),
            ha="center", va="center", fontsize=7.5,
            bbox={"boxstyle": "round,pad=0.45", "facecolor": "white", "edgecolor": "#868e96"},
        )  # fmt: skip
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(-0.75, tallest - 0.25)
    axes.set_axis_off()
    axes.set_title(title, fontsize=9.5, loc="left")
    pictures.save(figure, path)
