"""Runs of train.py in processes of their own, which die or get signals where a test says.

Importing torch takes seconds, so a server does it once and forks for each run. This file as a
script is the server. It reads a JSON object a line: what to run, or for what to wait.
"""

import importlib
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
    """How a run ended: status as in subprocess, output, and the number of lines that it ran."""

    status: int
    out: list[str]
    err: list[str]
    lines: int


class Server:
    """Starts runs in `folder`; use it with `with`. All servers share one process."""

    _process = None

    def __init__(self, folder):
        self.folder = Path(folder)

    def __enter__(self):
        if Server._process is None:
            Server._process = subprocess.Popen(
                [sys.executable, __file__], text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, env=os.environ | {
                    "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
                },
            )  # fmt: skip
        return self

    def __exit__(self, *exception):
        """Leave the process to others; it ends with this one, which closes its stdin."""

    def start(self, *arguments, **plan):
        """Start a run; return its pid. The plan says what happens to it.

        Args:
            after: kill it after so many seconds.
            line: act when so many lines have been run in `files` ...
            call, nth: ... or at the nth call (default: first) of the function of this name there.
            files: of the project (default: those that train and write).
            send: to act is to send itself these signals (default: SIGKILL), with numbers of seconds
                to wait between them; or `raise` for an exception.
            limit, deadly: let no file grow beyond so many bytes; deadly: who tries dies.
            stdout, stderr: files to use in place of those that `wait` reads.
            environment: variables to set.
            heartbeat_timeout: HEARTBEAT_TIMEOUT of it, in seconds.
            main: `module.function` to call in place of train.main, with the arguments.
        """
        (self.folder / "fork_server.lines").unlink(missing_ok=True)
        plan |= {"arguments": [*map(str, arguments)], "folder": str(self.folder)}
        return self._ask(plan)

    def wait(self, pid=None):
        """Return how a run ended, by default the one that was started last."""
        status = self._ask({"wait": pid})
        out, err, lines = (self._lines(f"fork_server.{n}") for n in ("stdout", "stderr", "lines"))
        return Ended(status, out, err, int((lines or ["0"])[0]))

    def run(self, *arguments, **plan):
        """Start a run and wait for it."""
        self.start(*arguments, **plan)
        return self.wait()

    def start_together(self, processes, *arguments, plans=None, keeps_store=True, **common):
        """Start a run in several processes as torchrun would; return their pids by rank.

        Unlike torchrun this ends no process because another has ended.

        Args:
            plans: those of `start`, by rank; `more` in them are further arguments.
            keeps_store: the store outlives the processes, as torchrun's does; else it is rank 0's.
            common: of every rank's plan.
        """
        # Kept until the next start, when no process uses it any more.
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
            plan = {"stdout": f"rank_{rank}.out", "stderr": f"rank_{rank}.err", **common}
            plan |= {"environment": {name: str(value) for name, value in environment.items()}}
            plan |= (plans or {}).get(rank, {})
            pids.append(self.start(*arguments, *plan.pop("more", []), **plan))
        return pids

    def run_together(self, processes, *arguments, **how):
        """Start a run in several processes and wait; return how each ended, by rank."""
        ended, pids = [], self.start_together(processes, *arguments, **how)
        too_long = threading.Timer(240, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids])
        too_long.start()  # for processes that wait for each other
        for rank, pid in enumerate(pids):
            status = self.wait(pid).status
            out, err = (self._lines(f"rank_{rank}.{name}") for name in ("out", "err"))
            ended.append(Ended(status, out, err, 0))
        too_long.cancel()
        return ended

    def _ask(self, question):
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def _lines(self, name):
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


# ---------------------------------------------------------------------------------------------
# The server's side

TRAINING = ["train.py", "engine/training.py", "engine/step.py", "engine/run_folder.py",
            "engine/tensorboard.py", "engine/files.py", "engine/checkpoint.py"]  # fmt: skip


def run_child(plan):
    """Run what the plan says in a forked process, and end it."""
    os.chdir(plan["folder"])
    os.environ.update(plan.get("environment", {}))
    for number, name in ((1, "stdout"), (2, "stderr")):
        path = plan.get(name, f"fork_server.{name}")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    from engine.errors import exit_status
    from engine.signals import INTERRUPTS
    from parallel import heartbeat

    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored behind `pytest &`
    INTERRUPTS.install()
    if "after" in plan:
        threading.Timer(plan["after"], os.kill, (os.getpid(), signal.SIGKILL)).start()
    if limit := plan.get("limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if plan.get("deadly"):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    timeout = plan.get("heartbeat_timeout", heartbeat.HEARTBEAT_TIMEOUT)
    heartbeat.HEARTBEAT_TIMEOUT = timeout
    module, function = plan.get("main", "train.main").split(".")
    sys.argv = ["train.py", *plan["arguments"]]
    status, counted = 1, trace(plan) if {"line", "call"} & plan.keys() else [0]
    try:
        status = exit_status(getattr(importlib.import_module(module), function))
    except Exception:
        traceback.print_exc()
    Path("fork_server.lines").write_text(str(counted[0]))
    sys.stderr.flush()
    os._exit(status)


def trace(plan):
    """Act at a line or a call; return the count of lines, in a list."""
    files = {str(ROOT / name) for name in plan.get("files", TRAINING)}
    counted, calls = [0], [0]

    def act():
        for name in plan.get("send", ["SIGKILL"]):
            if name == "raise":
                raise ArithmeticError("as planned")
            if isinstance(name, str):
                os.kill(os.getpid(), getattr(signal, name))
            else:
                time.sleep(name)

    def count_line(frame, event, _):
        if event == "line":
            counted[0] += 1
            if counted[0] == plan.get("line"):
                act()
        return count_line

    def enter(frame, event, _):
        if frame.f_code.co_filename not in files:
            return None
        if frame.f_code.co_name == plan.get("call"):
            calls[0] += 1
            if calls[0] == plan.get("nth", 1):
                act()
        return count_line if "line" in plan else None

    sys.settrace(enter)
    return counted


def serve():
    """Fork for each line that comes in."""
    import pytest
    import torch
    from cli import few_test_images

    for name in ("parallel.pipeline", "parallel.data_parallel", "train"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    few_test_images(pytest.MonkeyPatch())  # for good
    pid = None
    for line in sys.stdin:
        plan = json.loads(line)
        if "wait" in plan:
            status = os.waitpid(plan["wait"] or pid, 0)[1]
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if not pid:
            run_child(plan)
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
