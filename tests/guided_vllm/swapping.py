"""A second version comes in while requests run: each request is exact for the version it started with."""

from pathlib import Path

import pytest

from guided_vllm.driving import Ask, drive
from guided_vllm.matrix import covers
from guided_vllm.served import Served, await_preparation
from guided_vllm.tiny_models import VALUE_MODELS, make_tokenizer, make_value_model, prompt
from qtilt.distributions import Bernoulli


@covers("two versions at once, during a swap")
@pytest.mark.parametrize(("value_model", "family"), [("v-bernoulli", "llama"), ("q-bernoulli", "llama")])
def test_requests_keep_their_version_through_a_swap(
    served: Served, tmp_path: Path, value_model: str, family: str
) -> None:
    """The second version of v-bernoulli shares its cache with the first; that of q-bernoulli has another geometry."""
    type_, distribution, _ = VALUE_MODELS[value_model]
    directory = make_value_model(tmp_path / "second", type_, distribution, family, seed=50)
    served.directories[value_model, 2] = directory

    def before_step(step: int) -> list[Ask]:
        if step == 3:
            served.rpc("qtilt_prepare_value_model", value_model, 2, str(directory))
        if step == 6:
            await_preparation(served, value_model, 2)
            served.rpc("qtilt_commit_value_model", value_model, 2)
            with pytest.raises(ValueError, match="guides 3 running request"):
                served.rpc("qtilt_discard_value_model", value_model, 1)
            return [
                Ask(prompt(8 + index, 210 + index), served.guide(value_model, version=2), arrives=step + index)
                for index in range(3)
            ]
        return []

    asks = [Ask(prompt(8 + index, 200 + index), served.guide(value_model), max_tokens=20) for index in range(3)]
    answers = drive(served.engine, asks, before_step)
    assert len(answers) == 6
    for answer in answers:
        served.check(answer)
    served.rpc("qtilt_discard_value_model", value_model, 2)
    assert (value_model, 2) not in resident_versions(served)


def test_a_failed_preparation_changes_nothing(served: Served, tmp_path: Path) -> None:
    before = resident_versions(served)
    other_words = make_tokenizer(ordinary=80)
    refused = {
        "absent": (tmp_path / "absent", "value_model.json"),
        "short": (make_value_model(tmp_path / "short", "v", Bernoulli(), "gpt2", 60, positions=100), "100 positions"),
        "words": (
            make_value_model(tmp_path / "words", "q", Bernoulli(), "llama", 61, tokenizer=other_words),
            "ordinary tokens",
        ),
    }
    truncated = make_value_model(tmp_path / "truncated", "v", Bernoulli(), "llama", 62)
    head = truncated / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-8])
    refused["truncated"] = (truncated, "head.safetensors")
    for name, (directory, reason) in refused.items():
        served.rpc("qtilt_prepare_value_model", name, 1, str(directory))
        status = await_preparation(served, name, 1)
        assert status["state"] == "failed"
        assert reason in status["error"]
        assert "\n" not in status["error"]
        with pytest.raises(ValueError, match="failed"):
            served.rpc("qtilt_commit_value_model", name, 1)
        served.rpc("qtilt_discard_value_model", name, 1)
        with pytest.raises(ValueError, match="isn't being prepared"):
            served.rpc("qtilt_prepare_status", name, 1)
    assert resident_versions(served) == before


def test_versions_are_prepared_and_committed_once(served: Served) -> None:
    directory = str(served.directories["v-bernoulli", 1])
    with pytest.raises(ValueError, match="already resident"):
        served.rpc("qtilt_prepare_value_model", "v-bernoulli", 1, directory)
    served.rpc("qtilt_prepare_value_model", "new", 1, directory)
    with pytest.raises(ValueError, match="already resident or being prepared"):
        served.rpc("qtilt_prepare_value_model", "new", 1, directory)
    assert await_preparation(served, "new", 1) == {"state": "ready", "error": None}
    served.rpc("qtilt_discard_value_model", "new", 1)
    with pytest.raises(ValueError, match="isn't resident"):
        served.rpc("qtilt_discard_value_model", "new", 1)


def test_differing_added_tokens_are_a_warning(served: Served, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    directory = make_value_model(tmp_path / "extra", "v", Bernoulli(), "llama", 63, tokenizer=tokenizer)
    served.rpc("qtilt_prepare_value_model", "extra", 1, str(directory))
    assert await_preparation(served, "extra", 1)["state"] == "ready"
    served.rpc("qtilt_commit_value_model", "extra", 1)
    (extra,) = [entry for entry in served.rpc("qtilt_describe")["value_models"] if entry["name"] == "extra"]
    assert extra["scorable_tokens"] == served.scorable
    assert "<extra>" in extra["warnings"][0]
    served.rpc("qtilt_discard_value_model", "extra", 1)


def resident_versions(served: Served) -> set[tuple[str, int]]:
    return {(entry["name"], entry["version"]) for entry in served.rpc("qtilt_describe")["value_models"]}
