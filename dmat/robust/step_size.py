"""The step of PGD where a parameter file gives none. Without torch, because the reader of parameters uses it."""


def default_step(norm: str, epsilon: float, steps: int) -> float:
    """In pixels of [0, 1]. linf: a quarter of epsilon (Wang et al. 2023). l2: 2 epsilon over steps, as their code has
    it, at most epsilon."""
    return min(epsilon, 2 * epsilon / max(1, steps)) if norm == "l2" else epsilon / 4
