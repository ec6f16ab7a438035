"""Diffusion models in the notation of Karras et al. 2022 ("EDM"): denoiser D(x; sigma, class), images in [-1, 1].

`edm` preconditions a raw network and has its training loss. `unet` is a raw network. `samplers` turn a denoiser into
images. `exact` is the optimal denoiser of a finite data set; tests compare the others with it.
"""
