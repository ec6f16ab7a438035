"""The EDM preconditioning and loss are Table 1 of Karras et al. 2022, and the exact denoiser is the optimal one.

Oracles: the formulas in plain Python floats; a raw network whose denoiser is exact; the score of a known
density. Run alone: pytest tests/test_edm.py
"""

import math

import pytest
import torch

from dmat.diffusion import edm
from dmat.diffusion.exact import ExactDenoiser

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
    actual = edm.scalings(torch.tensor(SIGMAS, dtype=torch.float64), sigma_data)
    for k, sigma in enumerate(SIGMAS):
        assert [c[k].item() for c in actual] == pytest.approx(list(table_1(sigma, sigma_data).values()), rel=1e-12)


def test_scalings_keep_the_shape_of_sigma():
    assert {c.shape for c in edm.scalings(torch.ones(2, 3), 0.5)} == {(2, 3)}


class RawNetwork(torch.nn.Module):
    """F(x; c_noise, label) = 3 x + c_noise + label, so that every argument shows in the output."""

    def forward(self, x, c_noise, labels):
        return 3 * x + (c_noise + (0 if labels is None else labels))[:, None, None, None]


@pytest.mark.parametrize("labels", [None, torch.tensor([4, 0, 9, 1, 1, 2])])
def test_denoiser_combines_input_and_network_by_equation_7(labels):
    noisy = torch.randn(len(SIGMAS), 3, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    actual = edm.Preconditioned(RawNetwork(), 0.7)(noisy, torch.tensor(SIGMAS, dtype=torch.float64), labels)
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

    def forward(self, x, c_noise, labels):
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
    actual = edm.loss(edm.Preconditioned(ExactNetwork(images, 0.5, delta), 0.5), images, None, sigma, noise)
    torch.testing.assert_close(actual, torch.full((4,), delta**2), rtol=1e-3, atol=1e-8)


class Shifted:
    """A denoiser that is wrong by 0.1 everywhere and records its arguments."""

    sigma_data = 0.5

    def __init__(self, clean):
        self.clean, self.calls = clean, []

    def __call__(self, noisy, sigma, labels):
        self.calls.append((noisy, sigma, labels))
        return self.clean + 0.1


def test_loss_of_a_known_error_is_lambda_times_its_square():
    images, noise = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    images[1] = 0.5
    sigma, labels = torch.tensor([2.0, 0.5]), torch.tensor([3, 7])
    denoiser = Shifted(images)
    actual = edm.loss(denoiser, images, labels, sigma, noise)
    # lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 4.25 / 1 and 0.5 / 0.0625, from the formula
    torch.testing.assert_close(actual, torch.tensor([4.25 * 0.01, 8.0 * 0.01]))
    ((noisy, sigma_seen, labels_seen),) = denoiser.calls
    assert torch.equal(noisy[0], torch.full((3, 4, 4), 2.0))  # image 0 + 2 * noise 1
    assert torch.equal(noisy[1], torch.full((3, 4, 4), 1.0))  # image 0.5 + 0.5 * noise 1
    assert sigma_seen is sigma
    assert labels_seen is labels


class ZeroNetwork(torch.nn.Module):
    """A raw network at initialisation: its last layer is zero."""

    def forward(self, x, c_noise, labels):
        return torch.zeros_like(x)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("sigma_data", SIGMA_DATA)
def test_expected_loss_of_a_zero_network_is_one(sigma, sigma_data):
    """On data of standard deviation sigma_data the training target has unit variance at every noise level."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(50, 1, 20, 20, generator=generator) * sigma_data
    noise = torch.randn(50, 1, 20, 20, generator=generator)
    actual = edm.loss(edm.Preconditioned(ZeroNetwork(), sigma_data), images, None, torch.full((50,), sigma), noise)
    assert actual.shape == (50,)
    assert actual.mean().item() == pytest.approx(1, abs=0.04)  # 20,000 squares of unit variance: standard error 0.01


def test_training_noise_levels_are_log_normal():
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logarithms = edm.sample_sigma(normal, p_mean=-1.2, p_std=0.8).log()
    assert logarithms.mean().item() == pytest.approx(-1.2, abs=0.015)
    assert logarithms.std().item() == pytest.approx(0.8, abs=0.01)
    exact = edm.sample_sigma(torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64), -1.2, 1.2)
    assert exact.tolist() == pytest.approx([math.exp(-2.4), math.exp(-1.2), math.exp(1.2)])


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
