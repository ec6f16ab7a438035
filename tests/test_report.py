"""The comparison of arms: what an arm without a headline shows, and that the rest is compared all the same."""

import numpy as np
import pytest

from dmat.config import WriteReport
from dmat.jobs import write_report

SETTINGS = WriteReport(title="t", baseline="real", bootstrap=100, seed=1)


def _tables(**names):
    """run -> per-image table of 40 images; `names`: what the accuracy under AutoAttack is called in it."""
    rng = np.random.default_rng(0)
    columns = ("best_clean", "best_pgd", "last_clean", "last_pgd")
    return {run: {name: rng.random(40) < 0.6 for name in (*columns, measure)} for run, measure in names.items()}


RUNS = {"real": ["real-1", "real-2"], "mixed": ["mixed-1", "mixed-2"]}
GOOD, BAD = "best_auto_attack", "best_auto_attack_unchecked"


@pytest.mark.parametrize("without", ["real-2", "mixed-1"])
def test_an_arm_of_which_one_seed_has_no_headline_shows_none(without):
    names = {run: BAD if run == without else GOOD for runs in RUNS.values() for run in runs}
    tables = _tables(**{run.replace("-", "_"): measure for run, measure in names.items()})
    tables = {run.replace("_", "-"): table for run, table in tables.items()}
    comparison = write_report.compare(RUNS, tables, SETTINGS)
    arm, other = without[:-2], ({"real", "mixed"} - {without[:-2]}).pop()
    assert GOOD not in comparison["arms"][arm]
    assert GOOD in comparison["arms"][other]
    assert set(comparison["differences"]["mixed"]) == {"best_clean", "best_pgd", "last_clean", "last_pgd"}
    for values in comparison["arms"].values():
        values |= {"best_gap": 0.1, "last_gap": 0.2}
    comparison["no_headline"] = {without: ["Only 40 of 50 images were attacked."]}
    table = write_report.markdown(comparison, "real").splitlines()
    rows = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in table[2:5]}
    assert table[0].split("|")[4].strip() == "AutoAttack, best"
    assert rows[arm][2] == "—"
    assert "[" in rows[other][2]
    assert rows["mixed − real"][2] == "—"
    assert "**" in rows["mixed − real"][1]
    assert table[-1] == f"No AutoAttack accuracy of {without}: Only 40 of 50 images were attacked."


def test_without_any_headline_there_is_no_column():
    names = [run for runs in RUNS.values() for run in runs]
    tables = dict(zip(names, _tables(a=BAD, b=BAD, c=BAD, d=BAD).values(), strict=True))
    comparison = write_report.compare(RUNS, tables, SETTINGS)
    assert list(write_report.measures_of(comparison)) == ["best_clean", "best_pgd", "last_clean", "last_pgd"]
