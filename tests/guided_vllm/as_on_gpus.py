"""Guidance on CPUs as it is on GPUs: caches in pages, attention that reads them where they lie, the tilt by Triton."""

from functools import partial

import pytest

from qtilt.engine import cache
from qtilt.forwards import choice, probe
from qtilt.forwards.compiled import library
from qtilt.forwards.paged.attention import PagedAttention
from qtilt.forwards.paged.kernels import PagedKernels
from qtilt.forwards.triton_tilt import tilt as triton_tilt
from qtilt.vllm_plugin import processor, versions


def run_as_on_gpus(kernels: PagedKernels, patch: pytest.MonkeyPatch) -> None:
    """Every engine that is made runs transformers' modules, or vLLM's kernels, with attention by these."""
    patch.setattr(library, "_loaded", [])
    patch.setattr(processor, "load_compiled_parts", lambda _: None)
    patch.setattr(choice, "choose_attention", lambda *_: partial(PagedAttention, kernels=kernels))
    patch.setattr(versions, "choose_tilt", lambda _: triton_tilt)
    for module in (cache, probe):
        patch.setattr(module, "has_one_piece", lambda _: False)
