"""A work-around for one defect of vLLM 0.32's V1 runner on CPUs."""

from functools import wraps
from typing import Any


def keep_seeds_through_chunked_prefill() -> None:
    """Let requests with a seed have their prompt prefilled in chunks on a CPU, where it kills vLLM's engine.

    The token sampled after a chunk of an unfinished prefill is discarded, and the runner takes back what the request's
    generator spent on it by lowering the generator's offset (`GPUModelRunner._bookkeeping_sync`). Generators of a CPU
    have no offset: "RuntimeError: CPU Generator does not use offset" ends the engine, for all requests. No upstream
    issue was found for it. Here such a request's generator is out of reach while its token is discarded, so nothing is
    spent and nothing taken back: a seed gives the same tokens in whatever chunks its prompt came.

    Idempotent; changes the class for the whole process.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    runner_class: Any = CPUModelRunner
    sample_tokens = runner_class.sample_tokens
    if hasattr(sample_tokens, "spares_seeds"):
        return

    @wraps(sample_tokens)
    def sample_tokens_sparing_seeds(runner: Any, grammar_output: Any) -> Any:
        generators = runner.input_batch.generators
        discarded = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0].tolist()
        spared = {index: generators.pop(index) for index in discarded if index in generators}
        try:
            return sample_tokens(runner, grammar_output)
        finally:
            generators.update(spared)

    runner_class.sample_tokens = sample_tokens_sparing_seeds
    runner_class.sample_tokens.spares_seeds = True
