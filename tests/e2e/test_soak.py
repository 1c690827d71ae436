"""The soak at a small size, and that it leaves nothing behind when it is interrupted."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from soaking.memory import processes

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"
END_LIMIT_S = 10


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_minute_of_load_finds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, SOAK, "--minutes", "1", "--clients", "16", "--checked", "0.1", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.endswith("passed\n")
    report = json.loads((tmp_path / "soak.json").read_text())
    assert report["passed"]
    assert report["problems"] == []
    # That all of it happened is among the soak's own checks; here that it counted what it checked.
    assert report["exactness"]["choices"] > 10
    assert report["exactness"]["tokens"] > 100
    assert report["exactness"]["largest_logprob_difference"] > 0
    assert (tmp_path / "server.log").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM], ids=["interrupt", "terminate"])
def test_it_stops_its_server_when_it_is_stopped(tmp_path: Path, signal_number: signal.Signals) -> None:
    command = [sys.executable, SOAK, "--clients", "8", "--out", tmp_path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as soak:
        assert soak.stderr is not None
        said = next(line for line in soak.stderr if line.startswith("the server is ready"))
        session = int(said.split()[-1].rstrip(")"))
        assert len(processes(session)) > 1
        time.sleep(3)  # requests are on their way
        soak.send_signal(signal_number)
        soak.stderr.read()
        assert soak.wait() != 0
    assert not processes(session)
    # What multiprocessing keeps beside a process ends when it sees that the process has ended.
    deadline = time.monotonic() + END_LIMIT_S
    while (left := processes(soak.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
