"""A searched schedule: dynamic programming against all ways, errors against Euler steps, and what it is good for."""

import functools
import itertools
import json

import numpy as np
import pytest
import torch
import yaml

from dmat import config, devices, seeds
from dmat.data import shards
from dmat.data.pixels import to_bytes
from dmat.diffusion import schedule_search
from dmat.diffusion.exact import ExactDenoiser
from dmat.diffusion.samplers import SAMPLERS, noise_levels
from dmat.errors import DmatError
from dmat.models.denoisers import load_denoiser
from dmat.training import weights

LATENTS = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(0))
DATA = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.5


@functools.cache
def searched(steps):
    return schedule_search.search(ExactDenoiser(DATA), LATENTS, None, steps, 0.01, 40.0)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
def test_the_way_is_the_cheapest_of_all(steps):
    generator = torch.Generator().manual_seed(steps)
    for _ in range(20):
        errors = torch.rand(8, 8, dtype=torch.float64, generator=generator)
        errors[torch.tril_indices(8, 8).unbind()] = torch.inf
        ways = [(0, *between, 7) for between in itertools.combinations(range(1, 7), steps - 1)]
        cost = {way: sum(errors[pair].item() for pair in itertools.pairwise(way)) for way in ways}
        assert tuple(schedule_search._cheapest(errors, steps)) == min(cost, key=cost.get)


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 60])
def test_levels_fall_from_the_highest_to_zero(steps):
    levels = searched(steps)
    assert (len(levels), levels.dtype) == (steps + 1, torch.float64)
    assert levels[0].item() == pytest.approx(40.0)
    assert levels[-1] == 0
    assert (levels.diff() < 0).all()


def test_the_levels_are_the_same_in_every_run():
    assert torch.equal(searched(5), searched.__wrapped__(5))


def test_errors_are_those_of_euler_steps_on_an_accurate_path():
    grid = torch.tensor([10.0, 5.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    denoiser = ExactDenoiser(DATA)
    points, slopes = schedule_search._paths(denoiser, LATENTS, None, grid.tolist())
    errors = schedule_search._errors(points, slopes, grid)
    for start, end in ((0, 1), (0, 3), (2, 3), (3, 4)):
        x, sigma, after = points[start], grid[start], grid[end]
        denoised = denoiser(x.float(), torch.full((32,), sigma.item()), None).double()
        jump = x + (after - sigma) / sigma * (x - denoised)
        difference = (jump - points[end]).flatten(1).norm(dim=1).mean()
        assert errors[start, end].item() == pytest.approx((difference / (0.25 + after**2).sqrt()).item(), rel=1e-5)
    assert errors[3, 4] == pytest.approx(0, abs=1e-6)  # Heun's last step is Euler's
    assert errors[1, 1] == errors[2, 0] == torch.inf


def test_paths_are_those_of_heun():
    settings = config.Sampler(name="heun", steps=12, sigma_min=0.01, sigma_max=40.0)
    points, _ = schedule_search._paths(ExactDenoiser(DATA), LATENTS, None, noise_levels(settings).tolist())
    assert points.shape == (13, *LATENTS.shape)
    expected = SAMPLERS["heun"](ExactDenoiser(DATA), LATENTS, None, settings)
    torch.testing.assert_close(points[-1], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [4, 5, 8])
def test_euler_ends_nearer_to_the_exact_images(steps):
    """Than with equally many levels of EDM, for other latents than those of the search."""
    latents = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    settings = config.Sampler(name="euler", steps=steps, sigma_min=0.01, sigma_max=40.0)
    exact = SAMPLERS["heun"](ExactDenoiser(DATA), latents, None, settings.model_copy(update={"steps": 200}))
    error = {
        name: (SAMPLERS["euler"](ExactDenoiser(DATA), latents, None, settings, levels=levels) - exact).square().mean()
        for name, levels in (("edm", None), ("searched", searched(steps).tolist()))
    }
    assert error["searched"] < 0.8 * error["edm"]


def test_a_set_is_generated_with_the_levels_in_its_manifest(finished, tmp_path):
    project = finished.copy_without("generate_images", tmp_path / "project")
    project.write({"generate_images": {"sampler": {"name": "ipndm", "steps": 4, "schedule": "searched"}}})
    project.run("generate_images")
    folder = project.folder / "artifacts/generate_images/edm18"
    manifest = json.loads((folder / shards.MANIFEST).read_text())
    assert len(manifest["levels"]) == 5
    compute = devices.resolve("cpu", "fp32", threads=1)
    model, _ = load_denoiser(project.folder / "artifacts/train_diffusion/edm" / weights.DENOISER, compute)
    indices = np.arange(25)
    settings = config.Sampler(name="ipndm", steps=4, schedule="searched")
    latents = compute.to_device(seeds.normals(1, "latents", indices, (1, 8, 8), compute.device))
    images = SAMPLERS["ipndm"](model, latents, torch.from_numpy(indices % 10), settings, levels=manifest["levels"])
    assert np.array_equal(to_bytes(images), shards.open_shards(folder).take(indices)[0])
    with pytest.raises(ValueError, match="given by schedule_search"):
        SAMPLERS["ipndm"](model, latents, None, settings)


def test_at_most_a_hundred_steps_are_searched(tiny_params, tmp_path):
    tiny_params["generate_images"]["sampler"] = {"name": "euler", "steps": 101, "schedule": "searched"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params))
    with pytest.raises(DmatError, match="steps is 101; expected at most 100 with the schedule searched"):
        config.load(tmp_path / "params.yaml")
