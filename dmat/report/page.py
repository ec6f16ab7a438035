"""The page: one HTML file with its style, charts and pictures inside. It opens anywhere and needs no network."""

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dmat.report.charts import Chart
from dmat.report.comparison import ArmMeasure, Comparison, per_cent, points
from dmat.report.costs import PARTS, Cost

if TYPE_CHECKING:  # importing the evaluation loads much more
    from markupsafe import Markup

    from dmat.evaluation.checks import CheckRecord
    from dmat.evaluation.evaluate import EvaluationProtocol
    from dmat.workspace import Provenance

_FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG file and its caption."""

    path: Path
    caption: str

    @property
    def embedded(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file from which numbers of the page were read. path: relative to the project."""

    path: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class PageContent:
    """Everything on the page.

    measures: column -> heading. quality: rows of a table, heading and a cell per selection. charts: by the names that
    the template uses; None where there is nothing to draw. checks: run -> checks of its evaluation. provenance: "stage
    instance" -> its provenance record.
    """

    title: str
    sentences: Sequence[str]
    comparison: Comparison
    measures: Mapping[ArmMeasure, str]
    protocol: "EvaluationProtocol"
    seeds: Sequence[int]
    mixes: Mapping[str, Mapping[str, object]]
    quality: Sequence[tuple[str, Sequence[str]]]
    selections: Sequence[str]
    quality_measure: str
    checks: "Mapping[str, Sequence[CheckRecord]]"
    costs: Sequence[Cost]
    charts: Mapping[str, Chart | None]
    sheets: Sequence[Picture]
    attacked: Sequence[Picture]
    chain: Picture
    chain_lines: Sequence[str]
    provenance: "Mapping[str, Provenance]"
    sources: Sequence[SourceFile]


def reproduction(provenance: "Mapping[str, Provenance]") -> tuple[str, list[str]]:
    """How to reproduce the numbers: a sentence and commands. provenance: "stage instance" -> its provenance record.

    A commit alone reproduces them only if every part was made at that commit without local changes. Where the project
    does not hold the code of dmat, one version of dmat must also have made every part.
    """
    records = provenance.values()
    commits = list(dict.fromkeys(record["git_commit"] for record in records if record.get("git_commit")))
    versions = list(dict.fromkeys(record.get("dmat") for record in records))
    committed = all(record.get("git_commit") and not record.get("git_dirty") for record in records)
    one_version = len(versions) == 1 and not str(versions[0]).endswith(".changed")
    if len(commits) == 1 and committed and one_version:
        by, command = (f", by dmat {versions[0]}", "dvc repro") if versions[0] else ("", "make repro")
        return f"Every part was made at one commit without local changes{by}.", [f"git checkout {commits[0]}", command]
    origin = (
        "outside a git repository" if not commits else f"at {len(commits)} commits" if commits[1:] else "at one commit"
    )
    local_changes = " with local changes" if commits and not committed else ""
    if not one_version:
        local_changes += f" by dmat {' and '.join(version or 'of the project itself' for version in versions)}"
    return (
        f"The parts were made {origin}{local_changes}, so no commit alone reproduces them. Each run records its "
        f"commit, its changes, its parameters and the checksums of its data; each of these commands sets up a tree for "
        f"one run:",
        [f"dmat runs reproduce {name.replace(' ', '/')}" for name in provenance if name.startswith("evaluate_robust ")],
    )


def render(content: PageContent) -> str:
    """The page as HTML. Raises jinja2.UndefinedError if the template uses a name that is not defined."""
    return render_template(
        "page.html.j2",
        content.charts,
        **{field.name: getattr(content, field.name) for field in dataclasses.fields(content) if field.name != "charts"},
        cost_parts=list(PARTS),
        reproduction=reproduction(content.provenance),
    )


def render_template(name: str, charts: Mapping[str, Chart | None], **values: object) -> str:
    """A template of this folder as HTML, with the style, the charts and the script that all pages share.

    charts: by the names that the template uses; None where there is nothing to draw. values: of its other names.
    Raises jinja2.UndefinedError if the template uses a name that is not defined.
    """
    import jinja2
    import plotly.offline

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"per_cent": per_cent, "points": points, "tera": _tera, "duration": _duration}
    drawn_charts = {chart_name: chart for chart_name, chart in charts.items() if chart is not None}
    return environment.get_template(name).render(
        **values,
        drawn_charts=drawn_charts,
        charts_json=_script(json.dumps(drawn_charts)),
        plotly_js=_script(plotly.offline.get_plotlyjs()),
        page_js=_script((_FOLDER / "page.js").read_text(encoding="utf-8")),
    )


def _script(text: str) -> "Markup":
    """Text escaped so that it cannot end the script element around it."""
    from markupsafe import Markup

    return Markup(text.replace("</", "<\\/"))


def _tera(value: float) -> str:
    """Operations with a metric prefix, such as "12.3 T" or "4.56 P"."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "


def _duration(hours: float) -> str:
    """A duration such as "3.4 h" or "12.1 min"."""
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
