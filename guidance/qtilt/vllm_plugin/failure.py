"""How guidance fails for a request, and how such a request ends. Imports neither torch nor vllm.

vLLM lets a logits processor neither end a request nor report on one. So a failed request ends in two ways, and the
second makes sure that it is answered with an error:

- In the worker the row is never guided again, gives its value-cache slot back, and is sampled from finite logits: with
  certainty the token that ends the request if there is one (the end token, or a stop token under ``ignore_eos``), else
  from the untouched reference. vLLM looks at these tokens before ``min_tokens``, and masks (``min_tokens``, logit bias,
  a grammar, bad words) come before the processor, so they can't prevent it; a grammar that rejects the token ends
  the request with an error. The request is over after the step that failed.
- In the API process every finished choice is looked up in the worker anyway, for its KL, and a failed one is an error
  whatever its finish reason. Requests that no token ends (``ignore_eos`` without stop tokens, a thinking budget that
  forces another token, the healthy choices of an ``n`` > 1) are aborted: while guided requests run, the server asks
  twice a second which of them have failed. Nothing is asked per step or per token.

A mere stop token of our own would not do: any id of the vocabulary may be sampled by a healthy row, too.
"""

from typing import Literal, TypedDict

LONGEST_REASON = 200


class GuidanceFailure(TypedDict):
    """kind: an exception in value code, or values that are not numbers. reason: one line."""

    kind: Literal["exception", "nan"]
    reason: str


def not_numbers() -> GuidanceFailure:
    """The value model gave NaN or infinity for a candidate."""
    return {
        "kind": "nan",
        "reason": "its values were not finite numbers: if it overflows in its dtype, serve it in another "
        "(--value-dtype float32 or bfloat16)",
    }


def of_exception(error: Exception) -> GuidanceFailure:
    """Type and first line of the error; its traceback belongs in the worker's log."""
    message = next(iter(str(error).splitlines()), "")
    return {"kind": "exception", "reason": f"{type(error).__name__}: {message}"[:LONGEST_REASON]}
