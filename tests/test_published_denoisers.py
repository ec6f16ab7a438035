"""Published diffusion models: imported by hand and as a stage; their images, classes and licence."""

import json

import numpy as np
import pytest
import torch
import yaml

from dmat import devices, files, seeds
from dmat.config import Sampler
from dmat.data import shards
from dmat.data.pixels import to_bytes
from dmat.diffusion.edm_networks import DhariwalUNet, SongUNet
from dmat.diffusion.formulations import EDM, IDDPM, VE, VP, Preconditioned
from dmat.diffusion.samplers import heun
from dmat.errors import DmatError
from dmat.models import denoisers, importing, published_denoisers
from tests import edm_files

COMPUTE = devices.resolve("cpu", "fp32", threads=1)
IMAGES = {"img_resolution": 8, "img_channels": 1}
SIZE = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
SONG = {**IMAGES, **SIZE, "label_dim": 10, "augment_dim": 9, "model_type": "SongUNet", "dropout": 0.13}
# Name of the network -> constructor arguments, and the network itself.
PUBLISHED = {
    "ddpmpp": (SONG, lambda: SongUNet(8, 1, 10, 9, 16, (1, 2), 1, (4,))),
    "ncsnpp": (
        {**SONG, "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
         "resample_filter": [1, 3, 3, 1]},
        lambda: SongUNet(8, 1, 10, 9, 16, (1, 2), 1, (4,), embedding="fourier", noise_multiplier=2,
                         encoder="residual", taps=(1, 3, 3, 1)),
    ),
    "adm": (
        {**IMAGES, **SIZE, "model_channels": 64, "label_dim": 10, "label_dropout": 0, "sigma_data": 0.6},
        lambda: DhariwalUNet(8, 1, 10, 0, 64, (1, 2), 1, (4,)),
    ),
}  # fmt: skip


def trained(network):
    """The network with every parameter shifted, as layers that start at zero would hide what lies before them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_import_computes_what_the_published_network_does(tmp_path, name):
    arguments, make = PUBLISHED[name]
    network = trained(make())
    edm_files.write(tmp_path / "m.pkl", network, arguments)
    published = importing.import_denoiser(tmp_path / "m.pkl")
    model, sidecar = denoisers.load_denoiser(tmp_path / "m.safetensors", COMPUTE)
    assert sidecar["network"]["name"] == name
    assert sidecar["licence"] == "CC BY-NC-SA 4.0"
    assert sidecar["origin"]["sha256"] == files.sha256(tmp_path / "m.pkl")
    assert "class k is taken to be class k of the data set" in " ".join(published.notes)
    x, sigma, labels = torch.randn(4, 1, 8, 8), torch.tensor([0.01, 0.5, 3, 70]), torch.tensor([0, 3, 3, 9])
    original = COMPUTE.model_to_device(Preconditioned(network, EDM(arguments.get("sigma_data", 0.5))))
    expected = original(x, sigma, labels)
    assert torch.equal(model(x, sigma, labels), expected)
    assert not torch.equal(model(x, sigma, labels), model(x, sigma, labels + torch.tensor([1, 0, 0, 0])))


def test_a_variance_preserving_model_is_imported(tmp_path):
    network = trained(PUBLISHED["ddpmpp"][1]())
    edm_files.write(tmp_path / "m.pkl", network, SONG, class_name="VPPrecond")
    importing.import_denoiser(tmp_path / "m.pkl")
    model, sidecar = denoisers.load_denoiser(tmp_path / "m.safetensors", COMPUTE)
    assert sidecar["formulation"] == "vp"
    assert sidecar["sigma_range"] == pytest.approx([0.001, 152.17], rel=1e-3)
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3]), torch.tensor([0, 3])
    expected = COMPUTE.model_to_device(Preconditioned(network, VP()))(x, sigma, labels)
    assert torch.equal(model(x, sigma, labels), expected)
    edm_files.write(tmp_path / "m.pkl", network, {**SONG, "beta_d": 10.0}, class_name="VPPrecond")
    with pytest.raises(DmatError, match="its noise process has"):
        published_denoisers.read(tmp_path / "m.pkl")


def test_a_variance_exploding_model_is_imported(tmp_path):
    arguments, make = PUBLISHED["ncsnpp"]
    network = trained(make())
    edm_files.write(tmp_path / "m.pkl", network, {**arguments, "sigma_max": 100}, class_name="VEPrecond")
    importing.import_denoiser(tmp_path / "m.pkl")
    model, sidecar = denoisers.load_denoiser(tmp_path / "m.safetensors", COMPUTE)
    assert (sidecar["formulation"], sidecar["sigma_range"]) == ("ve", [0.02, 100.0])
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3]), torch.tensor([0, 3])
    expected = COMPUTE.model_to_device(Preconditioned(network, VE()))(x, sigma, labels)
    assert torch.equal(model(x, sigma, labels), expected)
    edm_files.write(tmp_path / "m.pkl", network, {**arguments, "sigma_max": 50}, class_name="VEPrecond")
    with pytest.raises(DmatError, match="its noise process has"):
        published_denoisers.read(tmp_path / "m.pkl")


class TwoOutputs(torch.nn.Module):
    """The first half of the channels that a network of iDDPM gives: the noise. The other half is a variance."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, noise, labels, augment):
        return self.network(x, noise, labels, augment).chunk(2, dim=1)[0]


