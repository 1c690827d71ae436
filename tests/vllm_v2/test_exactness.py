"""Guided distributions under Model Runner V2: the tests of tests/guided_vllm."""

from guided_vllm.equality import *
from guided_vllm.exactness import *
from guided_vllm.sampling import *
from guided_vllm.seeds import *
from guided_vllm.swapping import *
