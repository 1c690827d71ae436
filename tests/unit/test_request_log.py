"""Where --guidance-log writes to; what it writes is tested against a real server (tests/e2e/test_request_log.py)."""

import json
from pathlib import Path
from typing import Any

import pytest

from qtilt_server.errors import StartupError
from qtilt_server.flags import parse_own_flags
from qtilt_server.request_log import RequestLog


def test_a_file_is_appended_to_and_each_line_is_there_at_once(tmp_path: Path) -> None:
    entries = []
    for number in range(2):
        log = RequestLog.open(str(tmp_path / "log"))
        entries.append({"number": number, "text": "η\n"})
        log.write(entries[-1])
        assert [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()] == entries
        log._stream.close()


def test_a_dash_is_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    RequestLog.open("-").write({"number": 1})
    assert capsys.readouterr().out == '{"number": 1}\n'


@pytest.mark.parametrize("target", ["", "no/such/directory/log"])
def test_a_place_that_is_not_there_is_refused_at_once(target: str) -> None:
    with pytest.raises(StartupError, match="--guidance-log"):
        parse_own_flags([f"--guidance-log={target}"])


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"--guidance-log .*: Is a directory"):
        RequestLog.open(str(tmp_path))


def test_without_the_flag_nothing_is_logged() -> None:
    assert parse_own_flags([]).log is None


class FullDisk:
    def write(self, _text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None: ...


def test_a_line_that_cannot_be_written_is_no_reason_to_fail() -> None:
    full: Any = FullDisk()
    RequestLog(full).write({"number": 1})
