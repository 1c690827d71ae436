"""The roll-out store: what goes in comes out, atomically, once."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from qtilt_trainer.atomic_file import UNFINISHED
from qtilt_trainer.rollouts import SCHEMA, Rollout, RolloutStore
from stored_rollouts import make_rollout, store_graded, unguided

TESTS = Path(__file__).parents[1]
WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from stored_rollouts import make_rollout
from qtilt_trainer.rollouts import RolloutStore
store = RolloutStore(Path(sys.argv[1]))
for part in range(100_000):
    store.append([make_rollout(f"{part}-{n}", 0) for n in range(40)])
"""


def test_roll_outs_come_back_exactly(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "new" / "store")
    rollouts = [make_rollout("a", 0), unguided(make_rollout("b", 1)), make_rollout("a", 0, iteration=2)]
    store_graded(store, rollouts)
    assert sorted(store.read(), key=lambda r: r.rollout_id) == sorted(rollouts, key=lambda r: r.rollout_id)
    assert store.read(2) == [rollouts[2]]
    assert store.ids() == {"1/a/0", "1/b/1", "2/a/0"}


def test_an_empty_store_is_empty(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "none")
    assert store.read() == []
    assert store.ids() == set()


def test_the_file_format_is_frozen(tmp_path: Path) -> None:
    store_graded(RolloutStore(tmp_path), [make_rollout()])
    schema = pq.read_schema(tmp_path / "iteration-001" / "part-00000.parquet")
    assert schema.metadata[b"qtilt_rollouts"] == b"2"
    assert [f"{field.name}: {field.type}" for field in schema] == [
        "rollout_id: string",
        "iteration: int32",
        "prompt_id: string",
        "prompt_digest: string",
        "split: string",
        "prompt_token_ids: list<element: int32>",
        "token_ids: list<element: int32>",
        "text: string",
        "finish_reason: string",
        "ended: bool",
        "switch_point: int32",
        "guided_tokens: int32",
        "value_model: string",
        "eta: double",
        "method: string",
        "guidance_top_k: int32",
        "tail: string",
        "temperature: double",
        "top_p: double",
        "sampling_top_k: int32",
        "max_tokens: int32",
        "seed: int64",
        "model: string",
        "kl: double",
        "kl_candidates: double",
        "mass: double",
    ]
    assert [field.name for field in fields(Rollout)] == [*SCHEMA.names, "reward"]
    rewards = pq.read_schema(tmp_path / "iteration-001" / "rewards-00000.parquet")
    assert rewards.metadata[b"qtilt_rollouts"] == b"2"
    assert [f"{field.name}: {field.type}" for field in rewards] == ["reward: double", "failure: string"]


def test_completions_are_stored_before_their_rewards(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    first = store.append([make_rollout("a", 0), make_rollout("a", 1), make_rollout("b", 0)])
    assert store.ids() == {"1/a/0", "1/a/1", "1/b/0"}
    assert store.table(1, ["reward"]).column("reward").to_pylist() == [None] * 3
    assert store.read() == []
    store.set_rewards(first, [0.25, None, 1.0], [None, "ValueError: no", None])
    assert [(rollout.rollout_id, rollout.reward) for rollout in store.read()] == [("1/a/0", 0.25), ("1/b/0", 1.0)]
    assert [rollout.reward for rollout in store.read(ungraded=-1.0)] == [0.25, -1.0, 1.0]
    assert store.table(1, ["failure", "rollout_id"]).to_pylist()[1] == {
        "failure": "ValueError: no",
        "rollout_id": "1/a/1",
    }
    store.set_rewards(first, [0.5, 0.5, 0.5], [None] * 3)
    assert [rollout.reward for rollout in store.read()] == [0.5] * 3


def test_rewards_that_are_not_those_of_the_part_are_refused(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store.set_rewards(store.append([make_rollout("a")]), [1.0, 2.0], [None, None])
    with pytest.raises(ValueError, match=r"rewards-00000\.parquet has 2 rewards for 1 completions: delete it"):
        store.read()


def test_parts_are_numbered_and_half_written_ones_are_not_read(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store.append([make_rollout("a")])
    store.append([make_rollout("b")])
    directory = tmp_path / "iteration-001"
    leftover = directory / f"part-00002.parquet{UNFINISHED}"
    leftover.write_bytes(b"half")
    assert sorted(part.name for part in directory.glob("*.parquet")) == ["part-00000.parquet", "part-00001.parquet"]
    assert store.ids() == {"1/a/0", "1/b/0"}
    store.remove_unfinished()
    assert not leftover.exists()


def test_a_new_part_does_not_take_the_rewards_of_one_that_was_deleted(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store_graded(store, [make_rollout("a")])
    (part,) = store.parts()
    part.unlink()
    store.append([make_rollout("b")])
    assert store.read() == []
    assert store.table(columns=["reward"]).column("reward").to_pylist() == [None]


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store.append([make_rollout()])
    part = tmp_path / "iteration-001" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"part-00000\.parquet is damaged"):
        store.ids()


def test_a_part_of_another_format_is_refused(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store.append([make_rollout()])
    part = tmp_path / "iteration-001" / "part-00000.parquet"
    table = pq.read_table(part)
    pq.write_table(table.replace_schema_metadata({"qtilt_rollouts": "1"}), part)
    with pytest.raises(ValueError, match="not a roll-out file of format version 2"):
        store.read()


def test_the_same_id_twice_is_refused(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store.append([make_rollout("a")])
    store.append([make_rollout("a")])
    with pytest.raises(ValueError, match="1 roll-out ids occur twice, the first is '1/a/0'"):
        store.read()


def test_a_writer_killed_at_any_moment_leaves_whole_parts_only(tmp_path: Path) -> None:
    for kill_after_parts in (1, 4, 9):
        store = RolloutStore(tmp_path / f"killed-after-{kill_after_parts}")
        writer = subprocess.Popen([sys.executable, "-c", WRITER, store.directory, TESTS])
        deadline = time.monotonic() + 60
        while len(list(store.directory.glob("*/part-*.parquet"))) < kill_after_parts:
            assert writer.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.003)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        ids = store.ids()
        assert len(ids) % 40 == 0
        assert len(ids) >= 40 * kill_after_parts
