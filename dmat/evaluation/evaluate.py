"""Turns shards into results: a row per image, accuracies with intervals, checks, pictures, and the verdict whether the
AutoAttack accuracy may be the headline.

Legend: B batch, N images, C channels, H height, W width, K classes.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NotRequired, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from dmat import __version__, seeds
from dmat.data.pixels import iter_batches
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.evaluation import checks, measures
from dmat.evaluation.checks import Check, CheckRecord
from dmat.evaluation.measures import Subject
from dmat.evaluation.progress import Meter, Report
from dmat.evaluation.work import Columns, ShardTask
from dmat.metrics import pictures
from dmat.metrics.intervals import AccuracyRecord, wilson
from dmat.robust import attacks, auto_attack, prediction

_MAX_PICTURED = 10  # images in the picture of perturbations
MIN_HEADLINE_IMAGES = 20  # of fewer, one image is more than the 5 % of checks.MAX_TRIVIAL_ACCURACY
TEST = "test"  # the only split that may have a headline

# Names that the accuracy under the suite may have: "auto_attack" if nothing speaks against a headline, else by the
# first reason. "pgd" without a suite.
SuiteMeasure = Literal[
    "auto_attack",
    "auto_attack_unchecked",
    "auto_attack_subset",
    "auto_attack_not_test",
    "auto_attack_quick",
    "auto_attack_nonstandard",
    "pgd",
]


class Headline(AccuracyRecord):
    """The accuracy that may be quoted, and the name of its measure."""

    measure: Literal["auto_attack"]


class SweepPoint(AccuracyRecord):
    """The PGD accuracy at one radius."""

    epsilon: float  # pixels of [0, 1], by the norm of the threat model


class Summary(TypedDict, total=False):
    """What summary.json holds of one model. Accuracies under attack: the share that is right with and without it."""

    clean: AccuracyRecord
    fgsm: AccuracyRecord
    pgd: AccuracyRecord
    auto_attack: AccuracyRecord  # this key and the next five: at most one of them, by `Verdict.measure`
    auto_attack_unchecked: AccuracyRecord
    auto_attack_subset: AccuracyRecord
    auto_attack_not_test: AccuracyRecord
    auto_attack_quick: AccuracyRecord
    auto_attack_nonstandard: AccuracyRecord
    broken_by: dict[str, int]  # attack, "none" or "misclassified" -> number of images
    broken_by_pgd_alone: int  # images that survived the suite
    sweep: list[SweepPoint]  # by radius
    headline: Headline | None
    no_headline: list[str]  # the reasons, as sentences; empty if there is a headline
    notes: list[str]
    checks: list[CheckRecord]
    # only of the stage evaluate_robust
    train_pgd: AccuracyRecord  # on the training split
    images_seen: int  # in training, by these weights
    train_test_gap: float  # PGD accuracy on the training split minus that on the test split


class EvaluationProtocol(TypedDict):
    """What protocol.json holds: everything that is needed to repeat the measurement."""

    threat: dict[str, str]  # norm, epsilon as written
    images: int  # attacked
    of_images: int  # size of the split
    pgd: str
    auto_attack: str  # name of the suite, or "none"
    attacks: list[str]
    attacks_by: str  # the code that ran them, "dmat" or "pyautoattack"
    targets: int  # wrong classes that a targeted attack tries
    seeds: dict[str, int | str]
    shard: int
    batch: int
    precision: str
    computed: list[dict[str, object]]  # device, precision, versions, and the number of shards that they computed
    images_from: NotRequired[str]  # this key and the next two: only of images and a model that no stage made
    images_notes: NotRequired[list[str]]
    labels_are: NotRequired[str]


class EvaluationSettings(measures.AttackSettings, Protocol):
    """Settings of the attacks and the checks."""

    check_images: int  # for the checks that run the model, and for the black-box attack
    check_queries: int  # of the black-box attack, per image


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether an accuracy may be the headline.

    measure: the name that the accuracy under the suite may have. reasons: why it is not a headline; empty: it is one.
    """

    measure: SuiteMeasure
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]

    def model_tags(self, summary: Summary, threat: Mapping[str, str]) -> dict[str, str | int]:
        """Registry tags of an evaluated model: its threat model and its accuracies with 95 % intervals.

        summary: as from `Evaluation.summary`. threat: norm, epsilon as written.
        """
        result_tags: dict[str, str | int] = {f"threat.{name}": threat[name] for name in ("norm", "epsilon")}
        for name in ("clean", "pgd", self.measure):
            if name in summary:
                value = summary[name]
                result_tags[f"accuracy.{name}"] = f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"
                result_tags["accuracy.n"] = value["n"]
        return result_tags | self.tags

    @property
    def sentences(self) -> list[str]:
        """Sentences for the person who started the evaluation: why there is no headline, and the notes."""
        return [*(f"no headline: {reason}" for reason in self.reasons), *self.notes]

    @property
    def notes(self) -> list[str]:
        """What a reader must know although the check passed: how many test images are copies, if any."""
        return [check.sentence for check in self.checks if check.name == "unseen" and check.passed and check.found]

    @property
    def tags(self) -> dict[str, str]:
        """MLflow tags of the evaluation: headline, measure, checks, and the reasons for no headline."""
        failed = [check.name for check in self.checks if not check.passed]
        return {
            "evaluation.headline": "no" if self.reasons else "yes",
            "evaluation.measure": self.measure,
            "evaluation.checks": f"failed: {', '.join(failed)}" if failed else "passed",
            **({"evaluation.no_headline": " ".join(self.reasons)} if self.reasons else {}),
        }


