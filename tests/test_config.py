"""params.yaml: all problems of a file in one error with found and expected values; overrides; exact numbers."""

import copy
import math
import re
import shlex
import types
import warnings

import pytest
import yaml

from cli.main import main
from dmat import config, recipes, yaml_file
from dmat.config import WrittenNumber, names
from dmat.errors import ConfigError, DmatError
from dmat.robust.step_size import default_step

GENERATED = {"images": "edm18_best", "generated_share": 0.7}
VIT = {"name": "vit", "depth": 12, "width": 3, "activation": "gelu"}
PREACT = {"name": "preact_resnet", "depth": 18, "activation": "relu"}

# dotted key, its new value, fragments that the error must hold (besides the section)
BAD = [
    ("train_robust.beta", -1, ["is -1", "greater than or equal to 0"]),
    ("train_robust.beta", "five", ["is 'five'", "valid number"]),
    ("train_robust.betta", 5.0, ["is not known", "beta"]),
    ("train_robust.batch", 0, ["is 0", "greater than or equal to 1"]),
    ("train_robust.batch", 1.5, ["is 1.5", "valid integer"]),
    ("train_robust.images_seen", "many", ["is 'many'", "valid integer"]),
    ("train_robust.learning_rate", 0.0, ["is 0.0", "greater than 0"]),
    ("train_robust.learning_rate", float("nan"), ["is nan", "finite"]),
    ("train_robust.threat.epsilon", 8, ["epsilon 8 is larger than the pixel range", "8/255"]),
    ("train_robust.threat.epsilon", "8/0", ["is '8/0'", "8/255"]),
    ("train_robust.threat.epsilon", "eight", ["is 'eight'", "8/255"]),
    ("train_robust.threat.epsilon", 0, ["is 0", "above 0"]),
    ("train_robust.threat.norm", "l3", ["is 'l3'", "'linf' or 'l2'"]),
    ("train_robust.loss", "hinge", ["is 'hinge'", "'trades', 'standard', 'pgd_at', 'ikl', 'mart', 'lse' or"]),
    ("arms.generated", GENERATED | {"loss": "mart", "cutmix": 1.0}, ["loss 'mart'", "one label per image"]),
    ("arms.generated", GENERATED | {"loss": "consistency", "cutmix": 1.0}, ["two views of the same image"]),
    ("arms.generated", GENERATED | {"loss": "consistency", "batch": 63}, ["batch is 63", "an even number"]),
    ("arms.generated", GENERATED | {"loss": "standard", "awp_gamma": 0.01}, ["awp_gamma is 0.01 and loss"]),
    ("train_robust.awp_gamma", -0.01, ["is -0.01", "greater than or equal to 0"]),
    ("train_robust.schedule", "cyclic", ["is 'cyclic'", "'one_cycle', 'cosine' or 'step'"]),
    ("train_robust.milestones", [0.75, 0.5], ["milestones is [0.75, 0.5]", "rising fractions"]),
    ("train_robust.milestones", [0.5, 1.0], ["is 1.0", "less than 1"]),
    ("train_robust.momentum_lowest", 0.96, ["momentum_lowest is 0.96", "at most momentum_highest, 0.95"]),
    ("train_robust.attack_steps", 0, ["attack_steps is 0", "loss is 'trades'"]),
    ("train_robust.network.depth", 12, ["depth is 12", "6 n + 4"]),
    ("train_robust.network", PREACT | {"depth": 20}, ["depth is 20", "18 or 34"]),
    ("train_robust.network", PREACT | {"width": 4}, ["width is 4", "leave it out"]),
    ("train_robust.network", PREACT | {"name": "wide_resnet", "depth": 16}, ["width is missing", "1 or more"]),
    ("train_robust.cutmix", -1.0, ["is -1.0", "greater than or equal to 0"]),
    ("train_robust.cutmix_copies", 2, ["cutmix_copies is 2 and cutmix 0", "cutmix: 1.0"]),
    ("train_robust.cutmix_copies", 0, ["is 0", "greater than or equal to 1"]),
    ("arms.generated", GENERATED | {"cutmix": 1.0, "cutmix_copies": 7}, ["cutmix_copies is 7", "divisor of batch"]),
    ("train_robust.momentum", 1.0, ["is 1.0", "less than 1"]),
    ("train_robust.temperature", 0.0, ["is 0.0", "greater than 0"]),
    ("train_robust.patience", -1, ["is -1", "greater than or equal to 0"]),
    ("train_robust.on_divergence", "ignore", ["is 'ignore'", "'stop' or 'roll_back'"]),
    ("train_robust.real_sampling", "twice", ["is 'twice'", "'without_replacement' or 'reshuffled'"]),
    ("train_robust.generated_sampling", "twice", ["is 'twice'", "'with_replacement'"]),
    ("train_robust.batch_norm_momentum", 1.5, ["is 1.5", "less than or equal to 1"]),
    ("train_robust.start_divisor", 0.5, ["is 0.5", "greater than or equal to 1"]),
    ("train_robust.network.activation", "tanh", ["is 'tanh'", "'relu', 'silu' or 'gelu'"]),
    ("train_robust.network", VIT | {"width": 0}, ["width is missing", "1 or more"]),
    ("train_robust.network", VIT | {"name": "ra_wide_resnet", "depth": 12}, ["depth is 12", "6 n + 4"]),
    ("train_robust.label_smoothing", 2.0, ["is 2.0", "less than or equal to 1"]),
    ("train_robust.augmentation", "blur", ["is 'blur'", "'crop1'"]),
    ("arms.generated.generated_share", 1.0, ["generated_share is 1.0", "below 1", "every batch has real images"]),
    ("arms.generated.generated_share", 1.5, ["is 1.5", "less than or equal to 1"]),
    ("arms.generated.generated_share", 0.0, ["has generated_share 0.0", "above 0"]),
    ("arms.generated.images", "edm5_best", ["is 'edm5_best'", "expected one of edm18_best, or none"]),
    ("arms.generated.images", "none", ["generated_share 0.7 and images: none", "above 0 exactly where"]),
    ("arms.none", {"images": "none"}, ["the name 'none' cannot be used", "says that there is none"]),
    ("arms.real_only.generated_share", 0.5, ["has generated_share 0.5", "selection"]),
    ("arms.generated", 3, ["is 3", "mapping of overrides"]),
    ("arms", {}, ["is {}", "named entries"]),
    ("arms", [], ["is []", "named entries"]),
    ("seeds", [], ["is []", "[1, 2, 3]"]),
    ("seeds", [1, 1], ["is [1, 1]", "different"]),
    ("seeds", 1, ["is 1", "list"]),
    ("generators.edm.network.channels", 12, ["is 12", "multiple of 8"]),
    ("generators.edm.network.dropout", 1.0, ["is 1.0", "less than 1"]),
    ("generators.edm.network.multipliers", [], ["is []", "at least 1 item"]),
    ("generators.edm.network.name", "vit", ["is 'vit'", "'ddpmpp', 'ncsnpp' or 'adm'"]),
    ("generators.edm.network.attention", [4], ["unet attends at its lowest size alone"]),
    ("generators.edm.network.label_dropout", 0.1, ["label_dropout is 0.1; unet has none"]),
    ("generators.edm.source", "/data/edm.pkl", ["`ln -s /data/edm.pkl sources/edm.pkl`", "write edm.pkl"]),
    ("generators.edm.source", "sources/edm.pkl", ["expected a name below sources/; write edm.pkl"]),
    ("generators.edm.source", "../edm.pkl", ["expected a name below sources/"]),
    ("generators.edm.source", "", ["name of a file or folder in sources/"]),
    ("generators.edm", {"source": "edm.pkl", "seed": 2}, ["seed has no effect", "source edm.pkl is imported"]),
    ("image_sets.edm18.classes", [-1], ["is -1", "greater than or equal to 0"]),
    ("generators.e-m", {"source": "none"}, ["'e-m'", "letters, digits and underscores"]),
    ("generate_images.sampler.steps", 0, ["is 0", "greater than or equal to 1"]),
    ("generate_images.sampler.name", "dpm", ["is 'dpm'", "'unipc_3' or 'ipndm'"]),
    ("image_sets.edm18.sampler", {"name": "dpm"}, ["image_sets.edm18.sampler.name is 'dpm'", "'unipc_3' or 'ipndm'"]),
    ("image_sets.edm18.sampler", {"name": "ipndm", "s_churn": 1}, ["s_churn is 1", "ipndm has no churn"]),
    ("image_sets.edm18.sampler", {"schedule": "log_snr", "rho": 3}, ["rho is 3", "the schedule log_snr has none"]),
    ("image_sets.edm18.sampler.schedule", "cosine", ["is 'cosine'", "'vp', 've', 'iddpm' or 'searched'"]),
    ("image_sets.edm18.sampler", {"schedule": "ddpm", "steps": 2000}, ["steps is 2000", "at most 1000"]),
    ("image_sets.edm18.sampler", {"schedule": "ddpm", "sigma_max": 50}, ["sigma_max is 50", "leave it out"]),
    ("image_sets.edm18.sampler", {"schedule": "iddpm", "steps": 993}, ["steps is 993", "at most 992"]),
    ("image_sets.edm18.sampler", {"schedule": "iddpm", "rho": 5}, ["rho is 5", "schedule iddpm has none"]),
    ("image_sets.edm18.sampler", {"schedule": "vp", "sigma_min": 0.01}, ["sigma_min is 0.01", "schedule vp has none"]),
    ("image_sets.edm18.sampler", {"schedule": "ve", "rho": 5}, ["rho is 5", "the schedule ve has none"]),
    ("image_sets.edm18.sampler", {"s_noise": 1.003}, ["s_noise is 1.003 and s_churn 0", "above 0, or no s_noise"]),
    ("image_sets.edm18.sampler", {"s_churn": 4, "s_min": 3, "s_max": 2.0}, ["s_min is 3", "at most s_max, 2.0"]),
    ("generators.edm", {"source": "none", "formulation": "vp", "p_std": 1.0, "network": {"name": "ddpmpp"}},
     ["p_std is 1.0", "the formulation vp has its own noise levels"]),
    ("generators.edm", {"source": "none", "conditional": False, "network": {"name": "adm", "label_dropout": 0.1}},
     ["label_dropout is 0.1", "has no labels to leave out"]),
    ("generators.edm", {"source": "none", "snapshot_images": 1}, ["snapshot_images is 1", "or equal to 6"]),
    ("measure_images.images", 1, ["measure_images.images is 1", "greater than or equal to 6"]),
    ("measure_images.images", 50_001, ["measure_images.images is 50001", "less than or equal to 50000"]),
    ("measure_images.features", "vgg", ["measure_images.features is 'vgg'", "'efficientnet_lite0'"]),
    ("measure_images.features", "inception", ["measure_images.features_file is 'none'", "a file of its weights"]),
    ("measure_images.features_file", "x.pth", ["features_file is 'x.pth' and features 'scorer'; expected none"]),
    ("measure_images", {"images": 9, "near": 0.5, "features": "inception", "features_file": "/x.pth"},
     ["features_file is '/x.pth'", "ln -s /x.pth sources/x.pth"]),
    ("measure_images", {"images": 9, "near": 0.5}, ["features_file is missing; write features_file: none"]),
    ("image_sets.edm18.sampler.rho", 0.02, ["is 0.02", "greater than or equal to 0.5"]),
    ("image_sets.edm18.sampler.sigma_max", 1e30, ["is 1e+30", "less than or equal to 1000000"]),
    ("image_sets.edm18.sampler.steps", 10**9, ["is 1000000000", "less than or equal to 100000"]),
    ("generators.edm.network", {"name": "adm", "label_dropout": 1.0}, ["label_dropout is 1.0", "less than 1"]),
    ("generators.edm.network.blocks", 1000, ["is 1000", "less than or equal to 64"]),
    ("generators.edm.network.depth", 10, ["generators.edm.network.depth is not known", "one of name, channels"]),
    ("image_sets.edm18.sampler", {"S_churn": 3}, ["sampler.S_churn is not known", "one of name, steps"]),
    ("generators.edm.network.multipliers", 2, ["is 2", "expected a valid list"]),
    ("generators.edm.formulation", "vp", ["formulation is 'vp'", "unet embeds noise levels as EDM gives them"]),
    ("generators.edm.formulation", "flow", ["is 'flow'", "'edm', 'vp', 've', 'ddpm' or 'iddpm'"]),
    ("image_sets.edm18.sampler.guidance", -1, ["is -1", "greater than or equal to 0"]),
    ("image_sets.edm18.keep", 0.2, ["image_sets.edm18.keep is not known", "sampler"]),
    ("image_sets.empty", {}, ["image_sets.empty.generator is missing; expected one of edm", "empty.source is missing"]),
    ("image_sets.edm18.generator", "ddpm", ["is 'ddpm'", "expected one of edm"]),
    ("image_sets.edm18.generator", "none", ["generator is none, and source too", "a generator or a source"]),
    ("image_sets.edm18.sampler.guidance", 2, ["guidance is 2.0", "edm never learns to denoise without labels"]),
    ("image_sets.edm18.source", "a.npz", ["generator is 'edm' and source 'a.npz'", "expected none for one of them"]),
    ("image_sets.edm18.source", "../a.npz", ["is '../a.npz'", "expected a name below sources/"]),
    ("image_sets.edm18", {"generator": "edm", "source": "none"}, ["images is missing", "number of images to generate"]),
    ("image_sets.edm18", {"generator": "none", "source": "a.npz", "classes": [0]}, ["classes has no effect"]),
    ("selections.edm18_best.band", "best", ["is 'best'", "'easy', 'middle' or 'hard'"]),
    ("selections.edm18_best.score", "entropy", ["is 'entropy'", "'probability', 'margin' or 'certainty'"]),
    ("image_sets.edm18.images", 0, ["is 0", "greater than or equal to 1"]),
    ("generate_images.block", 300, ["shard is 2500 and block 300", "a multiple of block"]),
    ("select_images.keep", 0.0, ["is 0.0", "greater than 0"]),
    ("prepare_data.train", 0, ["is 0", "greater than or equal to 1"]),
    ("prepare_data.source", "imagenet", ["is 'imagenet'", "'digits', 'cifar10', 'cifar100', 'svhn', 'tinyimagenet',"]),
    ("prepare_data.validation_split", "last", ["is 'last'", "'stratified' or 'first'"]),
    ("prepare_data.normalisation", "svnh", ["is 'svnh'", "svhn, tinyimagenet, mnist, fashion_mnist, or a mapping of"]),
    ("prepare_data.normalisation", 0.5, ["is 0.5", "or a mapping of mean and std"]),
    ("prepare_data.normalisation", {"mean": [0.5]}, ["prepare_data.normalisation.std is missing"]),
    ("prepare_data.normalisation", {"mean": [0.5], "std": [0.0]}, ["normalisation.std.0 is 0.0", "greater than 0"]),
    ("prepare_data.normalisation", {"mean": [127.5], "std": [0.5]}, ["mean.0 is 127.5", "less than or equal to 1"]),
    ("evaluate_robust.auto_attack", "plus", ["is 'plus'", "'standard', 'quick', 'none' or a list"]),
    ("evaluate_robust.auto_attack", ["apgd-ce", "apgd-ce"], ["expected each attack once"]),
    ("evaluate_robust.auto_attack", [], ["is []", "or a list of some of apgd-ce"]),
    ("evaluate_robust.auto_attack", 3, ["is 3", "or a list of some of apgd-ce"]),
    ("evaluate_robust.pgd_loss", "kl", ["is 'kl'", "'cw' or 'dlr'"]),
    ("evaluate_robust.sweep", [0.5, 0.0], ["sweep.1 is 0.0", "greater than 0"]),
    ("evaluate_robust.images", -1, ["is -1", "greater than or equal to 0"]),
    ("evaluate_robust.check_images", 0, ["is 0", "greater than or equal to 1"]),
    ("evaluate_robust.shard", 0, ["is 0", "greater than or equal to 1"]),
    ("write_report.baseline", "nobody", ["is 'nobody'", "generated, real_only"]),
    ("compute.precision", "fp16", ["is 'fp16'", "'bf16'"]),
    ("train_robust.attack_steps", 0, ["attack_steps is 0", "loss: standard"]),
    ("train_robust.attack_step_size", float("inf"), ["is inf", "such as 8/255"]),
    ("train_robust.threat.epsilon", "-1/-5", ["is '-1/-5'", "such as 8/255"]),
    ("train_robust.threat.epsilon", "-1/5", ["is '-1/5'", "above 0"]),
    ("train_robust.threat.epsilon", "1_0/5_0", ["is '1_0/5_0'", "such as 8/255"]),
    ("train_robust.threat.epsilon", True, ["is True", "such as 8/255"]),
    ("train_robust.learning_rate", 1e300, ["is 1e+300", "less than or equal to 1000"]),
    ("train_robust.images_seen", 10**30, ["less than or equal to 1000000000000"]),
    ("train_scorer.seed", -1, ["is -1", "greater than or equal to 0"]),
    ("seeds", [2**63], ["is [9223372036854775808]", "whole numbers from 0"]),
    ("compute.threads", 99999999999, ["is 99999999999", "less than or equal to 4096"]),
    ("compute", 0, ["compute is 0", "mapping of keys"]),
    ("tune", 0, ["tune is 0", "mapping of keys"]),
    ("tune.space.beta.high", 1e300, ["is 1e+300", "less than or equal to 1000"]),
    ("train_robust.threat", 5, ["is 5", "mapping of keys"]),
    ("train_robust", 5, ["is 5", "mapping of keys"]),
    ("train_scorer.loss", "trades", ["is 'trades'", "'standard'"]),
    ("train_scorer.selection_steps", 3, ["selection_steps is 3", "expected 0"]),
    ("train_robust.threat.epsilon", "0", ["is '0'", "above 0"]),
    ("train_robust.attack_step_size", "1/4", ["attack_step_size is 1/4, larger than threat.epsilon 1/5", "a quarter"]),
    ("train_robust.selection_step_size", 0.3, ["selection_step_size is 0.3, larger than threat.epsilon 1/5"]),
    ("arms.generated.attack_step_size", "1/2", ["arms.generated.attack_step_size is 1/2, larger than", "1/5"]),
    ("evaluate_robust.pgd_step_size", "1/4", ["pgd_step_size is 1/4, larger than threat.epsilon 1/5", "arm generated"]),
    ("tune.space.attack_step_size", {"low": 0.01, "high": 0.3}, ["attack_step_size.high is 0.3", "at most epsilon"]),
    ("tune.overrides.attack_step_size", 0.3, ["tune.overrides.attack_step_size is 0.3, larger than", "1/5"]),
    ("prepare_data.source", "npz", ["path is 'none' and source 'npz'", "a file or folder in sources/"]),
    ("prepare_data.source", "cifar10", ["path is 'none' and source 'cifar10'", "a file or folder in sources/"]),
    ("prepare_data.path", "digits.npz", ["path is 'digits.npz' and source 'digits'", "expected path: none"]),
    (
        "prepare_data",
        {"source": "npz", "path": "/data/a.npz", "train": 1, "validation": 1, "test": 1, "seed": 1},
        ["path is '/data/a.npz'", "ln -s /data/a.npz sources/a.npz", "then write a.npz"],
    ),
    (
        "prepare_data",
        {"source": "npz", "path": "../a.npz", "train": 1, "validation": 1, "test": 1, "seed": 1},
        ["path is '../a.npz'", "below sources/"],
    ),
    ("generate_images.sampler.sigma_min", 100.0, ["sigma_min is 100.0", "80.0"]),
    ("image_sets.edm18", 5, ["image_sets.edm18 is 5", "mapping of overrides"]),
    ("selections.edm18_best.kep", 0.1, ["selections.edm18_best.kep is not known", "keep"]),
    ("selections.edm18_best.image_set", "edm5", ["selections.edm18_best.image_set is 'edm5'", "edm18"]),
    ("selections.edm18_best", {}, ["selections.edm18_best.image_set is missing", "edm18"]),
    ("selections.edm18-best", {"image_set": "edm18"}, ["'edm18-best'", "letters, digits and underscores"]),
    ("arms.generated.images", ["x"], ["is ['x']", "edm18"]),
    ("arms.real_only", {}, ["images is missing", "edm18_best, or none"]),
    ("image_sets", {}, ["is {}", "named entries"]),
    ("trian_robust", {}, ["trian_robust is not a section", "train_robust"]),
    ("tune.arm", "nobody", ["tune.arm is 'nobody'", "generated, real_only"]),
    ("tune.arm", "real_only", ["has generated_share", "real_only has no generated images"]),
    ("tune.trials", 0, ["tune.trials is 0", "greater than or equal to 1"]),
    ("tune.enqueue", [{"beta": 100.0}], ["tune.enqueue.0.beta is 100.0", "from 1.0 to 10.0"]),
    ("tune.space.images_seen", {"low": 1, "high": 2}, ["tune.space.images_seen", "could not be compared"]),
    ("tune.images_seen", 0, ["tune.images_seen is 0", "greater than or equal to 1"]),
    ("tune.evaluate_every", 10**6, ["tune.evaluate_every is 1000000", "at least one report"]),
    ("tune.pruner", "wilcoxon", ["is 'wilcoxon'", "'hyperband', 'median' or 'none'"]),
    ("tune.sampler", "cma", ["is 'cma'", "'tpe', 'gp' or 'random'"]),
    ("tune.space", {}, ["tune.space has 0 entries", "at least 1"]),
    ("tune.space.momentum", {"low": 0.0, "high": 1.0}, ["momentum.high is 1.0", "less than 1"]),
    ("tune.space.momentun", {"low": 0.0, "high": 0.9}, ["momentun is not known", "momentum_lowest"]),
    ("tune.space.beta.low", 10.0, ["low is 10.0 and high is 10.0", "low below high"]),
    ("tune.space.beta.low", 0.0, ["low is 0.0", "above 0, or scale: linear"]),
    ("tune.space.beta.scale", "cubic", ["is 'cubic'", "'linear' or 'log'"]),
    ("tune.space.beta", {"low": -1.0, "high": 5.0}, ["tune.space.beta.low is -1.0", "greater than or equal to 0"]),
    ("tune.space.learning_rate", {"low": 0.0, "high": 0.5}, ["learning_rate.low is 0.0", "greater than 0"]),
    ("tune.space.generated_share.high", 1.0, ["from 0.1 to 1.0", "one generated and one real"]),
    ("tune.overrides.bacth", 64, ["tune.overrides.bacth is not known", "batch"]),
    ("tune.overrides.images_seen", 64, ["tune.overrides gives images_seen", "leave it out"]),
    ("tune.overrides.beta", 3.0, ["tune.overrides gives beta, which tune.space varies", "leave it out"]),
    ("tune.overrides", {"network.width": 2}, ["network.width has a dot", "write network: {width: ...}"]),
    ("tune", [1], ["tune is [1]", "a mapping of keys"]),
    ("tune.trails", 3, ["tune.trails is not known", "did you mean trials?"]),
    ("tune.arm", "generatd", ["tune.arm is 'generatd'", "did you mean generated?"]),
    ("tune.space.beta", 3, ["tune.space.beta is 3", "expected {low: ..., high: ...}, or {choices: [...]}"]),
    ("tune.space.beta", [1, 2], ["tune.space.beta is [1, 2]", "expected {low: ..., high: ...}"]),
    ("tune.space.beta", {"low": 1.0, "hihg": 2.0}, ["beta.hihg is not known", "low, high and scale, or choices; did"]),
    ("tune.space.betta", {"low": 1.0, "high": 2.0}, ["tune.space.betta is not known", "did you mean beta?"]),
    ("tune.space", {"beta.x": {"low": 1, "high": 2}}, ["tune.space.beta.x is not known", "beta is a single value"]),
    ("tune.space", {"image_sets.x": {"low": 1, "high": 2}}, ["image_sets.x is not known", "did you mean image_set?"]),
    ("tune.enqueue", [{"betta": 3.0}], ["tune.enqueue.0.betta is not in the space", "did you mean beta?"]),
    ("measure_images", None, ["is missing", "near"]),
]


