"""Parts of studies without training: spaces, imported trials, what samplers see, the winner's arm, storages.

Run alone: pytest tests/test_tuning_parts.py
"""

import contextlib
import dataclasses
import sqlite3
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import sqlalchemy
import yaml
from optuna.trial import TrialState, create_trial

from dmat import config
from dmat.engine import InProcessEngine
from dmat.errors import ConfigError, DmatError
from dmat.tuning import applying, rank_task, ranking, sampling, space, storage
from dmat.tuning.driver import Driver
from dmat.tuning.plan import Study


def _study(root, tmp_path, changes):
    """The study of params.yaml with some keys of `tune` changed, the parameters and their file."""
    raw = yaml.safe_load((root / "params.yaml").read_text())
    raw["tune"] |= changes
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    params = config.load(path)
    settings, trial = params.tune, params.trial
    folder = tmp_path / "runs/tune/generated-000000000000"
    return Study(settings, trial, {}, folder, "sqlite:///none", "transfer key"), params, path


SPACE = {
    "beta": {"low": 1.0, "high": 10.0, "scale": "log"},
    "network.width": {"low": 1, "high": 3},
    "augmentation": {"choices": ["none", "crop1"]},
    "image_set.sampler.steps": {"low": 5, "high": 40, "scale": "log"},
    "selection.keep": {"low": 0.2, "high": 1.0},
    "attack_step_size": {"low": 0.02, "high": 0.1},
}


def test_any_parameter_of_an_arm_or_its_images_may_be_in_a_space(root, tmp_path):
    plan, *_ = _study(root, tmp_path, {"space": SPACE})
    search_space = space.distributions(plan)
    kinds = {
        name: type(distribution).__name__.removesuffix("Distribution") for name, distribution in search_space.items()
    }
    assert kinds == {
        "beta": "Float",
        "network.width": "Int",
        "augmentation": "Categorical",
        "image_set.sampler.steps": "Int",
        "selection.keep": "Float",
        "attack_step_size": "Float",
    }
    assert (
        search_space["beta"].log,
        search_space["image_set.sampler.steps"].log,
        search_space["selection.keep"].log,
    ) == (True, True, False)
    assert plan.points == [
        {"beta": 5.0, "network.width": 1, "augmentation": "none", "image_set.sampler.steps": 18, "selection.keep": 0.8,
         "attack_step_size": 0.05}
    ]  # fmt: skip
    values = plan.points[0] | {"network.width": 2, "image_set.sampler.steps": 9, "selection.keep": 0.5}
    changed = plan.trial.with_values(values)
    assert (changed.arm.network.width, changed.image_set.sampler.steps, changed.selection.keep) == (2, 9, 0.5)
    assert changed.arm.network.depth == plan.trial.arm.network.depth, "mappings are merged"
    assert (changed.arm.images_seen, changed.arm.evaluate_every) == (
        plan.settings.images_seen,
        plan.settings.evaluate_every,
    )


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"space": {"bta": {"low": 1, "high": 2}}}, ["tune.space.bta is not known", "beta"]),
        ({"space": {"network": {"choices": ["a", "b"]}}}, ["network is not a single value", "dots"]),
        ({"space": {"network.dpth": {"low": 1, "high": 2}}}, ["network.dpth is not known", "depth"]),
        ({"space": {"images_seen": {"low": 1, "high": 2}}}, ["tune.space.images_seen", "could not be compared"]),
        ({"space": {"threat.epsilon": {"low": 0.1, "high": 0.2}}}, ["threat.epsilon", "could not be compared"]),
        ({"space": {"augmentation": {"low": 1, "high": 2}}}, ["augmentation is 'none'", "choices, not a range"]),
        ({"space": {"augmentation": {"choices": ["none", "nose"]}}}, ["augmentation.choices.1 is nose", "crop1"]),
        ({"space": {"network.width": {"low": 1, "high": 2.5}}}, ["width.high is 2.5", "whole number"]),
        ({"space": {"beta": {"choices": [1.0]}}}, ["tune.space.beta", "at least 2 items"]),
        ({"space": {"beta": {"choices": [1.0, 1.0]}}}, ["expected each once"]),
        (
            {"space": {"image_set.sampler.stps": {"low": 1, "high": 2}}},
            ["image_set.sampler.stps is not known", "steps"],
        ),
        ({"space": {"selection.keep": {"low": 0.0, "high": 1.0}}}, ["selection.keep.low is 0.0", "greater than 0"]),
        ({"arm": "real_only", "space": {"selection.keep": {"low": 0.1, "high": 1.0}}}, ["no generated images"]),
        ({"enqueue": [{"bet": 1.0}]}, ["tune.enqueue.0.bet is not in the space", "beta"]),
        ({"enqueue": [{"beta": 50.0}]}, ["tune.enqueue.0.beta is 50.0", "from 1.0 to 10.0"]),
        ({"space": {"beta": {"low": 0.0, "high": 1.0, "scale": "log"}}}, ["low is 0.0 on a log scale"]),
        ({"space": {"beta": {"low": 2.0, "high": 1.0}}}, ["low is 2.0 and high is 1.0"]),
    ],
)
def test_an_invalid_space_is_refused_with_its_key(root, tmp_path, changes, fragments):
    with pytest.raises(ConfigError) as refused:
        _study(root, tmp_path, changes)
    assert all(fragment in str(refused.value) for fragment in fragments), str(refused.value)


