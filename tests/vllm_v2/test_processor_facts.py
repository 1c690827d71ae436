"""What a value engine rests on: which rows of logits Model Runner V2 shows a logits processor, when, and with what."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.worker.gpu.spec_decode import rejection_sampler

from guided_vllm.driving import Answer, Ask, drive
from guided_vllm.oracle import reference_oracle
from guided_vllm.served import Served
from guided_vllm.tight_engine import worker
from guided_vllm.tiny_models import MAX_MODEL_LEN, REFERENCE_VOCAB, prompt
from guided_vllm.v2_watcher import Stay, Watcher, watched

FEW = [3, 5, 8, 13]  # among so few tokens n-gram drafts are often right
BIAS = {5: 1.5}


def only_few(logits_V: torch.Tensor, generated: list[int]) -> torch.Tensor:
    masked_V = torch.full_like(logits_V, -torch.inf)
    masked_V[FEW] = logits_V[FEW]
    return masked_V


def only_few_biased(logits_V: torch.Tensor, generated: list[int]) -> torch.Tensor:
    masked_V = only_few(logits_V, generated)
    masked_V[list(BIAS)] += torch.tensor(list(BIAS.values())).double()
    return masked_V


@dataclass
class Crowd:
    """Twelve requests that are prefilled in chunks, meet in the prefix cache, are preempted, and reuse slots."""

    answers: dict[str, Answer]
    stays: list[Stay]
    preemptions: int

    def watched_stays(self) -> Iterator[tuple[Stay, Answer, list[int], bool]]:
        """With the answer, its tokens with the prompt's, and whether the stay is the request's last.

        Less what is shown of a request that has its last token, because a step after it was scheduled already.
        """
        for name, answer in self.answers.items():
            history = history_of(answer)
            stays = [stay for stay in self.stays if stay.name == name]
            for stay in stays:
                visits = [visit for visit in stay.visits if visit.rows[0].position < len(history) - 1]
                yield replace(stay, visits=visits), answer, history, stay is stays[-1]


def history_of(answer: Answer) -> list[int]:
    return [*answer.ask.prompt, *answer.choices[0].token_ids]


@pytest.fixture(scope="module")
def crowd(served: Served) -> Crowd:
    (watcher,) = [
        part for part in worker(served.engine).model_runner.sampler.logits_processors if isinstance(part, Watcher)
    ]
    watcher.forget()
    before = served.preemptions()
    shared = prompt(40, seed=199)
    asks = {
        f"{index}": Ask(
            [*shared[: 40 * (index % 4 == 3)], *prompt(70 if index == 0 else 20 + 2 * index, seed=200 + index)],
            temperature=(1.0, 0.7, 0.0)[index % 3],
            max_tokens=40 + index,
            arrives=2 * index,
            sampling={"allowed_token_ids": FEW, "seed": 400 + index} | watched(f"{index}", BIAS),
        )
        for index in range(12)
    }
    answers = drive(served.engine, list(asks.values()))
    return Crowd(dict(zip(asks, answers, strict=True)), watcher.stays, served.preemptions() - before)


def test_what_is_added_lies_between_the_other_processors_and_the_temperature(served: Served, crowd: Crowd) -> None:
    for answer in crowd.answers.values():
        served.check(answer, only_few_biased)


def test_every_token_after_the_prefill_is_fed_once_as_last_committed_or_as_accepted_draft(
    crowd: Crowd, speculative: bool
) -> None:
    accepted = 0
    for stay, _, history, is_last in crowd.watched_stays():
        decoding = [visit for visit in stay.visits if visit.rows[0].position >= stay.prefill_len - 1]
        bases = [visit.rows[0].position for visit in decoding]
        if not bases:
            continue  # preempted before its prefill was done
        end = (
            len(history) - 1 if is_last else bases[-1] + 1
        )  # tokens of a step under way at a preemption are drawn anew
        fed = []
        for visit, next_base in zip(decoding, [*bases[1:], end], strict=True):
            fed += [(row.position, row.token) for row in visit.rows if row.position < next_base]
            accepted += next_base - visit.rows[0].position - 1
        assert fed == list(enumerate(history))[stay.prefill_len - 1 : end]
    assert (accepted > 20) == speculative


def test_a_cache_written_at_every_row_holds_the_history_whenever_a_row_is_scored(
    crowd: Crowd, speculative: bool
) -> None:
    """Drafts are written too: what a rejected one left is overwritten before anything after it is scored."""
    overwritten = 0
    for stay, _, history, _ in crowd.watched_stays():
        cache = dict(enumerate(stay.prefilled))
        for visit in stay.visits:
            base = visit.rows[0].position
            assert [(row.position, row.draft) for row in visit.rows] == [(base + d, d) for d in range(len(visit.rows))]
            new = {row.position: row.token for row in visit.rows}
            overwritten += sum(cache.get(position, token) != token for position, token in new.items())
            cache |= new
            assert [cache[position] for position in range(base + 1)] == history[: base + 1]
    assert (overwritten > 20) == speculative


def test_committed_tokens_are_on_the_device_at_every_call(crowd: Crowd) -> None:
    """all_token_ids up to total_len: the whole prefill from the first chunk on, then one with every token."""
    for stay, _, history, _ in crowd.watched_stays():
        for visit in stay.visits:
            assert visit.known == history[: max(stay.prefill_len, visit.rows[0].position + 1)]


def test_rows_of_unfinished_prefill_chunks_come_with_the_last_position_of_the_chunk(crowd: Crowd) -> None:
    chunks = 0
    for stay, *_ in crowd.watched_stays():
        for visit in stay.visits:
            if visit.rows[0].position < stay.prefill_len:
                chunks += visit.rows[0].position < stay.prefill_len - 1
                (row,) = visit.rows
                assert visit.bound == row.position + 1
                assert row.token == stay.prefilled[row.position]
    assert chunks > 5


def test_the_host_knows_lengths_exactly_without_speculation_and_an_upper_bound_with(
    crowd: Crowd, speculative: bool
) -> None:
    slack = [visit.bound - visit.rows[-1].position - 1 for stay in crowd.stays for visit in stay.visits]
    assert min(slack) == 0
    assert (max(slack) > 0) == speculative


def test_lengths_are_on_the_host_when_a_request_is_added_and_tokens_on_the_device_when_writes_are_flushed(
    crowd: Crowd,
) -> None:
    for stay, answer, history, _ in crowd.watched_stays():
        assert stay.prompt_len == len(answer.ask.prompt)
        assert stay.prefilled == history[: stay.prefill_len]
        assert stay.prefill_len >= stay.prompt_len


def test_a_preempted_request_is_added_again_with_what_it_generated(crowd: Crowd) -> None:
    assert crowd.preemptions > 0
    assert len(crowd.stays) == len(crowd.answers) + crowd.preemptions
    assert any(stay.prefill_len > stay.prompt_len for stay in crowd.stays)
    assert any(answer.cached_tokens for answer in crowd.answers.values())


def test_slots_are_reused_without_notice(served: Served, crowd: Crowd) -> None:
    slots = {stay.slot for stay in crowd.stays}
    assert len(slots) < len(crowd.answers)
    assert slots <= set(range(served.max_seqs))


def test_positions_and_tokens_stay_in_range_up_to_the_length_limit(served: Served, watcher: Watcher) -> None:
    asks = [
        Ask(prompt(100, seed=300), temperature=0.3, max_tokens=28, sampling=watched("long")),
        Ask(prompt(127, seed=301), max_tokens=1, sampling=watched("full")),
    ]
    for answer in drive(served.engine, asks):
        served.check(answer)
    rows = [row for stay in watcher.stays for visit in stay.visits for row in visit.rows]
    assert max(row.position for row in rows) == MAX_MODEL_LEN - 2
    assert all(0 <= row.token < REFERENCE_VOCAB for row in rows)


def test_a_stopped_request_may_have_rows_after_its_last_token(served: Served, watcher: Watcher) -> None:
    """The step after it was scheduled before the stop was known: what such a row yields belongs to no token."""

    def ask(name: str, **stop: list[int]) -> Ask:
        return Ask(prompt(12, seed=310), max_tokens=16, sampling={"seed": 5} | watched(name) | stop)

    (whole,) = drive(served.engine, [ask("whole")])
    stop = whole.choices[0].token_ids[6]
    (stopped,) = drive(served.engine, [ask("stopped", stop_token_ids=[stop])])
    assert stopped.choices[0].token_ids[-1] == stop
    (stay,) = watcher.of("stopped")
    assert stay.visits[-1].rows[0].position == len(history_of(stopped)) - 1


def test_speculation_may_show_a_step_in_several_calls(
    served: Served, watcher: Watcher, speculative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM cuts what it verifies at a gigabyte of logits. Every request is whole in one of the calls."""
    monkeypatch.setattr(rejection_sampler, "MAX_CHUNK_BYTES", 9 * REFERENCE_VOCAB * 4)
    steps = 0

    def count(step: int) -> None:
        nonlocal steps
        steps = step

    asks = [
        Ask(prompt(8, seed=320 + index), max_tokens=10, sampling={"allowed_token_ids": FEW} | watched(f"{index}", BIAS))
        for index in range(5)
    ]
    for answer in drive(served.engine, asks, count):
        served.check(answer, only_few_biased)
    assert (watcher.calls > steps) if speculative else (watcher.calls <= steps)