class Evaluation:
    """The evaluation of one subject, with its shards in one folder.

    identity: everything that decides the content of the shards; shards of another identity are refused. Raises
    DmatError for images, labels, an epsilon or a loss that do not fit the model.
    """

    def __init__(
        self,
        folder: Path,
        subject: Subject,
        settings: EvaluationSettings,
        compute: Compute,
        identity: Mapping[str, object],
    ):
        _refuse_bad_images(subject)
        if settings.pgd_loss == "dlr" and subject.classes < 3:
            raise DmatError(
                f"pgd_loss is dlr and the model has {subject.classes} classes; expected 3 or more, "
                f"as the loss compares with the third logit; set pgd_loss: cw"
            )
        if settings.auto_attack_code != "dmat" and subject.suite is not None and subject.suite.quick:
            raise DmatError(
                f"auto_attack is quick and auto_attack_code {settings.auto_attack_code}, which has no quick tier; "
                f"expected auto_attack_code: dmat; leave it out, or set auto_attack: standard"
            )
        self.folder, self.subject, self.settings, self.compute = folder, subject, settings, compute
        count = -(-len(subject.labels) // settings.shard)
        slices = [measures.shard_slice(k, settings.shard, len(subject.labels)) for k in range(count)]
        shard_identity = {**identity, "subject": subject.name, "images_attacked": len(subject.labels)}
        # dmat's version comes from its source: it may be used from a tree that was never installed
        versions = {"dmat": __version__, **{name: version(name) for name in ("torch", "pyautoattack")}}
        computed_by = {"device": compute.describe()["device"], "precision": compute.precision, "versions": versions}
        passes, mixed = measures.passes_per_image(subject, settings), _mixed(subject.labels.numpy(), settings.shard)
        self._shards = [
            ShardTask(
                folder / f"shard-{number:05d}",
                positions.stop - positions.start,
                (positions.stop - positions.start) * passes,
                {**shard_identity, "shard": number},
                functools.partial(measures.measure_shard, subject, settings, number, compute),
                computed_by,
                suite=subject.suite is not None,
                mixed=mixed,
            )
            for number, positions in enumerate(slices)
        ]
        self._checked_positions = _evenly_spaced(len(subject.labels), settings.check_images)
        black_box = {**shard_identity, "shard": "black box of spread images"}
        checked = len(self._checked_positions)
        self._black_box = ShardTask(
            folder / "black-box", checked, checked * (settings.check_queries + 4), black_box, self._run_square,
            computed_by,
        )  # fmt: skip

    @property
    def shards(self) -> list[ShardTask]:
        """The shards that `columns` needs, without the one that only the checks need."""
        return self._shards

    @property
    def tasks(self) -> list[ShardTask]:
        """All that must be computed before the other methods may be called."""
        return [*self._shards, self._black_box] if self.subject.full_suite else self._shards

    def columns(self) -> Columns:
        """The columns of `measures.measure_shard` for all images [N]. Raises DmatError where a shard is missing."""
        parts = [task.read() for task in self._shards]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run_square(self, report: Report) -> Columns:
        """Robust flags under Square, a black-box attack with `check_queries` queries, of evenly spaced images."""
        settings, robust_flags = self.settings, []
        model = Meter(self.subject.model, self._black_box.passes, self._black_box.images, report)
        images, labels = self.subject.images[self._checked_positions], self.subject.labels[self._checked_positions]
        for _, image_batch, label_batch in iter_batches(images, labels, settings.batch):
            x, y = self.compute.to_device(image_batch), label_batch.to(self.compute.device)
            adversarial = auto_attack.square(
                model, x, y, self.subject.ball, settings.check_queries, settings.auto_attack_seed
            )
            with torch.no_grad():
                robust_flags.append((model(x).argmax(1) == y) & (model(adversarial).argmax(1) == y))
        return {"robust": torch.cat(robust_flags).cpu().numpy()}

    def _check_batch(self) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] and labels [B] for the checks that run the model, on the device.

        Not more than `check_images`, and not more than the batch of an attack, which is known to fit.
        """
        positions = _evenly_spaced(len(self.subject.labels), min(self.settings.check_images, self.settings.batch))
        x, y = self.subject.images[positions], self.subject.labels[positions]
        return self.compute.to_device(x), y.to(self.compute.device)

    def checks(self, columns: Columns, copies: Mapping[str, np.ndarray]) -> list[Check]:
        """Runs all checks of a subject with `full_suite`, in the order in which one explains the failure of later ones.

        copies: flags [N] as `checks.unseen` takes them.
        """
        subject, settings = self.subject, self.settings
        x, y = self._check_batch()
        adversarial = torch.from_numpy(columns["adversarial"])
        outputs = torch.cat(
            [
                prediction.logits(subject.model, inputs, self.compute, settings.batch)
                for inputs in (subject.images, adversarial)
            ]
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
            checks.more_steps(
                columns["pgd_few"], columns["pgd"], measures.fewer_steps(settings.pgd_steps), settings.pgd_steps
            ),
            checks.black_box(self._black_box.read()["robust"], self._white_box(columns)[self._checked_positions]),
            checks.large_radius(columns["grey"], measures.trivial_attack_radius(subject.ball, shape)),
            checks.fgsm_and_pgd(columns["fgsm"], columns["pgd"], subject.ball.norm),
            checks.unseen(copies),
        ]

    def _margins(self, adversarial: Tensor, batch: int | None) -> np.ndarray:
        """Logit margins [N] of saved images [N, C, H, W].

        batch: batch size of the attack; shards go one by one. None: batches of another size.
        A margin is above 0 exactly where the prediction is right, also where the first of equal logits decides it, as
        in a model with a constant output.
        """
        model, compute, shard = self.subject.model, self.compute, self.settings.shard
        if batch is None:
            logits = prediction.logits(
                model, adversarial, compute, _different_batch_size(min(self.settings.batch, shard))
            )
        else:
            logits = torch.cat([prediction.logits(model, part, compute, batch) for part in adversarial.split(shard)])
        margins = attacks.logit_margin(logits, self.subject.labels)
        right = logits.argmax(1) == self.subject.labels
        return torch.where(right & ~(margins > 0), torch.finfo(margins.dtype).tiny, margins).numpy()

    def _white_box(self, columns: Columns) -> np.ndarray:
        """Flags [N] of the images that are robust to PGD and to the suite's gradient attacks."""
        robust = columns["pgd"]
        if self.subject.suite is not None:
            numbers = [k for k, name in enumerate(self.subject.suite.attacks) if name != "square"]
            robust = robust & ~np.isin(columns["broken_by"], numbers)
        return robust

    def verdict(
        self, columns: Columns, all_images: int, copies: Mapping[str, np.ndarray], split: str = TEST
    ) -> Verdict:
        """Runs the checks and decides whether the accuracy under the suite may be the headline.

        all_images: size of the split; if fewer were attacked, the result is of a subset. copies: flags [N] as
        `checks.unseen` takes them. split: that of the images; "" if unknown.
        """
        checked, suite, count = self.checks(columns, copies), self.subject.suite, len(self.subject.labels)
        reasons = [check.sentence for check in checked if not check.passed]
        measure: SuiteMeasure = "auto_attack_unchecked" if reasons else "auto_attack"
        if count < MIN_HEADLINE_IMAGES:
            reasons.insert(0, f"Only {count} images; a headline needs {MIN_HEADLINE_IMAGES} or more.")
            measure = "auto_attack_subset"
        if split != TEST:
            reasons.insert(
                0,
                f"The images are of the split {split}, not of test."
                if split
                else "It is unknown whether the model was trained on these images; if it was not, pass `--split test`.",
            )
            measure = "auto_attack_not_test"
        if count < all_images:
            reasons.insert(0, f"Only {count:,} of {all_images:,} images were attacked.")
            measure = "auto_attack_subset"
        if suite is None:
            reasons.insert(0, "AutoAttack was not run.")
            measure = "pgd"
        elif suite.quick:
            reasons.insert(0, "The attacks are the quick tier, which gives up most targets, not standard AutoAttack.")
            measure = "auto_attack_quick"
        elif not suite.standard:
            reasons.insert(0, f"The attacks are {suite.name}, not those of standard AutoAttack.")
            measure = "auto_attack_nonstandard"
        return Verdict(measure, tuple(reasons), tuple(checked))

    def rows(self, columns: Columns, verdict: Verdict | None = None) -> dict[str, np.ndarray]:
        """Columns [N] of the per-image table. Without `full_suite` only clean and pgd."""
        rows = {name: columns[name] for name in ("prediction", "clean", "pgd")}
        if not self.subject.full_suite:
            return {name: rows[name] for name in ("clean", "pgd")}
        rows["fgsm"] = columns["fgsm"]
        if self.subject.suite is not None and verdict is not None:
            rows[verdict.measure] = columns["auto_attack"]
            rows["broken_by"] = self._attack_names(columns["broken_by"])
        return rows | {name: columns[name] for name in ("attacked", "margin", "perturbation")}

    def _attack_names(self, broken_by: np.ndarray) -> np.ndarray:
        """Names [N] of the first attack that broke an image: "none" if robust, "misclassified" if no attack was needed.

        broken_by: int [N].
        """
        assert self.subject.suite is not None
        names = {auto_attack.ROBUST: "none", auto_attack.MISCLASSIFIED: "misclassified"}
        names |= dict(enumerate(self.subject.suite.attacks))
        return np.array([names[int(number)] for number in broken_by])

    def summary(self, columns: Columns, verdict: Verdict) -> Summary:
        """What summary.json holds: accuracies with Wilson intervals, how many images each attack broke, the accuracies
        of the sweep, the checks, and the headline or the reasons why there is none."""
        entries: Summary = {
            "clean": wilson(columns["clean"]).plain(),
            "fgsm": wilson(columns["fgsm"]).plain(),
            "pgd": wilson(columns["pgd"]).plain(),
        }
        if self.subject.suite is not None:
            entries[verdict.measure] = wilson(columns["auto_attack"]).plain()
            names, counts = np.unique(self._attack_names(columns["broken_by"]), return_counts=True)
            entries["broken_by"] = dict(zip(names.tolist(), counts.tolist(), strict=True))
            # Images that survived the suite but not PGD: more than a few mean that the suite was not at its strongest.
            entries["broken_by_pgd_alone"] = int((columns["auto_attack"] & ~columns["pgd"]).sum())
        entries["sweep"] = [{"epsilon": radius, **wilson(flags).plain()} for radius, flags in self._sweep(columns)]
        entries["headline"] = None if verdict.reasons else {"measure": "auto_attack", **entries["auto_attack"]}
        entries["no_headline"] = list(verdict.reasons)
        entries["notes"] = verdict.notes
        entries["checks"] = [check.plain() for check in verdict.checks]
        return entries

    def protocol(self, threat: Mapping[str, str], all_images: int) -> EvaluationProtocol:
        """What protocol.json holds: everything that is needed to repeat the measurement.

        threat: norm, epsilon as written. all_images: size of the split.
        """
        settings, suite = self.settings, self.subject.suite
        step = f"step {settings.pgd_step(self.subject.ball.norm, self.subject.ball.epsilon):.6g}"
        return {
            "threat": dict(threat),
            "images": len(self.subject.labels),
            "of_images": all_images,
            "pgd": f"PGD-{settings.pgd_steps}, loss {settings.pgd_loss}, {step}, restarts {settings.pgd_restarts}",
            "auto_attack": suite.name if suite else "none",
            "attacks": list(suite.attacks) if suite else [],
            "attacks_by": settings.auto_attack_code,
            "targets": suite.targets if suite else 0,
            "seeds": {"pgd": settings.pgd_seed, "auto_attack": f"{settings.auto_attack_seed} + number of the shard"},
            "shard": settings.shard,
            "batch": settings.batch,
            "precision": self.compute.precision,
            "computed": self._computed(),
        }

    def _computed(self) -> list[dict[str, object]]:
        """Device, precision and versions that computed the finished shards, with the number of shards of each."""
        records = [record for task in self.tasks if (record := task.record()) is not None]
        origins = [json.dumps(record.get("by", {}), sort_keys=True) for record in records]
        return [{**json.loads(origin), "shards": origins.count(origin)} for origin in sorted(set(origins))]

    def _sweep(self, columns: Columns) -> list[tuple[float, np.ndarray]]:
        """Pairs of radius and PGD's flags [N], by radius; 0 and epsilon are included."""
        epsilon = self.subject.ball.epsilon
        points = {0.0: columns["clean"], epsilon: columns["pgd"]}
        points |= {
            multiple * epsilon: columns["sweep"][:, k]
            for k, multiple in enumerate(self.settings.sweep)
            if multiple != 1
        }
        return sorted(points.items(), key=lambda point: point[0])

    def draw(self, folder: Path, columns: Columns, epsilon: str, class_names: Sequence[str], verdict: Verdict) -> None:
        """Draws the pictures of the evaluation as PNG files. epsilon: as people write it, such as "8/255"."""
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
        """Draws images that are classified correctly, first those that the attack broke."""
        labels, clean, after = self.subject.labels.numpy(), columns["clean"], columns["attacked"]
        broken = np.flatnonzero(clean & (after != labels))
        pictured = np.concatenate([broken, np.flatnonzero(clean & (after == labels))])[:_MAX_PICTURED]
        if len(pictured):
            clean_images, worst = self.subject.images.numpy()[pictured], columns["adversarial"][pictured]
            pictures.perturbations(
                path, clean_images.transpose(0, 2, 3, 1), worst.transpose(0, 2, 3, 1), labels[pictured],
                columns["prediction"][pictured], after[pictured], epsilon, class_names,
            )  # fmt: skip


