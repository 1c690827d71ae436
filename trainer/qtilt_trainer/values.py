"""What a value model thinks of a completion, token by token. Used by the report; the server isn't needed for it."""

from collections.abc import Sequence

import torch

from qtilt.value_model import ValueModel


@torch.inference_mode()
def completion_values(model: ValueModel, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
    """E[Z] in units of the reward after each token of `token_ids`: the return to expect if the reference goes on.

    `prompt_token_ids` must not be empty: a Q-type model has no state before the first token.
    """
    if not prompt_token_ids:
        raise ValueError("values need at least one prompt token, got none")
    if not token_ids:
        return []
    device = next(model.parameters()).device
    ids_1T = torch.tensor([[*prompt_token_ids, *token_ids]], device=device)
    mean_T = model.distribution.mean(model.taken_logits(ids_1T))[0]
    return [float(value) for value in mean_T[len(prompt_token_ids) :]]