def test_known_points_come_first_each_once(root, tmp_path):
    arm_values = {"beta": 5.0, "learning_rate": 0.2, "generated_share": 0.7}
    plan, *_ = _study(root, tmp_path, {"enqueue": [{"beta": 3.0}, {"beta": 5.0}, {"generated_share": 0.5}]})
    assert plan.points == [arm_values, arm_values | {"beta": 3.0}, arm_values | {"generated_share": 0.5}]
    low = {"beta": {"low": 6.0, "high": 10.0}, "learning_rate": {"low": 0.02, "high": 0.5}}
    plan, *_ = _study(root, tmp_path, {"space": low})
    assert plan.points == [], "the arm lies outside"


def _trial(values, state=TrialState.COMPLETE, value=None, reports=None, **attributes):
    search_space = {name: optuna.distributions.FloatDistribution(0.0, 100.0) for name in values}
    return create_trial(
        state=state, value=value, params=values, distributions=search_space, intermediate_values=reports or {},
        user_attrs=attributes,
    )  # fmt: skip


def test_trials_of_a_study_with_another_space_are_imported_where_they_fit(root, tmp_path):
    new_space = {"beta": {"low": 2.0, "high": 8.0}, "generated_share": {"low": 0.1, "high": 0.9}}
    plan, *_ = _study(root, tmp_path, {"space": new_space})
    old = [
        _trial({"beta": 3.0, "learning_rate": 0.2, "generated_share": 0.5}, value=0.6, reports={128: 0.5}),
        _trial({"beta": 1.0, "learning_rate": 0.2, "generated_share": 0.5}, value=0.7),  # outside
        _trial(
            {"beta": 3.0, "learning_rate": 0.1, "generated_share": 0.5}, value=0.8
        ),  # the arm has another learning rate now
        _trial({"beta": 4.0, "learning_rate": 0.2}, TrialState.PRUNED, reports={128: 0.2}),  # had the arm's share
        _trial({"beta": 4.0, "learning_rate": 0.2, "generated_share": 0.5}, TrialState.RUNNING),
    ]
    for number, trial in enumerate(old):
        trial.number = number
    imported = list(space.fitting(plan, "old", old))
    assert [trial.params for trial in imported] == [
        {"beta": 3.0, "generated_share": 0.5},
        {"beta": 4.0, "generated_share": 0.7},
    ]
    assert [trial.user_attrs[space.ORIGIN] for trial in imported] == [
        {"study": "old", "trial": 0},
        {"study": "old", "trial": 3},
    ]
    assert (imported[0].value, imported[0].intermediate_values, imported[1].state) == (
        0.6, {128: 0.5}, TrialState.PRUNED
    )  # fmt: skip
    imported_again = list(space.fitting(plan, "newer", [_number(imported[0], 7)]))
    assert imported_again[0].user_attrs[space.ORIGIN] == {"study": "old", "trial": 0}, "the study that computed it"


def _number(trial, number):
    trial.number = number
    return trial


