"""LoRA adapters are other policies: a value model guides the one whose roll-outs it was fitted on, and no other."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qtilt_trainer.client import Guidance, GuidedClient, Sampling
from qtilt_trainer.config import ServerConfig
from qtilt_trainer.prompts import Framing
from real_server.checking import Oracle, Returned, encode
from real_server.models import POSITIONS, make_value_model
from real_server.process import RunningServer, running_server

ADAPTER = "support"


@pytest.fixture(scope="module")
def adapted(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Value models ``plain``, of the reference, and ``adapted``, of the adapter."""
    directory = tmp_path_factory.mktemp("adapted")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(models / "reference"),
        LoraConfig(r=8, lora_alpha=512, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    model.save_pretrained(directory / "adapter")
    for seed, name in enumerate(("plain", "adapted")):
        make_value_model(directory / name, seed=seed)
    manifest = directory / "adapted" / "value_model.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"adapter": ADAPTER}))
    flags = (
        *(f"--value-model={name}={directory / name}" for name in ("plain", "adapted")),
        "--enable-lora",
        f"--lora-modules={ADAPTER}={directory / 'adapter'}",
        "--max-lora-rank=8",
    )
    with running_server(models / "reference", directory, directory / "server.log", *flags) as server:
        yield server


def complete(server: RunningServer, model: str, value_model: str | None) -> httpx.Response:
    body = {"model": model, "prompt": "a b", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    if value_model is not None:
        body["guidance"] = {"value_model": value_model}
    return server.post("/v1/completions", body)


def test_whose_value_models_they_are_is_told(adapted: RunningServer) -> None:
    told = {each["name"]: each["versions"][0]["adapter"] for each in adapted.get("/v1/guidance").json()["value_models"]}
    assert told == {"plain": None, "adapted": ADAPTER}


def test_each_policy_is_guided_by_its_own_value_model(adapted: RunningServer) -> None:
    for model, value_model in ((adapted.model, "plain"), (ADAPTER, "adapted")):
        answer = complete(adapted, model, value_model)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["guidance"]["guided_tokens"] == 3


@pytest.mark.parametrize(
    ("of_adapter", "value_model", "named"),
    [
        (True, "plain", "plain@1 was fitted to the reference model without an adapter, and this request asks for the "),
        (False, "adapted", "adapted@1 was fitted to the LoRA adapter 'support', and this request asks for the ref"),
    ],
)
def test_a_value_model_of_another_policy_is_refused(
    adapted: RunningServer, of_adapter: bool, value_model: str, named: str
) -> None:
    refused = complete(adapted, ADAPTER if of_adapter else adapted.model, value_model)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "guidance.value_model"
    assert named in error["message"]


def test_each_is_a_model_of_its_policy(adapted: RunningServer) -> None:
    listed = {card["id"]: card for card in adapted.get("/v1/models").json()["data"]}
    assert {f"{ADAPTER}:adapted", f"{ADAPTER}:adapted@1", f"{adapted.model}:plain"} <= listed.keys()
    assert f"{adapted.model}:adapted" not in listed
    assert listed[f"{ADAPTER}:adapted"]["parent"] == ADAPTER
    named, asked = (complete(adapted, *each) for each in ((f"{ADAPTER}:adapted", None), (ADAPTER, "adapted")))
    assert named.json()["choices"][0]["text"] == asked.json()["choices"][0]["text"]
    assert named.json()["guidance"] == asked.json()["guidance"]
    assert complete(adapted, f"{adapted.model}:adapted", None).status_code == 400


def test_logprobs_are_the_references_by_vllms_default(adapted: RunningServer, models: Path) -> None:
    """At temperature 1, whatever was sampled from."""
    body = {"prompt": "abc", "max_tokens": 12, "temperature": 0.5, "logprobs": 0, "return_token_ids": True}
    (choice,) = adapted.post("/v1/completions", {**body, "guidance": {"eta": 0.02}}).json()["choices"]
    returned = Returned(encode("abc"), choice["token_ids"], choice["logprobs"]["token_logprobs"], None)
    Oracle(models / "reference", {}).check(returned, None)
    assert choice["guidance"]["kl"] > 0.1


def test_requests_without_guidance_are_vllms_own(adapted: RunningServer) -> None:
    texts = [complete(adapted, model, None).json()["choices"][0]["text"] for model in (adapted.model, ADAPTER)]
    assert texts[0] != texts[1], "the adapter is one that changes what is generated"


def test_the_trainer_collects_from_an_adapter(adapted: RunningServer) -> None:
    """vLLM's card of an adapter doesn't say how long its sequences may be; that of the model that it is of does."""
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=3)

    async def ask() -> None:
        async with GuidedClient(ServerConfig(url=adapted.origin, model=ADAPTER, retries=0)) as client:
            assert await client.context_length() == POSITIONS
            assert await client.prompt_length("a b", Framing()) == len("a b")
            guidance = Guidance("adapted@1", 0.1, 8, "qsharp", guided_tokens=2)
            completions = await client.complete("a b", 2, 5, sampling, guidance)
            assert [completion.guided_tokens for completion in completions] == [2, 2]

    asyncio.run(ask())
