"""`params.yaml` as frozen, validated records: one module for each stage, and `params` for the whole file.

Limits are defined in the records only; messages are made from them.
"""

from dmat import NONE
from dmat.config.classifier_training import ClassifierTraining, Network
from dmat.config.combine_selections import Mixture
from dmat.config.compute import ComputeSettings
from dmat.config.diffusers_network import DiffusersNetwork, NoiseProcess
from dmat.config.evaluate_robust import EvaluateRobust
from dmat.config.fields import Record, WrittenNumber
from dmat.config.generate_images import GenerateImages, ImageSet, ImportedImageSet, Sampler
from dmat.config.measure_images import MeasureImages
from dmat.config.merging import merge
from dmat.config.mix_images import MixImages
from dmat.config.params import (
    LISTS,
    SECTIONS,
    Params,
    check,
    denoiser_network,
    diffusers_network,
    evaluation,
    expect_name,
    load,
    noise_process,
    threat,
)
from dmat.config.prepare_data import Normalisation, PrepareData
from dmat.config.renamed import denoiser_of_an_earlier_version
from dmat.config.score_images import ScoreImages
from dmat.config.select_images import SelectImages, Selection
from dmat.config.train_diffusion import DenoiserNetwork, DenoiserTraining, Generator, PublishedGenerator
from dmat.config.train_robust import Arm, Threat, TrainRobust, step_problem
from dmat.config.train_scorer import TrainScorer
from dmat.config.tune import IMAGE_SET, SELECTION, Choices, Dimension, Range, TrialSettings, Tune, nested_values
from dmat.config.write_report import Report, WriteReport

__all__ = [
    "IMAGE_SET",
    "LISTS",
    "NONE",
    "SECTIONS",
    "SELECTION",
    "Arm",
    "Choices",
    "ClassifierTraining",
    "ComputeSettings",
    "DenoiserNetwork",
    "DenoiserTraining",
    "DiffusersNetwork",
    "Dimension",
    "EvaluateRobust",
    "GenerateImages",
    "Generator",
    "ImageSet",
    "ImportedImageSet",
    "MeasureImages",
    "MixImages",
    "Mixture",
    "Network",
    "NoiseProcess",
    "Normalisation",
    "Params",
    "PrepareData",
    "PublishedGenerator",
    "Range",
    "Record",
    "Report",
    "Sampler",
    "ScoreImages",
    "SelectImages",
    "Selection",
    "Threat",
    "TrainRobust",
    "TrainScorer",
    "TrialSettings",
    "Tune",
    "WriteReport",
    "WrittenNumber",
    "check",
    "denoiser_network",
    "denoiser_of_an_earlier_version",
    "diffusers_network",
    "evaluation",
    "expect_name",
    "load",
    "merge",
    "nested_values",
    "noise_process",
    "step_problem",
    "threat",
]
