"""`dmat evaluate-robust --model FILE --images SOURCE`: the same evaluation for what no stage made.

Everything is in one folder: shards in `work/`, and when all are done the table, the summary, the protocol and pictures.
In a project it is tracked like a stage; elsewhere it is not.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dmat import config, devices, files, plugins, processes, tracking
from dmat.config import EvaluateRobust, Threat
from dmat.data import overlap
from dmat.data.pixels import to_float
from dmat.data.sources import ImageSource, listing, recognise
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.evaluation import work
from dmat.evaluation.evaluate import Evaluation, Verdict
from dmat.evaluation.measures import Subject, images_sha256
from dmat.evaluation.table import PER_IMAGE, PROTOCOL, SUMMARY, write_table
from dmat.models import importing, leaderboard
from dmat.models.loading import SUFFIX, expect_pair, open_classifier
from dmat.pipeline import code_identity
from dmat.pipeline.work_folder import lock, set_aside
from dmat.robust import auto_attack
from dmat.robust.attacks import Ball
from dmat.tracking import registry
from dmat.training import weights
from dmat.training.interruption import Interruption

_ABOUT = "evaluation.json"
_NETWORK = ("network", "classes", "channels", "mean", "std", "image_shape")  # what a sidecar makes of weights


@dataclasses.dataclass(frozen=True)
class Request:
    """What to evaluate on what. norm, epsilon: None for those of the model's sidecar. folder: where all goes.

    classes_in_order: somebody says that label k of the images is class k of the model, whatever the names are.
    """

    model: Path
    images: str  # a path, or the name of an embedded source
    split: str | None  # None: the test images, or all where a source has none
    norm: str | None
    epsilon: str | None
    settings: EvaluateRobust
    folder: Path
    home: Path | None  # the project whose MLflow store is told; None: nobody is
    classes_in_order: bool = False


@dataclasses.dataclass(frozen=True)
class DirectResult:
    """summary: as in summary.json. compared: sentences about a published number, if one was asked for."""

    summary: dict[str, Any]
    verdict: Verdict
    protocol: dict[str, Any]


class DirectEvaluation:
    """A request with everything loaded and checked. Raises DmatError for whatever does not fit together."""

    def __init__(self, request: Request, compute: Compute):
        self.request, self.compute = request, compute.exact()
        path = expect_pair(request.model)
        model, self.sidecar = open_classifier(path)
        self.sidecar_sha256 = weights.sidecar_sha256(path, self.sidecar)
        self.source = recognise(request.images, request.split)
        _expect_fit(self.source, self.sidecar, request)
        self.labels_are = _expect_same_classes(self.source, self.sidecar, request)
        self.threat = _threat(request, self.sidecar)
        settings, classes = request.settings, self.sidecar["classes"]
        if (sentence := config.step_problem(self.threat, settings.pgd_step_size)) is not None:
            raise DmatError(f"evaluate_robust.pgd_step_size {sentence}")
        self.names = _class_names(self.source, self.sidecar)
        suite = None if settings.auto_attack == "none" else auto_attack.suite(settings.auto_attack, classes)
        labels = torch.from_numpy(self.source.labels)
        images = to_float(self.source.images)
        self.all_images, self.all_sha256 = len(labels), images_sha256(images, labels)
        if settings.images:
            images, labels = images[: settings.images], labels[: settings.images]
        self.compute.model_to_device(model)
        ball = Ball(self.threat.norm, float(self.threat.epsilon))
        subject = Subject("model", model, images, labels, ball, suite, full_suite=True)
        self.identity = {
            "weights": self.sidecar["sha256"],
            "network": files.fingerprint({name: self.sidecar[name] for name in _NETWORK}),
            "images": images_sha256(images, labels),
            "threat": self.threat.plain(),
            "settings": settings.plain() | {"pgd_step": settings.pgd_step(ball.norm, ball.epsilon)},
        }
        if own := self._own_code():
            self.identity["plugins"] = own
        self.evaluation = Evaluation(request.folder / "work", subject, settings, self.compute, self.identity)

    def _own_code(self) -> dict[str, str]:
        """Import path -> identity of the code of the project that computes."""
        named = plugins.words([self.request.settings.plain(), self.sidecar["network"]])
        return code_identity.of_plugins(named, "evaluate_robust")

    def estimate(self) -> dict[str, Any]:
        """What `--dry-run` says."""
        return {
            "model": str(self.request.model),
            "images": self.source.origin,
            "folder": str(self.request.folder),
            "protocol": self.protocol(),
            **work.estimate(self.evaluation.tasks),
        }

    def protocol(self) -> dict[str, Any]:
        """Says also which images these are: a source without test images of its own may hold what a model saw."""
        return {
            **self.evaluation.protocol(self.threat.plain(), self.all_images),
            "images_from": self.source.origin,
            "images_notes": list(self.source.notes),
            "labels_are": self.labels_are,
        }

    def run_worker(self, quiet: bool) -> None:
        """Computes shards that nobody else is computing, until none is left."""
        make_folder(self.request.folder)
        self._expect_own_folder()
        with Interruption(at_once=True):
            work.compute_all(self.evaluation.tasks, wait=False, quiet=quiet)

    def run(self, fresh: bool, quiet: bool) -> DirectResult:
        """Computes what is missing and writes the results. The same request goes on, and finds a finished one."""
        folder = self.request.folder
        make_folder(folder)
        with lock(folder), Interruption(at_once=True):
            if fresh:  # what was imported for this very evaluation stays
                model = self.request.model
                own = (model.name, model.with_suffix(".json").name) if model.parent == folder else ()
                set_aside(folder, self.request.home or folder, own)
            self._expect_own_folder()
            files.write_json(folder / _ABOUT, self.identity)
            with self._tracked() as run:
                with Interruption(at_once=True):  # inside, so that the run hears of the signal
                    work.compute_all(self.evaluation.tasks, wait=True, quiet=quiet)
                    self._expect_same_code()
                    result = self._write(folder)
                for name, value in result.verdict.tags.items():
                    run.tag(name, value)
                run.register(self._candidate(result))
                run.finish_with(_numbers(result.summary), sorted(folder.glob("*.png")))
        return result

    def _tracked(self) -> tracking.Run:
        request = self.request
        return tracking.open_run(
            request.home or request.folder,
            request.folder,
            stage="evaluate_robust",
            instance_name=request.model.stem,
            settings=request.settings.plain() | {"threat": self.threat.plain(), "images_from": self.source.origin},
            inputs={
                "model": {"path": str(request.model), "sha256": self.identity["weights"]},
                "images": {"path": request.images, "sha256": self.identity["images"]},
            },
            compute=self.compute.describe(),
            fingerprint=files.fingerprint(self.identity),
            enabled=request.home is not None,
        )

    def _write(self, folder: Path) -> DirectResult:
        evaluation = self.evaluation
        columns = evaluation.columns()
        count = len(evaluation.subject.labels)
        repeated = overlap.repeated(overlap.digests(self.source.images[:count]))
        copies = {"earlier test images (what the model was trained on is not known here)": repeated}
        verdict = evaluation.verdict(columns, self.all_images, copies, self.source.split)
        summary, protocol = evaluation.summary(columns, verdict), self.protocol()
        rows = {"index": np.arange(count), "label": evaluation.subject.labels.numpy()}
        write_table(folder / PER_IMAGE, rows | evaluation.rows(columns, verdict))
        evaluation.draw(folder, columns, self.threat.epsilon.text, self.names, verdict)
        files.write_json(folder / PROTOCOL, protocol)
        files.write_json(folder / SUMMARY, summary)
        return DirectResult(summary, verdict, protocol)

    def _candidate(self, result: DirectResult) -> tracking.RegistryCandidate:
        """For the registry of the project."""
        data = self.sidecar.get("data") or "images"
        headline = result.summary["headline"]
        return tracking.RegistryCandidate(
            registry.name_of(data, self.all_sha256, self.threat.norm, self.threat.epsilon.text),
            self.request.model,
            {
                "data.test.sha256": self.all_sha256,
                **result.verdict.about_model(result.summary, self.threat.plain()),
            },
            headline["value"] if headline else None,
            weights_sha256=self.sidecar["sha256"],
            sidecar_sha256=self.sidecar_sha256,
        )

    def _expect_same_code(self) -> None:
        known, now = self.identity.get("plugins", {}), self._own_code()
        if changed := [path for path in known if now.get(path) != known[path]]:
            raise DmatError(
                f"the code of {', '.join(changed)} changed while it was evaluated with; expected no change until it "
                f"ended; nothing was written; run it again with --fresh"
            )

    def _expect_own_folder(self) -> None:
        path = self.request.folder / _ABOUT
        if path.exists() and (found := files.read_json(path)) != self.identity:
            other = [key for key, value in self.identity.items() if found.get(key) != value]
            raise DmatError(
                f"{self.request.folder} holds another evaluation ({', '.join(other)} differ); expected an empty folder "
                f"or the same request; give another --to, or start over with --fresh, which keeps the old one aside"
            )


def safetensors(model: Path, args: Path | None, data: str | None, activation: str | None, folder: Path) -> Path:
    """The model as dmat keeps it: itself, or what `dmat models import` makes of it in the folder of the evaluation."""
    if model.suffix == SUFFIX or not model.is_file():
        return model
    beside = model.with_name("args.txt")
    target = folder / f"{model.stem}{SUFFIX}"
    make_folder(folder)
    done = importing.import_model(
        model, args or (beside if beside.is_file() else None), data, activation=activation, target=target
    )
    for note in done.notes:
        tqdm.write(f"note: {note}")
    return done.path


def make_folder(folder: Path) -> None:
    """Raises DmatError where none can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DmatError(f"--to is {folder}, where no folder can be made ({error.strerror}); give another one") from None