@pytest.mark.parametrize("name", ["adm", "ddpmpp"])
def test_a_model_of_iddpm_is_imported_without_its_variance(tmp_path, name):
    arguments, make = PUBLISHED[name]
    arguments = {key: value for key, value in arguments.items() if key != "sigma_data"}
    network = make()
    last = network.out_conv if name == "adm" else network.dec["8x8_aux_conv"]
    last.weight = torch.nn.Parameter(torch.randn(2, *last.weight.shape[1:]))
    last.bias = torch.nn.Parameter(torch.zeros(2))
    trained(network)
    arguments |= {"model_type": "DhariwalUNet" if name == "adm" else "SongUNet"}
    table = {"u": torch.cat([IDDPM().levels.flip(0), torch.zeros(1)]).float()}
    edm_files.write(tmp_path / "m.pkl", network, arguments, class_name="iDDPMPrecond", buffers=table)
    importing.import_denoiser(tmp_path / "m.pkl")
    model, sidecar = denoisers.load_denoiser(tmp_path / "m.safetensors", COMPUTE)
    assert sidecar["formulation"] == "iddpm"
    assert sidecar["sigma_range"] == pytest.approx([0.0064, 20291], rel=0.01)
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3]), torch.tensor([0, 3])
    expected = COMPUTE.model_to_device(Preconditioned(TwoOutputs(network), IDDPM()))(x, sigma, labels)
    torch.testing.assert_close(model(x, sigma, labels), expected)
    for changed, message in (({"C_2": 0.01}, "its noise process has"), ({"img_channels": 3}, "has 2 outputs for 3")):
        edm_files.write(tmp_path / "m.pkl", network, {**arguments, **changed}, class_name="iDDPMPrecond")
        with pytest.raises(DmatError, match=message):
            published_denoisers.read(tmp_path / "m.pkl")


