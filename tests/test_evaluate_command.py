"""`dmat evaluate-robust` on the command line: workers and kills, any model on any images, refusals and reports.

Run alone: pytest tests/test_evaluate_command.py
"""

import json
import re
import shutil
import types

import numpy as np
import pytest
import yaml

from dmat import config, files
from dmat.config import NONE, MixImages
from dmat.data import shards, sources
from dmat.errors import DmatError
from dmat.evaluation.table import read_table
from dmat.jobs import evaluate_robust, mix_images
from dmat.pipeline import direct_evaluation
from tests import cifar_files, forked
from tests.projects import STAGE_OPTIONS

OPTIONS = STAGE_OPTIONS["evaluate_robust"]
TABLE = "artifacts/evaluate_robust/generated-1/per_image.parquet"
SUMMARY = "artifacts/evaluate_robust/generated-1/summary.json"


def _dmat(folder, *arguments, code=0, output=".output"):
    exit_code, text = forked.Command(folder, "evaluate-robust", *arguments, output=output).wait()
    assert exit_code == code, text
    return text


@pytest.fixture
def unevaluated(finished, tmp_path):
    return finished.copy_without("evaluate_robust", tmp_path / "project")


@pytest.fixture(scope="module")
def model(finished, tmp_path_factory):
    """A trained classifier and its images in a folder outside any project."""
    folder = tmp_path_factory.mktemp("elsewhere")
    source = finished.folder / "artifacts/train_robust/generated-1"
    for suffix in (".safetensors", ".json"):
        shutil.copy(source / f"best{suffix}", folder / f"model{suffix}")
    shutil.copytree(finished.folder / "artifacts/prepare_data/test", folder / "test")
    images, labels = shards.open_shards(folder / "test").all()
    np.savez(folder / "images.npz", image=images, label=labels)
    settings = finished.params["evaluate_robust"] | {"shard": 20}
    (folder / "quick.yaml").write_text(yaml.safe_dump(finished.params | {"evaluate_robust": settings}))
    return folder


@pytest.fixture
def elsewhere(model, tmp_path):
    return shutil.copytree(model, tmp_path / "elsewhere")


# --- several processes


def test_jobs_of_an_array_give_the_result_of_an_uninterrupted_evaluation(finished, unevaluated):
    """Two jobs start first, one is killed while it runs; then the evaluation itself."""
    folder = unevaluated.folder
    jobs = [
        forked.Command(folder, "evaluate-robust", *OPTIONS, "--shards", numbers, output=f".output-{numbers}")
        for numbers in ("0:4", "4:9")
    ]
    jobs[0].kill_after(1.5)
    unevaluated.run("evaluate_robust")
    assert jobs[1].wait()[0] == 0
    assert unevaluated.outputs("evaluate_robust") == finished.outputs("evaluate_robust")


def test_shards_alone_are_computed_and_not_published(finished, unevaluated):
    count = json.loads(_dmat(unevaluated.folder, *OPTIONS, "--dry-run"))["shards"]
    assert f"has the shards 0 to {count - 1};" in _dmat(unevaluated.folder, *OPTIONS, "--shards", "0:99", code=2)
    _dmat(unevaluated.folder, *OPTIONS, "--shards", f"0:{count}")
    assert not (unevaluated.folder / "artifacts/evaluate_robust").exists()
    estimate = json.loads(_dmat(unevaluated.folder, *OPTIONS, "--dry-run"))
    assert estimate["shards"] == estimate["shards_done"] > 8
    assert estimate["seconds_left"] == 0
    assert "step 0.05," in estimate["protocol"]["pgd"]
    unevaluated.run("evaluate_robust")
    assert unevaluated.outputs("evaluate_robust") == finished.outputs("evaluate_robust")


# --- reports


