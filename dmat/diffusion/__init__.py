"""Diffusion models in the notation of Karras et al. 2022 ("EDM"): denoiser D(x; sigma, class), images in [-1, 1].

`formulations` precondition a raw network and have its training loss. `networks` are the raw networks. `samplers` turn a
denoiser into images along `paths`. `exact` is the optimal denoiser of a finite data set; tests compare the others with
it.
"""
