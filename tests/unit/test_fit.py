"""Label rule and fit on a task whose optimum is known: no letter may repeat its predecessor.

The reference is uniform over 4 letters for 6 steps and the reward is 1 iff all letters differ from the one before, so
after t >= 1 clean letters the reference succeeds with V* = 0.75^(6-t), and all 4^6 sequences can be enumerated.
"""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaModel

from qtilt.checkpoint import CheckpointError, load_value_model, read_manifest
from qtilt.distributions import Bernoulli, Categorical, ReturnDistribution
from qtilt.value_model import ValueModel, ValueType
from qtilt_trainer.config import FitConfig
from qtilt_trainer.dataset import label_rollouts
from qtilt_trainer.fit import FitPoint, fit, fit_record_path, fit_value_model
from qtilt_trainer.initialise import initialise_value_model
from qtilt_trainer.rollouts import Rollout
from stored_rollouts import as_table
from tiny_reference import build_tokenizer

LETTERS, LENGTH, PROMPT_TOKEN = 4, 6, 4
INV_ETA = 5.0
ALL_SEQUENCES = np.array(list(itertools.product(range(LETTERS), repeat=LENGTH)))
CONFIG = FitConfig(steps=800, batch_size=128, learning_rate=6e-3, drop_unanimous=False, threads=1, precision="float32")


def exact_value(letters: NDArray[np.int64]) -> NDArray[np.float64]:
    """V* of prefixes `[sequences, t >= 1]`."""
    clean = (letters[:, 1:] != letters[:, :-1]).all(1)
    return np.where(clean, 0.75 ** (LENGTH - letters.shape[1]), 0.0)


def sample_rollouts(count: int, guided_roll_in: bool, seed: int = 0) -> list[Rollout]:
    """Uniform letters; with a guided roll-in the first g ~ U{0..6} come from the exact Q# policy at 1/eta = 5."""
    rng = np.random.default_rng(seed)
    switch_points = rng.integers(0, LENGTH + 1, count) if guided_roll_in else np.zeros(count, dtype=int)
    letters = np.zeros((count, 0), dtype=np.int64)
    for t in range(LENGTH):
        extended = [np.column_stack([letters, np.full(count, letter)]) for letter in range(LETTERS)]
        weights = np.stack([1 + exact_value(prefix) * np.expm1(INV_ETA) for prefix in extended], 1)
        cumulative = (weights / weights.sum(1, keepdims=True)).cumsum(1)
        guided = np.minimum((cumulative < rng.random((count, 1))).sum(1), LETTERS - 1)
        uniform = rng.integers(0, LETTERS, count)
        letters = np.column_stack([letters, np.where(t < switch_points, guided, uniform)])
    rewards = exact_value(letters)
    return [
        rollout(index, token_ids.tolist(), int(switch_point), float(reward))
        for index, (token_ids, switch_point, reward) in enumerate(zip(letters, switch_points, rewards, strict=True))
    ]


def rollout(index: int, token_ids: list[int], switch_point: int, reward: float, temperature: float = 1.0) -> Rollout:
    return Rollout(
        rollout_id=f"1/p{index // 8:04d}/{index % 8}",
        iteration=1,
        prompt_id=f"p{index // 8:04d}",
        prompt_digest="d",
        split="train",
        prompt_token_ids=[PROMPT_TOKEN],
        token_ids=token_ids,
        text="",
        finish_reason="stop",
        ended=True,
        switch_point=switch_point,
        guided_tokens=switch_point,
        value_model=None,
        eta=None,
        method=None,
        guidance_top_k=None,
        tail=None,
        temperature=temperature,
        top_p=1.0,
        sampling_top_k=0,
        max_tokens=LENGTH,
        seed=index,
        model="uniform",
        kl=0.0,
        kl_candidates=0.0,
        mass=None,
        reward=reward,
    )


def small_llama(vocab_size: int = LETTERS + 1) -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=16,
            initializer_range=32**-0.5,
        )
    )