def test_the_stage_reports_its_measures(finished):
    table = read_table(finished.folder / TABLE)
    assert set(table) == {
        "index", "label", "best_prediction", "best_clean", "best_fgsm", "best_pgd", "best_broken_by", "best_attacked",
        "best_margin", "best_perturbation", "last_clean", "last_pgd", *(n for n in table if n.startswith("best_auto")),
    }  # fmt: skip
    summary = files.read_json(finished.folder / SUMMARY)["best"]
    assert summary["clean"]["right"] == int(table["best_clean"].sum())
    assert sum(summary["broken_by"].values()) == len(table["index"])
    assert len(summary["checks"]) == 14
    (unseen,) = [check for check in summary["checks"] if check["name"] == "unseen"]
    assert unseen["sentence"] == (
        "of 40 test images these are exact copies: 0 of earlier test images, 0 of real training images, 0 of generated "
        "training images"
    )
    assert (summary["headline"] is None) == bool(summary["no_headline"])


def test_copies_of_real_and_selected_generated_images_are_found(tmp_path):
    """Test images: a real one, a selected generated one, one that was not selected, the first again, two new ones."""
    images, labels = cifar_files.random_images(30, 3, 0)
    description = {"class_names": list("abc"), "metadata": {}}
    image_set, selection = tmp_path / "artifacts/generate_images/set", tmp_path / "artifacts/select_images/best"
    shards.write_set(tmp_path / "train", images[:10], labels[:10], **description)
    shards.write_set(image_set, images[10:20], labels[10:20], **description)
    shards.write_set(tmp_path / "test", images[[4, 13, 17, 4, 28, 29]], labels[[4, 13, 17, 4, 28, 29]], **description)
    selection.mkdir(parents=True)
    np.save(selection / "indices.npy", np.array([1, 3, 9]))
    files.write_json(
        selection / "selection.json",
        {"kept": 3, "pool": 10, "shape": [32, 32, 3], "classes": 3, "image_set": "set",
         "manifest_sha256": files.sha256(image_set / shards.MANIFEST)},
    )  # fmt: skip
    inputs = {"train": tmp_path / "train", "selection": selection, "mix": tmp_path / "mix"}
    job = types.SimpleNamespace(inputs=inputs, root=tmp_path, result=tmp_path, instance={"arm": "a"})
    test = shards.open_shards(tmp_path / "test")
    for selected, expected in (("best", [False, True] + 4 * [False]), (NONE, None)):
        share = 0.5 if expected else 0.0
        settings = MixImages(
            images=selected,
            batch=4,
            generated_share=share,
            images_seen=8,
            generated_sampling="without_replacement",
            copies=1,
            reshuffle_steps=0,
        )
        mix_images.run(settings, job)
        copies = {name: flags.tolist() for name, flags in evaluate_robust._copies(test, 6, job).items()}
        assert copies.pop("earlier test images") == [False, False, False, True, False, False]
        assert copies.pop("real training images") == [True, False, False, True, False, False]
        assert copies == ({"generated training images": expected} if expected else {})
    assert len(evaluate_robust._copies(test, 3, job)["earlier test images"]) == 3


def test_a_failed_check_is_reported_and_stops_nothing(unevaluated):
    """With tiny steps PGD is weaker than FGSM. Exit code 0, no headline, another name of the measure."""
    unevaluated.write({"evaluate_robust": {"pgd_step_size": "1/100000", "pgd_steps": 1}})
    text = unevaluated.run("evaluate_robust")
    assert "no headline: " in text
    summary = files.read_json(unevaluated.folder / SUMMARY)["best"]
    assert summary["headline"] is None
    assert {"auto_attack_unchecked"} == {name for name in summary if name.startswith("auto_attack")}
    assert any("FGSM" in reason for reason in summary["no_headline"])
    metrics = files.read_json(unevaluated.folder / "artifacts/metrics/evaluate_robust/generated-1.json")
    assert "best_auto_attack" not in metrics
    assert 0 <= metrics["best_auto_attack_unchecked"] <= 1


def test_fewer_images_are_a_subset(unevaluated):
    unevaluated.write({"evaluate_robust": {"images": 10}})
    text = unevaluated.run("evaluate_robust")
    assert "no headline: Only 10 of 40 images were attacked." in text
    summary = files.read_json(unevaluated.folder / SUMMARY)["best"]
    assert summary["auto_attack_subset"]["n"] == 10
    assert summary["headline"] is None