def test_weights_in_half_precision_become_single(tmp_path):
    edm_files.write(tmp_path / "m.pkl", trained(PUBLISHED["ddpmpp"][1]()).half(), {**SONG, "use_fp16": True})
    state = published_denoisers.read(tmp_path / "m.pkl").state
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma_max": "80"}, "sigma_max is '80'"),
        ({"encoder_type": "skip"}, "a SongUNet with"),
        ({"model_type": "DiT"}, "its model_type is 'DiT'"),
        ({"channel_mult_emb": 2}, "a SongUNet with"),
        ({"attention_heads": 4}, "the argument attention_heads is unknown"),
        ({"img_resolution": True}, "img_resolution is True"),
        ({"img_resolution": 9}, "2 multipliers halve the images 1 times"),
        ({"label_dim": 7}, "its tensors are not those of its arguments"),
        ({"num_blocks": 2}, "its tensors are not those of its arguments (missing"),
        ({"model_channels": 10**7}, "channels is 10000000"),
        ({"model_channels": "wide"}, "channels is 'wide'"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"sigma_data": float("inf")}, "sigma_data is inf"),
        ({"sigma_data": True}, "sigma_data is True"),
        ({"sigma_data": 0}, "sigma_data is 0.0"),
        ({"sigma_data": 10**400}, "sigma_data is 1000"),
        ({"sigma_min": float("inf")}, "sigma_min is inf"),
        ({"sigma_min": 5.0, "sigma_max": 1.0}, "noise levels go from 5.0 to 1.0"),
        ({"sigma_max": float("-inf")}, "sigma_max is -inf"),
        ({"channel_mult": [10**12, 2]}, "multipliers.0 is 1000000000000"),
        ({"num_blocks": 10**9}, "blocks is 1000000000"),
        ({"model_type": "x" * 5000}, "its model_type is 'xxx"),
    ],
)
def test_a_model_that_dmat_does_not_have_is_refused(tmp_path, changes, message):
    edm_files.write(tmp_path / "m.pkl", PUBLISHED["ddpmpp"][1](), {**SONG, **changes})
    with pytest.raises(DmatError) as refused:
        published_denoisers.read(tmp_path / "m.pkl")
    assert message in str(refused.value)
    assert "expected EDMPrecond, VPPrecond, VEPrecond or iDDPMPrecond around" in str(refused.value)
    assert len(str(refused.value)) < 900
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pkl"]


@pytest.mark.parametrize(
    ("positional", "message"),
    [((8, 1, 10, False), "4 arguments without a name"), ((8, 1, 5), "the argument img_channels twice")],
)
def test_arguments_that_dmat_cannot_name_are_refused(tmp_path, positional, message):
    edm_files.write(tmp_path / "m.pkl", PUBLISHED["ddpmpp"][1](), SONG, positional=positional)
    with pytest.raises(DmatError, match=message):
        published_denoisers.read(tmp_path / "m.pkl")


def test_another_preconditioning_and_values_that_are_not_numbers_are_refused(tmp_path):
    edm_files.write(tmp_path / "m.pkl", PUBLISHED["ddpmpp"][1](), SONG, class_name="FlowPrecond")
    with pytest.raises(DmatError, match="its preconditioning is FlowPrecond"):
        published_denoisers.read(tmp_path / "m.pkl")
    network = PUBLISHED["ddpmpp"][1]()
    network.map_layer0.weight.data[0, 0] = float("nan")
    edm_files.write(tmp_path / "m.pkl", network, SONG)
    with pytest.raises(DmatError, match=r"network.map_layer0.weight holds NaN"):
        published_denoisers.read(tmp_path / "m.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>sorry</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        (b"", "does not hold a diffusion model"),
        (b"\x80\x04N.", "it holds no network"),
        (b"cos\nsystem\n(S'touch executed'\ntR.", "its preconditioning is os.system"),
    ],
)
def test_files_that_are_no_models_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.pkl").write_bytes(content)
    with pytest.raises(DmatError, match=message):
        published_denoisers.read(tmp_path / "m.pkl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pkl"]


# --- commands


