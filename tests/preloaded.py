"""All that a `kdkit` command imports: the processes that tests start are forked from one that has it."""

import gc
import os

import accelerate  # noqa: F401
import timm.data  # noqa: F401
import timm.optim  # noqa: F401
import timm.scheduler  # noqa: F401
import timm.utils  # noqa: F401
import torchmetrics.classification  # noqa: F401
import training  # noqa: F401

import kdkit.cli  # noqa: F401
import kdkit.runs.training  # noqa: F401
import kdkit.study.comparison  # noqa: F401
from kdkit.recipe import registry

registry.load()
os.environ["PYTHONPATH"] = os.environ["PYTHONPATH"].partition(os.pathsep)[2]  # without the folder of this module
gc.freeze()  # Accelerate collects garbage after every stage, and would look at all of it each time
