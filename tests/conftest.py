"""Shared set-up: one thread per process, so that results do not depend on the neighbours."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import torch

torch.set_num_threads(1)
