"""Tests of memory: tiled blocks, tiled loss, checkpoints, tracker."""

import torch._dynamo  # the first dispatch mode imports it, which sets an environment variable  # noqa: F401