def test_what_samplers_are_shown_of_trials_that_did_not_finish():
    trials = [
        _trial({"x": 1.0}, value=0.6, reports={10: 0.3, 20: 0.6}),
        _trial({"x": 2.0}, value=0.8, reports={10: 0.4, 20: 0.8}),
        _trial({"x": 3.0}, TrialState.PRUNED, reports={10: 0.2}),
        _trial({"x": 4.0}, TrialState.FAIL),
        _trial({"x": 5.0}, TrialState.RUNNING),
        _trial({}, TrialState.FAIL),
    ]

    def values(pruned_as):
        return {trial.params["x"]: (trial.state.name, trial.value) for trial in sampling.shown(trials, pruned_as)}

    common = {1.0: ("COMPLETE", 0.6), 2.0: ("COMPLETE", 0.8), 4.0: ("COMPLETE", 0.6), 5.0: ("COMPLETE", 0.7)}
    assert values("nothing") == common
    assert values("last") == common | {3.0: ("COMPLETE", 0.2)}
    extended = values("extended")
    assert extended.pop(3.0) == ("COMPLETE", pytest.approx(0.2 + 0.35))
    assert extended == common
    assert values("pruned")[3.0][0] == "PRUNED"


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp"])
def test_a_proposal_depends_on_seed_number_and_trials_alone(root, tmp_path, sampler):
    plan, *_ = _study(root, tmp_path, {"sampler": sampler})
    search_space = space.distributions(plan)
    rng = np.random.default_rng(0)
    trials = []
    for number in range(12):
        values = sampling.propose(plan.settings, search_space, trials, number)
        assert values == sampling.propose(plan.settings, search_space, trials, number)
        assert list(values) == list(search_space)
        trials.append(
            create_trial(
                params=values, distributions=search_space, value=float(-abs(values["beta"] - 3) + rng.normal(0, 0.01))
            )
        )
    assert len({trial.params["beta"] for trial in trials}) == 12, "a resumed study does not repeat its start"
    if sampler != "random":
        late = [sampling.propose(plan.settings, search_space, trials, number)["beta"] for number in range(20, 26)]
        assert np.median(np.abs(np.log(np.array(late) / 3))) < 0.6, "proposals move to the best values"


@pytest.mark.parametrize("pruner", ["hyperband", "median", "none"])
def test_the_warm_up_is_never_pruned_and_what_falls_behind_is(root, tmp_path, pruner):
    changes = {
        "pruner": pruner,
        "images_seen": 8000,
        "evaluate_every": 1000,
        "warmup_images": 2000,
        "startup_trials": 2,
    }
    plan, *_ = _study(root, tmp_path, changes)
    study = optuna.create_study(direction="maximize", pruner=sampling.pruner(plan.settings))
    stopped = {}
    for number in range(24):
        trial = study.ask()
        level = 0.9 if number < 4 else 0.3
        for seen in range(1000, 9000, 1000):
            trial.report(level * seen / 8000, seen)
            if sampling.should_stop(trial, seen, plan.settings):
                stopped[number] = seen
                break
        study.tell(trial, state=TrialState.PRUNED if number in stopped else TrialState.COMPLETE, values=None if number in stopped else level)  # fmt: skip # noqa: E501
    assert all(seen > 2000 for seen in stopped.values())
    assert not {0, 1} & set(stopped)
    assert bool([n for n in stopped if n >= 4]) == (pruner != "none")


def _winner(values):
    return _number(create_trial(value=0.7, params=values, distributions={
        name: optuna.distributions.CategoricalDistribution([value]) for name, value in values.items()
    }), 5)  # fmt: skip


