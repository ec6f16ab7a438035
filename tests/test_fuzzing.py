"""A few hundred damaged and hostile files: every reader reads or refuses them. The long form is `make fuzz`."""

import os

import pytest

from dmat import files
from dmat.errors import DmatError
from tests import fuzzing

INPUTS = 12  # for each reader


@pytest.mark.parametrize("name", sorted({*fuzzing.READERS} - {fuzzing.FOLDER}))
def test_damaged_files_are_read_or_refused(tmp_path, name):
    tally = fuzzing.fuzz(name, INPUTS, 7, tmp_path)
    assert tally.failures == []
    assert tally.read + tally.refused == INPUTS


@pytest.mark.parametrize(
    ("read", "failure"),
    [
        (lambda folder: {}["key"], "KeyError"),
        (lambda folder: bytearray(2 * fuzzing.MEMORY), "MemoryError"),
        (lambda folder: open(folder / "fifo", encoding="utf-8"), "Hang"),  # noqa: SIM115
    ],
    ids=["another exception", "memory", "a hang"],
)
def test_a_failure_is_seen(tmp_path, monkeypatch, read, failure):
    def read_after_the_first(folder):
        if folder.name != "first":
            os.mkfifo(folder / "fifo")
            read(folder)

    monkeypatch.setattr(fuzzing, "SECONDS", 0.1)
    reader = fuzzing.Reader(lambda folder: files.write_json(folder / "a.json", {}), read_after_the_first, "*.json")
    monkeypatch.setitem(fuzzing.READERS, "broken", reader)
    (text,) = fuzzing.fuzz("broken", 1, 1, tmp_path).failures
    assert f"{failure}:" in text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "all of it: Input should be a valid dictionary"),
        ("null", "all of it: Input should be a valid dictionary"),
        ('{"metrics": 1}', "metrics: Input should be"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 51 + "]" * 51, "nested too deeply"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": ' + "9" * 400 + "}", "the number 99999999999999999999... has 400 digits"),
    ],
)
def test_json_that_no_stage_writes_is_refused(tmp_path, text, sentence):
    from dmat.pipeline.work_folder import Finished

    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DmatError) as refused:
        files.read_record(tmp_path / "a.json", Finished)
    assert sentence in str(refused.value)


def test_what_a_schema_does_not_name_stays(tmp_path):
    """Keys of another version of dmat are neither refused nor lost; a whole number is a number, True is not."""
    from dmat.data.selections import SelectionRecord

    record = {"image_set": "a", "shape": [1, 1, 1], "classes": 2, "manifest_sha256": "", "pool": 1, "kept": 1}
    files.write_json(tmp_path / "a.json", record | {"later": [1]})
    assert files.read_record(tmp_path / "a.json", SelectionRecord) == record | {"later": [1]}
    files.write_json(tmp_path / "a.json", record | {"pool": True})
    with pytest.raises(DmatError, match="pool: Input should be a valid integer"):
        files.read_record(tmp_path / "a.json", SelectionRecord)
