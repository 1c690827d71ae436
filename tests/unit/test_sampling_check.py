"""A request that samples otherwise than the roll-outs did is told of in the log, once."""

import pytest
from vllm.sampling_params import SamplingParams

from qtilt_server.registry import ResidentVersion
from qtilt_server.sampling_check import RolloutSamplingCheck


def version(**rollouts: float) -> ResidentVersion:
    return ResidentVersion("value", 1, "path", "v", {}, 10, rollouts)


def test_each_parameter_that_differs_is_told_once_whatever_its_values(caplog: pytest.LogCaptureFixture) -> None:
    check, fitted = RolloutSamplingCheck(), version(temperature=1.0, top_p=1.0, top_k=20)
    for temperature in (1.0, 0.7, 0.71, 0.72):
        check(fitted, SamplingParams(temperature=temperature, top_p=1.0, top_k=20))
    check(fitted, SamplingParams(temperature=0.7, top_p=0.5, top_k=20))
    first, second = (record.getMessage() for record in caplog.records)
    assert "value@1 was fitted on roll-outs sampled with temperature=1.0, top_p=1.0, top_k=20" in first
    assert "requests ask for temperature=0.7, top_p=1.0, top_k=20" in first
    assert "requests ask for temperature=0.7, top_p=0.5, top_k=20" in second


@pytest.mark.parametrize("off", [0, -1])
def test_no_truncation_is_written_in_two_ways(off: int, caplog: pytest.LogCaptureFixture) -> None:
    RolloutSamplingCheck()(version(top_k=0), SamplingParams(top_k=off))
    RolloutSamplingCheck()(version(), SamplingParams(top_k=5))
    assert not caplog.records
