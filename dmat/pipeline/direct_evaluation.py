"""`dmat evaluate-robust --model FILE --images SOURCE`: the evaluation of a model and images that no stage made.

Everything is written to one folder: shards to `work/`, and when all are done the table, the summary, the protocol and
pictures. In a project the evaluation is tracked like a stage; elsewhere it is not.
"""

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NotRequired, TypedDict

import numpy as np
import torch
from tqdm import tqdm

from dmat import config, devices, files, plugins, tracking
from dmat.config import EvaluateRobust, Threat
from dmat.data import overlap
from dmat.data.image_source import ImageSource, listing
from dmat.data.pixels import to_float
from dmat.data.shard_pool import expect_numbers
from dmat.data.sources import recognise
from dmat.devices import Compute
from dmat.engine import EngineOptions, Task, TaskContext
from dmat.errors import DmatError
from dmat.evaluation import work
from dmat.evaluation.evaluate import Evaluation, EvaluationProtocol, Summary, Verdict
from dmat.evaluation.measures import Subject, images_sha256
from dmat.evaluation.table import write_results
from dmat.models import importing, leaderboard
from dmat.models.loading import SUFFIX, expect_pair, open_classifier
from dmat.pipeline import code_identity, division
from dmat.pipeline.work_folder import lock, set_aside
from dmat.robust import auto_attack
from dmat.robust.attacks import Ball
from dmat.tracking import registry
from dmat.training import weights
from dmat.training.interruption import Interruption
from dmat.training.weights import ClassifierSidecar

_IDENTITY_FILE = "evaluation.json"
_NETWORK_KEYS: Final = ("network", "classes", "channels", "mean", "std", "image_shape")  # of a sidecar: the network


@dataclasses.dataclass(frozen=True)
class Request:
    """Which model to evaluate on which images.

    norm, epsilon: None for those of the model's sidecar. folder: receives all results.
    classes_in_order: the user asserts that label k of the images is class k of the model, whatever the names are.
    """

    model: Path
    images: str  # a path, or the name of an embedded source
    split: str | None  # None: the test images, or all where a source has none
    norm: str | None
    epsilon: str | None
    settings: EvaluateRobust
    folder: Path
    home: Path | None  # the project that tracks the evaluation in MLflow; None: not tracked
    classes_in_order: bool = False


@dataclasses.dataclass(frozen=True)
class DirectResult:
    """Result of an evaluation. summary, protocol: as in summary.json and protocol.json."""

    summary: Summary
    verdict: Verdict
    protocol: EvaluationProtocol


class EvaluationIdentity(TypedDict):
    """What decides the content of the shards; evaluation.json holds it."""

    weights: str  # SHA-256
    network: str  # fingerprint of the sidecar's keys that describe the network
    images: str  # SHA-256 of the attacked images and labels
    threat: Mapping[str, str]  # norm, epsilon as written
    settings: Mapping[str, object]
    plugins: NotRequired[dict[str, str]]  # import path -> identity of that code of the project