def published(direct: DirectEvaluation, name: str) -> leaderboard.Entry:
    """The entry that a request is to be compared with. Raises DmatError if there is none: ask before computing."""
    data = direct.sidecar.get("data")
    if data is None:
        raise DmatError(
            f"{direct.request.model.with_suffix('.json')} names no data set; expected data: cifar10 or cifar100, as "
            f"`dmat models import` writes it; leave --against out"
        )
    return leaderboard.entry(data, direct.threat.norm, name)


def against_robustbench(direct: DirectEvaluation, result: DirectResult, entry: leaderboard.Entry) -> list[str]:
    """The published number of an entry, ours, and what makes them different measurements."""
    threat, summary = direct.threat, result.summary
    ours = {
        "norm": threat.norm,
        "epsilon": threat.epsilon.text,
        "images": result.protocol["images"],
        "suite": "standard"
        if direct.evaluation.subject.suite and direct.evaluation.subject.suite.standard
        else "other",
        "precision": direct.compute.precision,
    }
    said = [
        f"{entry.name} on RobustBench ({entry.snapshot}): clean {entry.clean:.2f} %, AutoAttack "
        f"{entry.auto_attack:.2f} %.",
        f"Here: clean {100 * summary['clean']['value']:.2f} %"
        + (
            f", AutoAttack {100 * summary[result.verdict.measure]['value']:.2f} %."
            if result.verdict.measure in summary
            else "; AutoAttack was not run."
        ),
    ]
    return said + leaderboard.compared(entry, ours)