@pytest.fixture
def params(root):
    return yaml.safe_load((root / "params.yaml").read_text())


def _put(params, key, value):
    *path, last = key.split(".")
    for part in path:
        params[part] = params.get(part) or {}
        params = params[part]
    params[last] = value


def _load(tmp_path, params):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    return config.load(path)


def test_the_names_are_those_of_the_tables_of_functions():
    """A name without a function would fail late; a function without a name could not be used."""
    from dmat.data import augmentation, scores, sources
    from dmat.diffusion import formulations, samplers
    from dmat.diffusion.networks import NETWORKS as DENOISERS
    from dmat.robust import attacks, auto_attack, losses, networks

    tables = {
        "NETWORKS": networks.NETWORKS, "ACTIVATIONS": networks.ACTIVATIONS, "LOSSES": losses.LOSSES,
        "OBJECTIVES": attacks.OBJECTIVES, "ATTACKS": auto_attack.ATTACKS, "SCORES": scores.SCORES,
        "AUGMENTATIONS": augmentation.AUGMENTATIONS, "SOURCES": sources.SOURCES, "DENOISERS": DENOISERS,
        "FORMULATIONS": formulations.FORMULATIONS, "BETA_SCHEDULES": formulations.BETA_SCHEDULES,
        "PREDICTION_TYPES": formulations.PREDICTION_TYPES, "SAMPLERS": samplers.SAMPLERS, "CHURNED": samplers.CHURNED,
    }  # fmt: skip
    settings = types.SimpleNamespace(sigma_data=0.5, p_mean=-1.2, p_std=1.2)
    ranges = {name: of(settings).sigma_range for name, of in formulations.FORMULATIONS.items()}
    tables["WITHOUT_LIMITS"] = [name for name, limits in ranges.items() if limits == (0, math.inf)]
    tables["SOURCES_WITH_FILES"] = [name for name in sources.SOURCES if name != "digits"]
    listed = {name: value for name, value in vars(names).items() if isinstance(value, tuple)}
    assert listed == {name: tuple(table) for name, table in tables.items()}
    assert (names.MAX_STEPS, names.SEARCHED) == (samplers.MAX_STEPS, samplers.SEARCHED)


