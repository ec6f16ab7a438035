"""Diffusion models that diffusers saved: read, rebuilt and compared with that library's own networks and schedulers."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dmat import devices, files, seeds
from dmat.config import Sampler
from dmat.data import shards
from dmat.data.pixels import to_bytes
from dmat.diffusion.diffusers_unet import DiffusersUNet
from dmat.diffusion.formulations import DDPM, PREDICTION_TYPES
from dmat.diffusion.samplers import heun
from dmat.errors import DmatError
from dmat.models import denoisers, diffusers_folders, importing, published_denoisers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")

COMPUTE = devices.resolve("cpu", "fp32", threads=1)
# A small network: 8 x 8 grey images, two levels, one of them with attention, in groups of 4 channels.
SMALL = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4, "attention_head_dim": 8,
}  # fmt: skip
ALL_ATTEND = {"down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2}
NONE_ATTENDS = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
NETWORKS = {
    "small": {},
    "classes": {"num_class_embeds": 10},
    "attention everywhere": ALL_ATTEND,
    "no attention": {**NONE_ATTENDS, "add_attention": False},
    "no middle": {"mid_block_type": None},
    "one head": {"attention_head_dim": None},
    "heads that do not divide the channels": {"attention_head_dim": 6},
    "scale and shift": {**ALL_ATTEND, "resnet_time_scale_shift": "scale_shift"},
    "groups of the middle": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "resampling layers": {**ALL_ATTEND, "downsample_type": "resnet", "upsample_type": "resnet"},
    "resampling layers without attention": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "centred input": {"center_input_sample": True, "num_class_embeds": 3},
    "two layers": {"layers_per_block": 2, "norm_num_groups": 2, "norm_eps": 1e-3, "act_fn": "swish"},
    "three levels": {
        "sample_size": [8, 12], "in_channels": 3, "out_channels": 3, "block_out_channels": [8, 8, 24],
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"],
    },
    "scaled middle": {"mid_block_scale_factor": 2.0, "time_embedding_dim": 12},
    "as google/ddpm-cifar10-32": {
        "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
        "attention_head_dim": None,
    },
    "odd number of sines": {"block_out_channels": [9, 15], "norm_num_groups": 3, "attention_head_dim": 5},
    "dropout": {"dropout": 0.1},
}  # fmt: skip


def unet(changes=()):
    """A network of diffusers with random weights."""
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(**{**SMALL, **dict(changes)}).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))  # normalisations start as the identity
    return network


def save(folder, network=None, scheduler=None):
    """What `DDPMPipeline.save_pretrained` writes."""
    scheduler = scheduler or diffusers.DDPMScheduler()
    diffusers.DDPMPipeline(unet=network or unet(), scheduler=scheduler).save_pretrained(folder)
    return folder


def save_bare(folder, network=None):
    """A network with its scheduler beside it, as older repositories are."""
    (network or unet()).save_pretrained(folder)
    diffusers.DDPMScheduler().save_pretrained(folder)
    return folder


def edit(path, **changes):
    """Changes values of a JSON file; `...` removes a key."""
    values = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not ...}
    path.write_text(json.dumps(values))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def batch(network):
    """Four images of the network's size, and labels if it has classes."""
    size = network.config.sample_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    classes = network.config.num_class_embeds
    x = torch.randn(4, network.config.in_channels, height, width, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(4) % classes if classes else None


# --- the network


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_computes_what_that_of_diffusers_does(tmp_path, name):
    original = unet(NETWORKS[name])
    model = diffusers_folders.read(save(tmp_path / "m", original))
    network = DiffusersUNet(model.spec, model.network).eval()
    shapes = {key: tuple(tensor.shape) for key, tensor in original.state_dict().items()}
    assert {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()} == shapes
    network.load_state_dict(original.state_dict(), strict=True)
    assert model.state.keys() == {f"network.{key}" for key in shapes}
    x, labels = batch(original)
    for noise in (torch.tensor([0, 1, 500, 999]), torch.tensor([0.25, 17.5, 400.125, 998.75])):
        expected = original(x, noise, labels).sample
        torch.testing.assert_close(network(x, noise.float(), labels), expected, rtol=2e-5, atol=2e-5)
        exact = original.double()(x.double(), noise, labels).sample
        output = network.double()(x.double(), noise.double(), labels)
        torch.testing.assert_close(output, exact, rtol=1e-10, atol=1e-10)
        assert exact.std() > 0.01
        original.float(), network.float()


def test_a_network_with_classes_needs_them_and_each_changes_the_result(tmp_path):
    save(tmp_path / "m", unet({"num_class_embeds": 3}))
    importing.import_denoiser(tmp_path / "m")
    model, sidecar = denoisers.load_denoiser(tmp_path / "m.safetensors", COMPUTE)
    assert (sidecar["label_dim"], sidecar["class_names"]) == (3, ["0", "1", "2"])
    x, sigma = torch.randn(1, 1, 8, 8), torch.tensor([1.0])
    outputs = [model(x, sigma, torch.tensor([k])) for k in range(3)]
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    with pytest.raises(ValueError, match="this network needs the class of each image"):
        model(x, sigma, None)


def test_old_names_of_attention_are_read(tmp_path):
    folder = save_bare(tmp_path / "m")
    new = published_denoisers.read(folder).state
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for name in [name for name in tensors if ".attentions." in name]:
            old = name
            for today, earlier in old_names.items():
                old = old.replace(f".{today}.", f".{earlier}.")
            tensors[old] = tensors.pop(name)

    edit_tensors(folder / "diffusion_pytorch_model.safetensors", rename)
    assert any("proj_attn" in name for name in load_file(folder / "diffusion_pytorch_model.safetensors"))
    old = published_denoisers.read(folder).state
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in new)
    network = diffusers.UNet2DModel.from_pretrained(folder)  # diffusers reads the old names too
    assert all(torch.equal(tensor, new[f"network.{name}"]) for name, tensor in network.state_dict().items())


