"""`dmat images` as users call it: on the sets of a project and on folders of others; what it prints, and its refusals.

Run alone: pytest tests/test_images_command.py
"""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

from cli.main import app
from dmat import config, devices, files
from dmat.data import image_export, shards
from dmat.diffusion.networks import DenoiserSpec
from dmat.models import denoisers
from dmat.pipeline import STAGES, code_identity, image_plan
from dmat.training import weights
from tests.projects import current_code_lock
from tests.test_set_inspection import flip, write_set


@pytest.fixture(scope="module")
def made(tiny_params_once, tmp_path_factory):
    """A project with an untrained generator and a set of 100 images that says it is the generator's."""
    folder = tmp_path_factory.mktemp("images") / "project"
    folder.mkdir()
    (folder / "params.yaml").write_text(yaml.safe_dump(tiny_params_once))
    code_identity.write(folder, current_code_lock())
    params = config.load(folder / "params.yaml")
    generator = np.random.default_rng(0)
    names = [str(k) for k in range(10)]
    images, labels = generator.integers(0, 256, (100, 8, 8, 1), dtype=np.uint8), np.arange(100) % 10
    train = folder / "artifacts/prepare_data/train"
    shards.write_set(train, images, labels, class_names=names, metadata={"licence": "CC BY 4.0", "split": "train"})
    settings = params.generators["edm"]
    sidecar = denoisers.denoiser_sidecar(settings, shards.open_shards(train), devices.resolve("cpu", "fp32", 1))
    denoiser = folder / "artifacts/train_diffusion/edm" / weights.DENOISER
    formulation = denoisers.FORMULATIONS[settings.formulation](settings)
    model = denoisers.new_denoiser(settings.network, DenoiserSpec(8, 8, 1, 10), formulation, 1)
    denoiser.parent.mkdir(parents=True)
    weights.save(denoiser, model.state_dict(), sidecar)
    image_set = params.image_sets["edm18"]
    images_folder = folder / "artifacts/generate_images/edm18"
    entries = [shards.write_shard(images_folder, k, images[50 * k :][:50], labels[50 * k :][:50]) for k in range(2)]
    shards.write_manifest(
        images_folder, entries, shape=(8, 8, 1), class_names=names, class_counts=[10] * 10,
        metadata={"generator_sha256": files.sha256(denoiser), "sampler": image_set.sampler.plain(),
                  "seed": image_set.seed, "block": image_set.block, "licence": "CC BY 4.0"},
    )  # fmt: skip
    return folder


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    folder = shutil.copytree(made, tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


def test_info(project, call):
    code, out, _ = call("images", "info", "edm18")
    assert code == 0
    for line in (
        "images        100 of 8 x 8 x 1\n",
        "classes       10 (0, 1, 2, 3, 4, ...), 10 images each\n",
        "shards        2, 7.",
        "licence       CC BY 4.0\n",
        "Croissant     none\n",
    ):
        assert line in out
    code, by_folder, _ = call("images", "info", "artifacts/generate_images/edm18", "--json")
    assert code == 0
    record = json.loads(by_folder)
    assert (record["images"], record["shape"], record["seed"]) == (100, [8, 8, 1], 1)
    assert record["sampler"]["steps"] == 3


def test_a_name_of_params_yaml_is_the_set_also_beside_a_folder_of_that_name(project, call):
    call("images", "export", "edm18", "edm18", "--format", "folder", "--quiet")
    assert (project / "edm18/README.md").is_file()
    assert "\nimages        100 of" in call("images", "info", "edm18")[1]
    code, _, err = call("images", "info", "./edm18")
    assert (code, "edm18 has no manifest.json" in err) == (2, True)


def test_verify_names_damaged_shards_and_lists_usable_ones(project, call):
    assert call("images", "verify", "edm18", "--quiet")[:2] == (0, "usable: 2 of 2 shards (all), 100 images\n")
    flip(project / "artifacts/generate_images/edm18/images-00001.npy")
    code, out, _ = call("images", "verify", "edm18", "--quiet")
    assert code == 2
    first, last = out.splitlines()
    assert first.startswith("PROBLEM shard 1: images-00001.npy has checksum ")
    assert last == "usable: 1 of 2 shards (0), 50 images"
    code, out, _ = call("images", "verify", "edm18", "--json")
    record = json.loads(out)
    assert (code, record["intact"], record["usable"], list(record["damaged"])) == (2, False, [0], ["1"])


def test_sheet(project, call):
    code, out, _ = call("images", "sheet", "edm18", "-o", "sheet.png", "--columns", "5")
    assert (code, out) == (0, "sheet.png: 50 images\n")
    assert Image.open(project / "sheet.png").size > (300, 300)
    assert call("images", "sheet", "edm18", "-o", "sheet.jpg")[0] == 2


def test_export_and_import(project, call):
    code, out, err = call("images", "export", "edm18", "released.npz", "--format", "npz", "--first", "60", "--quiet")
    assert (code, out, err) == (0, "released.npz: 60 images as npz\n", "")
    assert "The first 60 of 100 generated images" in (project / "released.md").read_text()
    train = "artifacts/prepare_data/train"
    code, out, err = call("images", "import", "released.npz", "again", "--shard", "25", "--like", train, "--quiet")
    assert (code, out) == (0, "again: 60 images in 10 classes\n")
    assert err == "note: the licence is unknown; --licence states it\n"
    images = shards.open_shards([project / "artifacts/generate_images/edm18", project / "again"])
    assert np.array_equal(images.images[2], images.images[0][:25])
    code, out, _ = call("images", "info", "again")
    assert "origin        Imported from released.npz\n" in out
    assert "Croissant     croissant.json\n" in out
    code, _, err = call("images", "export", "again", "out", "--format", "csv")
    assert (code, err[:46]) == (2, "error: --format is 'csv'; expected one of npz,")


def test_nothing_is_overwritten_and_no_set_gets_other_files(project, call):
    (project / "mine.md").write_text("mine")
    code, _, err = call("images", "card", "edm18", "-o", "mine.md")
    assert (code, "mine.md exists; expected a new name" in err) == (2, True)
    assert (project / "mine.md").read_text() == "mine"
    code, _, err = call("images", "export", "edm18", "artifacts/generate_images/edm18/x.npz", "--format", "npz")
    assert (code, "would lie in the image set" in err) == (2, True)
    shutil.copytree(project / "artifacts/generate_images/edm18", project / "edm18")
    flip(project / "edm18/images-00001.npy")  # a folder with the name of a set does not hide it
    assert call("images", "verify", "edm18", "--quiet")[0] == 0
    assert call("images", "verify", "./edm18", "--quiet")[0] == 2


def test_card_tells_the_chain_of_licences_and_the_measures(project, call):
    code, out, _ = call("images", "card", "edm18")
    assert code == 0
    front_matter = yaml.safe_load(out.split("---\n")[1])
    assert front_matter["license"] == "cc-by-4.0"
    assert front_matter["size_categories"] == ["n<1K"]
    assert front_matter["tags"] == ["synthetic", "diffusion"]
    assert "They inherit it from the images that their generator learned: CC BY 4.0." in out
    assert "## Measures" not in out  # nothing was selected and measured
    selected = project / "artifacts/select_images/edm18_best"
    manifest = files.sha256(project / "artifacts/generate_images/edm18/manifest.json")
    record = {"image_set": "edm18", "shape": [8, 8, 1], "classes": 10, "kept": 5, "pool": 9}
    files.write_json(selected / "selection.json", {**record, "manifest_sha256": manifest})
    path = STAGES["measure_images"].metrics_path({"selection": "edm18_best"})
    files.write_json(project / path, {"memorised": 0.125, "measured": 5})
    assert "| memorised | 0.125 |\n" in call("images", "card", "edm18")[1]
    files.write_json(selected / "selection.json", {**record, "manifest_sha256": "of another set"})
    assert "## Measures" not in call("images", "card", "edm18")[1]


def test_card_of_a_set_of_imported_weights_and_of_a_folder(project, call, tmp_path):
    sidecar_path = project / "artifacts/train_diffusion/edm/denoiser.json"
    sidecar = json.loads(sidecar_path.read_text())
    origin = {"file": "edm.pkl", "sha256": "cd" * 32, "format": "EDM", "tensors": "", "args": None, "notes": []}
    files.write_json(sidecar_path, sidecar | {"origin": origin, "licence": "CC BY-NC-SA 4.0"})
    out = call("images", "card", "edm18")[1]
    assert "the published weights that generated them, `edm.pkl` (SHA-256 `cdcdcdcdcdcd`): CC BY-NC-SA 4.0." in out
    folder = write_set(tmp_path / "others", licence="unknown", origin="Imported from 1m.npz")
    assert call("images", "card", folder, "-o", folder / "README.md")[:2] == (0, f"{folder / 'README.md'}\n")
    text = (folder / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["license_name"] == "unknown"
    assert "18 images, 4 x 5 pixels, RGB, in 3 classes. Imported from 1m.npz." in text
    assert "Nobody stated a licence" in text
    assert "## How they were generated" not in text


def test_the_code_of_a_card_loads_the_images(project, call, monkeypatch):
    for target, options in (("artifacts/generate_images/edm18", None), (".", "npz")):
        if options:
            call("images", "export", "edm18", "edm18.npz", "--format", options, "--quiet")
        text = (project / "edm18.md").read_text() if options else call("images", "card", "edm18")[1]
        monkeypatch.chdir(project / target)
        names = {}
        exec(text.split("```python\n")[1].split("```")[0], names)
        images = names["images"] if options else np.concatenate([images for images, _ in names["shards"]])
        assert images.shape == (100, 8, 8, 1)
        monkeypatch.chdir(project)


def test_the_page_shows_every_command_as_it_is(root):
    page = (root / "docs/images.md").read_text()
    group = typer.main.get_command(app).commands["images"]
    lines = [shlex.split(line) for line in re.findall(r"^\$ dmat images (.+)$", page, re.MULTILINE)]
    assert len(lines) >= 6
    for name, *arguments in lines:
        group.commands[name].make_context(name, arguments)  # refuses options and arguments that do not exist
    assert set(re.findall(r"dmat images (\w+)", page)) == set(group.commands)
    for format_name in image_export.FORMATS:
        assert f"| `{format_name}` |" in page


def test_the_page_loads_images_in_plain_pytorch(project, root):
    (code,) = [text for text in re.findall(r"```python\n(.*?)```", (root / "docs/images.md").read_text(), re.DOTALL)
               if "torch.utils" in text]  # fmt: skip
    names = {}
    exec(code, names)
    images, labels = shards.open_shards(project / "artifacts/generate_images/edm18").all()
    data_set = names["Images"]()
    assert len(data_set) == 100
    for index in (0, 49, 50, 99):
        image, label = data_set[index]
        assert np.array_equal(image.numpy(), images[index].transpose(2, 0, 1).astype(np.float32) / 255)
        assert label == labels[index]


def test_plan_probes_the_generator_and_counts_what_exists(project, call, monkeypatch):
    code, out, err = call("images", "plan", "edm18", "--images", "1020", "--probe", "1", "--json")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert (plan["images"], plan["shards"]) == (1020, 21)
    assert plan["disk_bytes"] == 1020 * (64 + 8) + 21 * (256 + 8192)
    assert plan["reused_bytes"] == 0  # nothing says which code made the set
    assert plan["images_per_second"] > 0
    assert plan["hours"] == pytest.approx(1020 / plan["images_per_second"] / 3600)
    assert plan["memory_bytes"] > 50 << 20
    provenance = project / STAGES["generate_images"].provenance_path({"image_set": "edm18"})
    files.write_json(provenance, {"code": code_identity.of_stage("generate_images")})
    plan = json.loads(call("images", "plan", "edm18", "--images", "1020", "--probe", "0", "--json")[1])
    assert plan["reused_bytes"] == 100 * (64 + 8) + 2 * (256 + 8192)
    assert plan["hours"] is None
    files.write_json(provenance, {"code": "another"})
    assert json.loads(call("images", "plan", "edm18", "--probe", "0", "--json")[1])["reused_bytes"] == 0
    usage = image_plan.shutil.disk_usage(project)._replace(free=10_000_000)
    monkeypatch.setattr(image_plan.shutil, "disk_usage", lambda path: usage)
    code, out, err = call("images", "plan", "edm18", "--images", "1000000000", "--probe", "0")
    assert code == 2
    assert "disk          " in out
    assert err == (
        "error: edm18 needs 242.0 GB more, 1.1 GB of them to spare; the disk has 0.0 GB free; free some (`dmat "
        "clean`), or generate fewer images\n"
    )


def test_plan_without_a_generator(project, call):
    shutil.rmtree(project / "artifacts/train_diffusion")
    code, out, _ = call("images", "plan", "edm18")
    assert code == 0
    assert out.endswith("time          not measured: there is no generator yet\n")
    shutil.rmtree(project / "artifacts/prepare_data")
    code, _, err = call("images", "plan", "edm18")
    assert (code, "nothing says how large the images are" in err) == (2, True)


def test_speed_of_a_probe():
    probe = image_plan._Probe
    assert image_plan._images_per_second(probe(8, 2.0, 0, 0), probe(108, 7.0, 0, 0)) == 20
    assert image_plan._images_per_second(probe(8, 2.0, 0, 0), probe(108, 2.1, 0, 0)) == 108 / 2.1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("info", "edm19"), "edm19 is not an image set of params.yaml; expected one of edm18"),
        (("info", "artifacts"), "artifacts has no manifest.json; expected the folder of an image set"),
        (("plan", "edm19"), "edm19 is not an image set of params.yaml"),
        (("import", "none.npz", "out"), "none.npz does not exist"),
        (("import", "params.yaml", "out"), "params.yaml is damaged or not an archive of images"),
    ],
)
def test_refusals(project, call, arguments, sentence):
    code, _, err = call("images", *arguments)
    assert (code, sentence in err, "Traceback" in err) == (2, True, False), err


def test_a_set_that_was_not_generated_and_a_place_without_a_project(project, call, tmp_path, monkeypatch):
    shutil.rmtree(project / "artifacts/generate_images")
    code, _, err = call("images", "info", "edm18")
    assert (code, "edm18/manifest.json does not exist; run the stage that makes it" in err) == (2, True)
    monkeypatch.chdir(tmp_path)
    code, _, err = call("images", "info", "edm18")
    assert (code, "edm18 does not exist; expected the folder of an image set" in err) == (2, True)
