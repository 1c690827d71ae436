"""What must be left of a load when all clients have gone: nothing, and a server that still answers exactly."""

import re
import time
from pathlib import Path

from real_server.process import RunningServer
from real_server.state import worker_state
from soaking.answers import Answer, complaints
from soaking.asks import Asker
from soaking.exactness import compare
from soaking.findings import Findings
from soaking.load import samples

IDLE_LIMIT_S = 30.0
EXACT_ANSWERS = 4


def metric(server: RunningServer, name: str) -> float:
    """The sum over all label sets."""
    lines = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", server.get("/metrics").text, re.MULTILINE)
    assert lines, f"the server has no metric {name}"
    return sum(map(float, lines))


def left_overs(server: RunningServer, slots: int) -> list[str]:
    """What isn't as on a server that has just started."""
    found = []
    for name in server.get("/v1/guidance").json()["value_models"]:
        for version in name["versions"]:
            label = f"{name['name']}@{version['version']}"
            if version["running"]:
                found.append(f"{version['running']} request(s) use {label}")
            if version["failed"]:
                found.append(f"guidance failed on {version['failed']} request(s) of {label}")
    worker = worker_state(server)
    if worker["guided_rows"] or worker["traces"]:
        found.append(f"the worker holds {worker['guided_rows']} guided rows and {worker['traces']} traces")
    for version in worker["value_models"]:
        if version["rows"] or version["free_slots"] != slots or version["held_pages"]:
            label = f"{version['name']}@{version['version']}"
            used = f"{version['rows']} rows, {slots - version['free_slots']} slots, {version['held_pages']} pages"
            found.append(f"{label} has {used} in use")
    resident = {(version["name"], version["version"]) for version in worker["value_models"]}
    listed = {
        (name["name"], version["version"])
        for name in server.get("/v1/guidance").json()["value_models"]
        for version in name["versions"]
    }
    if resident != listed:
        found.append(f"the worker holds versions {sorted(resident)}, the server lists {sorted(listed)}")
    return found


def engine_left_overs(server: RunningServer) -> list[str]:
    """What vLLM's own metrics say; they are those of its last step."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return [f"{name} is {figure}" for name in names if (figure := metric(server, name))]


def check_idle(server: RunningServer, slots: int, findings: Findings) -> None:
    """Wait until nothing is left of the load; what stays is a problem."""
    started = time.monotonic()
    while found := left_overs(server, slots):
        if time.monotonic() - started > IDLE_LIMIT_S:
            break
        time.sleep(0.2)
    for left in found:
        findings.problem(f"{IDLE_LIMIT_S:g} s after the last client left: {left}")
    findings.facts["idle_after_seconds"] = round(time.monotonic() - started, 1)


def check_answers(server: RunningServer, asker: Asker, reference: Path, findings: Findings) -> None:
    """The active versions, and the plain reference, still answer exactly, by all log-probabilities."""
    for value_model in [*asker.published.names, None]:
        for _ in range(EXACT_ANSWERS):
            ask = asker.exactly_checked(value_model)
            answer = Answer(ask, time.monotonic())
            response = server.post(ask.path, ask.body)
            answer.status, answer.ended, answer.is_complete = response.status_code, time.monotonic(), True
            answer.read(response.content)
            wrong = complaints(answer, asker.published)
            for complaint in wrong:
                findings.problem(f"after the load: {complaint}")
            for sample in samples(answer, asker.published, reference) if not wrong else []:
                findings.checked(compare(sample), f"after the load, {value_model}")