def test_nothing_is_shown_while_no_request_needs_a_processor_and_everything_while_one_does(
    served: Served, watcher: Watcher
) -> None:
    drive(served.engine, [Ask(prompt(9, seed=330)), Ask(prompt(9, seed=331), temperature=0.0)])
    assert watcher.calls == 0
    asks = [Ask(prompt(9, seed=332)), Ask(prompt(9, seed=333), sampling=watched("one", BIAS))]
    answers = drive(served.engine, asks)
    assert [len(stay.visits) > 5 for stay in watcher.stays[2:]] == [True, True]
    served.check(answers[0])


def test_profiling_shows_slots_of_requests_that_are_gone(served: Served, watcher: Watcher) -> None:
    drive(served.engine, [Ask(prompt(9, seed=340), max_tokens=2, sampling=watched("gone"))])
    (stay,) = watcher.of("gone")
    seen = len(stay.visits)
    worker(served.engine).model_runner.profile_run()
    (dummy,) = stay.visits[seen:]
    assert [(row.position, row.token) for row in dummy.rows] == [(0, 0)]


def test_penalties_and_logit_bias_come_first(served: Served, watcher: Watcher, speculative: bool) -> None:
    bias = {} if speculative else {5: 3.0, 11: 2.0}  # refused under speculation
    sampling = {"repetition_penalty": 1.6, "logit_bias": bias} | watched("penalised", {7: 4.0})
    (answer,) = drive(served.engine, [Ask(prompt(9, seed=350), max_tokens=8, sampling=sampling)])
    history, (stay,) = history_of(answer), watcher.of("penalised")
    logits_LV = reference_oracle(served.reference).logits(history)
    for visit in stay.visits:
        base = visit.rows[0]
        expected_V = logits_LV[base.position].clone()
        for token, amount in bias.items():
            expected_V[token] += amount
        repeated = sorted(set(history[: base.position + 1]))
        positive_R = expected_V[repeated] > 0
        expected_V[repeated] *= torch.where(positive_R, 1 / 1.6, 1.6).double()
        torch.testing.assert_close(base.logits.double(), expected_V, atol=1e-4, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:max_rollback_tokens:DeprecationWarning")  # xgrammar of vLLM's use of it
def test_masks_come_first(served: Served, watcher: Watcher) -> None:
    grammar = StructuredOutputsParams(regex="(w1|w2|w3|w4){12}")
    words = {"allowed_token_ids": [1, 2, 5, 7, 8], "bad_words": ["w5"], "min_tokens": 4, "stop_token_ids": [7, 8]}
    asks = [
        Ask(prompt(9, seed=360), max_tokens=6, sampling={"structured_outputs": grammar} | watched("grammar")),
        Ask(prompt(9, seed=361), max_tokens=6, sampling=words | watched("words")),
    ]
    masks = (("grammar", {1, 2, 3, 4}, {1, 2, 3, 4}), ("words", {1, 2}, {1, 2, 7, 8}))
    for answer, (name, start, later) in zip(drive(served.engine, asks), masks, strict=True):
        (stay,) = watcher.of(name)
        # A step that was scheduled before the last token was known draws one more, without the grammar.
        drawing = [row for visit in stay.visits for row in visit.rows if row.position < len(history_of(answer)) - 1]
        for row in (row for row in drawing if row.draft == 0):
            finite = torch.isfinite(row.logits).nonzero().flatten().tolist()
            assert set(finite) == (start if row.position < 9 - 1 + 4 else later)


def test_a_seed_gives_the_same_tokens_in_any_company(served: Served) -> None:
    def seeded() -> Ask:
        return Ask(prompt(25, seed=94), arrives=1, sampling={"seed": 7})

    (alone,) = drive(served.engine, [seeded()])
    answers = drive(served.engine, [Ask(prompt(42, seed=95)), Ask(prompt(5, seed=96)), seeded()])
    assert answers[2].steps_to_first_token > alone.steps_to_first_token
    assert answers[2].choices[0].token_ids == alone.choices[0].token_ids
