"""A worker that trains nothing but keeps the run-folder protocol: lock, attempts, events, checkpoints, exit codes.

Written with the standard library alone: it starts in milliseconds, and it is a second reading of the protocol.
script.json in the run folder says how it behaves:
  steps, per_epoch, save_every (recovery checkpoints), delay (seconds a step)
  kill_at: {attempt: step}, exit_at: {attempt: [step, code]}: what happens to it after that step
  hold: {attempt: [step, …]}: after that step it waits for a file go-<step> in the run folder, or for SIGTERM
  ignore_term: SIGTERM does nothing; child: leave a process behind in the same group that ignores SIGTERM
  no_result: say succeeded without a result; late_lock: seconds until it takes the lock
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(sys.argv[1] + ".new", "w") as f:
    f.write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""


def loss(step: int) -> float:
    """The same for a step however often it is done: resuming is exact."""
    return 1.0 / step


def read_json(path: str) -> Any:
    with open(path) as f:
        return json.load(f)


class Events:
    def __init__(self, folder: str) -> None:
        self.fd = os.open(f"{folder}/events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.seq = 0

    def write(self, type: str, message: str, data: dict[str, Any] | None = None, level: str = "info") -> None:
        self.seq += 1
        line = {"seq": self.seq, "time": time.time(), "type": type, "level": level, "message": message}
        os.write(self.fd, (json.dumps({**line, "data": data or {}}) + "\n").encode())


def commit(final: str, fill: Callable[[str], None]) -> None:
    tmp = f"{final}.tmp-{os.getpid()}"
    os.makedirs(tmp)
    fill(tmp)
    files = []
    for folder, _, names in os.walk(tmp):
        for name in names:
            with open(f"{folder}/{name}", "rb") as f:
                raw = f.read()
            place = os.path.relpath(f"{folder}/{name}", tmp)
            files.append({"name": place, "size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()})
    with open(f"{tmp}/MANIFEST.json", "w") as f:
        json.dump({"format_version": 1, "files": files}, f)
    if os.path.exists(final):
        os.rename(final, f"{tmp}-old")
    os.rename(tmp, final)


def save(run: str, events: Events, step: int, kind: str) -> None:
    def fill(folder: str) -> None:
        os.mkdir(f"{folder}/artefact")
        write_artefact(run, f"{folder}/artefact", step)

    commit(f"{run}/checkpoints/step-{step:06d}", fill)
    data = {"step": step, "kind": kind, "metrics": {"step": step, "train_loss": loss(step)}}
    events.write("checkpoint", f"Checkpoint created at step {step}", data)


def write_artefact(run: str, folder: str, step: int) -> None:
    job = read_json(f"{run}/job.json")
    artefact = {"kind": "adapter", "name": job["name"], "base": job["base"], "tuner": {"name": "lora"}, "step": step}
    with open(f"{folder}/artefact.json", "w") as f:
        json.dump({**artefact, "metrics": {"train_loss": loss(step)}}, f)
    with open(f"{folder}/adapter_model.safetensors", "w") as f:
        f.write(f"{job['name']} {step}")


def newest(run: str) -> int:
    names = os.listdir(f"{run}/checkpoints") if os.path.isdir(f"{run}/checkpoints") else []
    return max((int(n[5:]) for n in names if n[5:].isdigit()), default=0)


def train(run: str, events: Events, attempt: int, script: dict[str, Any], stop: list[int]) -> int:
    total, start = script["steps"], newest(run)
    if attempt == 1:
        events.write("plan", "the plan", {"n_epochs": 2, "batch_size": 1, "total_steps": total})
    else:
        name = f"step-{start:06d}" if start else None
        events.write("resumed", f"goes on from step {start}", {"step": start, "checkpoint": name})
    events.write("message", "Fine-tuning job started")
    for step in range(start + 1, total + 1):
        time.sleep(script.get("delay", 0.002))
        data = {"step": step, "total_steps": total, "train_loss": loss(step), "eta_s": (total - step) * 10.0}
        events.write("metrics", f"Step {step}/{total}: training loss={loss(step):.2f}", data)
        if step % script.get("per_epoch", 10) == 0:
            save(run, events, step, "epoch")
        elif step % script.get("save_every", 5) == 0:
            save(run, events, step, "recovery")
        if script.get("kill_at", {}).get(str(attempt)) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        at, code = script.get("exit_at", {}).get(str(attempt), (0, 0))
        if at == step:
            return give_up(events, code)
        if step in script.get("hold", {}).get(str(attempt), []):
            hold(f"{run}/go-{step}", script, stop)
        if stop and not script.get("ignore_term"):
            save(run, events, step, "recovery")
            events.write("end", "stopped", {"status": "interrupted"})
            return 75
    return finish(run, events, script, total)


def hold(go: str, script: dict[str, Any], stop: list[int]) -> None:
    while not os.path.exists(go) and (not stop or script.get("ignore_term")):
        time.sleep(0.005)


def give_up(events: Events, code: int) -> int:
    status, word = ("paused", "disk_full") if code == 73 else ("failed", "diverged")
    data = {"status": status, "code": word, "message": f"gave up: {word}", "param": None, "reason": word}
    events.write("end", "gave up", data, "error")
    return code


def finish(run: str, events: Events, script: dict[str, Any], total: int) -> int:
    if not script.get("no_result"):
        commit(f"{run}/result", lambda folder: write_artefact(run, folder, total))
        with open(f"{run}/step_metrics.csv", "w") as f:
            f.write("step,train_loss\n")
    events.write("message", "The job has successfully completed")
    events.write("end", "succeeded", {"status": "succeeded", "trained_tokens": 100 * total, "steps": total})
    return 0


def leave_child(run: str) -> None:
    import subprocess

    subprocess.Popen([sys.executable, "-S", "-c", STUBBORN, f"{run}/child.pid"])


def main() -> int:
    run, stop = sys.argv[1], []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    script = read_json(f"{run}/script.json")
    time.sleep(script.get("late_lock", 0))
    lock = os.open(f"{run}/lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    done = os.listdir(f"{run}/attempts") if os.path.isdir(f"{run}/attempts") else []
    attempt = max([0, *map(int, done)]) + 1
    os.makedirs(f"{run}/attempts/{attempt}")
    if script.get("child"):
        leave_child(run)
    return train(run, Events(f"{run}/attempts/{attempt}"), attempt, script, stop)


if __name__ == "__main__":
    sys.exit(main())
