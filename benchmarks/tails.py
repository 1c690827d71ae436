"""Which tail is better at equal KL of what is really sampled? Both tails, three ways to sample, several 1/eta.

    .venv/bin/python benchmarks/tails.py --url URL --config examples/demo/keywords.toml --value-model keywords
        --reference ~/.cache/qtilt/SmolLM2-135M-Instruct --out runs/tails.json

The server must have been started with `--logprobs-mode processed_logprobs`: then the log-probability of a sampled token
is that of the distribution it was drawn from, after guidance, temperature and truncation. Its mean excess over the
reference's own at the same temperature (plain Hugging Face, untruncated) estimates KL(sampled ‖ reference) without
bias. By it the truncated reference, whose KL is the price of its truncation, can be compared with guided policies. (KL
to the truncated reference is infinite where guidance lifts a token into the nucleus.)
"""

import argparse
import asyncio
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openai import AsyncOpenAI
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from qtilt_trainer.config import read_config
from qtilt_trainer.estimators import bootstrap_interval
from qtilt_trainer.tasks import Problem, Task, make_task

REGIMES: dict[str, dict[str, float]] = {
    "T 1": {"temperature": 1.0},
    "T 1, top-k 20": {"temperature": 1.0, "top_k": 20},
    "T 0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
}
TAILS = ("floor", "mean")
SEED = 1_000_003
BATCH = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One policy under one way to sample. KLs in nats a response; `reported` is the server's, before truncation."""

    task: str
    regime: str
    policy: str
    inv_eta: float | None
    accuracy: float
    low: float
    high: float
    kl_sampled: float
    kl_sampled_error: float
    kl_reported: float
    kl_candidates: float
    mass: float


def main() -> None:
    """Measures everything and prints a table that can be pasted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--config", type=Path, required=True, help="its [task] and max_tokens")
    parser.add_argument("--value-model", required=True, help="NAME or NAME@VERSION")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--inv-eta", type=float, nargs="+", default=[3.0, 10.0, 30.0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    config = read_config(options.config)
    task = make_task(config.task.model_dump())
    problems = task.problems("test", options.prompts)
    reference = AutoModelForCausalLM.from_pretrained(Path(options.reference).expanduser(), dtype=torch.bfloat16).eval()
    rows = []
    for regime, sampling in REGIMES.items():
        policies = [("reference", None)] + [(tail, inv_eta) for tail in TAILS for inv_eta in options.inv_eta]
        for policy, inv_eta in policies:
            guidance = inv_eta and {"value_model": options.value_model, "eta": 1 / inv_eta, "tail": policy}
            body = {**sampling, "max_tokens": config.sampling.max_tokens, "return_token_ids": True}
            answers = asyncio.run(
                ask_all(options.url, problems, {**body, **({"guidance": guidance} if guidance else {})})
            )
            rows.append(measure(task, problems, answers, reference, regime, policy, inv_eta))
            print(line(rows[-1]), flush=True)
    options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))


async def ask_all(url: str, problems: list[Problem], body: dict[str, Any]) -> list[dict[str, Any]]:
    """One sampled answer a prompt, with the same seeds for all policies."""
    limit = asyncio.Semaphore(64)

    async def ask(client: AsyncOpenAI, model: str, number: int, problem: Problem) -> dict[str, Any]:
        fields: dict[str, Any] = {**body, "model": model, "seed": SEED + number}
        async with limit:
            if isinstance(problem.prompt, str):
                fields |= {"prompt": problem.prompt, "logprobs": 0}
                return dict(await client.post("/completions", body=fields, cast_to=object))
            fields |= {"messages": problem.prompt, "logprobs": True, "top_logprobs": 0}
            return dict(await client.post("/chat/completions", body=fields, cast_to=object))

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as client:
        (model,) = [model.id async for model in client.models.list() if model.owned_by != "qtilt"]
        return list(await asyncio.gather(*(ask(client, model, *numbered) for numbered in enumerate(problems))))


def measure(
    task: Task,
    problems: list[Problem],
    answers: list[dict[str, Any]],
    reference: Any,
    regime: str,
    policy: str,
    inv_eta: float | None,
) -> Row:
    """The row of one policy."""
    choices = [answer["choices"][0] for answer in answers]
    texts = [choice["text"] if "text" in choice else choice["message"]["content"] or "" for choice in choices]
    rewards = [task.reward(problem, text) for problem, text in zip(problems, texts, strict=True)]
    drawn = [sum(logprobs_of(choice)) for choice in choices]
    prompts = [
        choice.get("prompt_token_ids") or answer["prompt_token_ids"]
        for choice, answer in zip(choices, answers, strict=True)
    ]
    plain = reference_logprobs(
        reference, prompts, [choice["token_ids"] for choice in choices], REGIMES[regime]["temperature"]
    )
    excess = np.array(drawn) - np.array(plain)
    guided = [choice.get("guidance") or {} for choice in choices]
    low, high = bootstrap_interval(rewards, task.low, task.high)
    return Row(
        task.name,
        regime,
        policy,
        inv_eta,
        float(np.mean(rewards)),
        low,
        high,
        float(excess.mean()),
        float(excess.std() / len(excess) ** 0.5),
        *(float(np.mean([one.get(name, 0.0) for one in guided])) for name in ("kl", "kl_candidates", "mass")),
    )


def logprobs_of(choice: dict[str, Any]) -> list[float]:
    """Of the tokens that were drawn."""
    logprobs = choice["logprobs"]
    if "token_logprobs" in logprobs:
        return list(logprobs["token_logprobs"])
    return [token["logprob"] for token in logprobs["content"]]


@torch.inference_mode()
def reference_logprobs(
    model: Any, prompts: list[list[int]], answers: list[list[int]], temperature: float
) -> list[float]:
    """ln p of each answer under the untruncated reference."""
    sums = []
    for start in range(0, len(prompts), BATCH):
        part = list(zip(prompts[start : start + BATCH], answers[start : start + BATCH], strict=True))
        # Right padding: causal attention never lets a real token see it.
        tokens_NT = pad_sequence([torch.tensor(prompt + answer) for prompt, answer in part], batch_first=True)
        hidden_NTH = model.model(input_ids=tokens_NT).last_hidden_state
        for row, (prompt, answer) in enumerate(part):
            before_TH = hidden_NTH[row, len(prompt) - 1 : len(prompt) + len(answer) - 1]
            log_p_TV = (model.lm_head(before_TH).float() / temperature).log_softmax(-1)
            sums.append(float(log_p_TV.gather(-1, torch.tensor(answer).unsqueeze(-1)).sum()))
    return sums


def line(row: Row) -> str:
    """One line of a Markdown table."""
    inv_eta = "" if row.inv_eta is None else f"{row.inv_eta:g}"
    return (
        f"| {row.task} | {row.regime} | {row.policy} | {inv_eta} | {row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}] "
        f"| {row.kl_sampled:.2f} ± {row.kl_sampled_error:.2f} | {row.kl_reported:.2f} | {row.kl_candidates:.2f} "
        f"| {'–' if row.policy == 'reference' else format(row.mass, '.2f')} |"
    )


if __name__ == "__main__":
    sys.exit(main())