def lines(result: DirectResult) -> list[str]:
    """What people read at the end: accuracies with intervals, the headline or why there is none."""
    n = result.protocol["images"]
    found = [f"images: {result.protocol['images_from']}", *result.protocol["images_notes"]]
    found += [f"labels: {result.protocol['labels_are']}"]
    found += [
        f"{name:24s}{100 * value['value']:6.2f} %  [{100 * value['low']:.2f}, {100 * value['high']:.2f}]  n = {n:,}"
        for name, value in result.summary.items()
        if isinstance(value, dict) and "low" in value and name != "headline"
    ]
    if not result.verdict.reasons:
        threat = result.protocol["threat"]
        value = result.summary["headline"]["value"]
        found.append(
            f"headline: {100 * value:.2f} % under standard AutoAttack, {threat['norm']} {threat['epsilon']}; all "
            f"{len(result.verdict.checks)} checks passed"
        )
    return found + result.verdict.sentences


def compute_on(device: str) -> Compute:
    return devices.resolve(device, "fp32", torch.get_num_threads())


def is_main_process() -> bool:
    """Whether this process publishes; under torchrun the others assist."""
    return processes.world().is_main_process


def _threat(request: Request, sidecar: Mapping[str, Any]) -> Threat:
    found = sidecar.get("threat") or {}
    if not isinstance(found, dict) or not all(isinstance(found.get(key, ""), str) for key in ("norm", "epsilon")):
        raise DmatError(
            f"{request.model.with_suffix('.json')} has the threat {found!r}; expected norm and epsilon as text, for "
            f"example linf and 8/255; bring back the sidecar that was written with {request.model.name}"
        )
    norm, epsilon = request.norm or found.get("norm"), request.epsilon or found.get("epsilon")
    if norm is None or epsilon is None:
        raise DmatError(
            f"{request.model.with_suffix('.json')} says no threat model; expected one; give --norm and --epsilon, for "
            f"example --norm linf --epsilon 8/255"
        )
    return config.threat(norm, epsilon)