def test_a_bare_folder_without_defaults_is_the_same_model(tmp_path):
    """Older files lack the keys that later versions added; those have the defaults of diffusers."""
    pipeline, bare = save(tmp_path / "a"), save_bare(tmp_path / "b")
    (bare / "scheduler").mkdir()
    (bare / "scheduler_config.json").rename(bare / "scheduler" / "scheduler_config.json")
    kept = {*SMALL, "_class_name"}
    keys = json.loads((bare / "config.json").read_text()).keys() - kept
    edit(bare / "config.json", **dict.fromkeys(keys, ...))
    edit(bare / "scheduler/scheduler_config.json", prediction_type=..., variance_type=..., beta_schedule=...)
    first, second = (published_denoisers.read(folder) for folder in (pipeline, bare))
    keys = ("network", "noise_process", "sigma_range", "image_shape", "label_dim", "formulation")
    assert {key: first.sidecar[key] for key in keys} == {key: second.sidecar[key] for key in keys}
    assert all(torch.equal(first.state[name], second.state[name]) for name in first.state)
    assert (first.sidecar["origin"]["format"], second.sidecar["origin"]["format"]) == (
        f"diffusers {diffusers.__version__}",
        "diffusers",
    )
    defaults = diffusers.UNet2DModel(block_out_channels=(32, 32, 32, 32)).config
    for name, value in diffusers_folders._NETWORK.items():
        assert name == "block_out_channels" or list(np.atleast_1d(value)) == list(np.atleast_1d(defaults[name])), name


# --- the noise process


PROCESSES = {
    "ddpm": {},
    "others": {"num_train_timesteps": 200, "beta_start": 0.001, "beta_end": 0.05},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
    "v": {"prediction_type": "v_prediction"},
    "image": {"prediction_type": "sample"},
    "cosine and v": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
}


