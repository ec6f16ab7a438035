"""Imports of the server process of tests/forked.py before its first fork: all that jobs import, early or late."""

import importlib

import matplotlib.pyplot as plt
import plotly.express
import pyarrow.parquet
import sklearn.datasets
import torch
from pyautoattack import AutoAttack

from cli import main
from dmat.pipeline import STAGES, execution
from dmat.tuning import studies

for _stage_name in STAGES:
    importlib.import_module(f"dmat.jobs.{_stage_name}")
torch.set_num_threads(1)
LOADED = (plt, plotly.express, studies, pyarrow, sklearn, AutoAttack, main, execution)
