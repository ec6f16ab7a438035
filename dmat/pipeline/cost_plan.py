"""What a recipe costs before anything runs: disk, memory and hours of each stage, from the operations it needs.

Hours = operations / (published peak of the GPU x utilisation). Operations are counted from the networks, by torch's
counter, and from the lengths in the recipe. Utilisation was measured for one GPU and network (docs/log.md, 2026-11-26);
elsewhere the same fraction is stated, which is an assumption.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from dmat import NONE, config
from dmat.config import Arm, ClassifierTraining, Generator, Network, Params
from dmat.data.data_sets import DATA_SETS, DataSet
from dmat.diffusion import formulations
from dmat.diffusion.networks import DenoiserSpec
from dmat.diffusion.samplers import denoiser_calls
from dmat.errors import ConfigError, DmatError
from dmat.models.classifiers import new_classifier
from dmat.models.denoisers import new_denoiser
from dmat.models.network_cost import NetworkCost, denoiser_cost, network_cost
from dmat.recipes import Experiment
from dmat.report import costs
from dmat.robust import auto_attack, flops
from dmat.robust.networks import DataSpec


class Gpu(NamedTuple):
    """A GPU: dense peaks in operations per second, and memory in bytes, as its maker publishes them."""

    title: str
    bf16: float
    fp32: float  # without TF32, which evaluations switch off
    memory: float


GPUS = {  # NVIDIA's data sheets; GeForce: the white papers of GA102 and AD102. Sparse peaks are twice these
    "a100": Gpu("A100 SXM 80 GB", 312e12, 19.5e12, 80e9),
    "h100": Gpu("H100 SXM", 989e12, 67e12, 80e9),
    "h200": Gpu("H200 SXM", 989e12, 67e12, 141e9),
    "b200": Gpu("B200 SXM", 2250e12, 75e12, 180e9),
    "l40s": Gpu("L40S", 362e12, 91.6e12, 48e9),
    "rtx3090": Gpu("GeForce RTX 3090", 71e12, 35.6e12, 24e9),
    "rtx4090": Gpu("GeForce RTX 4090", 165e12, 82.6e12, 24e9),
}
# On an H200, TRADES-10 of WRN-28-10 at batch 512 (docs/log.md, 2026-11-26): 314e12 per second in bf16; in fp32 without
# TF32 6.44 s per step of 27 forward passes of 10.5e9 operations for each image.
_MEASURED_ON, _MEASURED_NETWORK = "h200", ("wide_resnet", 28, 10)
BF16_UTILISATION = 314e12 / 989e12
FP32_UTILISATION = 512 * 27 * 10.5e9 / 6.44 / 67e12

RELEASED_IMAGES = {  # name in sources/ -> number of images, as their authors state it
    "wang-cifar10-1m.npz": 1_000_000,
    "wang-cifar10-5m.npz": 5_000_000,
    "wang-cifar10-10m.npz": 10_000_000,
    "wang-cifar10-20m": 20_000_000,
    "wang-cifar10-50m": 50_000_000,
    "wang-cifar100-1m.npz": 1_000_000,
    "wang-cifar100-50m": 50_000_000,
    "wang-svhn-50m": 50_000_000,
    "wang-tinyimagenet-1m.npz": 1_000_000,
    "gowal-cifar10-ddpm-1m.npz": 1_000_000,
    "bartoldson-edm": 100_000_000,
    "bartoldson-edm-dg": 100_000_000,
    "bartoldson-pfgmpp": 100_000_000,
}
_WEIGHT = 4  # bytes of a parameter: weights, gradients and optimiser are float32
_PROCESSES = "`compute.processes` divides each batch among several GPUs"
_ADVICE = {  # where a stage does not fit into the memory of a GPU
    "train_scorer": _PROCESSES,
    "train_diffusion": "`accumulation_steps` computes each batch in parts",
    "train_robust": _PROCESSES,
    "evaluate_robust": "a smaller `evaluate_robust.batch` fits",
}
# Copies of the weights in a checkpoint. Classifier: live, EMA, momentum, best. Denoiser: live, EMA, two of Adam.
_CHECKPOINT = 4


class StageCost(NamedTuple):
    """What all runs of a stage cost together.

    disk_bytes: of results and of the last checkpoints. memory_bytes: of the GPU, for the largest run; None where it was
    not estimated. hours: of one GPU. speed: operations per second, and whether they were measured or stated.
    """

    stage: str
    runs: int
    disk_bytes: float
    memory_bytes: float | None
    flops: float
    hours: float
    speed: str


def plan(experiment: Experiment, gpu: str) -> list[StageCost]:
    """The cost of each stage of a recipe on one GPU.

    gpu: a name in `GPUS`. Raises DmatError for another one, and ConfigError for a recipe that is not valid.
    """
    if gpu not in GPUS:
        raise DmatError(f"--gpu is {gpu!r}; expected one of {', '.join(GPUS)}")
    params, problems = config.check(dict(experiment.values))
    if params is None:
        raise ConfigError(experiment.name, problems)
    return _Planner(experiment, params, gpu).stages()


def notes(gpu: str, stages: Sequence[StageCost]) -> list[str]:
    """What a reader of a plan must know, and which stages do not fit into the memory of the GPU."""
    device = GPUS[gpu]
    return [
        f"{device.title}: {device.bf16 / 1e12:.0f} TFLOP/s dense in bf16, {device.fp32 / 1e12:.3g} in fp32, as "
        f"published; {device.memory / 1e9:.0f} GB. Utilisation {BF16_UTILISATION:.2f} of the bf16 peak and "
        f"{FP32_UTILISATION:.2f} of the fp32 peak: measured on an H200 in trainings of a WRN-28-10, stated elsewhere; "
        f"small networks reach far less.",
        "Hours leave out reading, saving and the CPU. AutoAttack counts images that stay robust: the published share "
        "of them, else all. Memory is an estimate; files in sources/ are not counted.",
        *(
            f"{cost.stage} needs more memory than the GPU has; {_ADVICE[cost.stage]}."
            for cost in stages
            if cost.memory_bytes and cost.memory_bytes > device.memory
        ),
    ]


class _Planner:
    def __init__(self, experiment: Experiment, params: Params, gpu: str):
        self.params, self.gpu = params, gpu
        source = params.prepare_data.source
        if source not in DATA_SETS:
            raise DmatError(f"recipe {experiment.name} has the source {source}; expected one of {', '.join(DATA_SETS)}")
        self.data: DataSet = DATA_SETS[source]
        self.shape = (self.data.channels, self.data.size, self.data.size)
        self.image_bytes = math.prod(self.shape) + 8  # with its label
        self.robust_share = experiment.published.get("auto_attack", 100.0) / 100
        self.networks: dict[Network, NetworkCost] = {}
        self.denoiser = functools.cache(self.new_denoiser)  # of a generator, which many image sets share

    def stages(self) -> list[StageCost]:
        params, prepared = self.params, self.params.prepare_data
        images = prepared.train + prepared.validation + prepared.test
        sets = {name: self.images_of(name) for name in params.image_sets}
        kept = [
            8 * selection.keep * sets[selection.image_set] if selection.keep < 1 else 0
            for selection in params.selections.values()
        ]
        scorer = self.classifier(params.train_scorer.network)
        arms, seeds = list(params.arms.values()), len(params.seeds)
        trainings = [self.training(arm) for arm in arms]
        largest = max(arms, key=lambda arm: self.memory(arm))
        evaluations = [self.evaluation(arm) for arm in arms]
        evaluated = max(self.classifier(arm.network).activations for arm in arms)
        return [
            self.cost("prepare_data", 1, images * self.image_bytes),
            self.cost(
                "train_scorer", 1, self.disk(params.train_scorer), self.training(params.train_scorer),
                memory=self.memory(params.train_scorer), network=params.train_scorer.network,
            ),
            self.denoisers(),
            self.generation(sets),
            self.cost("score_images", len(sets), sum(3 * 4 * count for count in sets.values()),
                      sum(sets.values()) * scorer.forward, network=params.train_scorer.network),
            self.cost("select_images", len(kept), sum(kept)),
            self.cost(
                "train_robust", len(arms) * seeds, seeds * sum(self.disk(arm) for arm in arms), seeds * sum(trainings),
                memory=self.memory(largest), network=largest.network,
            ),
            self.cost(
                "evaluate_robust", len(arms) * seeds, 0, seeds * sum(evaluations), fp32=True, network=largest.network,
                memory=params.evaluate_robust.batch * 4 * evaluated,
            ),
        ]  # fmt: skip

    def cost(
        self,
        stage: str,
        runs: int,
        disk: float,
        operations: float = 0.0,
        memory: float | None = None,
        fp32: bool = False,
        network: Network | None = None,
    ) -> StageCost:
        device = GPUS[self.gpu]
        per_second = device.fp32 * FP32_UTILISATION if fp32 else device.bf16 * BF16_UTILISATION
        measured = (  # in fp32 a training was measured, no evaluation
            not fp32
            and self.gpu == _MEASURED_ON
            and network is not None
            and (network.name, network.depth, network.width) == _MEASURED_NETWORK
        )
        speed = f"{per_second / 1e12:.0f} TFLOP/s, {'measured' if measured else 'stated'}" if operations else ""
        return StageCost(stage, runs, disk, memory, operations, operations / per_second / 3600, speed)

    def classifier(self, network: Network) -> NetworkCost:
        if network not in self.networks:
            zeros = (0.0,) * self.data.channels
            with torch.device("meta"):  # shapes only, no memory
                model = new_classifier(network, DataSpec(self.data.classes, self.data.channels, zeros, zeros), 0)
            self.networks[network] = network_cost(model, self.shape)
        return self.networks[network]

    def training(self, settings: ClassifierTraining) -> float:
        """Operations of a training and of its evaluations on the validation split."""
        forward = self.classifier(settings.network).forward
        per_image: float = flops.forward_passes_per_step(settings.loss, settings.attack_steps)
        if settings.awp_gamma:
            perturbed = flops.forward_passes_per_step(settings.loss, settings.attack_steps, perturbs_weights=True)
            per_image += (perturbed - per_image) * (1 - settings.awp_warmup)
        evaluations = math.ceil(settings.images_seen / settings.evaluate_every)
        judged = self.params.prepare_data.validation * (2 + 2 * settings.selection_steps)
        return forward * (settings.images_seen * per_image + evaluations * judged)

    def memory(self, settings: ClassifierTraining) -> float:
        """Weights, gradients, momentum and EMA, and the activations of the trained passes of a batch in bf16."""
        passes = 1 if settings.loss in ("standard", "pgd_at") else 2  # clean and adversarial, one backward pass
        cost = self.classifier(settings.network)
        return 4 * _WEIGHT * cost.parameters + 2 * passes * settings.batch * cost.activations

    def disk(self, settings: ClassifierTraining) -> float:
        """Best and last weights, and a checkpoint."""
        return (2 + _CHECKPOINT) * _WEIGHT * self.classifier(settings.network).parameters

    def evaluation(self, arm: Arm) -> float:
        """Operations of PGD on best and last weights and on the radii of the curve, and of AutoAttack."""
        settings = self.params.evaluate_robust
        images = settings.images or self.params.prepare_data.test
        suite = None if settings.auto_attack == NONE else auto_attack.suite(settings.auto_attack, self.data.classes)
        share, suite_passes = (None, 0) if suite is None else (self.robust_share, suite.passes)
        passes = costs.evaluation_passes(settings.pgd_steps, len(settings.sweep), share, suite_passes)
        return self.classifier(arm.network).forward * images * passes

    def images_of(self, name: str) -> int:
        image_set = self.params.image_sets[name]
        if image_set.images is not None:
            return image_set.images
        if image_set.source not in RELEASED_IMAGES:
            raise DmatError(
                f"image set {name}: nothing says how many images sources/{image_set.source} has; expected one of "
                f"{', '.join(RELEASED_IMAGES)}; give the set its number of images"
            )
        return RELEASED_IMAGES[image_set.source]

    def new_denoiser(self, generator: Generator) -> NetworkCost:
        """Of an imported model: the network of the section, which is that of the published weights in every recipe."""
        augments = 9 if generator.augment_probability else 0
        label_dim = self.data.classes if generator.conditional else 0
        spec = DenoiserSpec(self.data.size, self.data.size, self.data.channels, label_dim, augments)
        with torch.device("meta"):
            model = new_denoiser(generator.network, spec, formulations.EDM(generator.sigma_data), 0)
        return denoiser_cost(model.network, spec)

    def denoisers(self) -> StageCost:
        generators = self.params.generators.values()
        trained = [(generator, self.denoiser(generator)) for generator in generators if generator.source == NONE]
        imported = [self.denoiser(generator) for generator in generators if generator.source != NONE]
        disk = sum((1 + _CHECKPOINT) * _WEIGHT * cost.parameters for _, cost in trained)
        disk += sum(_WEIGHT * cost.parameters for cost in imported)
        memories = [
            5 * _WEIGHT * cost.parameters + 2 * generator.batch * cost.activations / generator.accumulation_steps
            for generator, cost in trained
        ]
        operations = sum(3 * generator.images_seen * cost.forward for generator, cost in trained)
        return self.cost("train_diffusion", len(trained) + len(imported), disk, operations, max(memories, default=None))

    def generation(self, sets: Mapping[str, int]) -> StageCost:
        operations = 0.0
        for name, count in sets.items():
            image_set = self.params.image_sets[name]
            if image_set.source == NONE:
                sampler = image_set.sampler
                passes = denoiser_calls(sampler.name, sampler.steps, sampler.guidance)
                operations += count * passes * self.denoiser(self.params.generators[image_set.generator]).forward
        return self.cost("generate_images", len(sets), sum(sets.values()) * self.image_bytes, operations)
