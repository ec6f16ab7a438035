"""What DVC knows of the pipeline: which stage instances it would run, and in which order. Only this module imports DVC.

Names of instances are those of DVC, such as `train_robust@generated-1`.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from dmat.errors import DmatError, first_line

Waits = Mapping[str, frozenset[str]]  # instance -> the instances whose results it reads, directly or not


def instances_to_run(root: Path, targets: Sequence[str]) -> Waits:
    """The instances of `dvc repro TARGETS` that are out of date, or may be after those have run.

    Each comes with the others among them that must end before it. targets: as `dvc repro` takes them; none for all of
    dvc.yaml. What is out of date is what `dvc status` says. Raises DmatError if DVC refuses.
    """
    from dvc.exceptions import DvcException  # it takes a second
    from dvc.repo import Repo
    from dvc.repo.reproduce import collect_stages, plan_repro

    try:
        with warnings.catch_warnings(), Repo(str(root), _wait_for_lock=True) as repo:
            warnings.simplefilter("ignore", DeprecationWarning)  # of a package that DVC uses
            stages = collect_stages(repo, list(targets) or ["dvc.yaml"])
            order = [stage.addressing for stage in plan_repro(repo.index.graph, stages)]
            edges = [(reader.addressing, maker.addressing) for reader, maker in repo.index.graph.edges]
            changed = repo.status(targets=order) if order else {}
    except DvcException as error:
        raise DmatError(
            f"dvc cannot plan {' '.join(targets) or 'dvc.yaml'} ({first_line(error)}); expected what `dvc repro` "
            f"takes; look at `dvc status`"
        ) from error
    return _waits(order, edges, set(changed))


def _waits(order: Sequence[str], edges: Sequence[tuple[str, str]], changed: set[str]) -> Waits:
    """order: instances, makers first. edges: reader and maker. changed: the instances that are out of date."""
    waits: dict[str, frozenset[str]] = {}
    for name in order:
        makers = {maker for reader, maker in edges if reader == name and maker in waits}
        if makers or name in changed:
            waits[name] = frozenset(makers).union(*(waits[maker] for maker in makers))
    return waits
