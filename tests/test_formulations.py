"""The formulations are those of their papers, and the exact denoiser is the optimal one.

Oracles: the formulas in plain Python floats; a raw network whose denoiser is exact; the score of a known
density. Run alone: pytest tests/test_formulations.py
"""

import math

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch

from dmat import seeds
from dmat.diffusion import formulations
from dmat.diffusion.exact import ExactDenoiser
from dmat.diffusion.formulations import DDPM, EDM, IDDPM, VE, VP, Preconditioned

SIGMAS = (0.002, 0.1, 0.5, 1.0, 7.3, 80.0)
SIGMA_DATA = (0.25, 0.5, 0.7)


def table_1(sigma: float, sigma_data: float) -> dict[str, float]:
    """Karras et al. 2022, Table 1, column "Ours", network and preconditioning."""
    return {
        "c_skip": sigma_data**2 / (sigma**2 + sigma_data**2),
        "c_out": sigma * sigma_data / math.sqrt(sigma_data**2 + sigma**2),
        "c_in": 1 / math.sqrt(sigma**2 + sigma_data**2),
        "c_noise": math.log(sigma) / 4,
    }


@pytest.mark.parametrize("sigma_data", SIGMA_DATA)
def test_scalings_are_table_1(sigma_data):
    actual = EDM(sigma_data).scalings(torch.tensor(SIGMAS, dtype=torch.float64))
    for k, sigma in enumerate(SIGMAS):
        assert [c[k].item() for c in actual] == pytest.approx(list(table_1(sigma, sigma_data).values()), rel=1e-12)


def test_scalings_keep_the_shape_of_sigma():
    assert {c.shape for c in EDM(0.5).scalings(torch.ones(2, 3))} == {(2, 3)}


class RawNetwork(torch.nn.Module):
    """F(x; c_noise, label) = 3 x + c_noise + label, so that every argument shows in the output."""

    def forward(self, x, c_noise, labels, augment=None):
        return 3 * x + (c_noise + (0 if labels is None else labels))[:, None, None, None]


