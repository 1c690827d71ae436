"""Value engines on CPUs as they are on GPUs: caches in pages, and attention that reads them where they lie."""

from functools import partial

import pytest

from qtilt.engine import cache
from qtilt.forwards import choice, probe
from qtilt.forwards.compiled import library
from qtilt.forwards.paged.attention import PagedAttention
from qtilt.forwards.paged.kernels import PagedKernels


def attend_over_pages(kernels: PagedKernels, patch: pytest.MonkeyPatch) -> None:
    """Every engine that is made runs transformers' modules, or vLLM's kernels, with attention by these."""
    patch.setattr(library, "_loaded", [])
    patch.setattr(choice, "choose_attention", lambda *_: partial(PagedAttention, kernels=kernels))
    for module in (cache, probe):
        patch.setattr(module, "has_one_piece", lambda _: False)
