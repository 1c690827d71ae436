"""What Triton makes of our kernels for GPUs, compiled without one: their numbers are tested in tests/vllm_v2."""

import re
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qtilt.forwards.paged import programs
from qtilt.forwards.paged.kernels import LayerPages
from qtilt.forwards.paged.triton_kernels import WARPS, attention_blocks
from qtilt.forwards.triton_tilt import programs as tilt_programs
from qtilt.forwards.triton_tilt.tilt import BLOCK

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SHARED_BYTES = 99 * 1024
"""Of the cards that have least: consumer ones, A10, L4."""
KV_HEADS = 8


def compiled(
    program: Any,
    constants: Mapping[str, Any],
    dtype: torch.dtype,
    capability: int,
    *,
    is_aligned: bool = True,
    in_float64: Sequence[str] = (),
) -> Any:
    """For an NVIDIA card of this compute capability; with tensors and strides that are multiples of 16, as most are."""
    types = {
        "scaling": "fp32",
        "tail": "i32",
        "k": "i32",
        "size": "i32",
        "lses": "*fp32",
        "keys": "*i64",
        "key_of_nothing": "i64",
        "rounding": "fp32",
        "parts": "i32",
        "atoms": "i32",
    }
    types |= dict.fromkeys(("pages_of_rows", "lengths", "starts"), "*i32")
    types |= dict.fromkeys(("are_valid", "are_scored"), "*i1") | dict.fromkeys(("tokens", "top_ks"), "*i64")
    types |= dict.fromkeys(in_float64, "*fp64")
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32" if "stride" in name else TYPES[dtype])
        for name in program.arg_names
    }
    multiples = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(program.arg_names)
        if is_aligned and (signature[name].startswith("*") or "stride" in name)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton announces other defaults of its options
        return triton.compile(
            ASTSource(program, signature, constants, multiples),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": WARPS},
        )


def stack_bytes(kernel: Any, directory: Path) -> int:
    """What of a program's numbers doesn't find registers, by NVIDIA's own tool."""
    (directory / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", directory / "kernel.cubin"], capture_output=True, text=True, check=True)
    (stack,) = re.findall(r"STACK:(\d+)", usage.stdout)
    return int(stack)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "head_size", "group", "tokens"),
    [
        (torch.float32, 64, 3, 21),
        (torch.float32, 256, 8, 21),
        (torch.bfloat16, 64, 4, 1),
        (torch.bfloat16, 128, 4, 65),
        (torch.float16, 80, 1, 21),
    ],
)
def test_attention_fits_a_gpu(
    dtype: torch.dtype, head_size: int, group: int, tokens: int, capability: int, tmp_path: Path
) -> None:
    query_XHD = torch.empty(tokens, KV_HEADS * group, head_size, dtype=dtype)
    pages = LayerPages(*(torch.empty(1, KV_HEADS, 32, head_size, dtype=dtype) for _ in range(2)))
    for tails, is_aligned in product((False, True), repeat=2):
        constants = attention_blocks(query_XHD, pages, tokens, tails=tails)
        kernel = compiled(programs.attend, constants, dtype, capability, is_aligned=is_aligned)
        assert kernel.metadata.shared <= SHARED_BYTES
        assert stack_bytes(kernel, tmp_path) <= 64


@pytest.mark.parametrize(("tails", "only_numbers"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", TYPES)
def test_what_stores_and_merges_compiles(dtype: torch.dtype, tails: bool, only_numbers: bool) -> None:
    sizes = {"KV_HEADS": KV_HEADS, "SIZE": 80}
    stores = {"PAGE": 32, "BLOCK": 1024, "TAILS": tails, "ONLY_NUMBERS": only_numbers}
    compiled(programs.store, sizes | stores, dtype, 90)
    compiled(programs.merge_own, sizes | {"GROUP": 3, "BLOCK_G": 4, "BLOCK_D": 128}, dtype, 90)


@pytest.mark.parametrize("program", [tilt_programs.largest, tilt_programs.log_sum_exp])
def test_what_reads_the_vocabulary_compiles(program: Any, tmp_path: Path) -> None:
    kernel = compiled(program, {"BLOCK": BLOCK}, torch.float32, 90)
    assert kernel.metadata.shared <= SHARED_BYTES
    assert stack_bytes(kernel, tmp_path) == 0


IN_FLOAT64 = ["log_masses", "rests", "drops", "others", "outs", "other_outs", "offsets", "floors", "inv_etas"]


@pytest.mark.parametrize("candidates", [64, 128])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("program", "constants", "more"),
    [
        (tilt_programs.choose, {"HAS_TOP_KS": True}, ()),
        (tilt_programs.masses, {"BLOCK_P": 64}, ()),
        (tilt_programs.offsets, {"FIRST_IS_ZERO": 1, "IS_MEAN": False}, ("returns",)),
        (tilt_programs.offsets, {"FIRST_IS_ZERO": 0, "IS_MEAN": True}, ("returns",)),
        (tilt_programs.drops, {"IS_MEAN": False}, ()),
        (tilt_programs.drops, {"IS_MEAN": True}, ()),
        (tilt_programs.divergence, {}, ()),
        (tilt_programs.lower, {"BLOCK": BLOCK}, ("scales",)),
    ],
)
def test_what_tilts_compiles(
    program: Any, constants: dict[str, Any], more: Sequence[str], capability: int, candidates: int, tmp_path: Path
) -> None:
    sizes = {"BLOCK_K": candidates, **constants}
    kernel = compiled(program, sizes, torch.float32, capability, in_float64=[*IN_FLOAT64, *more])
    assert kernel.metadata.shared <= SHARED_BYTES
    assert stack_bytes(kernel, tmp_path) <= 64
