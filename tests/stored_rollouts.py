"""Roll-outs for tests that only care about some of their fields."""

from dataclasses import replace

from qtilt_trainer.rollouts import Rollout, rollout_id


def make_rollout(prompt_id: str = "p", sample: int = 0, iteration: int = 1) -> Rollout:
    return Rollout(
        rollout_id=rollout_id(iteration, prompt_id, sample),
        iteration=iteration,
        prompt_id=prompt_id,
        split="train",
        prompt_token_ids=[1, 2],
        token_ids=[3, 4, 0],
        text="añ\n",
        finish_reason="stop",
        ended=True,
        switch_point=2,
        guided_tokens=2,
        reward=0.1 + 0.2,
        value_model="value@3",
        eta=0.1,
        method="qsharp",
        guidance_top_k=20,
        temperature=1.0,
        top_p=0.9,
        sampling_top_k=0,
        max_tokens=16,
        seed=2**31 + 5,
        model="m",
        kl=0.7,
    )


def unguided(rollout: Rollout) -> Rollout:
    return replace(rollout, value_model=None, eta=None, method=None, guidance_top_k=None, switch_point=0)
