"""Found through PYTHONPATH by processes that vLLM spawns: they run Model Runner V2 as this one does."""

import sys

if any("spawn_main" in argument for argument in sys.orig_argv):
    from guided_vllm.vllm_on_cpu import run_model_runner_v2

    run_model_runner_v2()
