"""EDM preconditioning and training loss (Karras et al. 2022, section 5 and Table 1).

Images are [B, C, H, W] in [-1, 1]; sigma is the standard deviation of the noise in the same unit.
Shapes: B batch, C channels, H height, W width.
"""

from torch import Tensor, nn


def scalings(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes c_skip, c_out, c_in and c_noise of Table 1, column "Ours". sigma: any shape, above 0; results: same."""
    total = (sigma**2 + sigma_data**2).sqrt()
    return (sigma_data / total) ** 2, sigma * sigma_data / total, 1 / total, sigma.log() / 4


class Preconditioned(nn.Module):
    """The denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) around a raw network F (equation 7).

    network: F(x [B, C, H, W], c_noise [B], labels int64 [B] or None) -> [B, C, H, W].
    """

    def __init__(self, network: nn.Module, sigma_data: float):
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """noisy [B, C, H, W], sigma [B], labels int64 [B] or None -> estimate of the clean images, float32."""
        c_skip, c_out, c_in, c_noise = scalings(sigma.float(), self.sigma_data)  # [B] each
        output = self.network(_per_image(c_in) * noisy.float(), c_noise, labels)
        return _per_image(c_skip) * noisy.float() + _per_image(c_out) * output.float()


def sample_sigma(normal: Tensor, p_mean: float, p_std: float) -> Tensor:
    """Computes training noise levels with ln sigma ~ N(p_mean, p_std^2).

    normal: standard normal numbers [B]. Returns sigma [B].
    """
    return (normal * p_std + p_mean).exp()


def loss(denoiser: Preconditioned, images: Tensor, labels: Tensor | None, sigma: Tensor, noise: Tensor) -> Tensor:
    """Computes the weighted squared error per image, [B] (equation 8, with lambda(sigma) = 1 / c_out^2).

    It is the mean over pixels and channels. images in [-1, 1] and noise (standard normal): [B, C, H, W];
    labels int64 [B] or None; sigma [B].
    """
    weight = 1 / scalings(sigma, denoiser.sigma_data)[1] ** 2  # [B]
    error = denoiser(images + _per_image(sigma) * noise, sigma, labels) - images
    return weight * error.square().flatten(1).mean(1)


def _per_image(values: Tensor) -> Tensor:  # [B] -> [B, 1, 1, 1], to broadcast over images
    return values.reshape(-1, 1, 1, 1)
