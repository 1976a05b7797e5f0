"""The real worker, which SIGKILLs itself before the n-th durable file operation made inside a save.

python crash_worker.py RUN_FOLDER N     (N = 0 never crashes)
The number of such operations goes to RUN_FOLDER/../operations.txt, so that a test can draw N from the real range.
"""

import os
import signal
import sys
from pathlib import Path

from tunewright.core import durable
from tunewright.train import checkpoint, run, worker

target = int(sys.argv[2])
counter = {"depth": 0, "operations": 0}


def counted(function):
    def call(*args, **kwargs):
        if counter["depth"]:
            counter["operations"] += 1
            if counter["operations"] == target:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


def inside_save(*args, **kwargs):
    counter["depth"] += 1
    try:
        return durable.commit_folder(*args, **kwargs)
    finally:
        counter["depth"] -= 1


for name in ("fsync", "rename", "replace"):
    setattr(os, name, counted(getattr(os, name)))
checkpoint.save_file = counted(checkpoint.save_file)
checkpoint.commit_folder = run.commit_folder = inside_save
code = worker.main([sys.argv[1]])
Path(sys.argv[1]).parent.joinpath("operations.txt").write_text(str(counter["operations"]))
sys.exit(code)
