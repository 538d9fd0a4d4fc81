"""Writes the two census manifests of timm's vision transformers. Kept, so that they can be redone.

    python manifests/timm_vits.py             timm-vits.toml: all that the installed timm has
    python manifests/timm_vits.py --paper     timm-vits-181.toml: the paper's 181, reconstructed

The second needs the timm of the paper's time, which the first does not; put it in front:

    pip install --no-deps --target /tmp/timm-1.0.9 timm==1.0.9
    PYTHONPATH=/tmp/timm-1.0.9 python manifests/timm_vits.py --paper
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import timm
import torch

PATTERN = "*vit*"
MAX_INPUT = 384
NUM_CLASSES = 1000
PAPER_TIMM = "1.0.9"
PAPER_COUNT = 181
FOLDER = Path(__file__).parent

PAPER_HEADER = """\
# 181 pretrained vision transformers: a reconstruction of the population of the paper's Fig. 4.
#
# The paper gives their number, not their names. Its code takes timm's pretrained models by the
# pattern "*vit*", with 1000 classes and input of at most 384 pixels, without "test_*": that is
# %d names in timm 1.0.9, the release of its time. Models that could not be loaded or ran out of
# memory, and those whose standard errors were above 15 %%, then fell out. Large models are the
# likeliest to, so here stand the 181 of those names with the fewest parameters, ties by name.
#
# What this cannot claim: that these are the paper's 181. It is a list of their number, their
# source and their kind, fixed and reproducible. The weights behind a name may have changed on the
# hub since; `flatcensus lock` pins them as they are now.
#
# Made by: python manifests/timm_vits.py --paper (with timm 1.0.9). Not to be edited by hand.
"""
ALL_HEADER = """\
# All %d pretrained vision transformers of timm %s that classify ImageNet-1k at up to 384
# pixels: the names that match "*vit*", with 1000 classes, without "test_*".
#
# Made by: python manifests/timm_vits.py. Run it again after an update of timm; a test reports the
# names that came or went.
"""
MEASUREMENTS = """
[data]
name = "hub"
repo = "ILSVRC/imagenet-1k"      # gated: accept its terms once, then set HF_TOKEN
split = "train"                  # the paper measures on training images
files = 1                        # of 294 Parquet files, in which the classes are mixed
samples = 100

[resources]
num_gpus = 1
num_cpus = 4
batch_size = 16
device = "h100"                  # for the plan's predictions; nothing else depends on it

[[measurements]]
metric = "normalized_mls"

[[measurements]]
metric = "adaptive_sharpness"
rho = 0.1

[[measurements]]
metric = "accuracy"              # wrong images, labels or preprocessing show here first

[[correlations]]
x = "normalized_mls"
y = "adaptive_sharpness"
max_relative_stderr = 0.15       # the paper's gate; what it leaves out is counted

[[correlations]]
x = "mls"
y = "adaptive_sharpness"
max_relative_stderr = 0.15
"""


class Model(NamedTuple):
    """One line of a list."""

    name: str
    family: str
    tag: str
    input_size: int
    parameters: int


def eligible() -> list[str]:
    """Names of the installed timm by the rule of the paper's code, in timm's order."""
    names = timm.list_models(PATTERN, pretrained=True)
    configs = {name: timm.get_pretrained_cfg(name) for name in names}
    return [
        name
        for name, config in configs.items()
        if config.num_classes == NUM_CLASSES
        and max(config.input_size) <= MAX_INPUT
        and not name.startswith("test_")
    ]


def describe(name: str) -> Model:
    """What timm builds under a name, with random weights."""
    architecture, _, tag = name.partition(".")
    # On the meta device nothing is allocated, but old releases of timm cannot be built there.
    with torch.device("cpu" if timm.__version__ == PAPER_TIMM else "meta"):
        model = timm.create_model(name)
    return Model(
        name=name,
        family=timm.model_entrypoint(architecture).__module__.rpartition(".")[2],
        tag=tag,
        input_size=timm.data.resolve_model_data_config(model)["input_size"][-1],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def manifest(name: str, header: str, models: list[Model]) -> str:
    """Text of a manifest that measures these models."""
    lines = [
        f'    {{ name = "{m.name}", family = "{m.family}", tag = "{m.tag}", '
        f"input_size = {m.input_size}, parameters = {m.parameters} }},"
        for m in models
    ]
    listed = "\n".join(["[[checkpoints]]", 'source = "timm"', "models = [", *lines, "]"])
    return f'{header}name = "{name}"\nseed = 0\n{MEASUREMENTS}\n{listed}\n'


def main(arguments: list[str]) -> None:
    """Write one of the two manifests."""
    warnings.filterwarnings("ignore")
    names = eligible()
    if arguments == ["--paper"]:
        if timm.__version__ != PAPER_TIMM:
            sys.exit(f"needs timm {PAPER_TIMM}, found {timm.__version__}. How to: {__doc__}")
        models = sorted(map(describe, names), key=lambda m: (m.parameters, m.name))[:PAPER_COUNT]
        name, header = f"timm-vits-{PAPER_COUNT}", PAPER_HEADER % len(names)
    elif not arguments:
        models = list(map(describe, names))
        name, header = "timm-vits", ALL_HEADER % (len(names), timm.__version__)
    else:
        sys.exit(__doc__)
    path = FOLDER / f"{name}.toml"
    path.write_text(manifest(name, header, models))
    print(f"{path}: {len(models)} models")


if __name__ == "__main__":
    main(sys.argv[1:])