def test_names_of_losses_in_the_checks_are_those_of_the_losses(root):
    """The checks of `config` name losses, because it loads no table of functions."""
    from dmat.robust import losses

    section = yaml.safe_load((root / "params.yaml").read_text())["train_robust"]
    for name in losses.LOSSES:
        copies = config.TrainRobust.model_validate(section | {"loss": name}).copies
        assert copies == (2 if name in losses.WITH_TWO_VIEWS else 1)
        mixes = name not in (*losses.WITH_TWO_VIEWS, *losses.WITHOUT_MIXED_TARGETS)
        if mixes:
            config.TrainRobust.model_validate(section | {"loss": name, "cutmix": 1.0})
        else:
            with pytest.raises(ValueError, match=r"cutmix is 1\.0"):
                config.TrainRobust.model_validate(section | {"loss": name, "cutmix": 1.0})


@pytest.mark.parametrize(("key", "value", "fragments"), BAD, ids=[f"{key}={value}"[:50] for key, value, _ in BAD])
def test_invalid_parameters_are_explained(tmp_path, params, monkeypatch, capsys, key, value, fragments):
    """By the command itself: exit code 2, one list on stderr, no traceback, no file written."""
    _put(params, key, value)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    monkeypatch.setattr("sys.argv", ["dmat", "prepare-data", "--params", str(path)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    text = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert text.startswith(f"error: {path}: ")
    assert "Traceback" not in text
    assert key.partition(".")[0] in text
    assert all(fragment in text for fragment in fragments), text
    assert [path_left.name for path_left in tmp_path.iterdir()] == ["params.yaml"]


def test_all_problems_are_listed_once(tmp_path, params):
    for key, value in (("train_robust.beta", -1), ("prepare_data.train", 0), ("compute.device", "tpu")):
        _put(params, key, value)
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, params)
    assert len(caught.value.problems) == 3, str(caught.value)
    assert "3 problems" in str(caught.value)


def test_missing_and_malformed_files_are_refused(tmp_path):
    with pytest.raises(DmatError, match=r"does not exist; .*`dmat recipes"):
        config.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("5")
    with pytest.raises(ConfigError, match="mapping of sections"):
        config.load(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("seeds: [1]\narms: {}\nseeds: [2]\n", ["seeds is given twice, in lines 1 and 3", "keep one"]),
        ("arms: {a: {beta: 1.0, beta: 2.0}}", ["beta is given twice, in lines 1 and 1"]),
        ("seeds:\n- [" + "9" * 5000 + "]", ["line 2: a number of 5000 digits", "at most 300"]),
        ("seeds: [0x" + "f" * 5000 + "]", ["line 1: a number of 5002 digits"]),
        ("- " * 600, ["not readable: nested too deeply"]),
        ("a:\n  &x b: &y [*y]", ["line 2: holds itself"]),
        ("a: &a [1]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 40}]\n" for a, b in ("ab", "bc", "cd", "de")),
         ["aliases make more than 1,000,000 entries"]),
        ("a: 1\nseeds: [1, 2024-01-01]", ["line 2: 2024-01-01 is read as a date", "in quotes"]),
        ("a: !!python/object/apply:os.getpid []", ["line 1", "python/object/apply:os.getpid"]),
        ("a: 1\nb: !!int x", ["line 2: 'x' cannot be read"]),
        ("a: 1\n---\nb: 2\n", ["line 2", "another document", "keep one"]),
        ("a: 1\nb: \x07", ["line 2", "special characters"]),
        ("%YAML 1.9\n---\na: 1", ["not valid YAML: version"]),
    ],
    ids=["section twice", "key twice", "huge number", "huge hexadecimal", "nested", "loop", "many aliases",
         "date", "tag", "wrong tag", "two documents", "control character", "version"],
)  # fmt: skip
def test_ambiguous_yaml_is_refused(tmp_path, text, fragments):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path / "params.yaml")
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


