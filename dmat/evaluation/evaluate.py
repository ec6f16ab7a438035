"""From shards to what people read: a row for each image, accuracies with intervals, checks, and whether the AutoAttack
accuracy may stand as the headline."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dmat import __version__, seeds
from dmat.data.pixels import iter_batches
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.evaluation import checks, measures
from dmat.evaluation.checks import Check
from dmat.evaluation.measures import Subject
from dmat.evaluation.work import Columns, ShardTask
from dmat.metrics import pictures
from dmat.metrics.intervals import wilson
from dmat.robust import attacks, auto_attack, prediction

_SHOWN = 10  # images in the picture of perturbations
FEWEST = 20  # images of a headline: of fewer, one image is more than the 5 % of checks.GREY_ACCURACY
TEST = "test"  # the split that headlines are about


class EvaluationSettings(measures.AttackSettings, Protocol):
    check_images: int
    check_queries: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """measure: what the accuracy under the suite may be called. reasons: why it is no headline; empty: it is one."""

    measure: str
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]

    def about_model(self, summary: Mapping[str, Any], threat: Mapping[str, Any]) -> dict[str, Any]:
        """Tags of an evaluated model: its threat model and its accuracies with intervals. summary: of `Evaluation`."""
        found = {f"threat.{name}": threat[name] for name in ("norm", "epsilon")}
        for name in ("clean", "pgd", self.measure):
            if name in summary:
                value = summary[name]
                found[f"accuracy.{name}"] = f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"
                found["accuracy.n"] = value["n"]
        return found | self.tags

    @property
    def sentences(self) -> list[str]:
        """For who started the evaluation: why there is no headline, and the notes."""
        return [*(f"no headline: {reason}" for reason in self.reasons), *self.notes]

    @property
    def notes(self) -> list[str]:
        """What a reader must know although its check passed: how many test images are copies, if any is."""
        return [check.sentence for check in self.checks if check.name == "unseen" and check.passed and check.found]

    @property
    def tags(self) -> dict[str, str]:
        failed = [check.name for check in self.checks if not check.passed]
        return {
            "evaluation.headline": "no" if self.reasons else "yes",
            "evaluation.measure": self.measure,
            "evaluation.checks": f"failed: {', '.join(failed)}" if failed else "passed",
            **({"evaluation.no_headline": " ".join(self.reasons)} if self.reasons else {}),
        }


class Evaluation:
    """One subject in one folder. `identity` says what the files there belong to: all that decides them."""

    def __init__(
        self,
        folder: Path,
        subject: Subject,
        settings: EvaluationSettings,
        compute: Compute,
        identity: Mapping[str, Any],
    ):
        _refuse_bad_images(subject)
        if settings.pgd_loss == "dlr" and subject.model.logits.out_features < 3:
            raise DmatError(
                f"pgd_loss is dlr and the model has {subject.model.logits.out_features} classes; expected 3 or more, "
                f"as the loss compares with the third logit; say pgd_loss: cw"
            )
        self.folder, self.subject, self.settings, self.compute = folder, subject, settings, compute
        count = -(-len(subject.labels) // settings.shard)
        sizes = [measures.shard_of(k, settings.shard, len(subject.labels)) for k in range(count)]
        known = {**identity, "subject": subject.name, "images_attacked": len(subject.labels)}
        # its own from its source: it may be used from a tree that was never installed
        versions = {"dmat": __version__, **{name: version(name) for name in ("torch", "pyautoattack")}}
        by = {"device": compute.describe()["device"], "precision": compute.precision, "versions": versions}
        self._shards = [
            ShardTask(
                folder / f"shard-{number:05d}",
                where.stop - where.start,
                {**known, "shard": number},
                lambda number=number: measures.of_shard(subject, settings, number, compute),  # type: ignore[misc]
                by,
            )
            for number, where in enumerate(sizes)
        ]
        self._checked = _spread(len(subject.labels), settings.check_images)
        black_box = {**known, "shard": "black box of spread images"}
        self._black_box = ShardTask(folder / "black-box", len(self._checked), black_box, self._square, by)

    @property
    def shards(self) -> list[ShardTask]:
        """What `columns` needs; without what only the checks need."""
        return self._shards

    @property
    def tasks(self) -> list[ShardTask]:
        """Everything that must be computed before the rest of this class can be asked."""
        return [*self._shards, self._black_box] if self.subject.full_suite else self._shards

    def columns(self) -> Columns:
        """The columns of `measures.of_shard` for all images [N]."""
        parts = [unit.read() for unit in self._shards]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _square(self) -> Columns:
        model, settings, found = self.subject.model, self.settings, []
        images, labels = self.subject.images[self._checked], self.subject.labels[self._checked]
        for _, part, of in iter_batches(images, labels, settings.batch):
            x, y = self.compute.to_device(part), of.to(self.compute.device)
            broken = auto_attack.square(
                model, x, y, self.subject.ball, settings.check_queries, settings.auto_attack_seed
            )
            with torch.no_grad():
                found.append((model(x).argmax(1) == y) & (model(broken).argmax(1) == y))
        return {"robust": torch.cat(found).cpu().numpy()}

    def _few(self) -> tuple[Tensor, Tensor]:
        """The images that checks of the model look at, on the device: no more at once than an attack has there."""
        chosen = _spread(len(self.subject.labels), min(self.settings.check_images, self.settings.batch))
        x, y = self.subject.images[chosen], self.subject.labels[chosen]
        return self.compute.to_device(x), y.to(self.compute.device)

    def checks(self, columns: Columns, copies: Mapping[str, np.ndarray]) -> list[Check]:
        """All checks of a thorough subject, in the order in which they rule each other out. copies: `checks.unseen`."""
        subject, settings = self.subject, self.settings
        x, y = self._few()
        adversarial = torch.from_numpy(columns["adversarial"])
        outputs = torch.cat(
            [prediction.logits(subject.model, of, self.compute, settings.batch) for of in (subject.images, adversarial)]
        )
        start = subject.ball.random_start(seeds.stream(settings.pgd_seed, "evaluation/check"), tuple(x.shape))
        recorded = columns["pgd"] & columns["auto_attack"] if "auto_attack" in columns else columns["pgd"]
        shape = tuple(subject.images.shape[1:])
        return [
            checks.in_range(subject.images),
            checks.finite(outputs),
            checks.logits(outputs),
            checks.evaluation_mode(subject.model),
            checks.deterministic(subject.model, x),
            checks.same_alone(subject.model, x if len(x) > 1 else torch.cat([x, x])),
            checks.zero_gradients(subject.model, x, y, subject.ball, self.compute.to_device(start)),
            checks.inside_ball(subject.images, adversarial, subject.ball),
            checks.rescored(recorded, self._margins(adversarial, settings.batch), self._margins(adversarial, None)),
            checks.more_steps(columns["pgd_few"], columns["pgd"], measures.few(settings.pgd_steps), settings.pgd_steps),
            checks.black_box(self._black_box.read()["robust"], self._white_box(columns)[self._checked]),
            checks.large_radius(columns["grey"], measures.large(subject.ball, shape)),
            checks.fgsm_and_pgd(columns["fgsm"], columns["pgd"], subject.ball.norm),
            checks.unseen(copies),
        ]

    def _margins(self, adversarial: Tensor, batch: int | None) -> np.ndarray:
        """Logit margins of saved images: shard by shard as they were computed, or (None) in batches of another size.

        Above 0 exactly where the prediction is right: also where the first of equal logits decides it, as in a model
        that says one thing of everything.
        """
        model, compute, shard = self.subject.model, self.compute, self.settings.shard
        if batch is None:
            logits = prediction.logits(model, adversarial, compute, _other_size(min(self.settings.batch, shard)))
        else:
            logits = torch.cat([prediction.logits(model, part, compute, batch) for part in adversarial.split(shard)])
        margins = attacks.logit_margin(logits, self.subject.labels)
        right = logits.argmax(1) == self.subject.labels
        return torch.where(right & ~(margins > 0), torch.finfo(margins.dtype).tiny, margins).numpy()

    def _white_box(self, columns: Columns) -> np.ndarray:
        """What PGD and the suite's attacks by gradient left right."""
        robust = columns["pgd"]
        if self.subject.suite is not None:
            numbers = [k for k, name in enumerate(self.subject.suite.attacks) if name != "square"]
            robust = robust & ~np.isin(columns["broken_by"], numbers)
        return robust

    def verdict(
        self, columns: Columns, all_images: int, copies: Mapping[str, np.ndarray], split: str = TEST
    ) -> Verdict:
        """all_images: how many there are; fewer attacked are a subset. copies: as `checks.unseen` takes them. split: of
        the images; "" if nobody knows."""
        found, suite, count = self.checks(columns, copies), self.subject.suite, len(self.subject.labels)
        reasons = [check.sentence for check in found if not check.passed]
        measure = "auto_attack_unchecked" if reasons else "auto_attack"
        if count < FEWEST:
            reasons.insert(0, f"Only {count} images; a headline takes {FEWEST} or more.")
            measure = "auto_attack_subset"
        if split != TEST:
            reasons.insert(
                0,
                f"The images are of the split {split}, not of test."
                if split
                else "Nothing says that the model was not trained on these images; if so, say `--split test`.",
            )
            measure = "auto_attack_not_test"
        if count < all_images:
            reasons.insert(0, f"Only {count:,} of {all_images:,} images were attacked.")
            measure = "auto_attack_subset"
        if suite is None:
            reasons.insert(0, "AutoAttack was not run.")
            measure = "pgd"
        elif not suite.standard:
            reasons.insert(0, f"The attacks are {suite.name}, not those of standard AutoAttack.")
            measure = "auto_attack_nonstandard"
        return Verdict(measure, tuple(reasons), tuple(found))

    def rows(self, columns: Columns, verdict: Verdict | None = None) -> dict[str, np.ndarray]:
        """Columns of the per-image table."""
        rows = {name: columns[name] for name in ("prediction", "clean", "pgd")}
        if not self.subject.full_suite:
            return {name: rows[name] for name in ("clean", "pgd")}
        rows["fgsm"] = columns["fgsm"]
        if self.subject.suite is not None and verdict is not None:
            rows[verdict.measure] = columns["auto_attack"]
            rows["broken_by"] = self._names(columns["broken_by"])
        return rows | {name: columns[name] for name in ("attacked", "margin", "perturbation")}

    def _names(self, broken_by: np.ndarray) -> np.ndarray:
        """Name of the first attack that broke an image; "none" if robust, "misclassified" if none was needed."""
        assert self.subject.suite is not None
        words = {auto_attack.ROBUST: "none", auto_attack.MISCLASSIFIED: "misclassified"}
        words |= dict(enumerate(self.subject.suite.attacks))
        return np.array([words[int(number)] for number in broken_by])

    def summary(self, columns: Columns, verdict: Verdict) -> dict[str, Any]:
        """Accuracies with Wilson intervals, who broke what, the sweep, and the headline or why there is none."""
        found: dict[str, Any] = {name: wilson(columns[name]).plain() for name in ("clean", "fgsm", "pgd")}
        if self.subject.suite is not None:
            found[verdict.measure] = wilson(columns["auto_attack"]).plain()
            names, counts = np.unique(self._names(columns["broken_by"]), return_counts=True)
            found["broken_by"] = dict(zip(names.tolist(), counts.tolist(), strict=True))
            # Images that the whole suite left and PGD did not: more than a few say that the suite was not at its best.
            found["broken_by_pgd_alone"] = int((columns["auto_attack"] & ~columns["pgd"]).sum())
        found["sweep"] = [{"epsilon": radius, **wilson(flags).plain()} for radius, flags in self._sweep(columns)]
        found["headline"] = None if verdict.reasons else {"measure": verdict.measure, **found[verdict.measure]}
        found["no_headline"] = list(verdict.reasons)
        found["notes"] = verdict.notes
        found["checks"] = [check.plain() for check in verdict.checks]
        return found

    def protocol(self, threat: Mapping[str, Any], all_images: int) -> dict[str, Any]:
        """Everything that somebody needs who wants to measure the same. threat: norm, epsilon as written."""
        settings, suite = self.settings, self.subject.suite
        step = f"step {settings.pgd_step(self.subject.ball.norm, self.subject.ball.epsilon):.6g}"
        return {
            "threat": dict(threat),
            "images": len(self.subject.labels),
            "of_images": all_images,
            "pgd": f"PGD-{settings.pgd_steps}, loss {settings.pgd_loss}, {step}, restarts {settings.pgd_restarts}",
            "auto_attack": suite.name if suite else "none",
            "attacks": list(suite.attacks) if suite else [],
            "targets": suite.targets if suite else 0,
            "seeds": {"pgd": settings.pgd_seed, "auto_attack": f"{settings.auto_attack_seed} + number of the shard"},
            "shard": settings.shard,
            "batch": settings.batch,
            "precision": self.compute.precision,
            "computed": self._computed(),
        }

    def _computed(self) -> list[dict[str, Any]]:
        """Who computed how many shards of those that are there: device, precision, versions."""
        there = [note for unit in self.tasks if (note := unit.note()) is not None]
        notes = [json.dumps(note.get("by", {}), sort_keys=True) for note in there]
        return [{**json.loads(by), "shards": notes.count(by)} for by in sorted(set(notes))]

    def _sweep(self, columns: Columns) -> list[tuple[float, np.ndarray]]:
        """PGD's flags by radius, 0 and epsilon among them."""
        epsilon = self.subject.ball.epsilon
        points = {0.0: columns["clean"], epsilon: columns["pgd"]}
        points |= {
            multiple * epsilon: columns["sweep"][:, k]
            for k, multiple in enumerate(self.settings.sweep)
            if multiple != 1
        }
        return sorted(points.items(), key=lambda point: point[0])

    def draw(self, folder: Path, columns: Columns, epsilon: str, class_names: Sequence[str], verdict: Verdict) -> None:
        """Pictures as PNG files. epsilon: as people write it, such as "8/255"."""
        labels, classes = self.subject.labels.numpy(), len(class_names)
        by_attack = {"PGD": columns["pgd"]}
        if self.subject.suite is not None:
            by_attack[verdict.measure.replace("_", " ").replace("auto attack", "AutoAttack")] = columns["auto_attack"]
        points = {"PGD": [(r, *_interval(flags)) for r, flags in self._sweep(columns)]}
        for name, flags in by_attack.items():
            if name != "PGD":
                points[name] = [(self.subject.ball.epsilon, *_interval(flags))]
        pictures.against_epsilon(
            folder / "accuracy_against_epsilon.png", points, self.subject.ball.epsilon, epsilon,
            f"Accuracy against the radius of the attack ({self.subject.ball.norm}, n = {len(labels):,})",
        )  # fmt: skip
        present = [k for k in range(classes) if (labels == k).any()]
        per_class = {
            name: [_interval(flags[labels == k]) for k in present]
            for name, flags in {"clean": columns["clean"], **by_attack}.items()
        }
        title = f"Accuracy of each class, epsilon {epsilon} ({self.subject.ball.norm})"
        pictures.per_class(folder / "per_class.png", [class_names[k] for k in present], per_class, title)
        counts = np.zeros((classes, classes), dtype=np.int64)
        np.add.at(counts, (labels, columns["attacked"]), 1)
        pictures.confusion(
            folder / "confusion.png", counts, class_names, f"Predictions under attack, epsilon {epsilon}"
        )
        self._draw_perturbations(folder / "perturbations.png", columns, epsilon, class_names)

    def _draw_perturbations(self, path: Path, columns: Columns, epsilon: str, class_names: Sequence[str]) -> None:
        """Right images, preferring those that were broken."""
        labels, clean, after = self.subject.labels.numpy(), columns["clean"], columns["attacked"]
        broken = np.flatnonzero(clean & (after != labels))
        chosen = np.concatenate([broken, np.flatnonzero(clean & (after == labels))])[:_SHOWN]
        if len(chosen):
            clean_images, worst = self.subject.images.numpy()[chosen], columns["adversarial"][chosen]
            pictures.perturbations(
                path, clean_images.transpose(0, 2, 3, 1), worst.transpose(0, 2, 3, 1), labels[chosen],
                columns["prediction"][chosen], after[chosen], epsilon, class_names,
            )  # fmt: skip