def _expect_fit(source: ImageSource, sidecar: Mapping[str, Any], request: Request) -> None:
    shape, classes = list(sidecar["image_shape"]), sidecar["classes"]
    if list(source.images.shape[1:]) != shape:
        raise DmatError(
            f"{request.images} holds images {list(source.images.shape[1:])}, {request.model} is for {shape} (height, "
            f"width, channels); expected the same; name other images or another model"
        )
    if len(source.class_names) != classes and (_are_names(source.class_names) or len(source.class_names) > classes):
        raise DmatError(
            f"{request.images} has {len(source.class_names)} classes, {request.model} {classes}; expected the same; "
            f"name other images or another model"
        )


def _expect_same_classes(source: ImageSource, sidecar: Mapping[str, Any], request: Request) -> str:
    """What label k is, in words. Raises DmatError where names say that it is not class k of the model.

    Labels are numbers: with other names, or the same in another order, the accuracy would be that of other classes.
    """
    ours, theirs = list(source.class_names), [str(name) for name in sidecar.get("class_names") or []]
    place = {name.casefold(): k for k, name in enumerate(theirs)}
    places = [place.get(name.casefold()) for name in ours]
    if places == list(range(len(theirs))):
        return "classes of the same names as the model's"
    moved = [f"{name} is {k}, the model's {at}" for k, (name, at) in enumerate(zip(ours, places, strict=True))
             if at not in (None, k)]  # fmt: skip
    if moved:
        raise DmatError(
            f"{request.images} and {request.model} have classes in another order ({listing(moved, 3)}); expected one "
            f"order, as labels are numbers; put the images in the order of the sidecar's class_names"
        )
    if not (_are_names(ours) and _are_names(theirs)):
        whose = "the model" if _are_names(ours) else "the images"
        return f"numbers of the model's classes: names could not be compared, as {whose} came without any"
    if request.classes_in_order:
        return f"numbers of the model's classes, on the word of who asked: {ours[0]} is taken for {theirs[0]}"
    other = [f"{k} is {a}, the model's {b}" for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    raise DmatError(
        f"{request.images} has other classes than {request.model} ({listing(other, 3)}); expected the same names in "
        f"the same order, as labels are numbers; rename them as in the sidecar's class_names, or say "
        f"--classes-in-order if only the names differ"
    )


def _class_names(source: ImageSource, sidecar: Mapping[str, Any]) -> list[str]:
    if _are_names(source.class_names):
        return list(source.class_names)
    return [str(name) for name in sidecar.get("class_names") or range(sidecar["classes"])]


def _are_names(classes: Sequence[str]) -> bool:
    """Whether somebody named the classes; without names they are numbers, and the highest may just not occur."""
    return list(classes) != [str(k) for k in range(len(classes))]


def _numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value["value"]
        for name, value in summary.items()
        if isinstance(value, dict) and "value" in value and name != "headline"
    }
