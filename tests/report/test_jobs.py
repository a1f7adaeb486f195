"""Processes side by side."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from scripts.jobs import Jobs


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_for_all(jobs: Jobs) -> None:
    while jobs.num_running:
        jobs.wait_for_one()


def test_no_more_than_the_limit_run_and_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with Jobs(2, tmp_path) as jobs:
        assert jobs.num_free == 2
        for i in range(2):
            jobs.start(
                python("import os; print(os.environ['OMP_NUM_THREADS'])"), tmp_path / f"{i}.log"
            )
        assert jobs.num_free == 0
        wait_for_all(jobs)
        assert jobs.num_free == 2
    num_threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (
        (tmp_path / "0.log").read_text() == (tmp_path / "1.log").read_text() == f"{num_threads}\n"
    )


def test_each_gets_a_gpu_of_its_own_where_there_are_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them used the first, and the others stood idle."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A100 (UUID: a)'\necho 'GPU 1: A100 (UUID: b)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    shown = python("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    for expected in ("01", "57"):
        with Jobs(2, tmp_path) as jobs:
            for i in range(2):
                jobs.start(shown, tmp_path / f"{i}.log")
            wait_for_all(jobs)
        seen = [(tmp_path / f"{i}.log").read_text().strip() for i in range(2)]
        assert seen == [*expected]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")


def test_a_failure_is_told_with_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Jobs(None, tmp_path) as jobs:
        jobs.start(python("raise ValueError(3)"), tmp_path / "a.log")
        jobs.start(python("pass"), tmp_path / "b.log")
        wait_for_all(jobs)
    assert capsys.readouterr().out == f"failed, see {tmp_path / 'a.log'}\n"
    assert "ValueError: 3" in (tmp_path / "a.log").read_text()


@pytest.mark.parametrize("code", [130, 75])
def test_one_that_was_interrupted_ends_all_when_the_others_are_done(
    tmp_path: Path, code: int
) -> None:
    slow = f"import time; time.sleep(1); open({str(tmp_path / 'done')!r}, 'w')"

    def run() -> None:
        with Jobs(2, tmp_path) as jobs:
            jobs.start(python(slow))
            jobs.start(python(f"raise SystemExit({code})"))
            jobs.wait_for_one()

    with pytest.raises(KeyboardInterrupt):
        run()
    assert (tmp_path / "done").exists()


def test_sigterm_is_passed_on(tmp_path: Path) -> None:
    """So that runs write their checkpoints, and none is left behind."""
    saves = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(75)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    log = tmp_path / "a.log"

    def terminate_when_ready() -> None:
        while not log.exists() or log.read_text() != "ready\n":
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    def run() -> None:
        with Jobs(1, tmp_path) as jobs:
            jobs.start(python(saves), log)
            threading.Thread(target=terminate_when_ready, daemon=True).start()
            jobs.wait_for_one()

    previous = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert signal.getsignal(signal.SIGTERM) == previous
    assert log.read_text() == "ready\nsaved\n"


@pytest.mark.parametrize("is_running", [True, False])
def test_sigterm_ends_all_before_a_process_handles_it(tmp_path: Path, is_running: bool) -> None:
    long = python("import time; time.sleep(60); open('done', 'w')")

    def run() -> None:
        with Jobs(2, tmp_path) as jobs:
            if is_running:
                jobs.start(long)
            signal.raise_signal(signal.SIGTERM)
            if is_running:
                jobs.wait_for_one()
            else:
                jobs.start(long)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (tmp_path / "done").exists()
