"""Published accuracies: the table is complete and plausible, names are found, differences of protocol are reported.

Run alone: pytest tests/test_leaderboard.py
"""

import dataclasses
import datetime
import re
import tomllib
from fractions import Fraction

import pytest

from dmat.errors import DmatError
from dmat.models import leaderboard
from dmat.models.importing import DATA

TABLES = {("cifar10", "linf"): ("8/255", 27), ("cifar10", "l2"): ("0.5", 9), ("cifar100", "linf"): ("8/255", 11)}
ALL_ENTRIES = [entry for table in TABLES for entry in leaderboard.entries(*table)]
EQUAL_PROTOCOL = {"norm": "linf", "epsilon": "8/255", "images": 10_000, "suite": "standard", "precision": "fp32"}


def entry_title(entry):
    return f"{entry.data} {entry.norm} {entry.name}"


@pytest.mark.parametrize("table", TABLES)
def test_every_table_is_complete_and_ranked(table):
    rows = leaderboard.entries(*table)
    epsilon, count = TABLES[table]
    assert len(rows) == count
    assert {row.epsilon for row in rows} == {epsilon}
    assert [row.ranked for row in rows] == sorted((row.ranked for row in rows), reverse=True)
    names = [entry_name for row in rows for entry_name in (row.name, row.id) if entry_name]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("entry", ALL_ENTRIES, ids=entry_title)
def test_every_entry_is_plausible(entry):
    assert 0 < entry.auto_attack < entry.clean < 100
    assert entry.external is None or 0 < entry.external < entry.auto_attack
    assert entry.external is not None or entry.external_attack is None
    assert entry.data in DATA
    assert entry.architecture and entry.extra_data and "RobustBench" in entry.source
    assert datetime.date.fromisoformat(entry.snapshot) == datetime.date(2025, 3, 31)
    assert entry.images == 10_000
    assert re.fullmatch(r"[A-Z][a-z]+20\d\d[A-Za-z]+(_[\w-]+)?", entry.id)  # every row was looked up
    assert entry.id.startswith(entry.name.partition(" ")[0])  # author and year
    if sizes := re.search(r"(\d+)[-_](\d+)(_|$)", entry.id):  # an id that names depth and width names those of the row
        assert entry.architecture.endswith(f"-{sizes[1]}-{sizes[2]}")
    assert ("R18" in entry.id) == (entry.architecture in ("PreActResNet-18", "ResNet-18"))
    if entry.authors:  # only where they differ
        reported = (entry.authors.clean, entry.authors.auto_attack, entry.authors.epsilon)
        assert reported != (entry.clean, entry.auto_attack, entry.epsilon)
        assert abs(Fraction(entry.authors.epsilon) / Fraction(entry.epsilon) - 1) < 0.01
        assert entry.authors.source


@pytest.mark.parametrize(
    ("data", "norm", "name", "clean", "auto_attack", "ranked"),
    [
        ("cifar10", "linf", "Wang2023Better_WRN-70-16", 93.25, 70.69, 70.69),
        ("cifar10", "linf", "Wang2023Better_WRN-28-10", 92.44, 67.31, 67.31),
        ("cifar10", "linf", "Rebuffi2021Fixing_28_10_cutmix_ddpm", 87.33, 60.75, 60.73),
        ("cifar10", "linf", "Rade2021Helper_ddpm", 88.16, 60.97, 60.97),
        ("cifar10", "linf", "Amini2024MeanSparse_Ra_WRN_70_16", 93.24, 72.08, 68.94),
        ("cifar10", "l2", "Gowal2020Uncovering_extra", 94.74, 80.53, 80.53),
        ("cifar10", "l2", "Rebuffi2021Fixing_R18_cutmix_ddpm", 90.33, 75.86, 75.86),
        ("cifar10", "l2", "Wang2023Better_WRN-70-16", 95.54, 84.97, 84.97),
        ("cifar10", "l2", "Wang2023Better_WRN-28-10", 95.16, 83.68, 83.68),
        ("cifar100", "linf", "Wang2023Better_WRN-70-16", 75.22, 42.67, 42.66),
        ("cifar100", "linf", "Wang2023Better_WRN-28-10", 72.58, 38.83, 38.77),
    ],
)
def test_known_rows_have_their_published_numbers(data, norm, name, clean, auto_attack, ranked):
    row = leaderboard.entry(data, norm, name)
    assert (row.clean, row.auto_attack, row.ranked) == (clean, auto_attack, ranked)
    assert leaderboard.entry(data, norm, row.name) is row


def test_gains_of_the_paper_follow_from_the_table():
    """Wang et al. 2023, abstract: +4.58 (its Table 1: over 66.11), +4.44 in l2 and +8.03 over the previous best."""
    for data, norm, before, gain in [
        ("cifar10", "linf", "Gowal2021 ddpm_100m WRN-70-16", 4.58),
        ("cifar10", "l2", "Rebuffi2021 cutmix_ddpm WRN-70-16", 4.44),
        ("cifar100", "linf", "Rebuffi2021 cutmix_ddpm WRN-70-16", 8.03),
    ]:
        wang = leaderboard.entry(data, norm, "Wang2023Better_WRN-70-16")
        reported = wang.authors.auto_attack if wang.authors else wang.auto_attack
        assert reported - leaderboard.entry(data, norm, before).auto_attack == pytest.approx(gain)


