"""Imports of the server process of tests/forked.py before its first fork: all that jobs import, early or late."""

import importlib

import matplotlib.pyplot as plt
import plotly.express
import pyarrow.parquet
import sklearn.datasets
import torch
import torch._dynamo  # by optimisers
import torch_fidelity
from pyautoattack import AutoAttack

from cli import main
from dmat.pipeline import STAGES, code_identity, execution
from dmat.tuning import studies

for _stage_name in STAGES:
    importlib.import_module(f"dmat.jobs.{_stage_name}")
    code_identity.of_stage(_stage_name)  # parses source files, which is remembered by their content
torch.set_num_threads(1)
LOADED = (plt, plotly.express, studies, pyarrow, sklearn, torch._dynamo, torch_fidelity, AutoAttack, main, execution)
