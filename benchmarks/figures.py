"""From steps to figures: rates, start-up, compile time; medians over rounds; ratios; the machine; FLOPs a token."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.process import Outcome, RivalFailed

# dense bfloat16 FLOP/s of the maker's data sheet, for MFU
GPU_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "B200": 2250e12}


def figures(outcome: Outcome, warm: int, loss_step: int | None = None) -> dict[str, Any]:
    """One measured run as a flat row.

    warm: steps before the window. loss_step: the step whose time is `seconds_to_loss`.
    tokens_per_second, supervised_per_second: non-pad tokens of the window over its seconds, everything that happens
    between steps included. startup_s: process start to the first step, model loading and preflight included.
    compile_s: what the first steps took more than a median step, and what our plan says it compiled.
    Raises RivalFailed if no step lies in the window.
    """
    steps = outcome.steps
    if len(steps) < warm + 1:
        raise RivalFailed(f"only {len(steps)} steps were made, {warm + 1} are needed; give it more --seconds")
    window = steps[warm:]
    seconds = window[-1].time - steps[warm - 1].time
    durations = [b.time - a.time for a, b in pairwise(steps)]
    median = statistics.median(durations[warm - 1 :])
    early = [steps[0].time - outcome.began, *durations[: warm - 1]]
    tokens, supervised = sum(s.tokens for s in window), sum(s.supervised for s in window)
    compiled = float(outcome.facts.get("plan", {}).get("compile_seconds", 0.0))
    return {
        "tokens_per_second": tokens / seconds,
        "supervised_per_second": supervised / seconds,
        "window_s": seconds,
        "window_steps": len(window),
        "median_step_s": median,
        "startup_s": outcome.began - outcome.started,
        "compile_s": compiled + max(0.0, sum(d - median for d in early)),
        "wall_s": outcome.ended - outcome.started,
        "peak_bytes": outcome.peak_bytes,
        "tree_bytes": outcome.tree_bytes,
        "gpu_bytes": outcome.gpu_bytes,
        "seconds_to_loss": time_of(outcome, loss_step),
        "step_times": [round(s.time - outcome.started, 3) for s in steps],
    }


def time_of(outcome: Outcome, step: int | None) -> float | None:
    """Seconds from process start to the end of a step, None if it was not reached."""
    return next((s.time - outcome.started for s in outcome.steps if s.number == step), None)


def of(rows: Sequence[dict[str, Any]], rival: str, name: str) -> list[float]:
    """A figure of a rival in each round, where it was measured."""
    return [r[name] for r in rows if r["rival"] == rival and r.get(name) is not None]


def median_of(rows: Sequence[dict[str, Any]], rival: str, name: str) -> float | None:
    found = of(rows, rival, name)
    return statistics.median(found) if found else None


def ratios(rows: Sequence[dict[str, Any]], name: str, ours: str = "ours") -> dict[str, float]:
    """{rival: our figure over theirs, the median over the rounds in which both were measured}."""
    mine = {r["round"]: r[name] for r in rows if r["rival"] == ours and r.get(name)}
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["rival"] != ours and row.get(name) and row["round"] in mine:
            found.setdefault(row["rival"], []).append(mine[row["round"]] / row[name])
    return {rival: statistics.median(values) for rival, values in found.items()}


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on. load_1m: how busy it was just before."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    kinds = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {flag}" in text]
    return {
        "cpu": names[0] if names else platform.processor(),
        "instructions": kinds,
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "load_1m": os.getloadavg()[0],
        "gpu": gpu_name(),
    }


def gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def flops_per_token(config: dict[str, Any], tuner: str, r: int, length: float, supervised: float) -> float:
    """FLOPs of one training step per token that nobody can avoid, for a decoder of Llama's shape.

    LoRA: 4 N (no products for frozen weights' gradients) + 6 per adapter weight; full: 6 N. Attention: 2 T q forward,
    2.5 times that backward. The head counts for supervised tokens only. length: mean tokens a row; supervised: 0 to 1.
    """
    d, f, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    kv, width = config.get("num_key_value_heads") or heads, config.get("head_dim") or d // heads
    shapes = [(d, heads * width), (d, kv * width), (d, kv * width), (heads * width, d), (d, f), (d, f), (f, d)]
    body = layers * sum(a * b for a, b in shapes)
    head = config["vocab_size"] * d
    attention = 3.5 * 2 * length * heads * width * layers
    if tuner == "full":
        return 6 * body + 6 * head * supervised + attention
    return 4 * body + 4 * head * supervised + attention + 6 * layers * r * sum(a + b for a, b in shapes)


def peak_flops(gpu: str | None) -> float | None:
    """The GPU's dense bfloat16 peak, None if unknown (a CPU's is not on a data sheet: measure a product instead)."""
    return next((peak for name, peak in GPU_PEAKS.items() if gpu and name in gpu), None)
