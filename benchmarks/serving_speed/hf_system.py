"""The baseline: guided decoding the way the method's official code works, on Hugging Face `generate`.

A LogitsProcessor keeps the value model's key/value cache and scores the k likeliest tokens of every row. It is given
its best case. The whole concurrency is one left-padded batch; the new token and the candidates share one masked forward
(the official code runs two); a Q-type head is read at the candidates only; no KL is computed; nothing ends early, so
no row idles while another finishes.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from qtilt.checkpoint import load_value_model
from qtilt.value_model import ValueModel
from serving_speed.systems import System
from serving_speed.workload import Outcome, Workload

INV_ETA = 5.0


@dataclass(frozen=True)
class HfSettings:
    reference: Path
    value: Path | None
    dtype: str
    device: str
    dummy_weights: bool


class ValueGuidance(LogitsProcessor):
    """Adds ln E[e^{Z/η}] to the logits of the top k, for one batch from its prompts to its last token.

    Shapes: ``B`` rows, ``L`` tokens so far with padding on the left, ``N`` new ones, ``K`` candidates.
    """

    def __init__(self, model: ValueModel, top_k: int, attention_mask_BL: Tensor) -> None:
        self.model, self.top_k = model, top_k
        self.present_BL = attention_mask_BL.bool()
        self.padded = not bool(self.present_BL.all())
        self.cache = DynamicCache(config=model.backbone.config)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits_BK, ids_BK = scores.topk(self.top_k, dim=-1)
        grown = input_ids.shape[1] - self.present_BL.shape[1]
        self.present_BL = torch.nn.functional.pad(self.present_BL, (0, grown), value=True)
        new_ids_BN = input_ids[:, self.cache.get_seq_length() :]
        values_BKA = self._after(new_ids_BN, ids_BK) if self.model.type == "v" else self._before(new_ids_BN, ids_BK)
        offsets_BK = self.model.distribution.log_mgf(values_BKA, INV_ETA)
        return scores.scatter(-1, ids_BK, logits_BK + offsets_BK.to(scores.dtype))

    def _positions(self) -> Tensor:
        """Of every token so far ``[B, L]``; padding has some."""
        return (self.present_BL.cumsum(-1) - 1).clamp(min=0)

    def _before(self, new_ids_BN: Tensor, ids_BK: Tensor) -> Tensor:
        """Q-type: from the state after the last token."""
        outputs = self.model.backbone(
            input_ids=new_ids_BN,
            attention_mask=self.present_BL.long() if self.padded else None,
            position_ids=self._positions()[:, -new_ids_BN.shape[1] :],
            past_key_values=self.cache,
        )
        return self.model.head_logits(outputs.last_hidden_state[:, -1], ids_BK)

    def _after(self, new_ids_BN: Tensor, ids_BK: Tensor) -> Tensor:
        """V-type: new tokens and candidates in one forward; what it caches of the candidates is dropped."""
        count, k = new_ids_BN.shape[1], self.top_k
        positions_BL = self._positions()
        after_B1 = positions_BL[:, -1:] + 1
        outputs = self.model.backbone(
            input_ids=torch.cat([new_ids_BN, ids_BK], 1),
            attention_mask=self._mask(count)[:, None],
            position_ids=torch.cat([positions_BL[:, -count:], after_B1.expand(-1, k)], 1),
            past_key_values=self.cache,
        )
        self.cache.crop(-k)
        return self.model.head_logits(outputs.last_hidden_state[:, -k:])

    def _mask(self, count: int) -> Tensor:
        """Who sees whom ``[B, N + K, L + K]``: a token sees the past and itself, a candidate the history and itself."""
        rows, length = self.present_BL.shape
        k, device = self.top_k, self.present_BL.device
        mask = torch.zeros(rows, count + k, length + k, dtype=torch.bool, device=device)
        causal_NL = torch.ones(count, length, dtype=torch.bool, device=device).tril(length - count)
        mask[:, :count, :length] = causal_NL & self.present_BL[:, None]
        mask[:, count:, :length] = self.present_BL[:, None]
        # Padding sees itself too: a softmax over nothing is not a number.
        own = torch.arange(count + k, device=device)
        mask[:, own, own + length - count] = True
        return mask


class Clock(StoppingCriteria):
    """Never stops; notes when each token of the batch was there."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self.started)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class HfSystem:
    """Reference and value model in this process."""

    def __init__(self, settings: HfSettings) -> None:
        self.device, dtype = settings.device, getattr(torch, settings.dtype)
        if settings.dummy_weights:
            with torch.device(self.device):
                config = AutoConfig.from_pretrained(settings.reference)
                self.reference = AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            self.reference = AutoModelForCausalLM.from_pretrained(settings.reference, dtype=dtype)
        self.reference = self.reference.to(self.device).eval()
        self.value = None
        if settings.value is not None:
            self.value = load_value_model(settings.value, dtype, self.device)
        self.padding = self.reference.config.vocab_size - 1

    def describe(self) -> dict[str, Any]:
        return {"threads": torch.get_num_threads(), "attention": self.reference.config._attn_implementation}

    def run(self, system: System, workload: Workload) -> Outcome:
        """Whenever it is free it takes what is waiting, at most the concurrency, and generates to the end."""
        requests, waiting = workload.requests, list(range(len(workload.requests)))
        token_times: list[list[float]] = [[] for _ in requests]
        cpu_started, started = time.process_time(), time.perf_counter()
        while waiting:
            now = time.perf_counter() - started
            batch = [index for index in waiting if requests[index].arrives <= now][: workload.concurrency]
            if not batch:
                time.sleep(max(0.0, requests[waiting[0]].arrives - now))
                continue
            times = self._generate(system, [requests[index].prompt for index in batch], workload.new_tokens, started)
            for index in batch:
                token_times[index] = times
            waiting = waiting[len(batch) :]
        return Outcome([request.arrives for request in requests], token_times, time.process_time() - cpu_started)

    @torch.inference_mode()
    def _generate(self, system: System, prompts: list[list[int]], new_tokens: int, started: float) -> list[float]:
        length = max(map(len, prompts))
        ids_BL = torch.tensor([[self.padding] * (length - len(prompt)) + prompt for prompt in prompts])
        mask_BL = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ids_BL, mask_BL = ids_BL.to(self.device), mask_BL.to(self.device)
        processors = LogitsProcessorList()
        if system.type is not None:
            assert self.value is not None and self.value.type == system.type
            processors.append(ValueGuidance(self.value, system.top_k, mask_BL))
        clock = Clock(started)
        self.reference.generate(
            ids_BL,
            attention_mask=mask_BL,
            generation_config=GenerationConfig(
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=new_tokens,
                pad_token_id=self.padding,
            ),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return clock.times