def _interval(flags: np.ndarray) -> tuple[float, float, float]:
    found = wilson(flags)
    return found.value, found.low, found.high


def _spread(count: int, most: int) -> np.ndarray:
    """Positions of up to `most` of `count` items at equal distances: sets may be sorted by class."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


def _other_size(batch: int) -> int:
    """A batch size that cuts the images in other places."""
    return max(1, batch // 2 + 1) if batch > 1 else 2


def _refuse_bad_images(subject: Subject) -> None:
    images, labels, classes = subject.images, subject.labels, subject.model.logits.out_features
    largest = float(np.sqrt(np.prod(images.shape[1:])))
    if subject.ball.norm == "l2" and subject.ball.epsilon > largest:
        raise DmatError(
            f"epsilon is {subject.ball.epsilon:g}, larger than the l2 distance from a black to a white image, "
            f"{largest:.2f}; expected pixels of [0, 1]; for levels of 255 write {subject.ball.epsilon:g}/255"
        )
    if not len(labels):
        raise DmatError("there are 0 images to attack; expected 1 or more; name other images")
    in_range = checks.in_range(images)
    if not in_range.passed:
        raise DmatError(in_range.sentence)
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise DmatError(
            f"labels go from {int(labels.min())} to {int(labels.max())}; expected 0 to {classes - 1} for a model with "
            f"{classes} classes; name the images that it was trained for"
        )
