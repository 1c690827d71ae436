"""Guided distributions under the V1 model runner: tests/guided_vllm/exactness.py, swapping.py."""

from guided_vllm.exactness import *
from guided_vllm.swapping import *