def test_import_and_info_on_the_command_line(tmp_path, call):
    edm_files.write(tmp_path / "m.pkl", trained(PUBLISHED["ddpmpp"][1]()), SONG)
    code, out, err = call("models", "import", tmp_path / "m.pkl")
    assert (code, out) == (0, f"{tmp_path / 'm.safetensors'}: ddpmpp with 16 channels x [1, 2], images 8 x 8 x 1, "
                              f"10 classes\n")  # fmt: skip
    assert "note: the file has no class names" in err
    code, out, _ = call("models", "info", tmp_path / "m.safetensors")
    assert code == 0
    for line in ("noise levels    0.0 to any, sigma_data 0.5", "licence         CC BY-NC-SA 4.0", "checksum        ok"):
        assert line in out
    code, out, _ = call("models", "info", tmp_path / "m.safetensors", "--json")
    assert json.loads(out)["label_dim"] == 10
    code, _, err = call("models", "import", tmp_path / "m.pkl", "--activation", "relu")
    assert (code, "--activation has no effect on a diffusion model" in err) == (2, True)
    sidecar = json.loads((tmp_path / "m.json").read_text())
    (tmp_path / "m.json").write_text(json.dumps(sidecar | {"label_dim": "ten"}))
    code, _, err = call("models", "info", tmp_path / "m.safetensors")
    assert (code, "does not describe a denoiser (ValueError: 'ten' is not a whole number" in err) == (2, True)
    code, out, _ = call("models", "import", tmp_path / "m.pkl", "--licence", "MIT", "--to", tmp_path / "n.safetensors")
    assert json.loads((tmp_path / "n.json").read_text())["licence"] == "MIT"


EDITS = [
    *({"origin": value} for value in ("x", [], {}, -1, True, {"file": "m"}, None)),
    *({"training": value, "origin": None} for value in (None, {}, 5, {"images_seen": "x"})),
    *({"image_shape": value} for value in ([8, 8, 1, 1], [8, 8], None, "8x8", [8.0, 8, 1])),
    *({"sigma_range": value} for value in (["x", "y"], "ab", [5, 1], [-1, None], [None, None], None)),
    *({"class_names": value} for value in ("abcdefghij", list(range(10)), None, ["a"])),
    *({"formulation": value} for value in ("flow", None, ["edm"])),
    *({"sigma_data": value} for value in (0, -1, True, None, "0.5")),
    *({"network": value} for value in ({}, None, {"name": "vit"}, {"name": "ddpmpp", "blocks": 10**9})),
    *({"kind": value} for value in (None, "x", [])),
    *({"network": None, "generator": value} for value in (None, "x", {}, {"channels": 8})),
]


def test_edited_sidecars_are_one_sentence(tmp_path, call):
    edm_files.write(tmp_path / "m.pkl", PUBLISHED["ddpmpp"][1](), SONG)
    importing.import_denoiser(tmp_path / "m.pkl")
    sidecar = json.loads((tmp_path / "m.json").read_text())
    for edit in EDITS:
        edited = {key: value for key, value in (sidecar | edit).items() if key != "network" or value is not None}
        (tmp_path / "m.json").write_text(json.dumps(edited))
        code, _, err = call("models", "info", tmp_path / "m.safetensors")
        assert (code, err.count("error: "), "Traceback" in err) == (2, 1, False), (edit, err)
        assert "restore the sidecar" in err, (edit, err)


# --- as a stage


@pytest.fixture
def project(finished, tmp_path):
    """A project whose image set comes from a published model of 12 classes."""
    project = finished.copy_without("train_diffusion", tmp_path / "project")
    network = trained(SongUNet(8, 1, 12, 9, 16, (1, 2), 1, (4,)))
    (project.folder / "sources").mkdir()
    edm_files.write(project.folder / "sources" / "m.pkl", network, {**SONG, "label_dim": 12})
    project.network = network
    project.params["generators"] = {"edm": {"source": "m.pkl"}}
    project.write({"image_sets": {"edm18": {"classes": [11, 0, 1, 2, 3, 4, 5, 6, 7, 8]}}})
    return project