def fitted(
    rollouts: list[Rollout],
    config: FitConfig = CONFIG,
    type: ValueType = "v",
    distribution: ReturnDistribution | None = None,
) -> tuple[ValueModel, list[FitPoint]]:
    examples, _ = label_rollouts(as_table(rollouts), config.drop_unanimous)
    held = int(config.held_out * len(examples))  # All have one prompt, so that there is none to split by.
    held_out, training = examples[:held], examples[held:]
    model = ValueModel.from_backbone(small_llama(), type, distribution or Bernoulli()).requires_grad_(True)
    return model, fit(model, training, held_out, config)


@torch.inference_mode()
def taken_logits(model: ValueModel) -> torch.Tensor:
    """Logits of Z after each letter of every sequence: float32 `[4^6, 6, A]`."""
    ids = np.column_stack([np.full(len(ALL_SEQUENCES), PROMPT_TOKEN), ALL_SEQUENCES])
    return model.taken_logits(torch.from_numpy(ids))[:, 1:]


def exact_values() -> NDArray[np.float64]:
    return np.stack([exact_value(ALL_SEQUENCES[:, : t + 1]) for t in range(LENGTH)], 1)


def success_and_kl(q_over_eta: NDArray[np.float64]) -> tuple[float, float]:
    """Success rate of the policy tilted by Q/eta `[4^6, 6]`, and its KL to uniform, by summing over all sequences."""
    log_policy = np.zeros(len(ALL_SEQUENCES))
    for t in range(LENGTH):
        block = LETTERS ** (LENGTH - t - 1)  # sequences that share their first t + 1 letters are adjacent
        by_letter = q_over_eta[::block, t].reshape(-1, LETTERS)
        log_probability = by_letter - np.log(np.exp(by_letter).sum(1, keepdims=True))
        log_policy += np.repeat(log_probability.ravel(), block)
    policy = np.exp(log_policy)
    kl = policy @ (log_policy + LENGTH * np.log(LETTERS))
    return float(policy @ exact_value(ALL_SEQUENCES)), float(kl)


def mean_bias(model: ValueModel) -> float:
    """Mean of V - V* over clean prefixes."""
    exact = exact_values()
    error = model.distribution.mean(taken_logits(model)).numpy() - exact
    return float(error[exact > 0].mean())


def test_fitted_values_and_the_policy_they_tilt_match_the_closed_form() -> None:
    model, history = fitted(sample_rollouts(8000, guided_roll_in=False))
    logits = taken_logits(model)
    error = np.abs(model.distribution.mean(logits).numpy() - exact_values()).mean()
    success, kl = success_and_kl(model.distribution.log_mgf(logits.double(), INV_ETA).numpy())
    exact_success, exact_kl = success_and_kl(np.log1p(exact_values() * np.expm1(INV_ETA)))
    assert (exact_success, exact_kl) == (pytest.approx(0.979, abs=0.001), pytest.approx(1.311, abs=0.001))
    assert error < 0.04
    assert success == pytest.approx(exact_success, abs=0.02)
    assert kl == pytest.approx(exact_kl, abs=0.06)
    assert history[-1].step == 800
    assert history[-1].held_out_loss < history[0].held_out_loss
    assert history[-1].auc > 0.85
    assert history[-1].calibration_error < 0.04


def test_labelling_tokens_before_the_switch_point_would_bias_the_value_upwards() -> None:
    rollouts = sample_rollouts(8000, guided_roll_in=True)
    masked, _ = fitted(rollouts, CONFIG)
    unmasked, _ = fitted([rollout(i, r.token_ids, 0, r.reward) for i, r in enumerate(rollouts)], CONFIG)
    assert abs(mean_bias(masked)) < 0.03
    assert mean_bias(unmasked) > 0.1