@pytest.mark.parametrize("name", PROCESSES)
def test_noise_levels_and_estimates_agree_with_the_scheduler(tmp_path, name):
    scheduler = diffusers.DDPMScheduler(clip_sample=False, **PROCESSES[name])
    original = unet({"num_class_embeds": 4})
    importing.import_denoiser(save(tmp_path / "m", original, scheduler))
    model, sidecar = denoisers.load_denoiser(tmp_path / "m.safetensors", COMPUTE)
    kept = (1 - scheduler.betas.double()).cumprod(0)
    torch.testing.assert_close(model.formulation.levels, ((1 - kept) / kept).sqrt(), rtol=2e-4, atol=1e-6)
    assert sidecar["formulation"] == "ddpm"
    assert sidecar["sigma_range"] == [*model.formulation.sigma_range]
    assert sidecar["noise_process"]["steps"] == len(kept)
    x, labels = batch(original)
    for step in (0, 7, len(kept) // 2, len(kept) - 20):
        sigma = model.formulation.levels[step].item()
        scale = (1 + sigma**2) ** -0.5
        output = original(scale * x, step, labels).sample
        expected = scheduler.step(output, step, scale * x).pred_original_sample
        denoised = model(x, torch.full((4,), sigma), labels)
        # The scheduler has float32 products, from which it takes 1 - a.
        torch.testing.assert_close(denoised, expected, rtol=1e-3, atol=1e-3 * (1 + sigma))


def test_a_process_of_other_numbers_is_part_of_what_decides_images(tmp_path):
    for name in ("ddpm", "others"):
        importing.import_denoiser(save(tmp_path / name, scheduler=diffusers.DDPMScheduler(**PROCESSES[name])))
    sidecars = [denoisers.read_sidecar(tmp_path / f"{name}.safetensors") for name in ("ddpm", "others")]
    assert sidecars[0]["sha256"] == sidecars[1]["sha256"], "the weights are the same"
    assert denoisers.identity(sidecars[0]) != denoisers.identity(sidecars[1])
    assert "noise_process" not in denoisers.identity({k: v for k, v in sidecars[0].items() if k != "noise_process"})


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_each_prediction_of_the_truth_gives_the_image(prediction_type):
    """A network that predicts its own target exactly makes D the image, at every level."""
    formulation = DDPM(prediction_type=prediction_type)
    sigma = formulation.levels[::111]
    image, noise = torch.tensor(0.3).double(), torch.tensor(-1.7).double()
    a = (1 + sigma**2) ** -0.5
    target = {"epsilon": noise, "v_prediction": a * noise - sigma * a * image, "sample": image}[prediction_type]
    c_skip, c_out, c_in, _ = formulation.scalings(sigma)
    torch.testing.assert_close(c_in, a)
    torch.testing.assert_close(c_skip * (image + sigma * noise) + c_out * target, image.expand(len(sigma)))


@pytest.mark.parametrize("scheduler_class", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_a_model_of_edm_is_imported(tmp_path, scheduler_class):
    scheduler = getattr(diffusers, scheduler_class)(sigma_data=0.6)
    original = unet()
    folder = save_bare(tmp_path / "m", original)
    scheduler.save_pretrained(folder)
    importing.import_denoiser(folder)
    model, sidecar = denoisers.load_denoiser(tmp_path / "m.safetensors", COMPUTE)
    assert (sidecar["formulation"], sidecar["sigma_data"], sidecar["sigma_range"]) == ("edm", 0.6, [0.0, None])
    assert "noise_process" not in sidecar
    x, _ = batch(original)
    for sigma in (0.01, 1.0, 70.0):
        level = torch.tensor(sigma)
        output = original(scheduler.precondition_inputs(x, level), scheduler.precondition_noise(level)).sample
        expected = scheduler.precondition_outputs(x, output, level)
        torch.testing.assert_close(model(x, torch.full((4,), sigma), None), expected, rtol=1e-4, atol=1e-4)


# --- files


@pytest.mark.parametrize(
    ("readme", "values", "licence", "note"),
    [
        (None, {}, "unknown", "nothing in the folder names a licence"),
        ("---\nlicense: apache-2.0\ntags:\n- x\n---\n# A model\n", {}, "apache-2.0", "apache-2.0, as README.md says"),
        ("---\r\ntags: [x]\r\nlicense:\r\n- mit\r\n---\r\n", {"license": "x"}, "mit", "licence mit, as README.md says"),
        ("# license: mit\n", {"license": "cc0-1.0"}, "cc0-1.0", "licence cc0-1.0, as model_index.json says"),
        ("---\nlicense: a\x07b\n---\n", {"license": ["mit"]}, "unknown", "nothing in the folder names a licence"),
    ],
)
def test_the_licence_is_what_the_folder_says(tmp_path, readme, values, licence, note):
    folder = save(tmp_path / "m")
    if readme is not None:
        (folder / "README.md").write_bytes(readme.encode())
    edit(folder / "model_index.json", **values)
    published = published_denoisers.read(folder)
    assert published.sidecar["licence"] == licence
    assert note in " ".join(published.notes)
    assert "of the DDPMScheduler only the noise process was read" in " ".join(published.notes)
    assert published.sidecar["origin"]["sha256"] == files.checksum(folder)
    assert published_denoisers.read(folder, "MIT").sidecar["licence"] == "MIT"


def test_weights_in_half_precision_become_single(tmp_path):
    state = published_denoisers.read(save(tmp_path / "m", unet().half())).state
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def config(**changes):
    return lambda folder: edit(folder / "unet/config.json", **changes)


def process(**changes):
    return lambda folder: edit(folder / "scheduler/scheduler_config.json", **changes)


def tensors(change):
    return lambda folder: edit_tensors(folder / "unet/diffusion_pytorch_model.safetensors", change)


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def removed(name):
    return lambda folder: (folder / name).unlink()


def cut(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def as_pickle(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def split(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    path.with_name(f"{path.name}.index.json").write_text("{}")


def twice(folder):
    shutil.copy(folder / "unet/config.json", folder)


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
REFUSED = {
    "no config": (removed("unet/config.json"), "has neither unet/config.json nor config.json; expected a folder"),
    "no scheduler": (removed("scheduler/scheduler_config.json"), "has neither scheduler/scheduler_config.json nor"),
    "no weights": (removed(WEIGHTS), "has no diffusion_pytorch_model.safetensors; expected one"),
    "a pickle": (as_pickle, "has its weights in diffusion_pytorch_model.bin, a pickle; expected one"),
    "split weights": (split, "splits its weights (diffusion_pytorch_model.safetensors.index.json)"),
    "two configs": (twice, "has unet/config.json and config.json; expected one of them; remove the other"),
    "cut weights": (cut, "is incomplete or not a .safetensors file"),
    "empty weights": (content(WEIGHTS, b""), "is incomplete or not a"),
    "weights on a web page": (content(WEIGHTS, b"<html>sorry</html>"), "is a web page, not weights"),
    "LFS pointer": (content(WEIGHTS, b"version https://git-lfs.github.com/spec/v1"), "is a Git LFS pointer"),
    "cut config": (content("unet/config.json", b'{"act_fn": '), "unet/config.json is not valid JSON"),
    "config of bytes": (content("unet/config.json", b"\xff\xfe"), "unet/config.json is not valid JSON"),
    "deep config": (content("unet/config.json", b"[" * 100_000), "unet/config.json is not valid JSON"),
    "long config": (content("unet/config.json", b" " * (1 << 21)), "has 2097152 bytes; expected at most 1048576"),
    "config of NaN": (content("unet/config.json", b'{"norm_eps": NaN}'), "NaN is not a finite number"),
    "config of a list": (content("scheduler/scheduler_config.json", b"[]"), "holds a list; expected a JSON object"),
    "index of text": (content("model_index.json", b'"x"'), "model_index.json holds a str; expected a JSON object"),
    "another network": (config(_class_name="UNet2DConditionModel"), "its network is 'UNet2DConditionModel'"),
    "latents": (lambda f: edit(f / "model_index.json", vqvae=["diffusers", "VQModel"]), "has the part vqvae"),
    "unknown key": (config(dual_cross_attention=True), "the key dual_cross_attention of config.json is unknown"),
    "fourier": (config(time_embedding_type="fourier"), "time_embedding_type is 'fourier'; expected positional"),
    "class embedding": (config(class_embed_type="timestep"), "class_embed_type is 'timestep'; expected none"),
    "another block": (
        config(down_block_types=["DownBlock2D", "SkipDownBlock2D"]),
        "network.down_block_types.1 is 'SkipDownBlock2D'; expected 'DownBlock2D' or 'AttnDownBlock2D'",
    ),
    "spatial norm": (config(resnet_time_scale_shift="spatial"), "network.resnet_time_scale_shift is 'spatial'"),
    "activation": (config(act_fn="mish"), "network.act_fn is 'mish'; expected 'silu' or 'swish'"),
    "padding": (config(downsample_padding=2), "network.downsample_padding is 2; expected"),
    "no size": (config(sample_size=None), "sample_size is None; expected a whole number from 1"),
    "sizes of text": (config(sample_size=["8", 8]), "sample_size is '8'"),
    "odd size": (config(sample_size=9), "2 levels cannot halve 9x9 pixels 1 times"),
    "learned variance": (config(out_channels=2), "out_channels is 2; expected 1, as in_channels"),
    "levels": (config(up_block_types=["UpBlock2D"]), "network.up_block_types has 1 entries; expected 2"),
    "groups": (config(norm_num_groups=5), "must be divisible by num_groups (5)"),
    "heads": (config(attention_head_dim=64), "attention_head_dim is 64; expected at most 16, the channels of a level"),
    "huge": (config(block_out_channels=[10**12, 8]), "network.block_out_channels.0 is 1000000000000"),
    "long value": (config(mid_block_type="x" * 5000), "network.mid_block_type is 'xxx"),
    "other classes": (config(num_class_embeds=3), "its tensors are not those of config.json (missing"),
    "other layers": (config(layers_per_block=2), "its tensors are not those of config.json (missing"),
    "wrong shape": (
        tensors(lambda t: t.update({"conv_in.bias": torch.zeros(7)})),
        "its tensors are not those of config.json (conv_in.bias is (7,), expected (8,))",
    ),
    "missing tensor": (tensors(lambda t: t.pop("conv_out.bias")), "missing ['conv_out.bias'], unexpected []"),
    "extra tensor": (tensors(lambda t: t.update(x=torch.zeros(1))), "missing [], unexpected ['x']"),
    "two names": (
        tensors(lambda t: t.update({"mid_block.attentions.0.query.bias": torch.zeros(16)})),
        "some under an old and a new name",
    ),
    "NaN": (tensors(lambda t: t["conv_in.bias"].fill_(torch.nan)), "conv_in.bias holds NaN or infinite values"),
    "integers": (
        tensors(lambda t: t.update({"conv_in.bias": torch.zeros(8, dtype=torch.int64)})),
        "conv_in.bias holds NaN or infinite values, or other values than decimals",
    ),
    "another scheduler": (process(_class_name="ScoreSdeVeScheduler"), "its scheduler is 'ScoreSdeVeScheduler'"),
    "no class": (process(_class_name=...), "its scheduler is None"),
    "sigmoid": (process(beta_schedule="sigmoid"), "noise_process.beta_schedule is 'sigmoid'; expected 'linear'"),
    "flow": (process(prediction_type="flow_prediction"), "noise_process.prediction_type is 'flow_prediction'"),
    "steps": (process(num_train_timesteps=1), "noise_process.steps is 1; expected"),
    "falling betas": (process(beta_start=0.03), "beta_start is 0.03 and beta_end 0.02; expected rising values"),
    "too much noise": (process(beta_end=0.99), "its noise process has levels up to"),
    "trained betas": (process(trained_betas=[0.1, 0.2]), "trained_betas is [0.1, 0.2]; expected none"),
    "zero SNR": (process(rescale_betas_zero_snr=True), "rescale_betas_zero_snr is True; expected none"),
    "key of a scheduler": (process(use_flow_sigmas=True), "the key use_flow_sigmas of its scheduler is unknown"),
    "EDM with v": (
        process(_class_name="EDMEulerScheduler", prediction_type="v_prediction"),
        "the key beta_end of its scheduler is unknown",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved") / "m")


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_and_foreign_folders_are_refused_in_one_sentence(saved, tmp_path, name, call):
    damage, message = REFUSED[name]
    folder = shutil.copytree(saved, tmp_path / "m")
    damage(folder)
    code, _, err = call("models", "import", folder)
    assert (code, err.count("error: "), "Traceback" in err) == (2, 1, False), err
    assert message in err
    assert "expected" in err
    assert len(err) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["m"], "nothing is written"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'; expected epsilon of a scheduler"),
        ({"sigma_data": True}, "sigma_data is True; expected a number above 0"),
        ({"sigma_data": 10**400}, "the number 10000000000000000000... has 401 digits"),
    ],
)
def test_other_models_of_edm_are_refused(tmp_path, changes, message):
    folder = save_bare(tmp_path / "m")
    diffusers.EDMEulerScheduler().save_pretrained(folder)
    edit(folder / "scheduler_config.json", **changes)
    with pytest.raises(DmatError) as refused:
        published_denoisers.read(folder)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 900


# --- commands


def test_import_and_info_on_the_command_line(tmp_path, call, monkeypatch):
    folder = save(tmp_path / "ddpm-v1.0", unet({"num_class_embeds": 10}))
    code, out, err = call("models", "import", folder)
    target = tmp_path / "ddpm-v1.0.safetensors"
    title = "diffusers_unet with [8, 16] channels, images 8 x 8 x 1, 10 classes"
    assert (code, out) == (0, f"{target}: {title}\n")
    assert "note: nothing in the folder names a licence" in err
    code, out, err = call("models", "info", target)
    assert code == 0, err
    for line in ("formulation     ddpm", f"network         {title}", "checksum        ok", "licence         unknown",
                 f"from            ddpm-v1.0 (diffusers {diffusers.__version__})"):  # fmt: skip
        assert line in out
    monkeypatch.chdir(folder)
    assert call("models", "import", ".")[0] == 0, "the same model may be written again"
    code, _, err = call("models", "import", folder, "--to", folder / "x.safetensors")
    assert (code, "x.safetensors is in the folder to import" in err) == (2, True)
    code, _, err = call("models", "import", folder, "--data", "cifar10")
    assert (code, "--data has no effect on a diffusion model" in err) == (2, True)
    edit(folder / "scheduler/scheduler_config.json", beta_end=0.03)
    code, _, err = call("models", "import", folder)
    assert (code, "exists and is not an import of ddpm-v1.0" in err) == (2, True)


EDITS = [
    *({"network": {"name": "diffusers_unet", **value}} for value in ({}, {"layers_per_block": "x"})),
    *({"noise_process": value} for value in (None, {}, [], "x", {"steps": 5})),
    {"formulation": "edm"},
    {"augment_dim": 3},
    {"image_shape": [7, 8, 1]},
]


def test_edited_sidecars_are_one_sentence(saved, tmp_path, call):
    importing.import_denoiser(saved, target=tmp_path / "m.safetensors")
    sidecar = json.loads((tmp_path / "m.json").read_text())
    values = ({"beta_end": 0.999}, {"beta_schedule": "x"}, {"more": 1}, {"steps": 10**9})
    process_edits = [{"noise_process": {**sidecar["noise_process"], **value}} for value in values]
    for change in EDITS + process_edits:
        (tmp_path / "m.json").write_text(json.dumps(sidecar | change))
        code, _, err = call("models", "info", tmp_path / "m.safetensors")
        assert (code, err.count("error: "), "Traceback" in err) == (2, 1, False), (change, err)
        assert "restore the sidecar" in err, (change, err)


def test_params_cannot_train_this_network(call, root, tmp_path, monkeypatch):
    text = (root / "params.yaml").read_text()
    assert text.count("name: unet") == 1
    (tmp_path / "params.yaml").write_text(text.replace("name: unet", "name: diffusers_unet"))
    monkeypatch.chdir(tmp_path)
    code, _, err = call("train-diffusion", "--generator", "edm")
    assert (code, "is 'diffusers_unet'; expected 'unet', 'ddpmpp', 'ncsnpp' or 'adm'" in err) == (2, True)


# --- as a stage


def test_a_folder_generates_the_images_of_a_set(finished, tmp_path):
    project = finished.copy_without("train_diffusion", tmp_path / "project")
    original = unet({"num_class_embeds": 10})
    save(project.folder / "sources" / "ddpm-folder", original, diffusers.DDPMScheduler(num_train_timesteps=500))
    (project.folder / "sources/ddpm-folder/README.md").write_text("---\nlicense: mit\n---\n")
    project.params["generators"] = {"edm": {"source": "ddpm-folder"}}
    sampler = {"name": "heun", "steps": 3, "sigma_min": 0.02, "sigma_max": 10.0}
    project.write({"image_sets": {"edm18": {"sampler": sampler}}})
    project.run("train_diffusion")
    provenance = json.loads((project.folder / "artifacts/provenance/train_diffusion/edm.json").read_text())
    source = {"path": "sources/ddpm-folder", "sha256": files.checksum(project.folder / "sources/ddpm-folder")}
    assert provenance["inputs"]["source"] == source
    assert provenance["settings"] == {"source": "ddpm-folder"}
    project.run("generate_images")
    images = shards.open_shards(project.folder / "artifacts/generate_images/edm18")
    assert images.manifest["licence"] == "mit"
    pixels, labels = images.take(np.arange(25))
    seed = project.params["generate_images"]["seed"]
    latents = torch.as_tensor(seeds.normals(seed, "latents", np.arange(25), (1, 8, 8), COMPUTE.device))
    levels = DDPM(steps=500).levels

    def denoise(noisy, sigma, classes):
        """By the network of diffusers at the step, between two steps as well, that has this noise level."""
        step = torch.from_numpy(np.interp(sigma.double().log(), levels.log(), np.arange(500.0))).float()
        scale = sigma[:, None, None, None]
        noise = original((1 + scale**2).rsqrt() * noisy.float(), step, classes).sample
        return noisy.float() - scale.float() * noise

    expected = to_bytes(heun(denoise, latents, torch.from_numpy(labels), Sampler(**sampler)))
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1, "one step of rounding to bytes"
    assert len({image.tobytes() for image in pixels}) == 25

    (project.folder / "sources/ddpm-folder/unet/diffusion_pytorch_model.safetensors").unlink()
    assert "has no diffusion_pytorch_model.safetensors" in project.run("train_diffusion", code=2)
    shutil.rmtree(project.folder / "sources/ddpm-folder")
    assert "put it into sources/" in project.run("train_diffusion", code=2)