def test_a_published_model_generates_the_images_of_a_set(project):
    project.run("train_diffusion")
    provenance = json.loads((project.folder / "artifacts/provenance/train_diffusion/edm.json").read_text())
    assert provenance["settings"] == {"source": "m.pkl"}
    assert provenance["inputs"]["source"]["path"] == "sources/m.pkl"
    assert (project.folder / "artifacts/pictures/train_diffusion/edm/samples.png").exists()
    project.run("generate_images")
    images = shards.open_shards(project.folder / "artifacts/generate_images/edm18")
    assert images.manifest["licence"] == "CC BY-NC-SA 4.0"
    assert images.manifest["class_names"] == list("0123456789")
    pixels, labels = images.take(np.arange(25))
    assert labels.tolist() == [k % 10 for k in range(25)]
    classes = torch.tensor([11, 0, 1, 2, 3, 4, 5, 6, 7, 8])[torch.from_numpy(labels)]
    sampler = Sampler(**project.params["generate_images"]["sampler"])
    seed = project.params["generate_images"]["seed"]
    latents = seeds.normals(seed, "latents", np.arange(25), (1, 8, 8), COMPUTE.device)
    model = COMPUTE.model_to_device(Preconditioned(project.network, EDM(0.5)))
    expected = to_bytes(heun(model, COMPUTE.to_device(latents), classes, sampler))
    assert np.array_equal(pixels, expected)
    for stage_name in ("score_images", "select_images", "mix_images", "train_robust"):
        project.run(stage_name)
    sidecar = json.loads((project.folder / "artifacts/train_robust/generated-1/best.json").read_text())
    assert sidecar["licence_of_data"] == "CC BY 4.0; CC BY-NC-SA 4.0"


@pytest.mark.parametrize(
    ("image_set", "message"),
    [
        ({}, "has 12 classes and the data set 10; expected `classes` in the image set"),
        ({"classes": [0, 1]}, "classes has 2 entries up to 1; expected 10"),
        ({"classes": [*range(9), 12]}, "entries up to 12; expected 10, as the data set has, from 0 to 11"),
    ],
)
def test_classes_that_do_not_fit_are_refused(project, image_set, message):
    project.run("train_diffusion")
    entry = {"generator": "edm", "source": "none", "images": 50, **image_set}
    project.params["image_sets"]["edm18"] = entry
    project.write({})
    text = project.run("generate_images", code=2)
    assert message in text


def test_a_model_of_other_images_is_refused(project):
    network = SongUNet(8, 3, 10, 9, 16, (1, 2), 1, (4,))
    edm_files.write(project.folder / "sources" / "m.pkl", network, {**SONG, "img_channels": 3})
    text = project.run("train_diffusion", code=2)
    assert "generator edm makes images [8, 8, 3]; the training images are [8, 8, 1]" in text


def test_noise_levels_outside_the_model_are_refused(project):
    arguments = {**SONG, "label_dim": 12, "sigma_min": 0.01, "sigma_max": 50.0}
    edm_files.write(project.folder / "sources" / "m.pkl", project.network, arguments)
    project.run("train_diffusion")
    text = project.run("generate_images", code=2)
    assert "calls the model at noise levels from 80 to 0.002; generator edm accepts 0.01 to 50.0" in text
    project.write({"image_sets": {"edm18": {"sampler": {"sigma_min": 0.01, "sigma_max": 45.0, "s_churn": 9.0}}}})
    assert "at noise levels from 63.6396 to 0.01" in project.run("generate_images", code=2), "churn raises them"
    project.write({"image_sets": {"edm18": {"sampler": {"s_churn": 0.0}}}})
    project.run("generate_images")


def test_images_that_are_not_finite_are_refused(project):
    with torch.no_grad():
        for parameter in project.network.parameters():
            parameter.fill_(1e25)
    edm_files.write(project.folder / "sources" / "m.pkl", project.network, {**SONG, "label_dim": 12})
    assert "the model makes images with NaN or infinite pixels" in project.run("train_diffusion", code=2)


