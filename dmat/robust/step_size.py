"""The default step size of PGD. Loads no torch, because the reader of parameter files imports it."""


def default_step(norm: str, epsilon: float, steps: int) -> float:
    """Returns the step size of PGD, in pixels of [0, 1], where a parameter file gives none.

    linf: epsilon / 4 (Wang et al. 2023). l2: 2 epsilon / steps, as in their code, at most epsilon.
    """
    return min(epsilon, 2 * epsilon / max(1, steps)) if norm == "l2" else epsilon / 4