def test_a_categorical_q_type_model_learns_the_same_values() -> None:
    config = CONFIG.model_copy(update={"steps": 800})
    model, _ = fitted(sample_rollouts(8000, guided_roll_in=False), config, "q", Categorical(0.0, 1.0, 11))
    error = np.abs(model.distribution.mean(taken_logits(model)).numpy() - exact_values()).mean()
    assert error < 0.06


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    rollouts = sample_rollouts(160, guided_roll_in=True)
    config = FitConfig(epochs=2, batch_size=32, learning_rate=3e-3, drop_unanimous=False, threads=1)
    first, again = fitted(rollouts, config)[0], fitted(rollouts, config)[0]
    other = fitted(rollouts, config.model_copy(update={"seed": 1}))[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_cutting_a_batch_into_several_forwards_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = sample_rollouts(160, guided_roll_in=True)
    config = CONFIG.model_copy(update={"steps": 3, "batch_size": 64, "learning_rate": 1e-3, "held_out": 0.0})
    whole = fitted(rollouts, config)[0]
    monkeypatch.setattr("qtilt_trainer.fit.FORWARD_TOKENS", {"cpu": 50})
    parts = fitted(rollouts, config)[0]
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unfitted value model on disk whose tokenizer has the letters."""
    root = tmp_path_factory.mktemp("initial")
    tokenizer = build_tokenizer("abcd")
    small_llama(len(tokenizer)).save_pretrained(root / "backbone")
    tokenizer.save_pretrained(root / "backbone")
    initialise_value_model(str(root / "backbone"), "v", {"name": "bernoulli"}, root / "value")
    return root / "value"


QUICK = FitConfig(steps=4, batch_size=32, drop_unanimous=False, threads=1)


def test_the_written_model_is_the_fitted_one_and_says_where_it_comes_from(initial: Path, tmp_path: Path) -> None:
    rollouts = sample_rollouts(160, guided_roll_in=True)
    result = fit_value_model(initial, as_table(rollouts), tmp_path / "iteration-001", QUICK, {"iteration": 1})
    manifest = read_manifest(result.directory)
    assert manifest.provenance["rollouts"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    assert manifest.provenance["iteration"] == 1
    assert manifest.provenance["labels"]["rollouts"] == 160
    record = json.loads(fit_record_path(result.directory).read_text())
    assert [point["step"] for point in record["history"]] == [1, 2, 3, 4]
    assert record["history"] == [asdict(point) for point in result.history]
    before, after = load_value_model(initial), load_value_model(result.directory)
    assert not torch.equal(before.head.weight, after.head.weight)


def test_an_existing_value_model_is_never_overwritten(initial: Path, tmp_path: Path) -> None:
    (tmp_path / "iteration-001").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        fit_value_model(initial, as_table(sample_rollouts(80, guided_roll_in=False)), tmp_path / "iteration-001", QUICK)


def test_rollouts_of_two_reference_policies_are_refused(initial: Path, tmp_path: Path) -> None:
    rollouts = [rollout(0, [0, 1], 0, 1.0), rollout(1, [1, 1], 0, 0.0, temperature=0.8)]
    with pytest.raises(ValueError, match="different"):
        fit_value_model(initial, as_table(rollouts), tmp_path / "out", QUICK)


def test_a_fit_that_diverges_says_so() -> None:
    with pytest.raises(ValueError, match=r"loss became (nan|inf) in step \d+: lower fit.learning_rate"):
        fitted(sample_rollouts(80, guided_roll_in=False), CONFIG.model_copy(update={"learning_rate": 1e38}))


def test_tokens_outside_the_vocabulary_and_returns_that_are_not_the_distributions_are_refused(
    initial: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="token id 99"):
        fit_value_model(initial, as_table([rollout(0, [99], 0, 1.0)]), tmp_path / "out", QUICK)
    for graded in (0.5, 3.0):
        with pytest.raises(ValueError, match="is for rewards 0 and 1: set value_model"):
            fit_value_model(initial, as_table([rollout(0, [1], 0, graded)]), tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()
