"""The real worker with faults put around it: it is killed, runs out of memory, meets NaN or a full disk on purpose.

A server: it imports everything once, then reads one JSON object a line, {"run": FOLDER, …faults}, and runs the worker
for it in a forked process of its own, whose exit code it prints (negative: the signal that ended it). Faults:

kill: [where, n]   SIGKILL before the n-th call inside `save`, `pack` or `validate` (0: never; counted for all places)
kill_after: s      SIGKILL that many seconds after the start, from outside
oom: [step, n]     from this step on a micro-batch of more than n tokens finds no memory
nan: [steps]       the loss of these steps is NaN, until the job has rolled back (`nan_always`: for ever)
spike: [a, b, x]   the loss of steps a to b is multiplied by x until the job has rolled back
term_at: step      SIGTERM to itself in this step
disk, disk_events: n   the n-th fsync, the n-th line of events finds the disk full
"""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from tunewright.core import durable, events
from tunewright.train import checkpoint, loop, meter, rows, run, worker


def count_calls(fault, counts):
    """Wrap what is done inside a save, packing and validating so that calls are counted and one may kill."""
    kill_at = tuple(fault.get("kill", ("", 0)))
    depth = {"save": 0, "validate": 0}

    def tick(place):
        counts[place] = counts.get(place, 0) + 1
        if (place, counts[place]) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function, place, needs=None):
        def call(*args, **kwargs):
            if needs is None or depth[needs]:
                tick(place)
            return function(*args, **kwargs)

        return call

    def inside(function, name):
        def call(*args, **kwargs):
            depth[name] += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth[name] -= 1

        return call

    for name in ("fsync", "rename", "replace"):
        setattr(os, name, counted(getattr(os, name), "save", "save"))
    checkpoint.save_file = counted(checkpoint.save_file, "save", "save")
    checkpoint.commit_folder = inside(durable.commit_folder, "save")
    run.commit_folder = rows.commit_folder = inside(durable.commit_folder, "save")
    loop.pack = counted(counted(loop.pack, "pack"), "validate", "validate")
    loop.validate = inside(loop.validate, "validate")


def spoil_steps(fault):
    """Put out-of-memory, NaN and spikes into the loop's own computation."""
    accumulate, backward = loop.accumulate, loop.step_loss
    now = {"step": 0}

    def tracked(parts, groups, tokens, step=None, scale=1.0):
        if step is not None:
            now["step"] = step
            now["plan"] = parts.plan
            if step == fault.get("term_at"):
                os.kill(os.getpid(), signal.SIGTERM)
        limit = fault.get("oom")
        if limit and step is not None and step >= limit[0] and loop.pack(list(groups), tokens):
            largest = max(b.n_tokens for b in loop.pack(list(groups), tokens))
            if largest > limit[1]:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        sums, weights = accumulate(parts, groups, tokens, step, scale)
        return ({**sums, "loss": sums["loss"] * factor()} if step else sums), weights

    def factor():
        if now.get("plan") is None or (now["plan"].rollbacks and not fault.get("nan_always")):
            return 1.0
        if now["step"] in fault.get("nan", ()):
            return float("nan")
        first, last, times = fault.get("spike", (0, -1, 1))
        return float(times) if first <= now["step"] <= last else 1.0

    def spoiled(terms, weights):
        return backward(terms, weights) * factor()

    loop.accumulate, loop.step_loss = tracked, spoiled


def fill_disk(fault):
    """The n-th fsync, or the n-th line of events, fails as on a full disk."""
    left = {"fsync": fault.get("disk", 0), "write": fault.get("disk_events", 0)}

    def failing(function, name):
        def call(*args):
            left[name] -= 1
            if left[name] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args)

        return call

    os.fsync = failing(os.fsync, "fsync")
    events.os.write = failing(os.write, "write")


def work(fault):
    counts = {"bytes at the start": meter.resident()}
    fill_disk(fault)
    spoil_steps(fault)
    count_calls(fault, counts)
    code = worker.main([fault["run"]])
    Path(fault["run"]).parent.joinpath("counts.json").write_text(json.dumps(counts))
    return code


def serve():
    torch.set_num_threads(1)
    for line in sys.stdin:
        fault = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            sys.stdin.close()
            os.dup2(2, 1)
            os._exit(work(fault))
        if "kill_after" in fault:
            time.sleep(fault["kill_after"])
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                os.kill(child, signal.SIGKILL)
            else:
                print(0, flush=True)
                continue
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


serve()