@pytest.mark.parametrize("key", ["1", "010", "1e3", "0x1f", "2024-01-01", "true", "~", "1_0", ".5"])
def test_keys_that_dvc_drops_are_refused_with_their_line(root, tmp_path, key):
    """DVC would silently create no stage for this entry of a list."""
    path = tmp_path / "params.yaml"
    text = (root / "params.yaml").read_text()
    path.write_text(text.replace("arms:\n", f"arms:\n  {key}: {{images: none}}\n", 1))
    line = path.read_text().splitlines().index("arms:") + 2
    with pytest.raises(
        ConfigError, match=rf"line {line}: the key {re.escape(key)} is read as .*begin it with a letter"
    ):
        config.load(path)


def test_a_file_is_parsed_as_dvc_parses_it(root):
    """Parser and YAML version are those of DVC: YAML 1.2, or that of a %YAML line."""
    from dvc.utils.serialize import parse_yaml

    scalars = shlex.split(
        """0100 0o10 0x10 +1 -1 1_000 1e5 1e-5 1e+16 1E5 .5 1. .5e1 1:30 1:30:00 no yes on off y true True null ~
        .inf -.Inf .nan 1e400 08 00 -0 0b11 8/255 '1e5' "010" 1__0 e5 infinity nan""",
        posix=False,
    )
    merges = "base: &b {x: 1, y: [1, 2]}\nuser:\n  <<: *b\n  y: 010\nagain: *b\n"
    lists = "".join(f"k{n}: {scalar}\n" for n, scalar in enumerate(scalars))
    texts = [
        lists,
        f"%YAML 1.1\n---\n{lists}",
        f"%YAML 1.2\n---\n{lists}",
        merges,
        f"\ufeff{lists}",
        "a: |\n  x\n  y\n",
    ]
    for text in [*texts, (root / "params.yaml").read_text(), (root / "dvc.yaml").read_text()]:
        with warnings.catch_warnings(action="ignore"):
            dvc_value = parse_yaml(text, "x")
        assert repr(yaml_file.parse(text).value) == repr(dvc_value)


