"""Files of one set: which split each belongs to by its name, and whether all parts are there.

train-00000-of-00002.parquet, train-00001-of-00002.parquet, test-00000-of-00001.parquet    as Hugging Face writes them
train.npz, test.npz                                                                        one file per split
50m_part1.npz, 50m_part2.npz                                                               parts of one set
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from dmat import files
from dmat.data.image_source import expect_folder, listing
from dmat.errors import DmatError

SPLIT_FOLDERS = {  # first words of files or names of sub-folders, upper or lower case -> split; the last is not read
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
}
_LAST_NUMBER = re.compile(r"\d+(?=\D*$)")
_NUMBER_OF_COUNT, _COUNT = re.compile(r"\d+(?=-of-\d)"), re.compile(r"(?<=-of-)(\d+)")


def files_of_splits(path: Path | None, suffix: str) -> tuple[dict[str, list[Path]], list[str]]:
    """The files with a suffix directly in a folder by split, each in the order of names, and notes for people.

    Numbers in names are ordered as numbers. Without names of splits all files are `train`. Raises DmatError if names
    are ambiguous, if there is no training file, or if a part is missing.
    """
    root = expect_folder(path, f"a folder of {suffix} files")
    paths = [file for file in root.iterdir() if file.suffix.lower() == suffix and not files.hidden(file.name)]
    if not paths:
        raise DmatError(f"{root} has no {suffix} file; expected some directly in it; give another path")
    groups: dict[str, list[Path]] = {}
    for file in sorted(paths, key=lambda file: _sort_key(file.name)):
        start = next(iter(re.findall(r"^[a-z]+", file.stem.lower())), "")
        groups.setdefault(start if start in SPLIT_FOLDERS else "", []).append(file)
    splits = {SPLIT_FOLDERS.get(start, "train"): group for start, group in groups.items()}
    if len(splits) < len(groups) or "train" not in splits or ("" in groups and len(groups) > 1):
        names = [file.name for group in groups.values() for file in group]
        raise DmatError(
            f"{root} has {listing(names)}; expected parts of one set alone, or files of which each begins with train, "
            f"test or val, train among them; move the others away or rename them"
        )
    for group in splits.values():
        _expect_all_parts(root, group)
    notes = []
    if unread := splits.pop("validation", []):
        notes.append(
            f"{listing([file.name for file in unread])} in {root} is not read; validation images come from the others"
        )
    return splits, notes


def _sort_key(name: str) -> list[tuple[int, str]]:
    """Orders names with numbers by value: part2 before part10."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _expect_all_parts(root: Path, paths: Sequence[Path]) -> None:
    """Raises DmatError if the numbers in the names of one set have a gap, or do not reach the count after "-of-"."""
    counts = {int(match[1]) for file in paths if (match := _COUNT.search(file.stem))}
    pattern = _NUMBER_OF_COUNT if counts else _LAST_NUMBER
    if not counts and (len(paths) == 1 or len({pattern.sub("", file.stem) for file in paths}) > 1):
        return  # the names do not count parts
    numbers = sorted(int(match[0]) for file in paths if (match := pattern.search(file.stem)))
    first, last = (0, max(counts) - 1) if counts else (min(numbers[0], 1), numbers[-1])
    if len(counts) > 1 or len(set(numbers)) < len(paths) or numbers[-1] > last:
        raise DmatError(
            f"{root} has {listing([file.name for file in paths])}; expected the parts of one set, each once; move the "
            f"others away"
        )
    missing = next(number for number in itertools.count(first) if number not in numbers)
    if missing <= last:
        name = pattern.sub(lambda match: str(missing).zfill(len(match[0])), paths[0].stem) + paths[0].suffix
        raise DmatError(
            f"{root} lacks {name}; expected all {last - first + 1} parts of the set beside each other; add it"
        )
