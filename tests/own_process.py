"""Tests that need a process of their own: one pytest runs their folder, and the pytest that was asked reports them.

It runs beside the other tests, from the start on. They are collected, selected, reported and counted as any others;
what is asked on the command line beyond the choice of tests reaches them only as far as ``_command`` passes it on. To
debug them, run pytest with ``QTILT_TEST_PROCESS`` set to the folder's name: they then run in that very process.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, TextIO

import pytest

PROCESS = "QTILT_TEST_PROCESS"
PIPE = "QTILT_TEST_REPORTS_TO"
# For what is outside of the other process's tests, which have a time limit there: its start and its end.
TIMEOUT_S = 900


def is_of(folder: Path) -> bool:
    """Whether this process was started for the tests of the folder."""
    return os.environ.get(PROCESS) == folder.name


class OwnProcess:
    """In the pytest that was asked: runs the folder's tests elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: _Running | None = None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in filter(self._is_mine, items):
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        mine = list(filter(self._is_mine, session.items))
        if mine and not session.testsfailed and not session.config.option.collectonly:
            self.running = _Running(session.config, self.folder.name, mine)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if not self._is_mine(item):
            return None
        assert self.running is not None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.running.reports(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self) -> None:
        if self.running is not None:
            self.running.end()

    def _is_mine(self, item: pytest.Item) -> bool:
        return self.folder in item.path.parents


class _Running:
    """The other pytest. Its reports come one JSON object a line, its output goes to a log."""

    def __init__(self, config: pytest.Config, name: str, items: list[pytest.Item]) -> None:
        self.config = config
        self.reported: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.asked, self.finished = {item.nodeid for item in items}, set[str]()
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed by end)
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            self._command(items),
            cwd=config.invocation_params.dir,
            env=os.environ | {PROCESS: name, PIPE: str(writing)},
            pass_fds=[writing],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        os.close(writing)
        # Read at once, for the other process waits where the pipe is full. None: it has ended.
        self.lines = Queue[str | None]()
        self.reader = Thread(target=self._read, args=(os.fdopen(reading),))
        self.reader.start()

    def _read(self, pipe: TextIO) -> None:
        with pipe:
            for line in pipe:
                self.lines.put(line)
        self.lines.put(None)

    def _command(self, items: list[pytest.Item]) -> list[str]:
        config, options = self.config, self.config.option
        return [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
            *(f"--rootdir={config.rootpath}", f"--config-file={config.inipath}"),
            *(f"--tb={options.tbstyle}", f"--maxfail={options.maxfail or 0}", f"--verbosity={options.verbose}"),
            *(str(config.rootpath / item.nodeid) for item in items),
        ]

    def reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Of the item's phases, when all have come; one failure that shows the log if the process ends before."""
        while item.nodeid not in self.finished:
            line = self.lines.get()
            if line is None:
                self.lines.put(None)  # for the items after this one
                return [*self._received(item), self._ended(item)]
            message = json.loads(line)
            if "finished" in message:
                self.finished.add(message["finished"])
            else:
                self.reported[message["nodeid"]].append(message)
        return self._received(item)

    def _received(self, item: pytest.Item) -> list[pytest.TestReport]:
        from_data = self.config.hook.pytest_report_from_serializable
        return [from_data(config=self.config, data=data) for data in self.reported.pop(item.nodeid, [])]

    def _ended(self, item: pytest.Item) -> pytest.TestReport:
        message = f"the process of these tests ended before this one did, with exit code {self.process.wait()}"
        if not self.log.closed:  # what it said is shown once
            self.log.seek(0)
            message += f". Its last words:\n{self.log.read()[-8000:]}"
            self.log.close()
        return pytest.TestReport(item.nodeid, item.location, {}, "failed", message, "call")

    def end(self) -> None:
        """It ends by itself after the last test; if pytest was told to stop earlier, it is stopped too."""
        if not self.asked <= self.finished:
            self.process.terminate()
        try:
            self.process.wait(timeout=60)
        finally:
            self.process.kill()
            self.reader.join()
            self.log.close()


class ReportsBack:
    """In the other pytest: sends its reports through the pipe, if it was started by a pytest."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        # Not inherited by what tests start: the pipe must close when this process ends.
        pipe = os.environ.pop(PIPE, None)
        if pipe is None:
            self.pipe = None
            return
        os.set_inheritable(int(pipe), False)
        self.pipe = os.fdopen(int(pipe), "w")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._send(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._send({"finished": nodeid})

    def _send(self, message: dict[str, Any]) -> None:
        if self.pipe is not None:
            self.pipe.write(json.dumps(message) + "\n")
            self.pipe.flush()