def _interval(flags: np.ndarray) -> tuple[float, float, float]:  # [N] -> accuracy, low, high
    accuracy = wilson(flags)
    return accuracy.value, accuracy.low, accuracy.high


def _evenly_spaced(count: int, limit: int) -> np.ndarray:
    """Positions int64 [N] of up to `limit` of `count` images, evenly spaced because sets may be sorted by class."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64)


def _mixed(labels: np.ndarray, shard: int) -> bool:
    """Whether classes are divided over shards as in a random order, int64 [N]; a set sorted by class is not.

    Pearson's chi-square of shards and classes, for random orders: mean (S - 1)(K - 1) N / (N - 1) and nearly twice that
    as variance. Five standard deviations above it are no accident.
    """
    counts = np.zeros((-(-len(labels) // shard), labels.max() + 1))
    np.add.at(counts, (np.arange(len(labels)) // shard, labels), 1)
    counts = counts[:, counts.any(0)]
    expected = counts.sum(1, keepdims=True) * counts.sum(0) / len(labels)
    freedom = (counts.shape[0] - 1) * (counts.shape[1] - 1)
    chi_square = float(((counts - expected) ** 2 / expected).sum()) * (len(labels) - 1) / len(labels)
    return chi_square <= freedom + 5 * float(np.sqrt(2 * freedom))


def _different_batch_size(batch: int) -> int:
    """A batch size that splits the images at other positions."""
    return max(1, batch // 2 + 1) if batch > 1 else 2


def _refuse_bad_images(subject: Subject) -> None:
    images, labels, classes = subject.images, subject.labels, subject.classes
    largest = float(np.sqrt(np.prod(images.shape[1:])))
    if subject.ball.norm == "l2" and subject.ball.epsilon > largest:
        raise DmatError(
            f"epsilon is {subject.ball.epsilon:g}, larger than the l2 distance from a black to a white image, "
            f"{largest:.2f}; expected epsilon for pixels in [0, 1]; for 255 levels write {subject.ball.epsilon:g}/255"
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
