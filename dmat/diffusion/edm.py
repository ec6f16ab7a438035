"""EDM preconditioning and training loss (Karras et al. 2022, section 5 and Table 1).

Images are [B, C, H, W] in [-1, 1]; sigma is the standard deviation of the noise in the same unit.
"""

from torch import Tensor, nn


def scalings(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in, c_noise of Table 1, column "Ours". sigma: any shape, above 0; results have its shape."""
    total = (sigma**2 + sigma_data**2).sqrt()
    return (sigma_data / total) ** 2, sigma * sigma_data / total, 1 / total, sigma.log() / 4


class Preconditioned(nn.Module):
    """The denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) around a raw network F (equation 7)."""

    def __init__(self, network: nn.Module, sigma_data: float):
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """noisy [B, C, H, W], sigma [B], labels int64 [B] or None -> estimate of the clean images, float32."""
        c_skip, c_out, c_in, c_noise = scalings(sigma.float(), self.sigma_data)  # [B] each
        output = self.network(_wide(c_in) * noisy.float(), c_noise, labels)
        return _wide(c_skip) * noisy.float() + _wide(c_out) * output.float()


def sample_sigma(normal: Tensor, p_mean: float, p_std: float) -> Tensor:
    """Training noise levels: ln sigma ~ N(p_mean, p_std^2). normal: standard normal numbers."""
    return (normal * p_std + p_mean).exp()


def loss(denoiser: Preconditioned, images: Tensor, labels: Tensor | None, sigma: Tensor, noise: Tensor) -> Tensor:
    """Weighted squared error per image, [B] (equation 8, with lambda(sigma) = 1 / c_out^2).

    images in [-1, 1] and noise (standard normal): [B, C, H, W]; sigma [B]. Mean over pixels and channels.
    """
    weight = 1 / scalings(sigma, denoiser.sigma_data)[1] ** 2
    error = denoiser(images + _wide(sigma) * noise, sigma, labels) - images
    return weight * error.square().flatten(1).mean(1)


def _wide(per_image: Tensor) -> Tensor:
    return per_image.reshape(-1, 1, 1, 1)