@pytest.mark.parametrize("labels", [None, torch.tensor([4, 0, 9, 1, 1, 2])])
def test_denoiser_combines_input_and_network_by_equation_7(labels):
    noisy = torch.randn(len(SIGMAS), 3, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    actual = Preconditioned(RawNetwork(), EDM(0.7))(noisy, torch.tensor(SIGMAS, dtype=torch.float64), labels)
    assert actual.dtype == torch.float32
    for k, sigma in enumerate(SIGMAS):
        c = table_1(sigma, 0.7)
        raw = 3 * c["c_in"] * noisy[k] + c["c_noise"] + (0 if labels is None else int(labels[k]))
        expected = c["c_skip"] * noisy[k] + c["c_out"] * raw
        torch.testing.assert_close(actual[k].double(), expected, rtol=1e-5, atol=1e-5)


class ExactNetwork(torch.nn.Module):
    """The raw network whose denoiser returns `clean`, up to an error of `delta` in the network's output."""

    def __init__(self, clean, sigma_data, delta=0.0):
        super().__init__()
        self.clean, self.sigma_data, self.delta = clean, sigma_data, delta

    def forward(self, x, c_noise, labels, augment=None):
        outputs = []
        for k, scaled in enumerate(x):
            c = table_1(math.exp(4 * c_noise[k].item()), self.sigma_data)
            outputs.append((self.clean[k] - c["c_skip"] * scaled / c["c_in"]) / c["c_out"])
        return torch.stack(outputs) + self.delta


@pytest.mark.parametrize("delta", [0.0, 0.25])
def test_loss_is_the_squared_error_of_the_raw_network(delta):
    """0 for an exact denoiser; lambda = 1 / c_out^2 makes an error of the raw network weigh the same at any sigma."""
    generator = torch.Generator().manual_seed(2)
    sigma = torch.tensor([0.05, 0.5, 2.0, 5.0])
    images = torch.rand(4, 1, 5, 5, generator=generator) * 2 - 1
    noise = torch.randn(4, 1, 5, 5, generator=generator)
    actual = formulations.loss(Preconditioned(ExactNetwork(images, 0.5, delta), EDM(0.5)), images, None, sigma, noise)
    torch.testing.assert_close(actual, torch.full((4,), delta**2), rtol=1e-3, atol=1e-8)


class Shifted:
    """A denoiser that is wrong by 0.1 everywhere and records its arguments."""

    formulation = EDM(0.5)

    def __init__(self, clean):
        self.clean, self.calls = clean, []

    def __call__(self, noisy, sigma, labels, augment=None):
        self.calls.append((noisy, sigma, labels))
        return self.clean + 0.1


def test_loss_of_a_known_error_is_lambda_times_its_square():
    images, noise = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    images[1] = 0.5
    sigma, labels = torch.tensor([2.0, 0.5]), torch.tensor([3, 7])
    denoiser = Shifted(images)
    actual = formulations.loss(denoiser, images, labels, sigma, noise)
    # lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 4.25 / 1 and 0.5 / 0.0625, from the formula
    torch.testing.assert_close(actual, torch.tensor([4.25 * 0.01, 8.0 * 0.01]))
    ((noisy, sigma_seen, labels_seen),) = denoiser.calls
    assert torch.equal(noisy[0], torch.full((3, 4, 4), 2.0))  # image 0 + 2 * noise 1
    assert torch.equal(noisy[1], torch.full((3, 4, 4), 1.0))  # image 0.5 + 0.5 * noise 1
    assert sigma_seen is sigma
    assert labels_seen is labels


class ZeroNetwork(torch.nn.Module):
    """A raw network at initialisation: its last layer is zero."""

    def forward(self, x, c_noise, labels, augment=None):
        return torch.zeros_like(x)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("sigma_data", SIGMA_DATA)
def test_expected_loss_of_a_zero_network_is_one(sigma, sigma_data):
    """On data of standard deviation sigma_data the training target has unit variance at every noise level."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(50, 1, 20, 20, generator=generator) * sigma_data
    noise = torch.randn(50, 1, 20, 20, generator=generator)
    denoiser = Preconditioned(ZeroNetwork(), EDM(sigma_data))
    actual = formulations.loss(denoiser, images, None, torch.full((50,), sigma), noise)
    assert actual.shape == (50,)
    assert actual.mean().item() == pytest.approx(1, abs=0.04)  # 20,000 squares of unit variance: standard error 0.01


def test_training_noise_levels_are_log_normal():
    logarithms = EDM(0.5, p_mean=-1.2, p_std=0.8).draw_sigma(seeds.stream(1, "test"), 100_000).double().log()
    assert logarithms.mean().item() == pytest.approx(-1.2, abs=0.015)
    assert logarithms.std().item() == pytest.approx(0.8, abs=0.01)


# --- VP and DDPM


def test_vp_is_table_1():
    """Karras et al. 2022, Table 1, column "VP", in Python's floats, and its inverse."""
    vp = VP()
    for t in (1e-5, 0.01, 0.3, 1.0):
        sigma = math.sqrt(math.exp(19.9 * t**2 / 2 + 0.1 * t) - 1)
        assert vp.sigma(torch.tensor(t, dtype=torch.float64)).item() == pytest.approx(sigma, rel=1e-9)
        c_skip, c_out, c_in, c_noise = (c.item() for c in vp.scalings(torch.tensor(sigma, dtype=torch.float64)))
        assert (c_skip, c_out) == (1, -sigma)
        assert c_in == pytest.approx(1 / math.sqrt(sigma**2 + 1))
        assert c_noise == pytest.approx(999 * t, rel=1e-6)
        assert vp.weight(torch.tensor(sigma)).item() == pytest.approx(1 / sigma**2, rel=1e-5)
    assert vp.sigma_range == pytest.approx([vp.sigma(torch.tensor(1e-5)).item(), 152.1697], rel=1e-4)


def test_levels_of_ddpm_are_those_of_ho_et_al():
    kept, expected = 1.0, []
    for j in range(1000):
        kept *= 1 - (1e-4 + (0.02 - 1e-4) * j / 999)
        expected.append(math.sqrt((1 - kept) / kept))
    assert DDPM().levels.tolist() == pytest.approx(expected, rel=1e-9)
    assert DDPM().sigma_range == pytest.approx([expected[0], expected[-1]])


def test_ddpm_counts_its_steps_and_interpolates_between_them():
    levels = DDPM().levels
    assert DDPM().scalings(levels)[3].tolist() == pytest.approx(range(1000), abs=1e-6)
    assert DDPM().scalings(levels.float())[3].tolist() == pytest.approx(range(1000), abs=1e-3)
    between = (levels[41] * levels[42]).sqrt()
    assert DDPM().scalings(between)[3].item() == pytest.approx(41.5)


# --- VE and iDDPM


def test_ve_is_table_1():
    """Karras et al. 2022, Table 1, column "VE", in Python's floats."""
    for sigma in (0.02, 0.3, 1.0, 100.0):
        c_skip, c_out, c_in, c_noise = (c.item() for c in VE().scalings(torch.tensor(sigma, dtype=torch.float64)))
        assert (c_skip, c_out, c_in) == (1, sigma, 1)
        assert c_noise == pytest.approx(math.log(sigma / 2), rel=1e-12)
        assert VE().weight(torch.tensor(sigma)).item() == pytest.approx(1 / sigma**2, rel=1e-5)
    assert VE().sigma_range == (0.02, 100)
    assert {c.shape for c in VE().scalings(torch.ones(2, 3))} == {(2, 3)}


def test_loss_of_ve_is_the_squared_error_of_the_negative_noise():
    generator = torch.Generator().manual_seed(2)
    sigma = torch.tensor([0.05, 0.5, 2.0, 50.0])
    images, noise, predicted = torch.randn(3, 4, 1, 5, 5, generator=generator)
    inputs = []

    class Fixed(torch.nn.Module):
        def forward(self, x, c_noise, labels, augment):
            inputs.append(x)
            return predicted

    actual = formulations.loss(Preconditioned(Fixed(), VE()), images, None, sigma, noise)
    torch.testing.assert_close(actual, (predicted + noise).square().flatten(1).mean(1), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(inputs[0], images + sigma[:, None, None, None] * noise)


def u_of_table_1(m=1000, c_1=0.001, c_2=0.008):
    """u_0 to u_M of Karras et al. 2022, Table 1, column "iDDPM", with 50 digits."""
    with mpmath.workdps(50):
        kept = [mpmath.sin(mpmath.pi / 2 * j / (m * (mpmath.mpf(str(c_2)) + 1))) ** 2 for j in range(m + 1)]
        u = [mpmath.mpf(0)] * (m + 1)
        for j in range(m, 0, -1):
            u[j - 1] = mpmath.sqrt((u[j] ** 2 + 1) / max(kept[j - 1] / kept[j], mpmath.mpf(str(c_1))) - 1)
        return [float(level) for level in u]


def test_iddpm_is_table_1():
    u = u_of_table_1()
    assert IDDPM().levels.tolist() == pytest.approx(u[-2::-1], rel=1e-9)
    assert IDDPM().sigma_range == pytest.approx((u[999], u[0]))
    # Levels, numbers between two of them, and beyond both ends.
    for sigma in (*u[:-1:37], 0.001, 0.0212, 0.7, 3.3, 55.5, 15_000.0, 1e6):
        c_skip, c_out, c_in, c_noise = (c.item() for c in IDDPM().scalings(torch.tensor(sigma, dtype=torch.float64)))
        assert (c_skip, c_out) == (1, -sigma)
        assert c_in == pytest.approx(1 / math.sqrt(sigma**2 + 1))
        assert c_noise == 999 - int(np.argmin([abs(level - sigma) for level in u[:-1]]))
        assert IDDPM().weight(torch.tensor(sigma)).item() == pytest.approx(1 / sigma**2, rel=1e-5)


def test_iddpm_has_the_cosine_schedule():
    """Nichol and Dhariwal 2021, equations 16 and 17: what is left of the image is f(t) / f(0); the last step is cut."""

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    levels = IDDPM().levels.tolist()
    for t in range(1, 1000):
        assert 1 / (1 + levels[t - 1] ** 2) == pytest.approx(f(t) / f(0), rel=1e-9)
    assert f(1000) == pytest.approx(0, abs=1e-30)
    assert 1 / (1 + levels[999] ** 2) == pytest.approx(0.001 * f(999) / f(0), rel=1e-6)


def test_iddpm_counts_its_steps_in_any_shape_and_precision():
    levels = IDDPM().levels
    assert torch.equal(IDDPM().scalings(levels.float())[3], torch.arange(1000.0))
    assert torch.equal(IDDPM().scalings(levels.reshape(10, 100))[3], torch.arange(1000.0).double().reshape(10, 100))
    assert IDDPM().scalings(levels[7])[3].shape == ()


def test_levels_of_iddpm_are_those_of_diffusers():
    """Its variances are float32, which leaves three digits of the lowest levels."""
    diffusers = pytest.importorskip("diffusers")
    kept = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    torch.testing.assert_close(((1 - kept) / kept).sqrt(), IDDPM().levels, rtol=2e-3, atol=0)


def test_training_noise_of_ve_and_iddpm():
    logarithms = VE().draw_sigma(seeds.stream(1, "test"), 20_000).double().log()
    low, high = math.log(0.02), math.log(100)
    assert scipy.stats.kstest(logarithms.numpy(), "uniform", (low, high - low)).pvalue > 0.001
    drawn = IDDPM().draw_sigma(seeds.stream(1, "test"), 100_000)
    assert (drawn.dtype, drawn.shape) == (torch.float32, (100_000,))
    steps = IDDPM().scalings(drawn)[3].long()
    assert torch.equal(IDDPM().levels.float()[steps], drawn)
    assert scipy.stats.chisquare(torch.bincount(steps, minlength=1000).numpy()).pvalue > 0.001


@pytest.mark.parametrize("formulation", [VP(), DDPM(), IDDPM()], ids=["vp", "ddpm", "iddpm"])
def test_loss_is_the_squared_error_of_the_predicted_noise(formulation):
    """Ho et al. 2020, equation 14: the network sees x of unit variance and is compared with the noise itself."""
    generator = torch.Generator().manual_seed(2)
    sigma = torch.tensor([0.05, 0.5, 2.0, 50.0])
    images = torch.rand(4, 1, 5, 5, generator=generator) * 2 - 1
    noise = torch.randn(4, 1, 5, 5, generator=generator)
    predicted = torch.randn(4, 1, 5, 5, generator=generator)
    inputs = []

    class Fixed(torch.nn.Module):
        def forward(self, x, c_noise, labels, augment=None):
            inputs.append(x)
            return predicted

    actual = formulations.loss(Preconditioned(Fixed(), formulation), images, None, sigma, noise)
    torch.testing.assert_close(actual, (predicted - noise).square().flatten(1).mean(1), rtol=1e-3, atol=1e-5)
    kept = (1 / (1 + sigma**2))[:, None, None, None]
    torch.testing.assert_close(inputs[0], kept.sqrt() * images + (1 - kept).sqrt() * noise)


def test_training_noise_of_vp_and_ddpm_is_uniform_in_time():
    times = VP().time(VP().draw_sigma(seeds.stream(1, "test"), 20_000))
    assert scipy.stats.kstest(times.numpy(), "uniform").pvalue > 0.001
    steps = DDPM().scalings(DDPM().draw_sigma(seeds.stream(1, "test"), 100_000))[3].round().long()
    counts = torch.bincount(steps, minlength=1000)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 0.001


# --- the exact denoiser


def random_data(n=7, shape=(2, 3, 3)):
    generator = torch.Generator().manual_seed(5)
    return torch.rand(n, *shape, generator=generator, dtype=torch.float64) * 2 - 1, torch.tensor([0, 1, 2, 0, 1, 2, 0])


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("by_class", [False, True])
def test_exact_denoiser_is_the_likelihood_weighted_average(sigma, by_class):
    data, labels = random_data()
    noisy = torch.randn(4, *data.shape[1:], generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    requested = torch.tensor([2, 0, 1, 1])
    actual = ExactDenoiser(data, labels)(noisy, torch.full((4,), sigma), requested if by_class else None)
    for k in range(4):
        total, weights = torch.zeros_like(data[0]), 0.0
        for image, label in zip(data, labels, strict=True):
            if by_class and label != requested[k]:
                continue
            weight = math.exp(-((noisy[k] - image) ** 2).sum().item() / (2 * sigma**2))
            total, weights = total + weight * image, weights + weight
        torch.testing.assert_close(actual[k], total / weights)


def test_exact_denoiser_gives_the_score_of_the_smoothed_data():
    """Equation 3: D(x; sigma) = x + sigma^2 * gradient of log p(x; sigma), p the data blurred by a Gaussian."""
    data, _ = random_data()
    noisy, sigma = torch.randn(3, *data.shape[1:], dtype=torch.float64).requires_grad_(True), 0.8
    squares = (noisy[:, None] - data[None]).flatten(2).square().sum(2)
    log_density = (-squares / (2 * sigma**2)).logsumexp(1)
    (score,) = torch.autograd.grad(log_density.sum(), noisy)
    actual = ExactDenoiser(data)(noisy.detach(), torch.full((3,), sigma))
    torch.testing.assert_close(actual, noisy.detach() + sigma**2 * score, rtol=1e-6, atol=1e-6)


def test_exact_denoiser_in_the_limit_of_no_noise_is_the_nearest_image():
    data, labels = random_data()
    near = data + 0.05 * torch.randn(data.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    sigma = torch.full((7,), 1e-3)
    torch.testing.assert_close(ExactDenoiser(data)(near, sigma), data)
    torch.testing.assert_close(ExactDenoiser(data, labels)(near, sigma, labels), data)
    # for another class: the nearest image of that class
    other = (labels + 1) % 3
    actual = ExactDenoiser(data, labels)(near, sigma, other)
    for k in range(7):
        choice = data[labels == other[k]]
        nearest = choice[((choice - near[k]) ** 2).flatten(1).sum(1).argmin()]
        torch.testing.assert_close(actual[k], nearest)


def test_exact_denoiser_in_the_limit_of_infinite_noise_is_the_mean():
    data, labels = random_data()
    noisy, sigma = torch.zeros(3, *data.shape[1:]), torch.full((3,), 1e6)
    torch.testing.assert_close(ExactDenoiser(data)(noisy, sigma), data.mean(0).expand(3, -1, -1, -1))
    by_class = ExactDenoiser(data, labels)(noisy, sigma, torch.arange(3))
    torch.testing.assert_close(by_class, torch.stack([data[labels == c].mean(0) for c in range(3)]))