# --- any model on any images

QUICK = ("--attacks", "apgd-ce,apgd-dlr")


def test_a_model_and_a_set_of_images_are_enough(elsewhere):
    text = _dmat(elsewhere, "--model", "model.safetensors", "--images", "test", *QUICK)
    assert re.search(r"clean +\d+\.\d\d % +\[\d+\.\d\d, \d+\.\d\d\]  n = 40", text)
    assert "no headline: The attacks are nonstandard (apgd-ce, apgd-dlr), not those of standard AutoAttack." in text
    assert "not tracked: no params.yaml here" in text
    assert "all images, as it has no test images of its own" in text
    folder = elsewhere / "model-evaluation"
    names = {"per_image.parquet", "summary.json", "protocol.json", "perturbations.png", "confusion.png"}
    assert names <= {path.name for path in folder.iterdir()}
    before = files.checksum(folder / "work")
    again = _dmat(elsewhere, "--model", "model.safetensors", "--images", "test", *QUICK, "--json")
    assert json.loads(again.splitlines()[-1]) == files.read_json(folder / "summary.json")
    assert files.checksum(folder / "work") == before, "nothing was computed again"


def test_all_kinds_of_images_give_the_same_flags(elsewhere):
    flags = {}
    for images in ("test", "images.npz"):
        arguments = ("--model", "model.safetensors", "--images", images, "--params", "quick.yaml", *QUICK)
        _dmat(elsewhere, *arguments, "--to", f"to-{images}")
        flags[images] = read_table(elsewhere / f"to-{images}" / "per_image.parquet")
    assert all(np.array_equal(flags["test"][name], flags["images.npz"][name]) for name in flags["test"])


