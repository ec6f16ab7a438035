"""The table of stages. A word here is a section of params.yaml, a stage of dvc.yaml, a file `dmat/jobs/<word>.py`, a
command `dmat <word-with-dashes>`, a folder `artifacts/<word>/` and the MLflow tag `dmat.stage`.

Loads neither torch nor pydantic, so that the command line starts at once.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from dmat import ARTIFACTS, NONE, SOURCES
from dmat.workspace import provenance_path

if TYPE_CHECKING:
    from dmat.config import Params, Record

Paths = dict[str, str]  # input or output name -> path below the project


@dataclasses.dataclass(frozen=True)
class Stage:
    """keys: the options that name one instance, in the order of its name. settings and inputs: of an instance.

    processes: whether it takes one, several that compute in step with each other, or several that divide its work.
    float32: whatever the precision of the other stages. opens: settings beside its own that may name code of the
    project, as those of a model that it opens do.
    """

    name: str
    summary: str
    keys: tuple[str, ...]
    settings: Callable[..., "Record"]
    inputs: Callable[..., Paths]
    outputs: Callable[..., Paths]
    example: str
    processes: Literal["one", "together", "shared"] = "one"
    float32: bool = False
    opens: Callable[..., "tuple[Record, ...]"] = lambda params, **instance: ()

    @property
    def job(self) -> Any:
        """The module `dmat.jobs.<word>`, which loads torch."""
        return importlib.import_module(f"dmat.jobs.{self.name}")

    @property
    def command(self) -> str:
        return self.name.replace("_", "-")

    def instance_name(self, instance: Mapping[str, Any]) -> str:
        """Name of an instance as in dvc.yaml (`train_robust@real_only-1`) and of folders; "all" without options."""
        return "-".join(str(instance[option]) for option in self.keys) or "all"

    def options(self, instance: Mapping[str, Any]) -> list[str]:
        """The words after the command that name an instance."""
        return [word for name, value in instance.items() for word in (f"--{name.replace('_', '-')}", str(value))]

    def metrics_path(self, instance: Mapping[str, Any]) -> str:
        return f"{ARTIFACTS}/metrics/{self.name}/{self.instance_name(instance)}.json"

    def provenance_path(self, instance: Mapping[str, Any]) -> str:
        return provenance_path(self.name, self.instance_name(instance))

    def pictures_path(self, instance: Mapping[str, Any]) -> str:
        return f"{ARTIFACTS}/pictures/{self.name}/{self.instance_name(instance)}"

    def choices(self, params: "Params") -> list[dict[str, Any]]:
        """Every instance that a parameter file asks for."""
        lists: dict[str, Any] = {
            "generator": params.generators,
            "image_set": params.image_sets,
            "selection": params.selections,
            "arm": params.arms,
            "seed": params.seeds,
        }
        found: list[dict[str, Any]] = [{}]
        for option in self.keys:
            found = [{**one, option: value} for one in found for value in lists[option]]
        return found


def _split(name: str) -> str:
    return f"{ARTIFACTS}/prepare_data/{name}"


def _source(params: "Params") -> Paths:
    """Where real images come from, if from files."""
    path = params.prepare_data.path
    return {} if path == NONE else {"source": f"{SOURCES}/{path}"}


def _mix_settings(params: "Params", arm: str) -> "Record":
    from dmat.config import MixImages  # pydantic takes a third of the command line's start

    return MixImages.of(params.arms[arm])


def _report_settings(params: "Params") -> "Record":
    from dmat.config import Report

    made, training = [stage for stage in STAGES.values() if stage.name != "write_report"], STAGES["train_robust"]
    return Report(
        **params.write_report.plain(),
        seeds=params.seeds,
        arms={
            arm: [training.instance_name({"arm": arm, "seed": seed}) for seed in params.seeds] for arm in params.arms
        },
        instances={stage.name: [stage.instance_name(instance) for instance in stage.choices(params)] for stage in made},
    )


# What the report reads, below artifacts/. Its own metrics and provenance stand beside those of the others, so they are
# named one by one.
REPORTED = (
    *("train_diffusion", "measure_images", "mix_images", "train_robust", "evaluate_robust"),
    *("metrics/measure_images", "metrics/train_robust"),
    *(f"pictures/{word}" for word in ("train_diffusion", "measure_images", "evaluate_robust")),
    *(
        f"provenance/{word}"
        for word in (
            *("prepare_data", "train_scorer", "train_diffusion", "generate_images", "score_images", "select_images"),
            *("measure_images", "mix_images", "train_robust", "evaluate_robust"),
        )
    ),
)

SCORER = f"{ARTIFACTS}/train_scorer/scorer"

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "prepare_data",
            "Split real images into train, validation and test.",
            (),
            settings=lambda p: p.prepare_data,
            inputs=_source,
            outputs=lambda p: {
                **{name: _split(name) for name in ("train", "validation", "test")},
                "none": f"{ARTIFACTS}/select_images/{NONE}",  # DVC's templates know no conditions: what no images are
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
            "Train a diffusion model on the real training images.",
            ("generator",),
            settings=lambda p, generator: p.generators[generator],
            inputs=lambda p, generator: {"train": _split("train")},
            outputs=lambda p, generator: {"denoiser": f"{ARTIFACTS}/train_diffusion/{generator}"},
            example="dmat train-diffusion --generator edm",
        ),
        Stage(
            "generate_images",
            "Generate a labelled image set.",
            ("image_set",),
            settings=lambda p, image_set: p.image_sets[image_set],
            inputs=lambda p, image_set: {
                "denoiser": f"{ARTIFACTS}/train_diffusion/{p.image_sets[image_set].generator}",
            },
            outputs=lambda p, image_set: {"images": f"{ARTIFACTS}/generate_images/{image_set}"},
            example="dmat generate-images --image-set edm18",
        ),
        Stage(
            "score_images",
            "Score every image of a set by the scorer's confidence in its label.",
            ("image_set",),
            settings=lambda p, image_set: p.score_images,
            inputs=lambda p, image_set: {"images": f"{ARTIFACTS}/generate_images/{image_set}", "scorer": SCORER},
            outputs=lambda p, image_set: {"scores": f"{ARTIFACTS}/score_images/{image_set}"},
            example="dmat score-images --image-set edm18",
            opens=lambda p, image_set: (p.train_scorer.network,),
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
                "train": _split("train"),
                "validation": _split("validation"),
            },
            outputs=lambda p, selection: {"measures": f"{ARTIFACTS}/measure_images/{selection}"},
            example="dmat measure-images --selection edm18_best",
            opens=lambda p, selection: (p.train_scorer.network,),
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
            processes="shared",
            float32=True,
            opens=lambda p, arm, seed: (p.arms[arm].network,),
        ),
        Stage(
            "write_report",
            "Compare all arms in one page.",
            (),
            settings=_report_settings,
            inputs=lambda p: {path: f"{ARTIFACTS}/{path}" for path in REPORTED},
            outputs=lambda p: {"report": f"{ARTIFACTS}/write_report/report"},
            example="dmat write-report",
        ),
    )
}
