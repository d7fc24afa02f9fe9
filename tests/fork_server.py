"""Runs of train.py as processes of their own, which die at moments that a test chooses.

Importing takes seconds, so it is done once, in a server that forks for each run. As a script this
file is that server: a JSON object a line comes in for each run, one goes out when it has ended.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

ROOT = Path(__file__).parent.parent


class Ended(NamedTuple):
    """How a run ended: status as in subprocess, lines of its output, lines that the trace saw."""

    status: int
    out: list[str]
    err: list[str]
    lines: int


class Server:
    """Starts runs; use it with `with`. Paths are seen from `folder`."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__], cwd=self.folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )  # fmt: skip
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait()

    def start(self, *arguments, **plan):
        """Begin a run; its pid. The plan says what happens to it.

        Args:
            after: kill it after so many seconds.
            line, files: at the so-maniest line run in these files of the project (default: in
                those that train and write) ...
            call: ... or when a function of this name is first called in them ...
            send: ... have it send itself these signals (default: SIGKILL), with seconds between;
                or `raise` to have an exception there.
            limit, deadly: let no file grow beyond so many bytes; deadly: who tries dies.
            stdout, stderr: what these are, if not files to be read here.
            environment: variables to set.
            patience: `HEARTBEAT_TIMEOUT` of it, in seconds.
        """
        arguments = [str(argument) for argument in arguments]
        self.process.stdin.write(json.dumps({"arguments": arguments, **plan}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self, pid=None):
        """How a run ended, by default the one that was started last; its output is the last's."""
        self.process.stdin.write(json.dumps({"wait": pid}) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        out, err = (self._lines(name) for name in ("stdout", "stderr"))
        return Ended(status, out, err, int((self._lines("lines") or ["0"])[0]))

    def run(self, *arguments, **plan):
        """Start and wait."""
        self.start(*arguments, **plan)
        return self.wait()

    def start_together(self, processes, *arguments, plans=None, keeps_store=True):
        """Begin a run as torchrun would, but that none is ended for another; their pids by rank.

        `plans` are those of `start`, by rank; `more` in them are arguments of that rank alone.
        The store outlives all of them, as torchrun's does; or else it goes with rank 0.
        """
        # Of a test before, none is left that might use it.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self.store.port
        if not keeps_store:
            del self.store  # which frees the port
        pids = []
        for rank in range(processes):
            environment = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "TORCHELASTIC_USE_AGENT_STORE": keeps_store,
            }  # fmt: skip
            plan = {"stdout": f"rank_{rank}.out", "stderr": f"rank_{rank}.err"}
            plan |= {"environment": {name: str(value) for name, value in environment.items()}}
            plan |= (plans or {}).get(rank, {})
            pids.append(self.start(*arguments, *plan.pop("more", []), **plan))
        return pids

    def run_together(self, processes, *arguments, **how):
        """Start them and wait; how each ended, by rank."""
        ended, pids = [], self.start_together(processes, *arguments, **how)
        too_long = threading.Timer(150, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids])
        too_long.start()  # for processes that wait for each other
        for rank, pid in enumerate(pids):
            status = self.wait(pid).status
            texts = ((self.folder / f"rank_{rank}.{name}").read_text() for name in ("out", "err"))
            ended.append(Ended(status, *(text.splitlines() for text in texts), 0))
        too_long.cancel()
        return ended

    def _lines(self, name):
        path = self.folder / f"fork_server.{name}"
        return path.read_text().splitlines() if path.exists() else []


# ---------------------------------------------------------------------------------------------
# The server's side

TRAINING = ["train.py", "engine/training.py", "engine/step.py", "engine/run_folder.py",
            "engine/tensorboard.py", "engine/files.py", "engine/checkpoint.py"]  # fmt: skip


def child(arguments, plan):
    """What a forked process does; it does not return."""
    os.environ.update(plan.get("environment", {}))
    for number, name in ((1, "stdout"), (2, "stderr")):
        path = plan.get(name, f"fork_server.{name}")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    import train
    from engine.errors import exit_status
    from engine.signals import INTERRUPTS
    from parallel import process_group as team

    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored behind `pytest &`
    INTERRUPTS.install()
    if limit := plan.get("limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if plan.get("deadly"):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    counted = trace(plan) if {"line", "call"} & plan.keys() else [0]
    team.HEARTBEAT_TIMEOUT = plan.get("patience", team.HEARTBEAT_TIMEOUT)
    sys.argv = ["train.py", *arguments]
    try:
        status = exit_status(train.main)
    except Exception:
        traceback.print_exc()
        status = 1
    Path("fork_server.lines").write_text(str(counted[0]))
    sys.stderr.flush()
    os._exit(status)


def trace(plan):
    """Send signals at a line or a call; gives the count of lines, in a list."""
    files = {str(ROOT / name) for name in plan.get("files", TRAINING)}
    counted, calls = [0], [plan.get("call")]

    def act():
        for name in plan.get("send", ["SIGKILL"]):
            if name == "raise":
                raise ArithmeticError("as planned")
            if isinstance(name, str):
                os.kill(os.getpid(), getattr(signal, name))
            else:
                time.sleep(name)

    def count(frame, event, _):
        if event == "line":
            counted[0] += 1
            if counted[0] == plan.get("line"):
                act()
        return count

    def enter(frame, event, _):
        if frame.f_code.co_filename not in files:
            return None
        if frame.f_code.co_name in calls:
            calls.clear()
            act()
        return count

    sys.settrace(enter)
    return counted


def serve():
    """Fork for each line that comes in."""
    import pytest
    import torch
    from cli import few_test_images

    import parallel.data_parallel
    import parallel.pipeline  # noqa: F401
    import train  # noqa: F401

    torch.set_num_threads(1)
    few_test_images(pytest.MonkeyPatch())  # for good
    pid = deadline = None
    for line in sys.stdin:
        plan = json.loads(line)
        if "wait" in plan:
            print(wait(plan["wait"] or pid, deadline), flush=True)
            continue
        Path("fork_server.lines").unlink(missing_ok=True)
        pid = os.fork()
        if not pid:
            child(plan.pop("arguments"), plan)
        deadline = time.monotonic() + plan["after"] if "after" in plan else None
        print(pid, flush=True)


def wait(pid, deadline):
    """Exit status of a child, or minus its signal; killed at its deadline."""
    while deadline is not None and time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    if deadline is not None:
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    serve()
