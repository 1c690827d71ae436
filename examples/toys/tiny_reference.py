"""Tiny reference models for the toys: an alphabet, a tokenizer and a small Llama trained on flawed texts.

The flaw is in the texts (`task.reference_texts`), not here: this file only does ordinary next-token training, so the
reference that comes out is an honest language model of a wrong teacher, and a plain `vllm serve` can load it.

Knows nothing of values or guidance.

Shapes: `N` sequences of a batch, `T` positions.
"""

import copy
import json
import logging
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qtilt_trainer.progress import progress_bar
from qtilt_trainer.schedule import warmup_cosine

logger = logging.getLogger(__name__)

PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT = SPECIAL_TOKENS = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<user>",
    "<assistant>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
IGNORED_LABEL = -100
"""torch's cross entropy leaves positions with this label out."""
SERVABLE_HEAD_DIM = 32
"""The smallest attention head vLLM's CPU kernels take (vllm/v1/attention/backends/cpu_attn.py)."""


class ReferenceTask(Protocol):
    """What a task must offer to have a reference model trained on it."""

    name: str
    alphabet: Sequence[str]

    def reference_texts(self, rng: random.Random, count: int) -> Sequence[tuple[Any, str]]:
        """`count` pairs of (prompt: text or chat messages, completion text without the end token)."""


@dataclass(frozen=True, slots=True)
class ReferenceConfig:
    """Size and training of a tiny reference. The defaults are arithmetic's, with 1,000 steps instead of 1,500."""

    steps: int = 1000
    batch_size: int = 64
    """Sequences a step."""
    learning_rate: float = 3e-3
    """Peak; linear warm-up over the first 5 % of the steps, cosine down to 10 %."""
    weight_decay: float = 0.01
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    intermediate: int = 128
    max_positions: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "hidden", "layers", "heads", "intermediate", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"reference: {name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % (2 * self.heads):
            raise ValueError(f"reference: hidden ({self.hidden}) must be an even multiple of heads ({self.heads})")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"reference: learning_rate must be finite and > 0, got {self.learning_rate}")


def build_tokenizer(alphabet: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each entry of `alphabet` (longest match first), and a chat template.

    Text outside the alphabet becomes `<unk>`, so that any prompt can be sent to a server of it.
    Raises ValueError for an empty alphabet, an empty entry, or an entry that is a special token.
    """
    symbols = list(dict.fromkeys(alphabet))
    if not symbols or not all(symbols) or set(symbols) & set(SPECIAL_TOKENS):
        raise ValueError(f"alphabet must be non-empty strings other than {SPECIAL_TOKENS}, got {list(alphabet)!r}")
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *symbols])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    longest_first = sorted(symbols, key=len, reverse=True)
    pattern = "|".join([*map(re.escape, longest_first), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def prompt_token_ids(tokenizer: Any, prompt: str | Sequence[dict[str, str]]) -> list[int]:
    """The ids an OpenAI-compatible server makes of `prompt`: a text for completions, messages for chat."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def train_reference(task: ReferenceTask, config: ReferenceConfig, out: Path) -> dict[str, Any]:
    """Trains a reference model for `task` and writes it, with its tokenizer, as a Hugging Face directory.

    Next-token cross entropy over completion and end token (the prompts are drawn by the task, there is nothing to
    learn about them). Deterministic given `config.seed` and the number of threads.
    Returns the record it also writes to `out/training.json`.
    """
    tokenizer = build_tokenizer(task.alphabet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(_llama_config(tokenizer, config))
        losses = _train(model, _batches(task, tokenizer, config), config)
    model = with_servable_heads(model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {
        "task": task.name,
        "config": asdict(config),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "final_loss": sum(losses[-20:]) / len(losses[-20:]),
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    logger.info("reference %s: %d parameters, loss %.4f", task.name, record["parameters"], record["final_loss"])
    return record


@torch.no_grad()
def with_servable_heads(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same function with attention heads of SERVABLE_HEAD_DIM: smaller ones are filled up with zeros.

    Training such wide heads from the start is no way out: the star graph's references made like that (three of three)
    had features from which a value model learned nothing in the example's time.
    Exact when SERVABLE_HEAD_DIM / head_dim is a whole number r: rotary pair j of a small head has the frequency of pair
    r·j of a wide one. Queries and keys grow by the fourth root of r, as attention divides by the root of the width.
    """
    small, wide = model.config.hidden_size // model.config.num_attention_heads, SERVABLE_HEAD_DIM
    if small >= wide:
        return model
    if wide % small:
        raise ValueError(f"heads of {small} can't be filled up to {wide}: hidden / heads must divide {wide}")
    config = copy.deepcopy(model.config)
    config.head_dim = wide
    widened = LlamaForCausalLM(config)
    ratio, half = wide // small, torch.arange(small // 2)
    place = torch.cat([ratio * half, wide // 2 + ratio * half])
    rows = (torch.arange(config.num_attention_heads).unsqueeze(1) * wide + place).flatten()
    weights = dict(model.state_dict())
    for name, weight in widened.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weights[name] = torch.zeros_like(weight).index_copy(0, rows, weights[name] * ratio**0.25)
        elif name.endswith("v_proj.weight"):
            weights[name] = torch.zeros_like(weight).index_copy(0, rows, weights[name])
        elif name.endswith("o_proj.weight"):
            weights[name] = torch.zeros_like(weight).index_copy(1, rows, weights[name])
    widened.load_state_dict(weights)
    return widened


def _llama_config(tokenizer: PreTrainedTokenizerFast, config: ReferenceConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.max_positions,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        # Llama's 0.02 is made for widths in the thousands; at 64 it leaves the star graph unlearned after 700 steps.
        initializer_range=config.hidden**-0.5,
    )


def _batches(
    task: ReferenceTask, tokenizer: PreTrainedTokenizerFast, config: ReferenceConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    rng = random.Random(config.seed)
    while True:
        texts = task.reference_texts(rng, config.batch_size)
        yield _to_tensors([_encode(tokenizer, prompt, completion) for prompt, completion in texts], tokenizer)


def _encode(tokenizer: PreTrainedTokenizerFast, prompt: Any, completion: str) -> tuple[list[int], list[int]]:
    completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id in completion_ids:
        raise ValueError(f"completion {completion!r} has characters that the task's alphabet lacks")
    return prompt_token_ids(tokenizer, prompt), [*completion_ids, tokenizer.eos_token_id]


def _to_tensors(
    pairs: Sequence[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids_NT = torch.full((len(pairs), longest), int(tokenizer.pad_token_id or 0))
    labels_NT = torch.full((len(pairs), longest), IGNORED_LABEL)
    for row, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        ids_NT[row, :end] = torch.tensor(prompt + completion)
        labels_NT[row, len(prompt) : end] = torch.tensor(completion)
    return ids_NT, labels_NT


def _train(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], config: ReferenceConfig) -> list[float]:
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, warmup_cosine(config.steps))
    losses = []
    model.train()
    for _ in progress_bar("reference", "step", config.steps, range(config.steps)):
        ids_NT, labels_NT = next(batches)
        # Right padding under causal attention: real tokens never see it, so no mask is needed.
        logits_NTV = model(input_ids=ids_NT, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits_NTV.flatten(0, 1), labels_NT[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses
