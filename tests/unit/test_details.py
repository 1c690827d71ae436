"""What a request that asks for details is told of each token, against plain forwards and sums over the vocabulary."""

import gc
import math
import weakref
from pathlib import Path

import pytest
import torch

from guided_vllm.oracle import Guided, log_softmax, step_distributions, value_oracle
from guided_vllm.poisoned import POISON, poison
from guided_vllm.tiny_models import REFERENCE_VOCAB, TOKENS, make_value_model, prompt
from played_graphs import PlayedGraphs
from qtilt.distributions import Bernoulli, Categorical
from qtilt.vllm_plugin.details import TokenDetails
from qtilt.vllm_plugin.step import FORCED
from running_batch import RunningBatch, logits_at, make_residents

SLOTS, ETA, TOP_K = 6, 0.2, 5
CLOSE = {"rel": 1e-4, "abs": 1e-4}

pytestmark = pytest.mark.usefixtures("implementation")


class Runner(RunningBatch):
    """Requests, all of which ask for details, for one value model."""

    def __init__(
        self, directory: Path, type_: str = "v", family: str = "llama", graphs: PlayedGraphs | None = None
    ) -> None:
        super().__init__(SLOTS, graphs=graphs)
        distribution = Categorical(-1.0, 0.5, 4) if type_ == "q" else Bernoulli()
        self.directory = make_value_model(directory / "value", type_, distribution, family, seed=1)
        self.version = make_residents(SLOTS).load_at_start("value", str(self.directory))

    def put(self, slot: int, prompt_ids: list[int], output: tuple[int, ...] = (), **more: object) -> None:
        asked = {"eta": ETA, "top_k": TOP_K, "details": True, **more}
        self.add(slot, self.version, prompt_ids, output, **asked)

    def details(self, tokens: list[int], first: int = 0, trace: str = "t") -> list[TokenDetails | None]:
        return self.records.details(trace, first, tokens)

    def check(
        self, details: TokenDetails | None, history: list[int], token: int, temperature: float = 1.0, **more: object
    ) -> None:
        """The reference's logits depend on the position only."""
        assert details is not None
        asked = {"eta": ETA, "top_k": TOP_K, "method": "qsharp", "guided_tokens": None, **more}
        guided = Guided(self.directory, **asked)  # type: ignore[arg-type]
        logits_V = logits_at(len(history) - 1).double()
        (step,) = step_distributions(logits_V, history, guided, temperature, TOKENS)
        reference_V, tilted_V = log_softmax(logits_V / (temperature or 1.0)), step.log_probs_V
        ranked = sorted(range(TOKENS), key=lambda each: -float(logits_V[each]))[: guided.top_k]
        oracle = value_oracle(guided.directory)
        returns, pmf_KZ = oracle.pmf(oracle.logits(history, ranked))
        values_K, moved_V = (pmf_KZ * returns).sum(-1), tilted_V - reference_V
        conditional_K = log_softmax(tilted_V[ranked])
        candidates = details["candidates"]
        assert candidates["token_ids"] == ranked
        assert candidates["reference_logprobs"] == pytest.approx(reference_V[ranked].tolist(), **CLOSE)
        assert candidates["guided_logprobs"] == pytest.approx(tilted_V[ranked].tolist(), **CLOSE)
        assert candidates["values"] == pytest.approx(values_K.tolist(), **CLOSE)
        assert details["token_id"] == token
        assert details["reference_logprob"] == pytest.approx(float(reference_V[token]), **CLOSE)
        assert details["guided_logprob"] == pytest.approx(float(tilted_V[token]), **CLOSE)
        assert details["offset"] == pytest.approx(float(moved_V[token] - moved_V[ranked].max()), **CLOSE)
        assert details["kl"] == pytest.approx(step.kl, **CLOSE)
        assert details["entropy"] == pytest.approx(float(-(conditional_K.exp() * conditional_K).sum()), **CLOSE)
        value = float(values_K[ranked.index(token)]) if token in ranked else None
        assert details["value"] == (value if value is None else pytest.approx(value, **CLOSE))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("tail", ["mean", "floor"])
@pytest.mark.parametrize("method", ["qsharp", "cd"])
@pytest.mark.parametrize("type_", ["q", "v"])
def test_each_token_is_told_with_what_drew_it(
    tmp_path: Path, type_: str, method: str, tail: str, temperature: float
) -> None:
    """Of tokens that were candidates and of others; the last one isn't fed yet."""
    runner = Runner(tmp_path, type_)
    start, tokens = prompt(5, seed=1), []
    runner.put(2, start, temperature=temperature, method=method, tail=tail)
    runner.add(0, runner.version, prompt(9, seed=2), trace_id="beside", top_k=9)
    for rank in (0, 2, 40, TOP_K, 1):
        token = int(logits_at(len(start) + len(tokens) - 1)[:TOKENS].argsort(descending=True)[rank])
        runner.step({0: [3], 2: [token]})
        tokens.append(token)
    told = runner.details(tokens)
    assert len(told) == len(tokens)
    for step, (details, token) in enumerate(zip(told, tokens, strict=True)):
        runner.check(details, [*start, *tokens[:step]], token, temperature, method=method, tail=tail)
    assert runner.details(tokens, first=3) == told[3:]