def test_the_winner_is_an_arm_and_the_rest_of_the_file_stays(root, tmp_path):
    plan, params, path = _study(root, tmp_path, {})
    path.write_text((root / "params.yaml").read_text())
    before = path.read_text()
    winner = _winner({"beta": 3.25, "learning_rate": 0.1, "generated_share": 0.5})
    written = applying.apply(path, plan, params, winner, "tuned", [1, 2, 3])
    assert written == ["arms.tuned", "seeds"]
    loaded = config.load(path)
    assert (loaded.arms["tuned"].beta, loaded.arms["tuned"].generated_share, loaded.seeds) == (3.25, 0.5, (1, 2, 3))
    assert loaded.arms["tuned"].batch == loaded.arms["generated"].batch, "overrides of short runs stay with them"
    old, new = before.splitlines(), path.read_text().splitlines()
    removed = [line for line in old if line not in new]
    assert removed == ["seeds: [1]"], removed
    assert any("# written by `dmat tune apply`: study generated-000000000000, trial 5" in line for line in new)
    applying.apply(path, plan, loaded, _winner({"beta": 4.5}), "tuned", [])
    assert config.load(path).arms["tuned"].beta == 4.5, "a study may overwrite what a study wrote"
    with pytest.raises(DmatError, match=r"has arms\.generated, which no study wrote"):
        applying.apply(path, plan, loaded, winner, "generated", [])
    text = path.read_text()
    with pytest.raises(ConfigError, match="generated_share"):
        applying.apply(path, plan, loaded, _winner({"generated_share": 0.0}), "other", [])
    assert path.read_text() == text
    assert not list(tmp_path.glob(".params*"))


def test_a_winner_changes_one_key_of_a_mapping_and_keeps_the_others(root, tmp_path):
    plan, params, path = _study(root, tmp_path, {"space": SPACE})
    raw = yaml.safe_load(path.read_text())
    raw["arms"]["generated"]["network"] = {"depth": 16, "activation": "relu"}
    path.write_text(yaml.safe_dump(raw))
    applying.apply(path, plan, config.load(path), _winner({"network.width": 2}), "tuned", [])
    assert config.load(path).arms["tuned"].network.plain() == {
        "name": "wide_resnet", "depth": 16, "width": 2, "activation": "relu"}  # fmt: skip
    for name in ("null", "true", "a-b", "", "7", "010", "1e3", "1_0"):
        with pytest.raises(DmatError, match="--name is"):
            applying.apply(path, plan, params, _winner({"beta": 2.0}), name, [])


@pytest.mark.parametrize("head", ["", "%YAML 1.1\n---\n"])
def test_what_is_applied_is_what_is_read(root, tmp_path, head):
    """Small numbers are written as 1e-05, names as YAML 1.2 reads them; the other values stay what they were."""
    plan, _, path = _study(root, tmp_path, {})
    path.write_text(
        head + (root / "params.yaml").read_text().replace("label_smoothing: 0.1", "label_smoothing: 1.0e-1")
    )
    before = config.load(path)
    applying.apply(path, plan, before, _winner({"weight_decay": 1e-05, "beta": 1e22}), "no", [])
    after = config.load(path)
    assert (after.arms["no"].weight_decay, after.arms["no"].beta) == (1e-05, 1e22)
    assert (after.tune, after.arms["generated"]) == (before.tune, before.arms["generated"])


@pytest.mark.parametrize(
    ("point", "fragments"),
    [
        ({"beta": "5/2"}, ["enqueue.0.beta is '5/2'", "a number from"]),
        ({"network.width": 2.5}, ["network.width is 2.5", "whole number"]),
        ({"augmentation": "crop4"}, ["augmentation is 'crop4'", "none, crop1"]),
        ({"beta": 2.0}, ["enqueue.0 leaves out batch, which is 64 in the arm; expected one of 32, 128; name it"]),
        ({"batch": 128}, ["enqueue.0 leaves out learning_rate, which is 0.2 in the arm; expected from 0.3 to 0.5"]),
    ],
)
def test_points_outside_the_space_are_refused(root, tmp_path, point, fragments):
    arm_is_outside = {"batch": {"choices": [32, 128]}, "learning_rate": {"low": 0.3, "high": 0.5}}
    space_of_point = SPACE | (arm_is_outside if "leaves out" in fragments[0] else {})
    with pytest.raises(ConfigError) as refused:
        _study(root, tmp_path, {"space": space_of_point, "enqueue": [point]})
    assert all(fragment in str(refused.value) for fragment in fragments), str(refused.value)


