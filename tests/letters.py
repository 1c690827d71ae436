"""No-repeat letters: a task whose optimum is known in closed form, with a reference that needs no training.

The reference is uniform over 4 letters at each of 6 steps; the reward is 1 iff no letter equals the one before it.
After t >= 1 clean letters V is 0.75^(6 - t), and p = 0.75^5 of the reference's completions are right.
"""

import itertools
import math
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING

from qtilt_trainer.tasks import Problem, Split

if TYPE_CHECKING:
    # The trainer's processes import this file for the task alone: they shouldn't wait for torch.
    from transformers import LlamaConfig

LETTERS = "abcd"
PROMPT = "?"
STEPS = 6
POSITIONS = 64
REFERENCE_ACCURACY = 0.75 ** (STEPS - 1)


class Letters:
    name, low, high = "letters", 0.0, 1.0

    def problems(self, split: Split, count: int) -> list[Problem]:
        return [Problem(f"{split}-{n:04d}", PROMPT, None) for n in range(count)]

    def reward(self, problem: Problem, completion: str) -> float:
        repeats = any(a == b for a, b in itertools.pairwise(completion))
        return float(len(completion) == STEPS and not repeats)

    def answer(self, problem: Problem, completion: str) -> Hashable | None:
        return completion


def optimum(inv_eta: float) -> tuple[float, float]:
    """Accuracy of the KL-regularised optimum and its KL to the reference in nats."""
    p = REFERENCE_ACCURACY
    best = p * math.exp(inv_eta) / (1 - p + p * math.exp(inv_eta))
    return best, best * math.log(best / p) + (1 - best) * math.log((1 - best) / (1 - p))


def make_letters_reference(directory: Path) -> None:
    """A Llama whose hidden state is the same whatever it reads, so that its logits are what lm_head says."""
    import torch
    from transformers import LlamaForCausalLM

    from tiny_reference import build_tokenizer

    tokenizer = build_tokenizer(LETTERS + PROMPT)
    model = LlamaForCausalLM(_config(len(tokenizer), hidden_size=64, layers=1, heads=2))
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.fill_(-1.0)  # Times 64: nothing but letters.
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(list(LETTERS))] = 0.0
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_letters_backbone(directory: Path) -> None:
    """A small untrained model for the value model to start from."""
    import torch
    from transformers import LlamaForCausalLM

    from tiny_reference import build_tokenizer

    tokenizer = build_tokenizer(LETTERS + PROMPT)
    torch.manual_seed(0)
    LlamaForCausalLM(_config(len(tokenizer), hidden_size=32, layers=2, heads=4)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _config(vocab_size: int, hidden_size: int, layers: int, heads: int) -> "LlamaConfig":
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=POSITIONS,
        initializer_range=hidden_size**-0.5,  # The default is too small to learn from in a few hundred steps.
        tie_word_embeddings=False,
    )
