"""Where guidance tilts nothing, an answer is what vLLM without the plugin gives: the same tokens, the same bits."""

from pathlib import Path

import pytest

from guided_vllm import plain_vllm
from guided_vllm.matrix import WITHOUT_SPECULATION, covers
from guided_vllm.served import Served
from guided_vllm.tiny_models import VALUE_MODELS, make_constant
from qtilt.params import GuidanceParams

UNGUIDED = "unguided requests are plain vLLM, bit for bit"
CONSTANT = "a constant value is plain vLLM, bit for bit"


@covers(UNGUIDED)
def test_unguided_requests_on_a_guided_server_are_plain_vllm(served: Served) -> None:
    for allowed, plain in served.plain.items():
        for answer, before in zip(
            plain_vllm.drive_uncached(served.engine, plain_vllm.requests(allowed)), plain, strict=True
        ):
            plain_vllm.assert_same_bits(answer, before)
            served_alike = answer.steps_to_first_token == before.steps_to_first_token
            assert served_alike, "vLLM has batched these otherwise, so the comparison means little"


@covers(UNGUIDED, engines=WITHOUT_SPECULATION)
def test_unguided_requests_beside_guided_ones_are_plain_vllm(served: Served) -> None:
    """Guidance changes tokens, not the shapes of batches. (Speculation does: tokens that come true decide them.)"""

    def every_other(index: int) -> GuidanceParams | None:
        return served.guide(list(VALUE_MODELS)[index % 4]) if index % 2 else None

    answers = plain_vllm.drive_uncached(served.engine, plain_vllm.requests("any token", every_other))
    for answer, before in zip(answers, served.plain["any token"], strict=True):
        if answer.ask.guidance is None:
            plain_vllm.assert_same_bits(answer, before)
        else:
            assert answer.choices != before.choices
            served.rpc("qtilt_take_records", answer.ask.guidance.trace_id, [])


CONSTANTS = {
    "lowest": (True, "any token", 5, "floor"),
    "any": (False, "the tokenizer's tokens", 128, "floor"),
    "any, tail mean": (False, "any token", 5, "mean"),
}


@covers(CONSTANT)
@pytest.mark.parametrize("value_model", VALUE_MODELS)
@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_constant_value_is_plain_vllm(served: Served, tmp_path: Path, value_model: str, constant: str) -> None:
    """With the tail mean any constant. With the floor the lowest return tilts nothing whatever is scored; any other, if
    all tokens are that may be drawn.
    """
    lowest, allowed, top_k, tail = CONSTANTS[constant]
    directory = make_constant(tmp_path / "constant", *VALUE_MODELS[value_model], lowest=lowest)
    with served.also("constant", 1, directory):
        asks = plain_vllm.requests(allowed, lambda index: served.guide("constant", eta=0.1, top_k=top_k, tail=tail))
        answers = plain_vllm.drive_uncached(served.engine, asks)
        for answer, before in zip(answers, served.plain[allowed], strict=True):
            plain_vllm.assert_same_bits(answer, before)
            assert answer.ask.guidance is not None
            returned = [choice.token_ids for choice in answer.choices]
            summaries = served.rpc("qtilt_take_records", answer.ask.guidance.trace_id, returned)
            assert [summary["guided_tokens"] for summary in summaries] == [len(tokens) for tokens in returned]
            for kl in ("kl", "kl_candidates"):
                assert [summary[kl] for summary in summaries] == pytest.approx([0.0] * len(returned), abs=1e-6)
