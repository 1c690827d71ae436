import json

import pytest

from qtilt.params import EXTRA_ARGS_KEY, GuidanceParams

VALID = {"value_model": "maths", "version": 2, "eta": 0.1, "top_k": 20}


def test_params_survive_the_trip_through_json():
    params = GuidanceParams(**VALID, method="cd", tail="mean", guided_tokens=7, candidate_mass=0.9, trace_id="abc")
    wire = json.loads(json.dumps({EXTRA_ARGS_KEY: params.to_extra_args()}))
    assert GuidanceParams.from_extra_args(wire) == params


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}, {EXTRA_ARGS_KEY: None}])
def test_a_request_without_guidance_has_no_params(extra_args):
    assert GuidanceParams.from_extra_args(extra_args) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("value_model", ""),
        ("value_model", 3),
        ("version", 0),
        ("version", True),
        ("eta", 0.0),
        ("eta", -1),
        ("eta", 0.99e-9),
        ("eta", float("nan")),
        ("eta", float("inf")),
        ("eta", True),
        ("eta", "0.1"),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_k", True),
        ("method", "qshard"),
        ("tail", "average"),
        ("tail", None),
        ("guided_tokens", -1),
        ("guided_tokens", 1.0),
        ("kl_budget", 0),
        ("kl_budget", -1.0),
        ("kl_budget", float("inf")),
        ("kl_budget", float("nan")),
        ("kl_budget", True),
        ("kl_budget", "1"),
        ("details", 1),
        ("details", None),
        ("candidate_mass", 0),
        ("candidate_mass", -0.1),
        ("candidate_mass", 1.0000001),
        ("candidate_mass", float("nan")),
        ("candidate_mass", float("inf")),
        ("candidate_mass", True),
        ("candidate_mass", "0.1"),
        ("candidate_mass", None),
        ("trace_id", None),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"guidance.{field}"):
        GuidanceParams(**{**VALID, field: value})


def test_a_block_in_json_and_one_with_nothing_but_a_name_are_read():
    entry = {"value_model": "maths", "eta": 0.3}
    read = GuidanceParams.from_extra_args({EXTRA_ARGS_KEY: json.dumps(entry)})
    assert read == GuidanceParams.from_extra_args({EXTRA_ARGS_KEY: entry}) == GuidanceParams("maths", 1, 0.3, 20)
    assert GuidanceParams.from_extra_args({EXTRA_ARGS_KEY: {"value_model": "a"}}) == GuidanceParams("a", 1, 0.1, 20)
    nulls = {"value_model": "a", "eta": None, "tail": None, "guided_tokens": None}
    assert GuidanceParams.from_extra_args({EXTRA_ARGS_KEY: nulls}) == GuidanceParams("a", 1, 0.1, 20)


@pytest.mark.parametrize(
    "entry", [3, {"eta": 0.1}, {**VALID, "ета": 0.1}, "{", "[1]", "3", '{"eta": 0.1}', "[" * 100_000]
)
def test_a_malformed_entry_is_refused(entry):
    with pytest.raises(ValueError, match="extra_args"):
        GuidanceParams.from_extra_args({EXTRA_ARGS_KEY: entry})


def test_guided_tokens_counts_generated_tokens():
    assert [GuidanceParams(**VALID, guided_tokens=2).guides(n) for n in range(4)] == [True, True, False, False]
    assert not GuidanceParams(**VALID, guided_tokens=0).guides(0)
    assert GuidanceParams(**VALID).guides(10_000)