class DirectEvaluation:
    """A request with its model, images and settings loaded and checked.

    Raises DmatError if model, images and settings do not fit together.
    """

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
        subject = Subject("model", model, classes, images, labels, ball, suite, full_suite=True)
        self.identity: EvaluationIdentity = {
            "weights": self.sidecar["sha256"],
            "network": files.fingerprint({name: self.sidecar[name] for name in _NETWORK_KEYS}),
            "images": images_sha256(images, labels),
            "threat": self.threat.plain(),
            "settings": settings.plain() | {"pgd_step": settings.pgd_step(ball.norm, ball.epsilon)},
        }
        if plugin_identities := self._plugin_identities():
            self.identity["plugins"] = plugin_identities
        self.evaluation = Evaluation(request.folder / "work", subject, settings, self.compute, self.identity)

    def _plugin_identities(self) -> dict[str, str]:
        """Import path -> identity of the project's code that the evaluation uses."""
        paths = plugins.import_paths([self.request.settings.plain(), self.sidecar["network"]])
        return code_identity.of_plugins(paths, "evaluate_robust")

    def estimate(self) -> dict[str, object]:
        """What `--dry-run` prints: the request, the protocol, how much is done and how long the rest takes."""
        return {
            "model": str(self.request.model),
            "images": self.source.origin,
            "folder": str(self.request.folder),
            "protocol": self.protocol(),
            **work.Monitor(self.evaluation.tasks).estimate(),
        }

    def protocol(self) -> EvaluationProtocol:
        """The protocol of the evaluation, with the origin of the images: a source without test images of its own may
        hold images that the model was trained on."""
        return {
            **self.evaluation.protocol(self.threat.plain(), self.all_images),
            "images_from": self.source.origin,
            "images_notes": list(self.source.notes),
            "labels_are": self.labels_are,
        }

    def run_shards(self, numbers: range, quiet: bool) -> None:
        """Computes some of the shards and writes no result: a later run of the same request finds them.

        numbers: of the shards, from 0. Raises DmatError for numbers of shards that the evaluation does not have.
        """
        tasks = self.evaluation.tasks
        expect_numbers(numbers, len(tasks), f"the evaluation of {self.request.model.name}")
        make_folder(self.request.folder)
        self._expect_same_request()
        with Interruption(at_once=True):
            work.compute_all(tasks[numbers.start : numbers.stop], quiet=quiet)

    def run(self, fresh: bool, quiet: bool, options: EngineOptions) -> DirectResult:
        """Computes the missing shards and writes the results. The same request resumes, or returns a finished result.

        fresh: sets earlier work aside and starts over. quiet: no progress bar. options: of the workers, if any.
        """
        folder = self.request.folder
        make_folder(folder)
        with lock(folder), Interruption(at_once=True):
            if fresh:  # a model that was imported for this evaluation stays
                model = self.request.model
                keep = (model.name, model.with_suffix(".json").name) if model.parent == folder else ()
                set_aside(folder, self.request.home or folder, keep)
            self._expect_same_request()
            files.write_json(folder / _IDENTITY_FILE, self.identity)
            with self._tracked() as run:
                with Interruption(at_once=True):  # inside, so that the tracked run records the signal
                    if options.has_workers:
                        self._compute_in_workers(options, quiet)
                    work.compute_all(self.evaluation.tasks, quiet=quiet)
                    self._expect_same_code()
                    result = self._write(folder)
                for name, value in result.verdict.tags.items():
                    run.tag(name, value)
                run.register(self._candidate(result))
                run.finish_with(_numbers(result.summary), sorted(folder.glob("*.png")))
        return result

    def _compute_in_workers(self, options: EngineOptions, quiet: bool) -> None:
        request, images = self.request, Path(self.request.images)
        request = dataclasses.replace(  # a worker is in another folder
            request,
            model=request.model.resolve(),
            images=str(images.resolve()) if images.exists() else request.images,
            folder=request.folder.resolve(),
        )
        arguments = (request, self.identity, division.WorkerCompute.of(self.compute))
        numbers = [number for number, task in enumerate(self.evaluation.tasks) if not task.done]
        tasks = [Task(f"shard {number}", _compute_shard, (*arguments, number)) for number in numbers]
        monitor = work.Monitor(self.evaluation.tasks)
        division.run_tasks(tasks, options, label="evaluate", quiet=quiet, monitor=monitor)

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
        evaluation.draw(folder, columns, self.threat.epsilon.text, self.names, verdict)
        write_results(folder, rows | evaluation.rows(columns, verdict), summary, protocol)
        return DirectResult(summary, verdict, protocol)

    def _candidate(self, result: DirectResult) -> tracking.RegistryCandidate:
        """The evaluated model as a candidate for the project's model registry."""
        data = self.sidecar.get("data") or "images"
        headline = result.summary["headline"]
        return tracking.RegistryCandidate(
            registry.model_name(data, self.all_sha256, self.threat.norm, self.threat.epsilon.text),
            self.request.model,
            {
                "data.test.sha256": self.all_sha256,
                **weights.licences(self.sidecar),
                **result.verdict.model_tags(result.summary, self.threat.plain()),
            },
            headline["value"] if headline else None,
            weights_sha256=self.sidecar["sha256"],
            sidecar_sha256=self.sidecar_sha256,
        )

    def _expect_same_code(self) -> None:
        before, current = self.identity.get("plugins", {}), self._plugin_identities()
        if changed := [path for path in before if current.get(path) != before[path]]:
            raise DmatError(
                f"the code of {', '.join(changed)} changed while it was evaluated with; expected no change until it "
                f"ended; nothing was written; run it again with --fresh"
            )

    def _expect_same_request(self) -> None:
        path = self.request.folder / _IDENTITY_FILE
        if path.exists() and (recorded := files.read_record(path, dict[str, object])) != self.identity:
            differing = [key for key, value in self.identity.items() if recorded.get(key) != value]
            raise DmatError(
                f"{self.request.folder} holds another evaluation ({', '.join(differing)} differ); expected an empty "
                f"folder or the same request; give another --to, or start over with --fresh, which keeps the old one "
                f"aside"
            )


