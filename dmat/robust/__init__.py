"""Adversarial training and evaluation of classifiers: networks, attacks, losses, AutoAttack.

Images are [B, C, H, W] in [0, 1] everywhere; normalisation is the first layer of the network. A `Ball` limits
perturbations. Functions take tensors and numbers and return per-image values; callers average.
"""
