"""Fits a value model to rollouts: maximum likelihood of the observed return at every labelled token (paper, Eq. 6).

The loss of a sequence is the mean over its labelled tokens, the loss of a batch the mean over its sequences, so long
completions don't outweigh short ones. No bootstrapping and no moving target: a fit of iteration k starts from the
initial value model again and sees the aggregate of all iterations.

`FitConfig.seed`, the rollouts and the number of threads decide everything but rounding: the last bits of a matrix
product may differ between processes and machines.

Shapes: `N` sequences of a batch, `T` positions, `A` logits of one return distribution.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qtilt.checkpoint import load_tokenizer, read_manifest, save_value_model
from qtilt.value_model import ValueModel
from qtilt_trainer import dataset, metrics
from qtilt_trainer.atomic_file import write_json
from qtilt_trainer.config import FitConfig
from qtilt_trainer.dataset import (
    Batch,
    Example,
    Examples,
    LabelCounts,
    batches,
    collate,
    label_rollouts,
    split_prompts,
)
from qtilt_trainer.low_rank_fit import load_for_fit, update_of
from qtilt_trainer.precision import product_dtype
from qtilt_trainer.progress import progress_bar
from qtilt_trainer.schedule import warmup_cosine

logger = logging.getLogger(__name__)

BETAS = (0.9, 0.98)
GRADIENT_CLIP = 1.0
FORWARD_TOKENS = {"cuda": 32_768, "cpu": 4_096}
"""A batch is cut into forwards of at most this many padded tokens; their gradients add up to the batch's. On a CPU what
larger ones compute leaves its caches: scoring with 32,768 takes 1.7 times as long as with 4,096."""
HISTORY_POINTS = 10
"""How often the held-out sequences are scored during a fit."""
HELD_OUT_SEQUENCES = 2048
"""At most this many held-out sequences are scored, always the same ones."""


COLUMNS = (*dataset.COLUMNS, "temperature", "top_p", "sampling_top_k")
"""Of the roll-out store: what a fit reads."""


@dataclass(frozen=True, slots=True)
class FitPoint:
    """One point of the training curves. Held-out figures are None without held-out sequences."""

    step: int
    train_loss: float
    """Nats, mean over the steps since the last point."""
    held_out_loss: float | None
    auc: float | None
    """Of telling tokens of good sequences from tokens of bad ones; good is a return above the middle of the range."""
    calibration_error: float | None
    """In units of the reward."""


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a fit did, and how well its predictions hold on held-out prompts."""

    directory: Path
    labels: LabelCounts
    history: list[FitPoint]


def fit_record_path(directory: Path) -> Path:
    """The JSON record of the fit that wrote the value model `directory`: label counts, settings, training curves."""
    return directory.with_name(f"{directory.name}.fit.json")


def fit_value_model(
    model_dir: Path,
    rollouts: pa.Table,
    out: Path,
    config: FitConfig,
    provenance: Mapping[str, Any] | None = None,
) -> FitResult:
    """Fits the value model in `model_dir` to `rollouts` and writes the new directory `out`, atomically.

    rollouts: COLUMNS of the store.
    The record goes to `fit_record_path(out)` before the directory appears: whoever sees the directory has both.
    Raises ValueError when the rollouts hold no labels, were sampled with different settings, have returns outside
    the model's range or tokens outside its vocabulary; CheckpointError for a bad `model_dir` or an existing `out`.
    """
    sampling = _common_sampling(rollouts)
    examples, labels = label_rollouts(rollouts, config.drop_unanimous)
    training, held_out = split_prompts(examples, config.held_out, config.seed)
    device = _device()
    model, initial = load_for_fit(model_dir, device)
    _check_fits(examples, model)
    history = fit(model, training, held_out, config)
    result = FitResult(out, labels, history)
    settings = config.model_dump(mode="json")
    write_json(
        fit_record_path(out),
        {
            "labels": labels.to_dict(),
            "config": settings,
            "precision": _name(product_dtype(config.precision, device)),
            "history": [asdict(point) for point in history],
        },
    )
    known = {"rollouts": sampling, "fit": settings, "labels": labels.to_dict(), **(provenance or {})}
    manifest = read_manifest(model_dir)
    save_value_model(
        model,
        out,
        load_tokenizer(model_dir),
        {**manifest.provenance, **known},
        None if initial is None else update_of(model, initial.base, initial.rank),
        manifest.adapter,
    )
    return result


