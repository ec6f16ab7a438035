"""The table of stages.

The name of a stage is a section of params.yaml, a stage of dvc.yaml, a module `dmat/jobs/<name>.py`, a command
`dmat <name-with-dashes>`, a folder `artifacts/<name>/` and a value of the MLflow tag `dmat.stage`.

This module loads neither torch nor pydantic, so that the command line starts at once.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from dmat import ARTIFACTS, NONE, SOURCES
from dmat.workspace import Instance, provenance_path

if TYPE_CHECKING:
    from dmat.config import Params, Record

Paths = dict[str, str]  # input or output name -> path below the project


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of the table: a stage and what its instances read, compute with and write.

    name: see the module docstring. summary: one sentence for `--help`.
    keys: the keys of an instance, which are also options of the command, in the order of the instance's name; () for a
    stage with one instance. An instance is the mapping of these keys to values, for example {"arm": "generated",
    "seed": 1}; its name is the text `instance_name` makes of it, "generated-1".
    settings, inputs, outputs, model_settings: functions of the parameters and the instance (`params, **instance`).
    They return the record of the stage's settings, the paths read, the paths written, and the settings of the models
    that the instance opens, which may name code of the project as its own settings may.
    example: a command line for `--help`.
    processes: "one" process only; "together": several that compute in step with each other.
    float32: the stage computes in single precision, whatever the precision of the other stages.
    by_shards: whether workers can divide its shards. Its command takes `--shards`, `--workers` and `--cluster`, and its
    job has `pending_shards` and `run_shards`. It may have `monitor`, which reads how far the work inside shards is.
    """

    name: str
    summary: str
    keys: tuple[str, ...]
    settings: Callable[..., "Record"]
    inputs: Callable[..., Paths]
    outputs: Callable[..., Paths]
    example: str
    processes: Literal["one", "together"] = "one"
    float32: bool = False
    by_shards: bool = False
    model_settings: Callable[..., "tuple[Record, ...]"] = lambda params, **instance: ()

    @property
    def job(self) -> ModuleType:
        """The module `dmat.jobs.<name>`. Importing it loads torch."""
        return importlib.import_module(f"dmat.jobs.{self.name}")

    @property
    def command(self) -> str:
        """Name of the command below `dmat`: the stage's name with dashes."""
        return self.name.replace("_", "-")

    def instance_name(self, instance: Instance) -> str:
        """Name of an instance in dvc.yaml (`train_robust@real_only-1`) and of its folders; "all" for a stage without
        keys."""
        return "-".join(str(instance[key]) for key in self.keys) or "all"

    def options(self, instance: Instance) -> list[str]:
        """Command-line arguments that name an instance: ["--arm", "generated", "--seed", "1"]."""
        return [
            argument for name, value in instance.items() for argument in (f"--{name.replace('_', '-')}", str(value))
        ]

    def metrics_path(self, instance: Instance) -> str:
        """Path of an instance's metrics below the project."""
        return f"{ARTIFACTS}/metrics/{self.name}/{self.instance_name(instance)}.json"

    def provenance_path(self, instance: Instance) -> str:
        """Path of an instance's provenance below the project."""
        return provenance_path(self.name, self.instance_name(instance))

    def pictures_path(self, instance: Instance) -> str:
        """Path of an instance's folder of pictures below the project."""
        return f"{ARTIFACTS}/pictures/{self.name}/{self.instance_name(instance)}"

    def context(self, params: "Params", instance: Instance) -> dict[str, object]:
        """What an MLflow run can be searched by besides its own settings: the keys of the instance and, for an
        evaluation, the settings of its training. A name that the evaluation has too begins with `train_robust.`."""
        context: dict[str, object] = dict(instance)
        if self.name == "evaluate_robust":
            own = self.settings(params, **instance).plain()
            training = STAGES["train_robust"].settings(params, **instance).plain()
            context |= {f"train_robust.{name}" if name in own else name: value for name, value in training.items()}
        return context

    def all_instances(self, params: "Params") -> list[Instance]:
        """Every instance that a parameter file asks for: all combinations of the values of its keys."""
        lists: dict[str, Iterable[str | int]] = {
            "generator": params.generators,
            "image_set": params.image_sets,
            "selection": params.selections,
            "mixture": params.mixtures,
            "arm": params.arms,
            "seed": params.seeds,
        }
        combinations: list[Instance] = [{}]
        for key in self.keys:
            combinations = [{**combination, key: value} for combination in combinations for value in lists[key]]
        return combinations


def _split(name: str) -> str:
    return f"{ARTIFACTS}/prepare_data/{name}"


def _source(path: str) -> Paths:
    """A file or folder of external data; empty where none is read."""
    return {} if path == NONE else {"source": f"{SOURCES}/{path}"}


def _generator_settings(params: "Params", generator: str) -> "Record":
    from dmat.config import PublishedGenerator

    settings = params.generators[generator]
    return settings if settings.source == NONE else PublishedGenerator(source=settings.source)