@pytest.mark.parametrize(
    ("original", "replacement", "line_start", "fragments"),
    [
        ("label_smoothing: 0.1", "label_smoothing:0.1", "  label_smoothing:0.1", ["a space after the colon"]),
        ("  batch: 256", "\tbatch: 256", "\tbatch: 256", ["spaces, not with tabs"]),
        ("title: Robust", "title: Mix: Robust", "  title: Mix", ["text with a colon in quotes"]),
        ("seeds: [1]", "seeds: [1", "seeds: [1", ["expected ',' or ']'", "close the bracket"]),
        ("title: Robust", "title: 'Robust", "  title: 'Robust", ["unexpected end of stream", "close the quotes"]),
        ("title: Robust", "title: *Robust", "  title: *Robust", ["undefined alias", "in quotes"]),
        ("title: Robust", "title: @Robust", "  title: @Robust", ["cannot start any token", "in quotes"]),
        ("  beta: 5.0", "   beta: 5.0", "   beta: 5.0", ["mapping values", "alike"]),
        ("  beta: 5.0", " beta: 5.0", " beta: 5.0", ["expected <block end>", "alike"]),
        ("  beta: 5.0", "  beta: -5.0", "  beta: -5.0", ["train_robust.beta is -5.0"]),
        ("  beta: 5.0", "  beta: 5.0\n  betta: 5.0", "  betta: 5.0", ["train_robust.betta is not known"]),
        ("  beta: 5.0", "  beta: 5.0\n  beta: 4.0", "  beta: 4.0", ["beta is given twice, in lines"]),
        ("  loss: trades\n", "", "train_robust:", ["train_robust.loss is missing"]),
        ("seeds: [1]", "seeds: [1, 1]", "seeds: [1, 1]", ["seeds is [1, 1]"]),
        ("epsilon: 1/5", "epsilon: 0/5", "  threat:", ["threat.epsilon is '0/5'"]),
        ("depth: 10, width: 1, activation: silu}\n  threat", "depth: 11, width: 1, activation: silu}\n  threat",
         "  network: {name: wide_resnet, depth: 11", ["train_robust.network.depth is 11"]),
        ("_share: 0.7", "_share: 7", "    generated_share: 7", ["arms.generated.generated_share is 7"]),
        ("learning_rate: {low: 0.02", "learning_rate: {low: 0.9", "    learning_rate: {low", ["low is 0.9 and high"]),
        ("images: 10000}", "images: -1}", "  edm18:", ["image_sets.edm18.images is -1"]),
        ("baseline: real_only", "baseline: nobody", "  baseline", ["write_report.baseline is 'nobody'"]),
        ("  edm18_best: {", "  edm18-best: {", "  edm18-best", ["selections.edm18-best: the name 'edm18-best'"]),
    ],
)  # fmt: skip
def test_problems_name_their_line(root, tmp_path, original, replacement, line_start, fragments):
    path = tmp_path / "params.yaml"
    text = (root / "params.yaml").read_text()
    assert original in text
    path.write_text(text.replace(original, replacement, 1))
    (line, *_) = [n for n, line_text in enumerate(path.read_text().splitlines(), 1) if line_text.startswith(line_start)]
    with pytest.raises(ConfigError) as refused:
        config.load(path)
    assert f"line {line}: " in str(refused.value), (line, str(refused.value))
    assert all(fragment in str(refused.value) for fragment in fragments), str(refused.value)


