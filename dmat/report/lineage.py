"""Where a result comes from: the chain of stage instances behind it, with the hash of everything that was handed on.

Read from `artifacts/provenance`, which each stage writes. A link holds if what lies there now has the hash that the
next stage read; where one does not, the chain is not the history of the result, and that is said.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmat import files, tracking
from dmat.metrics import pictures
from dmat.workspace import FINISHED, Workspace, provenance_path

_SHORT = 8  # characters of hashes and ids that people see


@dataclasses.dataclass(frozen=True)
class LineageLink:
    """What a stage read. makers: the instances that wrote it; empty for what no stage made."""

    name: str
    path: str
    sha256: str
    holds: bool  # what lies at `path` is still that; True where nobody looked
    makers: tuple["LineageStep", ...]


@dataclasses.dataclass(frozen=True)
class LineageStep:
    """A finished stage instance and what it read."""

    stage: str
    instance_name: str
    fingerprint: str
    run: str | None
    parent: str | None  # of the run
    commit: str | None
    links: tuple[LineageLink, ...]
    rank: int  # of its stage among the stages

    @property
    def title(self) -> str:
        return f"{self.stage} {self.instance_name}"

    def steps(self) -> list["LineageStep"]:
        """This one and all behind it, each once, in the order of the stages."""
        return ancestors([self])

    @property
    def broken(self) -> list[str]:
        """A sentence for each link that does not hold."""
        return [
            f"{step.title} read {link.path} as {link.sha256[:_SHORT]}, which is not what lies there now"
            for step in self.steps()
            for link in step.links
            if not link.holds
        ]

    def plain(self) -> list[dict[str, Any]]:
        return [
            {
                **{name: getattr(step, name) for name in ("stage", "instance", "fingerprint", "run", "commit")},
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


def runs_of(provenance: Mapping[str, Any], home: Path) -> tuple[str | None, str | None]:
    """The MLflow run that made a result, and the parent of it. A store that was away when the result was finished got
    its run later: then what the work folder remembers by now counts, or where that work was set aside."""
    if provenance.get("mlflow_run") or not provenance.get("work"):
        return provenance.get("mlflow_run"), provenance.get("mlflow_parent")
    work = home / provenance["work"]
    for folder in (work, *sorted(work.glob("before-*"))):
        note = folder / FINISHED
        if note.exists() and files.read_json(note).get("provenance") == provenance:
            return tracking.remembered_runs(folder)
    return None, None


def ancestors(results: Sequence[LineageStep]) -> list[LineageStep]:
    """The results and all that they come from, each once, in the order of the stages."""
    found: dict[str, LineageStep] = {}

    def visit(step: LineageStep) -> None:
        if step.title not in found:
            found[step.title] = step
            for link in step.links:
                for maker in link.makers:
                    visit(maker)

    for result in results:
        visit(result)
    return sorted(found.values(), key=lambda step: (step.rank, step.instance_name))


Makers = Mapping[str, tuple[str, str]]  # path of an output -> stage, instance; in the order of the stages


class Chain:
    """Steps by title, each read once.

    verify: read everything that was handed on, millions of images too, and compare its hash.
    """

    def __init__(self, makers: Makers, workspace: Workspace, verify: bool):
        self._makers, self._workspace, self._verify = makers, workspace, verify
        self._ranks = {
            stage_name: rank
            for rank, stage_name in enumerate(dict.fromkeys(stage_name for stage_name, _ in makers.values()))
        }
        self._known: dict[str, LineageStep] = {}

    def step(self, stage: str, instance_name: str) -> LineageStep:
        title = f"{stage} {instance_name}"
        if title not in self._known:
            said = files.read_json(self._workspace.at(provenance_path(stage, instance_name)))
            links = tuple(self.link(name, **entry) for name, entry in said["inputs"].items())
            run, parent = runs_of(said, self._workspace.home)
            self._known[title] = LineageStep(
                stage,
                instance_name,
                said["fingerprint"],
                run,
                parent,
                said.get("git_commit"),
                links,
                self._ranks[stage],
            )
        return self._known[title]

    def link(self, name: str, path: str, sha256: str) -> LineageLink:
        owners = dict.fromkeys(
            maker for output, maker in self._makers.items() if output == path or output.startswith(f"{path}/")
        )
        steps = tuple(self.step(*owner) for owner in owners if self._workspace.at(provenance_path(*owner)).exists())
        at = self._workspace.at(path)
        holds = not self._verify or (at.exists() and files.checksum(at) == sha256)
        return LineageLink(name, path, sha256, holds, steps)


def lines(results: Sequence[LineageStep]) -> list[str]:
    """Trees, the results on top. A step that was shown is not opened again."""
    shown = set[str]()
    return [line for result in results for line in _lines(result, "", shown)]


def _lines(step: LineageStep, indent: str, shown: set[str]) -> Iterator[str]:
    run, commit = (value[:_SHORT] if value else "–" for value in (step.run, step.commit))
    if step.title in shown:
        yield f"{indent}{step.title} (above)"
        return
    shown.add(step.title)
    yield f"{indent}{step.title}  fingerprint {step.fingerprint}, run {run}, commit {commit}"
    for link in step.links:
        mark = "" if link.holds else "  CHANGED SINCE"
        yield f"{indent}  {link.name}: {link.path} {link.sha256[:_SHORT]}{mark}"
        for maker in link.makers:
            yield from _lines(maker, f"{indent}    ", shown)


def draw(results: Sequence[LineageStep], path: Path, title: str) -> None:
    """The chain as a picture: a column for each stage, arrows from what was made to who read it; red if changed."""
    steps = ancestors(results)
    columns = list(dict.fromkeys(one.stage for one in steps))
    rows = {stage_name: [one for one in steps if one.stage == stage_name] for stage_name in columns}
    tallest = max(len(some) for some in rows.values())
    figure, axes = pictures.new_figure(1.75 * len(columns), 0.95 * tallest + 0.9)
    at = {
        one.title: (column, (tallest - 1) / 2 - row + (len(rows[stage_name]) - 1) / 2)
        for column, stage_name in enumerate(columns)
        for row, one in enumerate(rows[stage_name])
    }
    for one in steps:
        for link in one.links:
            for maker in link.makers:
                colour = pictures.PALETTE[0] if link.holds else "#c92a2a"
                axes.annotate(
                    "", at[one.title], at[maker.title],
                    arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 36, "shrinkB": 40, "linewidth": 1,
                                "connectionstyle": "arc3,rad=0.12"},
                )  # fmt: skip
    for one in steps:
        stage_name, instance_name = (
            one.stage.replace("_", "\n"),
            one.instance_name if one.instance_name != "all" else "",
        )
        run = f"run {one.run[:_SHORT]}" if one.run else "not tracked"
        axes.text(
            *at[one.title], "\n".join(filter(None, (stage_name, instance_name, run))), ha="center", va="center", fontsize=7.5,
            bbox={"boxstyle": "round,pad=0.45", "facecolor": "white", "edgecolor": "#868e96"},
        )  # fmt: skip
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(-0.75, tallest - 0.25)
    axes.set_axis_off()
    axes.set_title(title, fontsize=9.5, loc="left")
    pictures.save(figure, path)