def _diffusion_inputs(params: "Params", generator: str) -> Paths:
    """What a generator is made from. DVC always waits for the scorer and validation, which only snapshots read."""
    settings = params.generators[generator]
    judged = settings.source == NONE and settings.snapshot_every
    return {
        "train": _split("train"),
        **_source(settings.source),
        **({"validation": _split("validation"), "scorer": SCORER} if judged else {}),
    }


def _image_set_settings(params: "Params", image_set: str) -> "Record":
    from dmat.config import ImportedImageSet

    settings = params.image_sets[image_set]
    if settings.source == NONE:
        return settings
    return ImportedImageSet(source=settings.source, images=settings.images, shard=settings.shard)


def _image_set_inputs(params: "Params", image_set: str) -> Paths:
    settings = params.image_sets[image_set]
    if settings.source != NONE:
        return {**_source(settings.source), "train": _split("train")}  # whose size and classes the images must have
    return {"denoiser": f"{ARTIFACTS}/train_diffusion/{settings.generator}"}


def _image_set_models(params: "Params", image_set: str) -> "tuple[Record, ...]":
    generator = params.image_sets[image_set].generator
    return () if generator == NONE else (params.generators[generator].network,)


def _mix_settings(params: "Params", arm: str) -> "Record":
    from dmat.config import MixImages  # pydantic takes a third of the command line's start

    return MixImages.from_arm(params.arms[arm])


def _report_settings(params: "Params") -> "Record":
    from dmat.config import Report

    earlier_stages, train_robust = (
        [stage for stage in STAGES.values() if stage.name != "write_report"],
        STAGES["train_robust"],
    )
    return Report(
        **params.write_report.plain(),
        seeds=params.seeds,
        arms={
            arm: [train_robust.instance_name({"arm": arm, "seed": seed}) for seed in params.seeds]
            for arm in params.arms
        },
        instances={
            stage.name: [stage.instance_name(instance) for instance in stage.all_instances(params)]
            for stage in earlier_stages
        },
    )


# Paths below artifacts/ that the report reads. They are listed one by one, because the report's own metrics and
# provenance lie in the same folders.
REPORT_INPUTS = (
    *("train_diffusion", "measure_images", "mix_images", "train_robust", "evaluate_robust"),
    "metrics/train_robust",
    *(f"pictures/{stage_name}" for stage_name in ("measure_images", "evaluate_robust")),
    *(
        f"provenance/{stage_name}"
        for stage_name in (
            *("prepare_data", "train_scorer", "generate_images", "score_images", "select_images", "measure_images"),
            *("mix_images", "train_robust", "evaluate_robust"),
        )
    ),
)


def _report_inputs(params: "Params") -> Paths:
    # These lists may be empty, and DVC's templates have no conditions. DVC sees a changed generator in
    # artifacts/train_diffusion, a changed image set in provenance/generate_images, and a changed mixture in mix_images.
    parts = ("pictures", "provenance", "metrics")
    generators = [f"{part}/train_diffusion" for part in parts] if params.generators else []
    image_sets = ["metrics/generate_images"] if params.image_sets else []
    mixtures = ["provenance/combine_selections"] if params.mixtures else []
    return {path: f"{ARTIFACTS}/{path}" for path in (*REPORT_INPUTS, *generators, *image_sets, *mixtures)}