def test_a_file_that_is_not_utf_8_names_the_line(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes("a: 1\nb: caf\xe9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="line 2: not UTF-8"):
        config.load(path)


@pytest.mark.parametrize(
    ("setting", "value_text", "advice"),
    [
        ("  batch: 128", "1e2", "100"),
        ("  batch: 128", "'128'", "128"),
        ("  batch: 128", "100.0", "100"),
        ("  weight_decay: 0.0005", "'1e-5'", "1e-05"),
        ("  weight_decay: 0.0005", "' 5e-4'", "0.0005"),
        ("  weight_decay: 0.0005", ".5e-3", None),
        ("  weight_decay: 0.0005", "1e-5", None),
        ("  weight_decay: 0.0005", ".5e1", "5.0"),
        ("  cycle_momentum: true", "no", "false"),
        ("  cycle_momentum: true", "On", "true"),
        ("  cycle_momentum: true", "Y", "true"),
    ],
)
def test_following_the_advice_is_accepted(root, tmp_path, setting, value_text, advice):
    """The value that a message recommends is accepted. advice: None if the value is valid."""
    path, (name, _, old) = tmp_path / "params.yaml", setting.partition(": ")
    before, section, after = (root / "params.yaml").read_text().partition("train_robust:")
    assert f"{name}: {old}" in after

    def put(value):
        path.write_text(before + section + after.replace(f"{name}: {old}", f"{name}: {value}", 1))

    put(value_text)
    if advice is not None:
        with pytest.raises(ConfigError) as refused:
            config.load(path)
        assert str(refused.value).rpartition("write ")[2].rstrip(")") == advice, str(refused.value)
        put(advice)
    config.load(path)


def test_no_advice_where_no_value_can_be_guessed(tmp_path, params):
    for key, value in (("train_robust.beta", "inf"), ("train_robust.batch", "1.5"), ("train_robust.batch", 1.5)):
        changed = copy.deepcopy(params)
        _put(changed, key, value)
        with pytest.raises(ConfigError) as refused:
            _load(tmp_path, changed)
        assert "write " not in str(refused.value)


@pytest.mark.parametrize(
    ("norm", "epsilon", "attack", "selection", "pgd"),
    [
        ("linf", "1/5", 1 / 20, 1 / 20, 1 / 20),
        ("linf", "8/255", 2 / 255, 2 / 255, 2 / 255),
        ("l2", "128/255", 2 * 128 / 255 / 10, 2 * 128 / 255 / 40, 2 * 128 / 255 / 20),
    ],
)
def test_step_sizes_follow_epsilon(tmp_path, params, norm, epsilon, attack, selection, pgd):
    """Changing epsilon takes one edit. Oracle: Wang et al.: 2/255 for 8/255; their l2 code: 2 epsilon / steps."""
    params["train_robust"]["threat"] = {"norm": norm, "epsilon": epsilon}
    params["evaluate_robust"]["pgd_steps"] = 20
    loaded = _load(tmp_path, params)
    arm = loaded.arms["generated"]
    step_sizes = (arm.attack_step_size, arm.selection_step_size)
    assert step_sizes == pytest.approx((attack, selection), rel=1e-15)
    assert arm.plain()["attack_step_size"] == str(float(arm.attack_step_size)), "readable and exact"
    evaluation = loaded.evaluate_robust
    assert evaluation.pgd_step(norm, arm.threat.epsilon) == pytest.approx(pgd, rel=1e-15)
    assert loaded.trial.with_values({"beta": 2.0}).arm.attack_step_size == pytest.approx(attack, rel=1e-15)
    assert float(WrittenNumber(loaded.trial.value_of("attack_step_size"))) == pytest.approx(attack, rel=1e-15)


def test_explicit_step_sizes_stay_and_defaults_follow_the_epsilon_of_each_arm(tmp_path, params):
    params["train_robust"]["attack_step_size"] = "1/40"
    params["arms"]["generated"]["threat"] = {"epsilon": "1/10"}
    params["evaluate_robust"]["pgd_step_size"] = 0  # what a command writes where no value was given
    arms = _load(tmp_path, params).arms
    assert {name: (arm.attack_step_size.text, float(arm.selection_step_size)) for name, arm in arms.items()} == {
        "generated": ("1/40", 0.025), "real_only": ("1/40", 0.05)}  # fmt: skip
    assert default_step("l2", 0.5, 1) == 0.5, "a step never leaves the ball"


def test_an_arm_overrides_only_its_own_settings(tmp_path, params):
    params["arms"]["generated"] |= {"beta": 3.0, "threat": {"epsilon": "1/10"}}
    loaded = _load(tmp_path, params)
    assert loaded.arms["generated"].beta == 3.0
    assert loaded.arms["generated"].threat.norm == "linf"
    assert loaded.arms["generated"].threat.epsilon.text == "1/10"
    assert loaded.arms["real_only"].beta == 5.0
    assert loaded.arms["real_only"].threat.epsilon.text == "1/5"


def test_fractions_stay_as_written():
    assert WrittenNumber("8/255") == 8 / 255
    assert WrittenNumber("8/255").text == "8/255"
    assert copy.deepcopy(WrittenNumber("8/255")).text == "8/255"
    assert WrittenNumber(0.5).text == "0.5"


def test_records_are_frozen(root):
    params = config.load(root / "params.yaml")
    with pytest.raises(ValueError, match="frozen"):
        params.arms["real_only"].beta = 1.0


def test_l2_radius_may_exceed_one(tmp_path, params):
    params["train_robust"]["threat"] = {"norm": "l2", "epsilon": 2}
    assert _load(tmp_path, params).arms["real_only"].threat.epsilon == 2.0


OLD = """
generate_images: {chunk: 5000, shard: 2500, block: 500, seed: 1, sampler: {name: heun, steps: 18}}
image_sets: {edm18: {}}
chunks:
  edm18-0000: {image_set: edm18, generator: edm, index: 0}
  edm18-0001: {image_set: edm18, generator: edm, index: 1}
arms:
  real_only: {images_from: artifacts/prepare_data/train, average_tau: 0.99}
  warm_up: {images: none}
  generated: {images_from: artifacts/select_images/edm18_best, images: 640}
prepare_data: {source: digits, train: 250, validation: 297, test: 1000, seed: 1}
train_scorer: {images: 64000, warm_up: 0.1}
train_diffusion: {average_half_life: 88000, channels: 32, multipliers: [1, 2]}
generators: {edm: {}, wide: {channels: 64, source: none}}
tune: {warm_up_images: 640, space: {average_warm_up: {low: 0, high: 0.1}}, enqueue: [{warm_up: 0.2}]}
"""


def test_a_file_of_an_earlier_version_is_refused_with_the_new_keys(tmp_path):
    (tmp_path / "params.yaml").write_text(OLD)
    with pytest.raises(ConfigError) as refused:
        config.load(tmp_path / "params.yaml")
    problems = refused.value.problems
    assert len(problems) == 16, problems
    for fragment in (
        "line 4: chunks is no longer a list",
        "write image_sets: {edm18: {generator: edm, source: none, images: 10000}}",
        "generate_images.chunk is 5000",
        "write images: none in its place",
        "write images: edm18_best in its place",
        "arms.generated.images is 640; the length of a training is called images_seen",
        "train_scorer.images is 64000",
        "write path: none",
        "arms.real_only.average_tau is no longer a key; the setting is called ema_decay: write that",
        "train_scorer.warm_up is no longer a key; the setting is called warmup: write that",
        "train_diffusion.average_half_life is no longer a key; the setting is called ema_half_life: write that",
        "train_diffusion.channels is no longer a key; the network has a section of its own: write "
        "network: {name: unet, channels: 32, multipliers: [1, 2]}",
        "generators.wide.channels is no longer a key; the network has a section of its own: write "
        "network: {channels: 64}",
        "generators.edm.source is missing; expected `source: none` for a model that is trained here",
        "tune.warm_up_images is no longer a key; the setting is called warmup_images: write that",
        "tune.space.average_warm_up is no longer a key; the setting is called ema_warmup: write that",
        "tune.enqueue.0.warm_up is no longer a key; the setting is called warmup: write that",
    ):
        assert any(fragment in problem for problem in problems), (fragment, problems)


def test_settings_of_an_earlier_version_get_their_new_names():
    """As a sidecar holds them: every old name, and no other."""
    old = ("average_tau", "average_warm_up", "average_half_life", "warm_up", "warm_up_images", "x")
    network = {"channels": 8, "multipliers": [1, 2], "blocks": 1, "dropout": 0.2}
    settings = {name: number for number, name in enumerate(old, 1)} | network
    expected = {"ema_decay": 1, "ema_warmup": 2, "ema_half_life": 3, "warmup": 4, "warmup_images": 5, "x": 6}
    expected["network"] = {"name": "unet", **network}
    assert config.denoiser_of_an_earlier_version(settings) == expected


def test_an_arm_names_a_selection_an_image_set_and_a_generator(tmp_path, params):
    """The chain of lists: an arm names a selection, a selection an image set, an image set a generator."""
    params["image_sets"] = {"edm1m": {"generator": "edm", "source": "none", "images": 1_000_000}}
    params["selections"] = {"edm1m_best": {"image_set": "edm1m"}}
    params["arms"]["generated"]["images"] = "edm1m_best"
    loaded = _load(tmp_path, params)
    assert loaded.image_sets[loaded.selections[loaded.arms["generated"].images].image_set].images == 1_000_000
    assert loaded.arms["real_only"].images == config.NONE


def test_generators_may_be_empty_where_no_image_set_names_one(params):
    params["generators"] = {}
    message = "image_sets.edm18.generator is 'edm'; expected one of (none defined), or none"
    assert config.check(copy.deepcopy(params))[1] == [message]
    params["image_sets"]["edm18"] = {"generator": "none", "source": "released.npz"}
    checked, problems = config.check(params)
    assert (problems, checked.generators) == ([], {})


@pytest.mark.parametrize(
    ("formulation", "sampler", "inside"),
    [
        ("ddpm", {"schedule": "ddpm", "steps": 50}, True),
        ("ddpm", {"schedule": "edm"}, False),  # from 80 to 0.002: below the first step of DDPM
        ("vp", {"schedule": "vp"}, True),
        ("ve", {"sigma_min": 0.02, "sigma_max": 100.0}, True),
        ("ve", {"sigma_min": 0.02, "sigma_max": 100.0, "s_churn": 5}, False),
        ("edm", {"sigma_max": 1e6}, True),
        ("iddpm", {"schedule": "searched", "sigma_min": 0.02}, True),  # known only when the model is there
    ],
)
def test_noise_levels_must_be_those_that_a_generator_learns(params, formulation, sampler, inside):
    network = {"name": "ddpmpp", "channels": 8, "multipliers": [1], "blocks": 1, "dropout": 0.0}
    params["generators"]["edm"] = {"source": "none", "formulation": formulation, "network": network}
    params["image_sets"]["edm18"] = {"generator": "edm", "source": "none", "images": 10, "sampler": sampler}
    _, problems = config.check(params)
    assert [problem.partition(" calls")[0] for problem in problems] == ([] if inside else ["image_sets.edm18.sampler"])


def test_an_unconditional_generator_maps_no_classes(params):
    params["generators"]["edm"] = {"source": "none", "conditional": False}
    params["image_sets"]["edm18"]["classes"] = [0]
    _, (problem,) = config.check(params)
    assert problem == "image_sets.edm18.classes has no effect, as generator edm is not conditional; leave it out"


@pytest.mark.parametrize("name", recipes.summaries())
def test_every_recipe_is_valid(name, tmp_path):
    recipes.use(name, tmp_path / "params.yaml")
    assert config.load(tmp_path / "params.yaml").arms