def test_a_published_checkpoint_and_a_cifar_folder_in_one_command(elsewhere):
    """Published numbers, our numbers and differences of protocol; a network of the right shape with random weights."""
    import torch

    from dmat.models import exporting
    from dmat.robust.networks import DataSpec, wide_resnet
    from dmat.training import weights

    data_spec = DataSpec(10, 3, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
    torch.manual_seed(0)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    cifar_files.write(elsewhere / "cifar-10-batches-py")
    weights.save(
        elsewhere / "wang.safetensors", wide_resnet(data_spec, 10, 1, "silu").state_dict(),
        {"kind": "classifier", "network": {"name": "wide_resnet", "depth": 10, "width": 1, "activation": "silu"},
         "classes": 10, "channels": 3, "mean": list(data_spec.mean), "std": list(data_spec.std),
         "image_shape": [32, 32, 3], "class_names": names, "data": "cifar10", "threat": None, "weights": "averaged"},
    )  # fmt: skip
    exporting.export(elsewhere / "wang.safetensors", "robustbench", elsewhere / "Wang2023Better_WRN-28-10.pt")
    arguments = ("--model", "Wang2023Better_WRN-28-10.pt", "--images", "cifar-10-batches-py", "--first", "6",
             "--attacks", "none")  # fmt: skip
    assert "--data" in _dmat(elsewhere, *arguments, code=2)
    arguments += ("--data", "cifar10", "--activation", "silu")
    early = (*arguments, "--norm", "linf", "--epsilon", "8/255", "--against", "robustbench", "--entry", "Nobody2030")
    assert "Nobody2030" in _dmat(elsewhere, *early, code=2)
    assert not list(elsewhere.glob("*-evaluation/work/shard-*")), "refused before anything was computed"
    assert "has no threat model" in _dmat(elsewhere, *arguments, code=2)
    text = _dmat(elsewhere, *arguments, "--norm", "linf", "--epsilon", "8/255", "--against", "robustbench")
    assert "92.44 %" in text
    assert "67.31 %" in text
    assert "We attack 6 images, the leaderboard 10,000" in text
    assert "Here: clean " in text
    fresh = _dmat(elsewhere, *arguments, "--norm", "linf", "--epsilon", "8/255", "--fresh")
    folder = elsewhere / "Wang2023Better_WRN-28-10-evaluation"
    assert "clean" in fresh
    assert (folder / "Wang2023Better_WRN-28-10.safetensors").is_file(), "what was imported stays"


def test_copies_among_the_images_are_counted(elsewhere):
    """Classes with other names match the model's only with --classes-in-order."""
    with np.load(elsewhere / "images.npz") as saved:
        images, labels = (
            np.concatenate([saved["image"], saved["image"][:3]]),
            np.append(saved["label"], saved["label"][:3]),
        )
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    files.write_json(
        elsewhere / "model.json", files.read_json(elsewhere / "model.json") | {"class_names": list("abcdefghij")}
    )
    np.savez(elsewhere / "named.npz", image=images, label=labels, class_names=np.array(names))
    arguments = ("--model", "model.safetensors", "--images", "named.npz", "--attacks", "none", "--split", "test")
    assert "named.npz has other classes than model.safetensors (0 is zero, the model's a, " in _dmat(
        elsewhere, *arguments, code=2
    )
    text = _dmat(elsewhere, *arguments, "--classes-in-order")
    assert "labels: numbers of the model's classes, by --classes-in-order: zero is taken for a" in text
    assert (
        "no headline: of 43 test images these are exact copies: 3 of earlier test images (what the model was " in text
    )


CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SHORT = ["plane", "car", *CIFAR[2:]]
NUMBERS = [str(k) for k in range(10)]
CLASSES = {  # class names of images, of model, part of the note or refusal, the same with --classes-in-order
    "the same": (CIFAR, CIFAR, "classes of the same names", ...),
    "capitals": ([name.title() for name in CIFAR], CIFAR, "classes of the same names", ...),
    "other names": (SHORT, CIFAR, "(0 is plane, the model's airplane, 1 is car, ", "by --classes-in-order"),
    "another order": (CIFAR[::-1], CIFAR, "truck is 0, the model's 9", ...),
    "names that moved": (sorted(SHORT), CIFAR, "bird is 0, the model's 2", ...),
    "from 1": ([str(k) for k in range(1, 11)], NUMBERS, "1 is 0, the model's 1", ...),
    "images without names": (NUMBERS, CIFAR, "as the images came without any", ...),
    "fewer numbers": (NUMBERS[:4], CIFAR, "as the images came without any", ...),
    "a model without names": (CIFAR, None, "as the model came without any", ...),
    "a model of numbers": (CIFAR, NUMBERS, "as the model came without any", ...),
}


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_classes_are_compared_by_name(tmp_path, kind, in_order):
    image_names, model_names, message, message_in_order = CLASSES[kind]
    source = sources.ImageSource(np.zeros((1, 2, 2, 1), np.uint8), np.zeros(1, int), tuple(image_names), "", "")
    request = direct_evaluation.Request(
        tmp_path / "m.safetensors", "images", None, None, None, config.evaluation({}), tmp_path, None, in_order
    )
    try:
        actual = direct_evaluation._expect_same_classes(source, {"class_names": model_names}, request)
    except DmatError as error:
        actual = str(error)
        assert "expected" in actual
    assert (message if not in_order or message_in_order is ... else message_in_order) in actual


# --- refusals

MODEL = ("--model", "model.safetensors", "--images", "test")
FEW_STEPS = (*MODEL, "--params", "quick.yaml", "--attacks", "none")
REFUSED = {
    "neither": ((), "--arm and --seed are missing"),
    "half a stage": (("--arm", "generated"), "--seed is missing"),
    "half a model": (("--model", "model.safetensors"), "--images is missing"),
    "both": ((*MODEL, "--arm", "generated"), "--arm came with --model"),
    "options of a model": (("--arm", "generated", "--seed", "1", "--first", "5"), "--first came with --arm"),
    "no such model": (("--model", "no.safetensors", "--images", "test"), "no.safetensors does not exist"),
    "no such images": (("--model", "model.safetensors", "--images", "nothing"), "nothing"),
    "epsilon in levels": ((*MODEL, "--norm", "linf", "--epsilon", "8"), "epsilon 8 is larger than the pixel range"),
    "l2 in levels": ((*MODEL, "--norm", "l2", "--epsilon", "128"), "larger than the l2 distance"),
    "epsilon no number": ((*MODEL, "--epsilon", "eight"), "is 'eight'"),
    "norm": ((*MODEL, "--norm", "l1", "--epsilon", "8/255"), "is 'l1'; expected 'linf' or 'l2'"),
    "attack": ((*MODEL, "--attacks", "pgd"), "expected 'standard', 'quick', 'none' or a list of some of apgd-ce"),
    "split": ((*MODEL, "--split", "validation"), "expected test or train"),
    "entry": ((*MODEL, "--against", "robustbench", "--entry", "Nobody2030"), "names no data set"),
    "entry alone": ((*MODEL, "--entry", "Wang2023Better_WRN-28-10"), "--entry came without --against"),
    "options of an import": ((*MODEL, "--data", "cifar10", "--activation", "silu"), "--data, --activation came with"),
    "split of a stage": (("--arm", "generated", "--seed", "1", "--split", "test"), "--split came with --arm"),
    "device of a stage": (("--arm", "generated", "--seed", "1", "--device", "cpu"), "--device came with --arm"),
    "fresh shards": ((*MODEL, "--shards", "0:1", "--fresh"), "--fresh came with --shards"),
    "shards": ((*MODEL, "--shards", "1"), "--shards is '1'; expected the first number"),
    "too many shards": ((*MODEL, "--shards", "0:99"), "the evaluation of model.safetensors has the shards 0 to"),
    "a folder": (("--model", ".", "--images", "test"), "is a folder"),
    "no place": ((*MODEL, "--to", "/proc/nowhere"), "no folder can be made"),
    "another split": ((*MODEL, "--split", "train"), "holds the split test, not train"),
    "usage": ((*MODEL, "--first", "-1"), "error: Invalid value for '--first'"),
    "unknown option": ((*MODEL, "--furst", "1"), "error: No such option"),
    "against": ((*MODEL, "--against", "papers"), "--against is 'papers'; expected robustbench"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_invalid_requests_give_one_error_line(elsewhere, kind):
    arguments, message = REFUSED[kind]
    text = _dmat(elsewhere, *arguments, code=2)
    assert message in text
    assert "Traceback" not in text
    assert len([line for line in text.splitlines() if line.startswith("error: ")]) == 1
    assert "Usage:" not in text
    assert not (elsewhere / "model-evaluation" / "summary.json").exists()


SIDECARS = {
    "threat as a string": ({"threat": "linf"}, "has the threat 'linf'; expected norm and epsilon"),
    "activation": ({"network": {"activation": "tanh"}}, "activation is 'tanh', not one of relu, silu"),
    "depth": ({"network": {"depth": "x"}}, "depth is 'x', not a whole number"),
    "classes": ({"classes": "10"}, "classes is '10'"),
    "std of two": ({"std": [0.3, 0.3]}, "std is"),
    "std of zero": ({"std": [0.0]}, "std is (0.0,), not as many numbers above 0"),
    "names": ({"class_names": ["a"]}, "class_names is ['a'], not a list of 10 names"),
}


def _edited(path, changes):
    sidecar = files.read_json(path)
    for key, value in changes.items():
        sidecar[key] = {**sidecar[key], **value} if key == "network" else value
    files.write_json(path, sidecar)


@pytest.mark.parametrize("kind", SIDECARS)
def test_an_invalid_sidecar_gives_one_error_line(elsewhere, kind):
    changes, message = SIDECARS[kind]
    _edited(elsewhere / "model.json", changes)
    text = _dmat(elsewhere, *MODEL, "--attacks", "none", code=2)
    assert message in text
    assert "Traceback" not in text


def test_the_same_weights_in_another_network_are_another_evaluation(elsewhere):
    """The sidecar holds the normalisation: shards of the other network must never be reported."""
    _dmat(elsewhere, *FEW_STEPS)
    _edited(elsewhere / "model.json", {"mean": [0.9]})
    text = _dmat(elsewhere, *FEW_STEPS, code=2)
    assert "holds another evaluation (network differ)" in text
    assert "network" in _dmat(elsewhere, *FEW_STEPS, "--shards", "0:1", code=2)


def test_a_parameter_file_sets_the_number_of_images(elsewhere, finished):
    params = yaml.safe_load((finished.folder / "params.yaml").read_text())
    params["evaluate_robust"] = {**params["evaluate_robust"], "images": 7, "auto_attack": "none",
                                 "pgd_step_size": "1/10"}  # fmt: skip
    (elsewhere / "own.yaml").write_text(yaml.safe_dump(params))
    planned = json.loads(_dmat(elsewhere, *MODEL, "--params", "own.yaml", "--dry-run"))
    assert planned["protocol"]["images"] == 7
    again = json.loads(_dmat(elsewhere, *MODEL, "--params", "own.yaml", "--first", "9", "--dry-run"))
    assert again["protocol"]["images"] == 9
    small = ("--norm", "linf", "--epsilon", "1/20")
    text = _dmat(elsewhere, *MODEL, "--params", "own.yaml", *small, "--dry-run", code=2)
    assert "pgd_step_size is 1/10, larger than threat.epsilon 1/20; expected at most epsilon; leave it out" in text
    assert "step 0.0125," in json.loads(_dmat(elsewhere, *MODEL, *small, "--dry-run"))["protocol"]["pgd"]


INVALID_IMAGES = {
    "other shape": (lambda x, y: (x[:, :6, :6], y), "holds images [6, 6, 1]"),
    "too many classes": (lambda x, y: (x, np.arange(len(y)) % 14), "has 14 classes"),
    "counted from 1": (lambda x, y: (x, np.arange(len(y)) % 9 + 1), "no image has the label 0"),
    "none": (lambda x, y: (x[:0], y[:0]), "images.npz"),
    "floats": (lambda x, y: (x / 255, y), "expected uint8"),
}


@pytest.mark.parametrize("kind", INVALID_IMAGES)
def test_images_that_do_not_fit_are_refused(elsewhere, kind):
    change, message = INVALID_IMAGES[kind]
    with np.load(elsewhere / "images.npz") as saved:
        images, labels = change(saved["image"], saved["label"])
    np.savez(elsewhere / "images.npz", image=images, label=labels)
    text = _dmat(elsewhere, "--model", "model.safetensors", "--images", "images.npz", *QUICK, code=2)
    assert message in text
    assert "Traceback" not in text


def test_a_folder_of_another_evaluation_is_refused_without_fresh(elsewhere):
    _dmat(elsewhere, *FEW_STEPS)
    text = _dmat(elsewhere, *FEW_STEPS, "--epsilon", "1/10", code=2)
    assert "holds another evaluation (threat, settings differ)" in text
    assert "holds another evaluation" in _dmat(
        elsewhere, *FEW_STEPS, "--epsilon", "1/10", "--shards", "0:1", code=2
    )
    _dmat(elsewhere, *FEW_STEPS, "--epsilon", "1/10", "--fresh")
    assert files.read_json(elsewhere / "model-evaluation/protocol.json")["threat"]["epsilon"] == "1/10"
    assert list((elsewhere / "model-evaluation").glob("before-*"))


@pytest.mark.parametrize("name", ["shard-00000.npz", "shard-00000.json", "black-box.npz"])
def test_an_altered_shard_is_computed_again(elsewhere, name):
    _dmat(elsewhere, *FEW_STEPS)
    table = elsewhere / "model-evaluation/per_image.parquet"
    before, path = files.sha256(table), elsewhere / "model-evaluation" / "work" / name
    stamps = {shard: shard.stat().st_mtime_ns for shard in path.parent.glob("*.npz")}
    path.write_bytes(path.read_bytes()[:-40])
    _dmat(elsewhere, *FEW_STEPS)
    assert files.sha256(table) == before
    again = [shard.stem for shard, stamp in stamps.items() if shard.stat().st_mtime_ns != stamp]
    assert again == [path.stem]  # and no other
