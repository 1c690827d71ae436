"""Roll-outs for tests that only care about some of their fields."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa

from qtilt_trainer.rollouts import REWARDS, SCHEMA, Rollout, RolloutStore, rollout_id


def store_graded(store: RolloutStore, rollouts: Sequence[Rollout]) -> None:
    """Completions and rewards, a part for each iteration among them."""
    for iteration in sorted({rollout.iteration for rollout in rollouts}):
        part = [rollout for rollout in rollouts if rollout.iteration == iteration]
        store.set_rewards(store.append(part), [rollout.reward for rollout in part], [None] * len(part))


def as_table(rollouts: Sequence[Rollout]) -> pa.Table:
    """As `RolloutStore.table` gives them; a NaN reward is none."""
    table = pa.Table.from_pylist(
        [asdict(rollout) for rollout in rollouts], pa.schema([*SCHEMA, REWARDS.field("reward")])
    )
    rewards = pa.array(table.column("reward").to_pylist(), pa.float64(), from_pandas=True)
    return table.set_column(table.column_names.index("reward"), "reward", rewards)


def make_rollout(prompt_id: str = "p", sample: int = 0, iteration: int = 1) -> Rollout:
    return Rollout(
        rollout_id=rollout_id(iteration, prompt_id, sample),
        iteration=iteration,
        prompt_id=prompt_id,
        prompt_digest="d",
        split="train",
        prompt_token_ids=[1, 2],
        token_ids=[3, 4, 0],
        text="añ\n",
        finish_reason="stop",
        ended=True,
        switch_point=2,
        guided_tokens=2,
        value_model="value@3",
        eta=0.1,
        method="qsharp",
        guidance_top_k=20,
        tail="floor",
        temperature=1.0,
        top_p=0.9,
        sampling_top_k=0,
        max_tokens=16,
        seed=2**31 + 5,
        model="m",
        kl=0.7,
        kl_candidates=0.3,
        mass=0.75,
        reward=0.1 + 0.2,
    )


def unguided(rollout: Rollout) -> Rollout:
    none: dict[str, Any] = dict.fromkeys(("value_model", "eta", "method", "guidance_top_k", "tail", "mass"))
    return replace(rollout, **none, switch_point=0)
