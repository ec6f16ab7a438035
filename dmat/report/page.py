"""The page: one HTML file with its style, charts and pictures inside, so that it opens anywhere and asks no network."""

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmat.report.charts import Chart
from dmat.report.comparison import per_cent, points
from dmat.report.costs import Cost

_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Picture:
    path: Path
    caption: str

    @property
    def embedded(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file that numbers of the page were read from. path: below the project."""

    path: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class PageContent:
    """Everything on the page. measures: column -> heading. charts: by the names that the template places; None: there
    is nothing to draw. checks: run -> checks of its evaluation. provenance: stage instance -> what it noted."""

    title: str
    sentences: Sequence[str]
    comparison: Mapping[str, Any]
    measures: Mapping[str, str]
    protocol: Mapping[str, Any]
    seeds: Sequence[int]
    mixes: Mapping[str, Mapping[str, Any]]
    quality: Mapping[str, Mapping[str, float]]
    quality_measure: str
    checks: Mapping[str, Sequence[Mapping[str, Any]]]
    costs: Sequence[Cost]
    charts: Mapping[str, Chart | None]
    sheets: Sequence[Picture]
    attacked: Sequence[Picture]
    chain: Picture
    chain_lines: Sequence[str]
    provenance: Mapping[str, Mapping[str, Any]]
    sources: Sequence[SourceFile]


def again(provenance: Mapping[str, Mapping[str, Any]]) -> tuple[str, list[str]]:
    """What to do to get the numbers again, as a sentence and commands. provenance: "stage instance" -> its own.

    A commit alone gives them only if every part was made at that commit without local changes; and by one dmat, where
    the project does not hold its code.
    """
    parts = provenance.values()
    commits = list(dict.fromkeys(one["git_commit"] for one in parts if one.get("git_commit")))
    versions = list(dict.fromkeys(one.get("dmat") for one in parts))
    whole = all(one.get("git_commit") and not one.get("git_dirty") for one in parts)
    known = len(versions) == 1 and not str(versions[0]).endswith(".changed")
    if len(commits) == 1 and whole and known:
        by, command = (f", by dmat {versions[0]}", "dvc repro") if versions[0] else ("", "make repro")
        return f"Every part was made at one commit without local changes{by}.", [f"git checkout {commits[0]}", command]
    made = (
        "outside a git repository" if not commits else f"at {len(commits)} commits" if commits[1:] else "at one commit"
    )
    changed = " with local changes" if commits and not whole else ""
    if not known:
        changed += f" by dmat {' and '.join(version or 'of the project itself' for version in versions)}"
    return (
        f"The parts were made {made}{changed}, so no commit alone gives them again. Each run keeps its commit, its "
        f"changes, its parameters and the checksums of its data; this sets a tree up for one of them:",
        [f"dmat runs reproduce {name.replace(' ', '/')}" for name in provenance if name.startswith("evaluate_robust ")],
    )


def render(content: PageContent) -> str:
    """The whole page. Raises jinja2.UndefinedError if the template asks for what is not there."""
    import jinja2
    import plotly.offline

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"per_cent": per_cent, "points": points, "tera": _tera, "duration": _duration}
    drawn = {name: chart for name, chart in content.charts.items() if chart is not None}
    return environment.get_template("page.html.j2").render(
        **{field.name: getattr(content, field.name) for field in dataclasses.fields(content)},
        drawn=drawn,
        again=again(content.provenance),
        charts_json=_script(json.dumps(drawn)),
        plotly_js=_script(plotly.offline.get_plotlyjs()),
        page_js=_script((_HERE / "page.js").read_text(encoding="utf-8")),
    )


def _script(text: str) -> Any:
    """Text that stands inside a script element and cannot end it."""
    from markupsafe import Markup

    return Markup(text.replace("</", "<\\/"))


def _tera(value: float) -> str:
    """Operations in the unit that fits: 12.3 T, 4.56 P."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "


def _duration(hours: float) -> str:
    """3.4 h, 12.1 min"""
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