def test_a_sampler_that_makes_nan_is_refused(project):
    (project.folder / "plugins").mkdir(exist_ok=True)
    (project.folder / "plugins" / "diverging.py").write_text(
        "def sample(denoiser, latents, labels, settings, noise):\n    return latents * float('nan')\n"
    )
    project.write({"generate_images": {"sampler": {"name": "diverging:sample"}}})
    project.run("train_diffusion")
    assert "made images with NaN or infinite pixels" in project.run("generate_images", code=2)
    project.write({"generate_images": {"sampler": {"name": "diverging:sample", "schedule": "searched"}}})
    assert "the sampler diverging:sample takes no `levels`" in project.run("generate_images", code=2)


def test_a_missing_source_and_a_height_without_attention_are_named(project):
    (project.folder / "sources/m.pkl").unlink()
    assert "put it into sources/" in project.run("train_diffusion", code=2)
    (project.folder / "sources/m.pkl").symlink_to("nowhere")
    assert "m.pkl is a link to nothing" in project.run("train_diffusion", code=2)
    project.params["generators"] = {"edm": {"source": "none", "network": {"name": "ddpmpp", "attention": [16]}}}
    project.write({})
    text = project.run("train_diffusion", code=2)
    assert "network.attention names the height 16; expected some of 8, 4" in text


def test_images_of_an_unconditional_model_have_no_labels(project):
    network = SongUNet(8, 1, 0, 9, 16, (1, 2), 1, (4,))
    edm_files.write(project.folder / "sources" / "m.pkl", network, {**SONG, "label_dim": 0})
    project.write({"image_sets": {"edm18": {"classes": []}}})
    project.run("train_diffusion")
    project.run("generate_images")
    assert not shards.open_shards(project.folder / "artifacts/generate_images/edm18").labelled


def test_dvc_reads_the_source_of_a_generator(root):
    stage = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]["train_diffusion"]["do"]
    assert "sources/${item.source}" in stage["deps"]


# --- the other formulations, trained


@pytest.mark.parametrize(
    ("formulation", "sampler"),
    [
        ("ddpm", {"name": "ancestral", "steps": 5, "schedule": "ddpm"}),
        ("ddpm", {"name": "ipndm", "steps": 4, "schedule": "edm", "sigma_min": 0.02, "sigma_max": 100.0}),
        ("vp", {"name": "dpmpp_2m", "steps": 4, "schedule": "log_snr", "guidance": 1.5}),
        ("ve", {"name": "heun", "steps": 4, "schedule": "ve", "sigma_min": 0.02, "sigma_max": 100.0}),
    ],
)
def test_a_baseline_is_trained_and_generates(finished, tmp_path, formulation, sampler):
    project = finished.copy_without("train_diffusion", tmp_path / "project")
    network = {"name": "ddpmpp", "channels": 8, "attention": [4], "label_dropout": 0.1}
    entry = {"source": "none", "formulation": formulation, "network": network}
    project.write({"generators": {"edm": entry}, "image_sets": {"edm18": {"images": 50, "sampler": sampler}}})
    printed = json.loads(project.run("train_diffusion").splitlines()[0])
    assert 0.5 < printed["loss"] < 1.1, "the variance of the noise, less what a short training explains"
    sidecar = json.loads((project.folder / "artifacts/train_diffusion/edm/denoiser.json").read_text())
    assert sidecar["formulation"] == formulation
    project.run("generate_images")
    pixels, _ = shards.open_shards(project.folder / "artifacts/generate_images/edm18").take(np.arange(50))
    assert len({image.tobytes() for image in pixels}) == 50


def test_guidance_needs_a_network_that_learned_to_go_without_labels(finished, tmp_path):
    project = finished.copy_without("generate_images", tmp_path / "project")
    project.write({"image_sets": {"edm18": {"sampler": {"guidance": 2.0}}}})
    assert "generator edm never learns to denoise without labels" in project.run("generate_images", code=2)
