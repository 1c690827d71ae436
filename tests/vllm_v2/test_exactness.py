"""Guided distributions under Model Runner V2: tests/guided_vllm/exactness.py, swapping.py."""

from guided_vllm.exactness import *
from guided_vllm.swapping import *
