"""Two answers to each prompt from the model that a job starts from, sampled by the engine inside the worker.

They are a function of (seed, row) and are written down as they come, so an attempt goes on where the last one stopped.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from tunewright.core.durable import disk_full_is_clear, write_json
from tunewright.core.errors import Interrupted, TunewrightError, UserError
from tunewright.core.events import EventWriter
from tunewright.core.home import Home
from tunewright.core.run import ARTEFACT, BASE_IS_START, Run
from tunewright.data.judging import Pair
from tunewright.engine.engine import Engine
from tunewright.engine.request import GenerateRequest
from tunewright.train.finish import Start

TOGETHER = 64  # prompts that are answered before their answers are written down
Prompt = list[dict[str, Any]]


def sampled_pairs(
    path: Path,
    prompts: Iterable[Prompt],
    total: int,
    engine: Callable[[], Engine],
    asked: dict[str, Any],
    seed: int,
    events: EventWriter,
    stop: Callable[[], bool],
) -> Iterator[Pair]:
    """Each prompt with two answers, in order, from the file `path`, which is completed first.

    engine: makes one, if anything is left to do. asked: further fields of a GenerateRequest.
    Raises Interrupted when `stop` became true; what was written down is kept. DiskFull.
    """
    done = _whole_lines(path)
    left = itertools.islice(enumerate(prompts), done, None)
    if done < total:
        running = engine()
        with disk_full_is_clear(path.name), open(path, "ab") as out:
            while chunk := list(itertools.islice(left, TOGETHER)):
                text = f"Sampling two answers to each prompt: {done} of {total}"
                events.write("phase", text, {"name": "sampling", "done": done, "total": total})
                for line in _answered(running, chunk, asked, seed, stop):
                    out.write(line)
                out.flush()
                os.fsync(out.fileno())
                done += len(chunk)
        del running
        gc.collect()  # the engine's weights, before the job's own are loaded
    return _read(path)


def _whole_lines(path: Path) -> int:
    """The complete lines of the file; a torn last one is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = path.read_bytes() if path.exists() else b""
    end = raw.rfind(b"\n") + 1
    if end < len(raw):
        os.truncate(path, end)
    return raw.count(b"\n")


def _answered(
    engine: Engine, chunk: list[tuple[int, Prompt]], asked: dict[str, Any], seed: int, stop: Callable[[], bool]
) -> list[bytes]:
    """A line for each prompt; all are answered at the same time. A prompt that leaves no room has empty answers."""
    heard: list[list[dict[str, Any]]] = []
    for number, prompt in chunk:
        heard.append([])
        own = {"messages": prompt, "n": 2, "seed": (seed << 24) + number}
        try:
            engine.add_request(GenerateRequest.model_validate({**asked, **own}), heard[-1].append)
        except UserError as e:
            if e.code != "context_length_exceeded":
                raise
    while engine.step():
        if stop():
            raise Interrupted("Stopped while answers were sampled; those written down so far are kept.")
    lines = []
    for (_, prompt), told in zip(chunk, heard, strict=True):
        if told and told[-1]["type"] == "error":
            raise TunewrightError(told[-1]["error"]["message"], code=told[-1]["error"]["code"])
        row = {"prompt": prompt, "answers": [c["text"] for c in told[-1]["choices"]] if told else ["", ""]}
        lines.append((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return lines


def _read(path: Path) -> Iterator[Pair]:
    with open(path, encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            yield Pair(row["prompt"], (row["answers"][0], row["answers"][1]))


def engine_of(home: Home, dtype: str) -> Engine:
    """An engine on the threads that the job has."""
    return Engine(home, dtype if dtype in ("float32", "bfloat16") else "auto", torch.get_num_threads())


def place_of(run: Run, base: str, start: Start, name: str) -> dict[str, str]:
    """The fields of a request that name a model that lies in the run folder. base: below it. name: what it is called
    under answers/ if a copy is needed."""
    if start.base == BASE_IS_START:
        return {"artefact": str(start.weights)}
    if start.over is None or start.record is None:
        return {"base": base}
    if start.record.base != BASE_IS_START:
        return {"artefact": str(start.over)}
    return {"artefact": str(_with_base(start.over, run.folder / "answers" / name, base))}


def _with_base(over: Path, place: Path, base: str) -> Path:
    """The same adapter or delta, saying by name which base it belongs to."""
    if not place.exists():
        tmp = place.with_name(f"{place.name}.tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.copytree(over, tmp, copy_function=os.link)
        record = json.loads((tmp / ARTEFACT).read_bytes())
        (tmp / ARTEFACT).unlink()
        write_json(tmp / ARTEFACT, {**record, "base": base})
        os.rename(tmp, place)
    return place