def test_a_token_without_any_mass_is_told_as_that(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    runner.put(0, prompt(5, seed=1), top_k=4)
    logits_BV = torch.full((1, REFERENCE_VOCAB), -math.inf)
    logits_BV[0, [3, 7]] = torch.tensor([1.0, 2.0])
    runner.guide([0], logits_BV)
    runner.requests.commit(0, [9])
    (details,) = runner.details([9])
    assert details is not None
    assert details["reference_logprob"] == details["guided_logprob"] == -math.inf
    assert details["candidates"]["token_ids"] == [7, 3]
    assert math.isfinite(details["entropy"])


@pytest.mark.parametrize("allowed", [[TOKENS + 1], []])
def test_where_nothing_may_be_scored_every_number_is_one(tmp_path: Path, allowed: list[int]) -> None:
    """A grammar that allows what the value model lacks, or masks that leave nothing."""
    runner = Runner(tmp_path)
    runner.version.scorable = TOKENS
    runner.put(0, prompt(5, seed=1))
    logits_BV = torch.full((1, REFERENCE_VOCAB), -math.inf)
    logits_BV[0, allowed] = 1.5
    runner.guide([0], logits_BV)
    runner.requests.commit(0, [TOKENS + 1])
    (details,) = runner.details([TOKENS + 1])
    assert details is not None
    assert details["reference_logprob"] == details["guided_logprob"] == (0.0 if allowed else -math.inf)
    assert (details["kl"], details["entropy"], details["candidates"]["token_ids"]) == (0.0, 0.0, [])


def test_details_are_gone_with_their_trace_though_the_request_goes_on(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    request = runner.add(0, runner.version, prompt(5, seed=1), details=True)
    for token in (3, 4):
        runner.step({0: [token]})
    step = weakref.ref(request.stay.details._steps[0].numbers)
    runner.records.take("t", [[3, 4]])
    gc.collect()
    assert step() is None
    runner.step({0: [5]})
    assert request.stay.details.read(0, [3, 4, 5]) == {}


def test_candidates_without_a_score_have_no_value(tmp_path: Path) -> None:
    """One candidate alone isn't scored under ``mean``: nothing could change."""
    runner = Runner(tmp_path)
    runner.put(0, prompt(5, seed=1), candidate_mass=1e-6)
    token = int(logits_at(4)[:TOKENS].argmax())
    runner.step({0: [token]})
    (details,) = runner.details([token])
    assert details is not None
    assert details["candidates"]["values"] == [None]
    assert details["value"] is None
    assert details["guided_logprob"] == pytest.approx(details["reference_logprob"])


def test_choices_of_one_trace_are_told_apart(tmp_path: Path) -> None:
    runner, start = Runner(tmp_path), prompt(5, seed=1)
    for slot in (0, 1):
        runner.put(slot, start)
    for first, second in [(3, 3), (4, 5), (6, 6)]:
        runner.step({0: [first], 1: [second]})
    for tokens in ([3, 4, 6], [3, 5, 6]):
        for step, details in enumerate(runner.details(tokens)):
            runner.check(details, [*start, *tokens[:step]], tokens[step])


def test_a_request_that_was_preempted_is_told_of_all_its_tokens(tmp_path: Path) -> None:
    runner, start = Runner(tmp_path), prompt(5, seed=1)
    runner.put(0, start)
    for token in (3, 60, 5):
        runner.step({0: [token]})
    runner.batch.keep_only([])
    runner.add_unguided(0, prompt(30, seed=3))
    runner.put(1, start, output=(3, 60, 5))
    runner.step({1: [6]})
    tokens = [3, 60, 5, 6]
    for step, details in enumerate(runner.details(tokens)):
        runner.check(details, [*start, *tokens[:step]], tokens[step])


def test_tokens_that_were_not_guided_have_no_details(tmp_path: Path) -> None:
    runner, start = Runner(tmp_path), prompt(5, seed=1)
    runner.put(0, start, guided_tokens=2)
    runner.put(1, start, trace_id="forced")
    for step in range(3):
        guided_BV = runner.guide([0, 1], torch.stack([logits_at(4 + step)] * 2))
        guided_BV[:, 9] = FORCED if step == 1 else 0.0
        runner.batch.leave_out_forced(guided_BV)
        for slot in (0, 1):
            runner.requests.commit(slot, [9])
    for trace, guided in (("t", [True, False, False]), ("forced", [True, False, True])):
        assert [details is not None for details in runner.details([9, 9, 9], trace=trace)] == guided


def test_a_step_whose_values_are_no_numbers_has_no_details(tmp_path: Path) -> None:
    runner = Runner(tmp_path, family="gpt2")
    runner.version = make_residents(SLOTS).load_at_start("poisoned", str(poison(runner.directory)))
    runner.put(0, prompt(5, seed=1))
    for token in (3, POISON, 4):
        runner.step({0: [token]})
    assert [details is not None for details in runner.details([3, POISON, 4])] == [True, True, False]


def test_what_was_not_generated_is_refused(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    runner.put(0, prompt(5, seed=1))
    for token in (3, 4):
        runner.step({0: [token]})
    for tokens in ([4], [3, 4, 5]):
        with pytest.raises(ValueError, match="no details of trace 't'"):
            runner.details(tokens)
    with pytest.raises(ValueError, match="no details of trace 'other'"):
        runner.details([3], trace="other")


@pytest.mark.parametrize("type_", ["q", "v"])
def test_steps_that_are_replayed_are_told_as_others(tmp_path: Path, type_: str) -> None:
    graphs = PlayedGraphs()
    runner, start = Runner(tmp_path, type_, graphs=graphs), prompt(5, seed=1)
    runner.put(0, start)
    tokens = [3, 60, 5, 7, 9]
    for token in tokens:
        runner.step({0: [token]})
    for step, details in enumerate(runner.details(tokens)):
        runner.check(details, [*start, *tokens[:step]], tokens[step])