def ensure_safetensors(model: Path, args: Path | None, data: str | None, activation: str | None, folder: Path) -> Path:
    """Path of the model as a .safetensors file: the given one, or what `dmat models import` makes of another format in
    the folder of the evaluation. args, data, activation: as for `dmat models import`."""
    if model.suffix == SUFFIX or not model.is_file():
        return model
    args_path = model.with_name("args.txt")
    target = folder / f"{model.stem}{SUFFIX}"
    make_folder(folder)
    imported = importing.import_model(
        model, args or (args_path if args_path.is_file() else None), data, activation=activation, target=target
    )
    for note in imported.notes:
        tqdm.write(f"note: {note}")
    return imported.path


def make_folder(folder: Path) -> None:
    """Makes a folder with its parents. Raises DmatError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DmatError(f"--to is {folder}, where no folder can be made ({error.strerror}); give another one") from None


def leaderboard_entry(direct: DirectEvaluation, name: str) -> leaderboard.Entry:
    """The RobustBench entry to compare with. Raises DmatError if there is none, so call it before computing."""
    data = direct.sidecar.get("data")
    if data is None:
        raise DmatError(
            f"{direct.request.model.with_suffix('.json')} names no data set; expected data: cifar10 or cifar100, as "
            f"`dmat models import` writes it; leave --against out"
        )
    return leaderboard.entry(data, direct.threat.norm, name)


def compare_with_robustbench(direct: DirectEvaluation, result: DirectResult, entry: leaderboard.Entry) -> list[str]:
    """Sentences with the published accuracies of an entry, those of this evaluation, and how the two measurements
    differ."""
    threat, summary = direct.threat, result.summary
    measured: leaderboard.MeasurementProtocol = {
        "norm": threat.norm,
        "epsilon": threat.epsilon.text,
        "images": result.protocol["images"],
        "suite": "standard"
        if direct.evaluation.subject.suite and direct.evaluation.subject.suite.standard
        else "other",
        "precision": direct.compute.precision,
    }
    sentences = [
        f"{entry.name} on RobustBench ({entry.snapshot}): clean {entry.clean:.2f} %, AutoAttack "
        f"{entry.auto_attack:.2f} %.",
        f"Here: clean {100 * summary['clean']['value']:.2f} %"
        + (
            f", AutoAttack {100 * summary[result.verdict.measure]['value']:.2f} %."
            if result.verdict.measure in summary
            else "; AutoAttack was not run."
        ),
    ]
    return sentences + leaderboard.differences(entry, measured)


def result_lines(result: DirectResult) -> list[str]:
    """Lines for the terminal: images, labels, accuracies with intervals, and the headline or why there is none."""
    n = result.protocol["images"]
    lines = [f"images: {result.protocol['images_from']}", *result.protocol["images_notes"]]
    lines += [f"labels: {result.protocol['labels_are']}"]
    lines += [
        f"{name:24s}{100 * value['value']:6.2f} %  [{100 * value['low']:.2f}, {100 * value['high']:.2f}]  n = {n:,}"
        for name, value in result.summary.items()
        if isinstance(value, dict) and "low" in value and name != "headline"
    ]
    if headline := result.summary["headline"]:
        threat = result.protocol["threat"]
        lines.append(
            f"headline: {100 * headline['value']:.2f} % under standard AutoAttack, "
            f"{threat['norm']} {threat['epsilon']}; all {len(result.verdict.checks)} checks passed"
        )
    return lines + result.verdict.sentences


def _compute_shard(
    context: TaskContext, request: Request, identity: EvaluationIdentity, compute: division.WorkerCompute, number: int
) -> None:
    """Computes one shard in a worker, if it would make the same evaluation as the driver."""
    if request.home is not None:
        with contextlib.suppress(DmatError):  # the driver has read it
            config.load(request.home / "params.yaml")  # allows the networks that it names by import path
    direct = DirectEvaluation(request, compute.resolve())
    if direct.identity != identity:
        raise DmatError(
            f"a worker on {os.uname().nodename} would evaluate another model or other images than the driver; expected "
            f"no change until the evaluation ended; run the same command again"
        )
    direct.run_shards(range(number, number + 1), quiet=True)


def resolve_compute(device: str) -> Compute:
    """Resolves a device for an evaluation in single precision. device: auto, cpu or cuda."""
    return devices.resolve(device, "fp32", torch.get_num_threads())


def _threat(request: Request, sidecar: ClassifierSidecar) -> Threat:
    recorded = sidecar.get("threat") or {}
    if not isinstance(recorded, dict) or not all(isinstance(recorded.get(key, ""), str) for key in ("norm", "epsilon")):
        raise DmatError(
            f"{request.model.with_suffix('.json')} has the threat {recorded!r}; expected norm and epsilon as text, for "
            f"example linf and 8/255; bring back the sidecar that was written with {request.model.name}"
        )
    norm, epsilon = request.norm or recorded.get("norm"), request.epsilon or recorded.get("epsilon")
    if norm is None or epsilon is None:
        raise DmatError(
            f"{request.model.with_suffix('.json')} has no threat model; expected one; give --norm and --epsilon, for "
            f"example --norm linf --epsilon 8/255"
        )
    return config.threat(norm, epsilon)


def _expect_fit(source: ImageSource, sidecar: ClassifierSidecar, request: Request) -> None:
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


def _expect_same_classes(source: ImageSource, sidecar: ClassifierSidecar, request: Request) -> str:
    """A sentence on what label k means. Raises DmatError if names show that it is not class k of the model.

    Labels are numbers: with other class names, or the same names in another order, the accuracy would be that of other
    classes.
    """
    image_names, model_names = list(source.class_names), [str(name) for name in sidecar.get("class_names") or []]
    index_of_name = {name.casefold(): k for k, name in enumerate(model_names)}
    model_indices = [index_of_name.get(name.casefold()) for name in image_names]
    if model_indices == list(range(len(model_names))):
        return "classes of the same names as the model's"
    moved = [
        f"{name} is {k}, the model's {index}"
        for k, (name, index) in enumerate(zip(image_names, model_indices, strict=True))
        if index not in (None, k)
    ]
    if moved:
        raise DmatError(
            f"{request.images} and {request.model} have classes in another order ({listing(moved, 3)}); expected one "
            f"order, as labels are numbers; put the images in the order of the sidecar's class_names"
        )
    if not (_are_names(image_names) and _are_names(model_names)):
        unnamed = "the model" if _are_names(image_names) else "the images"
        return f"numbers of the model's classes: names could not be compared, as {unnamed} came without any"
    if request.classes_in_order:
        return f"numbers of the model's classes, by --classes-in-order: {image_names[0]} is taken for {model_names[0]}"
    differing = [
        f"{k} is {a}, the model's {b}" for k, (a, b) in enumerate(zip(image_names, model_names, strict=True)) if a != b
    ]
    raise DmatError(
        f"{request.images} has other classes than {request.model} ({listing(differing, 3)}); expected the same names "
        f"in the same order, as labels are numbers; rename them as in the sidecar's class_names, or give "
        f"--classes-in-order if only the names differ"
    )


def _class_names(source: ImageSource, sidecar: ClassifierSidecar) -> list[str]:
    if _are_names(source.class_names):
        return list(source.class_names)
    return [str(name) for name in sidecar.get("class_names") or range(sidecar["classes"])]


def _are_names(classes: Sequence[str]) -> bool:
    """Whether classes have names. Without names they are numbers, of which the highest may not occur in the images."""
    return list(classes) != [str(k) for k in range(len(classes))]


def _numbers(summary: Summary) -> dict[str, float]:
    return {
        name: value["value"]
        for name, value in summary.items()
        if isinstance(value, dict) and "value" in value and name != "headline"
    }