SCORER = f"{ARTIFACTS}/train_scorer/scorer"

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "prepare_data",
            "Split real images into train, validation and test.",
            (),
            settings=lambda p: p.prepare_data,
            inputs=lambda p: _source(p.prepare_data.path),
            outputs=lambda p: {
                **{name: _split(name) for name in ("train", "validation", "test")},
                # The empty generator and selection: DVC's templates have no conditions.
                "no_generator": f"{ARTIFACTS}/train_diffusion/{NONE}",
                "no_selection": f"{ARTIFACTS}/select_images/{NONE}",
            },
            example="dmat prepare-data",
        ),
        Stage(
            "train_scorer",
            "Train an ordinary classifier that judges generated images.",
            (),
            settings=lambda p: p.train_scorer,
            inputs=lambda p: {"train": _split("train"), "validation": _split("validation")},
            outputs=lambda p: {"scorer": SCORER},
            example="dmat train-scorer",
            processes="together",
        ),
        Stage(
            "train_diffusion",
            "Train a diffusion model on the real training images, or import a published one.",
            ("generator",),
            settings=_generator_settings,
            inputs=_diffusion_inputs,
            outputs=lambda p, generator: {"denoiser": f"{ARTIFACTS}/train_diffusion/{generator}"},
            example="dmat train-diffusion --generator edm",
            processes="together",
        ),
        Stage(
            "generate_images",
            "Generate a labelled image set, or import one.",
            ("image_set",),
            settings=_image_set_settings,
            inputs=_image_set_inputs,
            outputs=lambda p, image_set: {"images": f"{ARTIFACTS}/generate_images/{image_set}"},
            example="dmat generate-images --image-set edm18",
            by_shards=True,
            model_settings=_image_set_models,
        ),
        Stage(
            "score_images",
            "Score every image of a set by the scorer's confidence in its label.",
            ("image_set",),
            settings=lambda p, image_set: p.score_images,
            inputs=lambda p, image_set: {"images": f"{ARTIFACTS}/generate_images/{image_set}", "scorer": SCORER},
            outputs=lambda p, image_set: {"scores": f"{ARTIFACTS}/score_images/{image_set}"},
            example="dmat score-images --image-set edm18",
            by_shards=True,
            model_settings=lambda p, image_set: (p.train_scorer.network,),
        ),
        Stage(
            "select_images",
            "Keep the best-scored images of each class of an image set.",
            ("selection",),
            settings=lambda p, selection: p.selections[selection],
            inputs=lambda p, selection: {
                "images": f"{ARTIFACTS}/generate_images/{p.selections[selection].image_set}",
                "scores": f"{ARTIFACTS}/score_images/{p.selections[selection].image_set}",
            },
            outputs=lambda p, selection: {"selection": f"{ARTIFACTS}/select_images/{selection}"},
            example="dmat select-images --selection edm18_best",
        ),
        Stage(
            "measure_images",
            "Measure quality, memorisation and duplicates of a selection.",
            ("selection",),
            settings=lambda p, selection: p.measure_images,
            inputs=lambda p, selection: {
                "images": f"{ARTIFACTS}/generate_images/{p.selections[selection].image_set}",
                "selection": f"{ARTIFACTS}/select_images/{selection}",
                "scorer": SCORER,
                **{name: _split(name) for name in ("train", "validation", "test")},
                **_source(p.measure_images.features_file),
            },
            outputs=lambda p, selection: {"measures": f"{ARTIFACTS}/measure_images/{selection}"},
            example="dmat measure-images --selection edm18_best",
            model_settings=lambda p, selection: (p.train_scorer.network,),
        ),
        Stage(
            "combine_selections",
            "Combine selections into a mixture, from which an arm takes its generated images.",
            ("mixture",),
            settings=lambda p, mixture: p.mixtures[mixture],
            # DVC's templates name no list of inputs: it watches the provenance of all selections instead.
            inputs=lambda p, mixture: {
                selection: f"{ARTIFACTS}/select_images/{selection}" for selection in p.mixtures[mixture].of
            },
            outputs=lambda p, mixture: {"mixture": f"{ARTIFACTS}/select_images/{mixture}"},
            example="dmat combine-selections --mixture pool",
        ),
        Stage(
            "mix_images",
            "State which real and generated images an arm trains on.",
            ("arm",),
            settings=_mix_settings,
            inputs=lambda p, arm: {
                "train": _split("train"),
                "selection": f"{ARTIFACTS}/select_images/{p.arms[arm].images}",
            },
            outputs=lambda p, arm: {"mix": f"{ARTIFACTS}/mix_images/{arm}"},
            example="dmat mix-images --arm generated",
        ),
        Stage(
            "train_robust",
            "Train a robust classifier: one arm with one seed.",
            ("arm", "seed"),
            settings=lambda p, arm, seed: p.arms[arm],
            inputs=lambda p, arm, seed: {
                "train": _split("train"),
                "validation": _split("validation"),
                "mix": f"{ARTIFACTS}/mix_images/{arm}",
            },
            outputs=lambda p, arm, seed: {"classifier": f"{ARTIFACTS}/train_robust/{arm}-{seed}"},
            example="dmat train-robust --arm generated --seed 1",
            processes="together",
        ),
        Stage(
            "evaluate_robust",
            "Evaluate a robust classifier on the test images with PGD and AutoAttack.",
            ("arm", "seed"),
            settings=lambda p, arm, seed: p.evaluate_robust,
            inputs=lambda p, arm, seed: {
                "train": _split("train"),
                "test": _split("test"),
                "mix": f"{ARTIFACTS}/mix_images/{arm}",
                "classifier": f"{ARTIFACTS}/train_robust/{arm}-{seed}",
            },
            outputs=lambda p, arm, seed: {"evaluation": f"{ARTIFACTS}/evaluate_robust/{arm}-{seed}"},
            example="dmat evaluate-robust --arm generated --seed 1",
            float32=True,
            by_shards=True,
            model_settings=lambda p, arm, seed: (p.arms[arm].network,),
        ),
        Stage(
            "write_report",
            "Compare all arms in one page.",
            (),
            settings=_report_settings,
            inputs=_report_inputs,
            outputs=lambda p: {"report": f"{ARTIFACTS}/write_report/report"},
            example="dmat write-report",
        ),
    )
}