def test_a_winner_with_images_of_its_own_brings_their_entries(root, tmp_path):
    plan, params, path = _study(root, tmp_path, {"space": SPACE})
    winner = _winner({"beta": 2.0, "image_set.sampler.steps": 9, "selection.keep": 0.5, "network.width": 2})
    written = applying.apply(path, plan, params, winner, "tuned", [])
    assert written == ["arms.tuned", "image_sets.tuned", "selections.tuned"]
    loaded = config.load(path)
    assert loaded.arms["tuned"].images == "tuned"
    assert loaded.selections["tuned"].image_set == "tuned"
    assert (loaded.image_sets["tuned"].sampler.steps, loaded.selections["tuned"].keep) == (9, 0.5)
    assert loaded.arms["tuned"].network.width == 2
    assert loaded.image_sets["tuned"].generator == "edm"
    only_kept = applying.apply(path, plan, params, _winner({"selection.keep": 0.3}), "kept", [])
    assert only_kept == ["arms.kept", "selections.kept"]
    assert config.load(path).selections["kept"].image_set == "edm18"


@pytest.mark.parametrize(
    ("url", "fragments"),
    [
        ("postgresql+psycopg://h:notaport/db", ["is not a URL"]),
        ("sqlite://", ["in memory"]),
        ("nonsense", ["is not a URL", "postgresql+psycopg://"]),
        ("postgresql+psycopg://someone:secret@127.0.0.1:1/studies", ["someone:***@127.0.0.1:1", "cannot be reached"]),
        ("postgresql+psycopg://127.0.0.1:1/studies?password=secret", ["?password=***", "cannot be reached"]),
        ("postgresql+psycopg://me:sec@ret@127.0.0.1:1/studies", ["me:***@127.0.0.1:1", "plain @", "expected %40"]),
        ("postgres+nothing://127.0.0.1/studies", ["cannot be reached"]),
        ("sqlite:////proc/none/studies.db", ["/proc/none"]),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_message_without_its_password(url, fragments):
    with pytest.raises((DmatError, OSError)) as refused:
        storage.connect(url)
    assert all(fragment in str(refused.value) for fragment in fragments), str(refused.value)
    assert "secret" not in str(refused.value)


def _ranking_driver(root, tmp_path, monkeypatch, values, quiet):
    """What ranks the best three trials of a study, whose AutoAttack accuracy is half of that under PGD."""
    plan, *_ = _study(root, tmp_path, {"rerank": 3})
    study = optuna.create_study(direction="maximize")
    study.add_trials([create_trial(value=value) for value in values])
    monkeypatch.setattr(rank_task, "_has_weights", lambda plan, trial: True)
    monkeypatch.setattr(rank_task, "weights_of", lambda plan, trial: trial.value)
    monkeypatch.setattr(rank_task, "rank", lambda engine, context, value, folder: {"value": value / 2})
    return SimpleNamespace(_plan=plan, _study=study, _context=None, _quiet=quiet)


def test_a_bar_shows_the_ranking_of_the_best_trials(root, tmp_path, monkeypatch, capsys):
    """It counts the trials that are left to rank: a resumed ranking has fewer."""
    driver = _ranking_driver(root, tmp_path, monkeypatch, [0.2, 0.5, 0.4, 0.3], quiet=False)
    ranking.record(driver._study, 2, {"value": 0.1})
    Driver._rank(driver, InProcessEngine(), lambda: None)
    bar = capsys.readouterr().err
    assert "rank by AutoAttack" in bar
    assert "0/2 [" in bar
    assert "2/2 [" in bar
    assert ranking.auto_attack_results(driver._study) == {1: {"value": 0.25}, 2: {"value": 0.1}, 3: {"value": 0.15}}
    Driver._rank(driver, InProcessEngine(), lambda: None)
    assert capsys.readouterr().err == "", "nothing is left to rank"


def test_a_quiet_ranking_shows_no_bar_and_a_failed_one_raises(root, tmp_path, monkeypatch, capsys):
    driver = _ranking_driver(root, tmp_path, monkeypatch, [0.5], quiet=True)
    Driver._rank(driver, InProcessEngine(), lambda: None)
    assert capsys.readouterr().err == ""
    assert ranking.auto_attack_results(driver._study) == {0: {"value": 0.25}}
    driver = _ranking_driver(root, tmp_path, monkeypatch, [0.5], quiet=True)

    def fail(*_):
        raise DmatError("weights are damaged; expected those of the trial; restore them")

    monkeypatch.setattr(rank_task, "rank", fail)
    with pytest.raises(DmatError, match="weights are damaged"):
        Driver._rank(driver, InProcessEngine(), lambda: None)


def _storage_file(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute(content)


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (None, ["studies.db does not exist", "`dmat tune start`", "--storage"]),
        (b"", ["studies.db has no study", "`dmat tune start`", "--storage"]),
        (b"no database" * 50, ["file is not a database", "bring back a good copy", "--storage"]),
        ("create table browser(page)", ["of another programme, with the table browser", "--storage"]),
        ("create table studies(title)", ["of another programme, with the table studies", "--storage"]),
    ],
)
def test_reading_a_study_writes_no_file_and_says_what_the_storage_is(tmp_path, content, fragments):
    path = tmp_path / "folder/studies.db" if content is None else tmp_path / "studies.db"
    _storage_file(path, content)
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(DmatError) as refused:
        storage.find(storage.connect(f"sqlite:///{path}", create=False), "study")
    assert all(fragment in str(refused.value) for fragment in fragments), str(refused.value)
    assert (path.read_bytes() if path.exists() else None) == before
    assert path.parent.exists() == (content is not None)


def test_a_study_starts_in_an_empty_file_and_in_no_database_of_another_programme(tmp_path):
    _storage_file(tmp_path / "empty.db", b"")
    assert storage.find(storage.connect(f"sqlite:///{tmp_path}/empty.db"), "study") is None
    _storage_file(tmp_path / "other.db", "create table browser(page)")
    with pytest.raises(DmatError, match="of another programme"):
        storage.connect(f"sqlite:///{tmp_path}/other.db")


def test_a_storage_of_a_newer_optuna_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path}/studies.db"
    study_storage = storage.connect(url)
    with study_storage.engine.begin() as connection:
        connection.execute(sqlalchemy.text("update alembic_version set version_num = 'v9.9.9.a'"))
        connection.execute(sqlalchemy.text("update version_info set library_version = '99.0.0', schema_version = 99"))
    with pytest.raises(DmatError, match="written by another version of Optuna"):
        storage.connect(url)


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"HTTP_HOST": "127.0.0.1:8080"}, True),
        ({"HTTP_HOST": "LocalHost"}, True),
        ({"HTTP_HOST": "[::1]:9", "HTTP_ORIGIN": "http://localhost:9"}, True),
        ({"HTTP_HOST": "elsewhere.example:8080"}, False),
        ({"HTTP_HOST": "127.0.0.1.elsewhere.example"}, False),
        ({"HTTP_HOST": "127.0.0.1@elsewhere.example"}, False),
        ({"HTTP_HOST": "localhost:8080/@elsewhere.example"}, True),  # a path, which no browser sends
        ({"HTTP_HOST": "[bad"}, False),
        ({"HTTP_HOST": ""}, False),
        ({}, False),
        ({"HTTP_HOST": "127.0.0.1", "HTTP_ORIGIN": "http://elsewhere.example"}, False),
        ({"HTTP_HOST": "127.0.0.1", "HTTP_ORIGIN": "null"}, False),
    ],
)
def test_the_dashboard_answers_to_the_names_of_this_machine_alone(headers, allowed):
    from dmat.tuning import dashboard

    statuses = []
    guarded = dashboard.guarded(lambda environment, start: [b"studies"])
    body = b"".join(guarded(headers, lambda status, headers: statuses.append(status)))
    assert (body == b"studies", statuses) == ((True, []) if allowed else (False, ["403 Forbidden"]))


def test_shown_addresses_hold_no_passwords(root, tmp_path):
    plan, *_ = _study(root, tmp_path, {})
    shown = [
        dataclasses.replace(plan, storage=url).describe()
        for url in ("postgresql+psycopg://me:secret@host/db", "postgresql://host/db?password=secret", "me:secret@host")
    ]
    assert [description["storage"] for description in shown] == [
        "postgresql+psycopg://me:***@host/db", "postgresql://host/db?password=***", "me:***@host"
    ]  # fmt: skip
    assert "secret" not in str(shown)