def fit(model: ValueModel, training: Examples, held_out: Sequence[Example], config: FitConfig) -> list[FitPoint]:
    """Fits what requires gradients of `model` in place, leaves it in evaluation mode, and returns the training curves.

    Raises ValueError when the loss diverges.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = next(model.parameters()).device
    dtype = product_dtype(config.precision, device)
    total = _total_steps(len(training), config)
    scored = list(held_out[:HELD_OUT_SEQUENCES])
    report_every = max(1, math.ceil(total / HISTORY_POINTS))
    history: list[FitPoint] = []
    losses: list[float] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        steps = progress_bar("fit", "step", total, _steps(training, total, config))
        for step, loss in enumerate(_optimise(model, steps, total, config, dtype), start=1):
            if not math.isfinite(loss):
                raise ValueError(f"the training loss became {loss} in step {step}: lower fit.learning_rate")
            losses.append(loss)
            if step % report_every == 0 or step == total:
                history.append(_point(model, step, float(np.mean(losses)), scored, dtype))
                losses.clear()
                steps.set_postfix(loss=history[-1].train_loss, auc=history[-1].auc, refresh=False)
    model.eval().requires_grad_(False)
    logger.info("fit: %s", history[-1])
    return history


def _optimise(
    model: ValueModel, steps: Iterable[list[Example]], total: int, config: FitConfig, dtype: torch.dtype
) -> Iterator[float]:
    """Takes one optimiser step for each batch and yields its loss in nats."""
    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, betas=BETAS, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, warmup_cosine(total))
    for examples in steps:
        model.train()
        optimiser.zero_grad(set_to_none=True)
        loss = 0.0
        for part in _forwards(examples, device):
            batch = collate(part)
            part_loss = sequence_losses(model, batch, *_taken_logits(model, batch, dtype)).sum() / len(examples)
            part_loss.backward()
            loss += float(part_loss.detach())
        nn.utils.clip_grad_norm_(trained, GRADIENT_CLIP)
        optimiser.step()
        schedule.step()
        yield loss


def sequence_losses(model: ValueModel, batch: Batch, logits_NTA: Tensor, labelled_NT: Tensor) -> Tensor:
    """Mean negative log-likelihood of the return over each sequence's labelled tokens, in nats: float32 `[N]`."""
    return_N = batch.reward_N.to(logits_NTA.device)
    nll_NT = model.distribution.nll(logits_NTA, return_N.unsqueeze(-1).expand(labelled_NT.shape))
    return (nll_NT * labelled_NT).sum(-1) / labelled_NT.sum(-1)


def _taken_logits(model: ValueModel, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of the return `[N, T, A]` and which of them are labelled `[N, T]`. dtype: of the backbone's products."""
    device = next(model.parameters()).device
    # Right padding under causal attention needs no mask, and without one attention takes its fast path.
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits_NTA = model.taken_logits(batch.token_ids_NT.to(device))
    return logits_NTA, batch.labelled_NT.to(device)


@torch.inference_mode()
def _point(
    model: ValueModel, step: int, train_loss: float, held_out: Sequence[Example], dtype: torch.dtype
) -> FitPoint:
    if not held_out:
        return FitPoint(step, train_loss, None, None, None)
    model.eval()
    device = next(model.parameters()).device
    losses, predicted, observed = [], [], []
    for part in _forwards(sorted(held_out, key=lambda example: len(example.token_ids)), device):
        batch = collate(part)
        logits_NTA, labelled_NT = _taken_logits(model, batch, dtype)
        losses.append(sequence_losses(model, batch, logits_NTA, labelled_NT))
        predicted.append(model.distribution.mean(logits_NTA)[labelled_NT].cpu())
        observed.append(batch.reward_N.unsqueeze(-1).expand(labelled_NT.shape)[labelled_NT.cpu()])
    low, high = model.distribution.v_min, model.distribution.v_max
    means, returns = _float64(predicted), _float64(observed)
    return FitPoint(
        step,
        train_loss,
        float(torch.cat(losses).mean()),
        metrics.auc(means, returns, threshold=(low + high) / 2),
        metrics.calibration_error(means, returns, low, high),
    )


def _float64(parts: Sequence[Tensor]) -> NDArray[np.float64]:
    return torch.cat(list(parts)).double().numpy()


def _total_steps(sequences: int, config: FitConfig) -> int:
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None, "FitConfig has steps or epochs"
    return math.ceil(config.epochs * math.ceil(sequences / config.batch_size))


def _steps(training: Examples, total: int, config: FitConfig) -> Iterator[list[Example]]:
    """`total` batches, epoch after epoch in new orders."""
    taken = 0
    for epoch in range(total):
        for examples in batches(training, config.batch_size, seed=config.seed * 1_000_003 + epoch):
            if taken == total:
                return
            taken += 1
            yield examples


def _forwards(examples: Sequence[Example], device: torch.device) -> Iterator[list[Example]]:
    """Cuts a batch into parts of at most FORWARD_TOKENS padded tokens, at least one sequence each."""
    most_tokens = FORWARD_TOKENS[device.type]
    part: list[Example] = []
    longest = 0
    for example in examples:
        longest = max(longest, len(example.token_ids))
        if part and longest * (len(part) + 1) > most_tokens:
            yield part
            part, longest = [], len(example.token_ids)
        part.append(example)
    yield part


def _common_sampling(rollouts: pa.Table) -> dict[str, float]:
    names = ["temperature", "top_p", "sampling_top_k"]
    settings = {tuple(row.values()) for row in rollouts.select(names).group_by(names).aggregate([]).to_pylist()}
    if len(settings) > 1:
        raise ValueError(
            f"the rollouts were sampled with different (temperature, top_p, top_k): {sorted(settings)}; "
            "Z belongs to one reference policy, so collect all iterations with the same [sampling]"
        )
    return {
        name: value for pair in settings for name, value in zip(("temperature", "top_p", "top_k"), pair, strict=True)
    }


def _check_fits(examples: Sequence[Example], model: ValueModel) -> None:
    largest = max(int(example.token_ids.max()) for example in examples)
    if largest >= model.vocab_size:
        raise ValueError(
            f"rollouts hold token id {largest}, but the value model's vocabulary ends at {model.vocab_size - 1}: "
            "initialise it from a backbone that shares the reference's tokenizer"
        )
    if model.distribution.name == "bernoulli" and any(example.reward not in (0.0, 1.0) for example in examples):
        raise ValueError("a bernoulli value is for rewards 0 and 1: set value_model.distribution = 'categorical'")
    longest = max(len(example.token_ids) for example in examples)
    if longest > model.max_positions:
        raise ValueError(f"a rollout has {longest} tokens, but the value model covers {model.max_positions} positions")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