def test_entries_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALL_ENTRIES[0].clean = 100.0
    leaderboard.entries("cifar10", "l2").clear()
    assert len(leaderboard.entries("cifar10", "l2")) == 9


def test_an_unknown_name_is_refused_with_similar_ones():
    with pytest.raises(DmatError) as caught:
        leaderboard.entry("cifar10", "linf", "wang2023better_WRN70-16")
    assert str(caught.value).startswith("no entry 'wang2023better_WRN70-16' for cifar10 linf; expected a name or an id")
    assert "Wang2023Better_WRN-70-16" in str(caught.value)
    with pytest.raises(DmatError, match="say for example Wang2023 WRN-70-16, "):  # nothing is similar
        leaderboard.entry("cifar10", "l2", "§§§")


def test_an_unknown_table_is_refused():
    with pytest.raises(DmatError, match="no published numbers for svhn linf; expected one of cifar10 linf, cifar10 l2"):
        leaderboard.entries("svhn", "linf")


# --- differences of protocol


def sentences(entry, **changes):
    return leaderboard.differences(entry, EQUAL_PROTOCOL | changes)


WANG = leaderboard.entry("cifar10", "linf", "Wang2023Better_WRN-70-16")
WANG_L2 = leaderboard.entry("cifar10", "l2", "Wang2023Better_WRN-70-16")


def test_an_equal_protocol_differs_in_shards_and_seed_only():
    (only,) = sentences(WANG)
    assert only.startswith("We attack in shards, each with a seed and batches of its own; RobustBench")
    assert sentences(WANG_L2, norm="l2", epsilon="1/2") == [only]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"norm": "l2"}, "We attack in l2, the entry is for linf: the two numbers are not comparable."),
        (
            {"epsilon": "4/255"},
            "Our epsilon is 4/255, the leaderboard's 8/255: ours is smaller by 50.0 %, which makes our accuracy "
            "higher.",
        ),
        (
            {"images": 1000},
            "We attack 1,000 images, the leaderboard 10,000: an accuracy of 70.7 % of 1,000 has a 95 % interval from "
            "67.8 to 73.4 %.",
        ),
        (
            {"suite": "rand"},
            "Our attack is rand, the leaderboard's standard AutoAttack: the two numbers are not comparable.",
        ),
        (
            {"precision": "bf16"},
            "We compute in bf16, RobustBench in fp32: coarser gradients can make an attack weaker.",
        ),
    ],
)
def test_each_difference_is_one_sentence(change, sentence):
    reported = sentences(WANG, **change)
    assert sentence in reported
    assert len(reported) == 2


def test_the_number_of_the_authors_is_named_if_its_epsilon_is_ours():
    reported = sentences(WANG_L2, norm="l2", epsilon="128/255")
    assert reported[:2] == [
        "Our epsilon is 128/255, the leaderboard's 0.5: ours is larger by 0.4 %, which makes our accuracy lower.",
        "With epsilon 128/255 the authors report 84.86 % (wzekai99/DM-Improves-AT, README): compare with that number "
        "instead of 84.97 %.",
    ]
    assert not any("84.86" in line for line in sentences(WANG_L2, norm="l2", epsilon="0.25"))


def test_a_rank_by_a_stronger_attack_is_reported():
    malt = leaderboard.entry("cifar100", "linf", "Wang2023Better_WRN-70-16")
    expected = "The leaderboard ranks the entry by 42.66 % under MALT; its number for AutoAttack is 42.67 %."
    assert expected in sentences(malt)
    unnamed = leaderboard.entry("cifar10", "linf", "Gowal2021 ddpm_100m WRN-70-16")
    assert any("by 66.10 % under a stronger attack;" in line for line in sentences(unnamed))


@pytest.mark.parametrize("entry", ALL_ENTRIES, ids=entry_title)
def test_every_entry_can_be_compared(entry):
    for line in sentences(entry, epsilon="3/255", images=7, suite="none", precision="bf16"):
        assert line.endswith(".") and "None" not in line


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"epsilon": "8 of 255"}, "epsilon is '8 of 255'; expected a number above 0 as text; write it as 8/255 or 0.5"),
        ({"epsilon": "0"}, "epsilon is '0'; expected"),
        ({"epsilon": "8/0"}, "epsilon is '8/0'; expected"),
        ({"images": 0}, "images is 0; expected 1 or more"),
    ],
)
def test_an_invalid_protocol_is_refused(change, text):
    with pytest.raises(DmatError, match=re.escape(text)):
        sentences(WANG, **change)


def test_an_incomplete_protocol_is_refused():
    with pytest.raises(DmatError, match="a protocol without images, suite, precision; expected norm, epsilon, images"):
        leaderboard.differences(WANG, {"norm": "linf", "epsilon": "8/255"})


def test_the_table_is_part_of_the_wheel(root):
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {path.name for pattern in data["dmat.models"] for path in (root / "dmat" / "models").glob(pattern)}
    assert packaged == {"leaderboard.json"}
