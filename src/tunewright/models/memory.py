"""What training costs, by counting: bytes by what they are for, and what would fit. No measurement, no torch.

The preflight starts from these figures and replaces them by measured ones; `tunewright estimate` shows them.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CHECKPOINTING = ("none", "selective", "full")
# float32-equivalent bytes of state for each trained parameter; Adafactor's rows and columns are next to nothing
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2.1, "adafactor": 0.1, "lion": 4.0, "muon": 4.0, "sgd": 4.0}
NF4_BYTES = 0.516  # 4 bits, and a doubly quantised scale for 64 of them (ops/quant.py)
HEAD_CHUNK = 256
PROCESS = 0.45e9  # Python, torch and transformers, without any model
CONTEXT = 0.6e9  # what CUDA itself takes on the GPU
SLACK = 1.05  # the allocator's rounding and fragments


@dataclass(frozen=True)
class Setting:
    """How to train. tuner: full, lora or qlora (lora on 4-bit weights). offload: optimizer, gradients and weights stay
    in the CPU's memory and come to the GPU layer by layer. tokens: of one micro-batch; length: of a row. together: rows
    that must be in one micro-batch (2 of a pair). reference: the objective compares with the model at step 0, of which
    full training holds a second copy."""

    tuner: str = "lora"
    dtype: str = "bfloat16"
    checkpointing: str = "none"
    optimizer: str = "adamw"
    offload: bool = False
    rank: int = 16
    tokens: int = 2048
    length: int = 2048
    together: int = 1
    reference: bool = False

    @property
    def here(self) -> bool:
        """Whether tunewright can train so today."""
        return not self.offload

    @property
    def title(self) -> str:
        named = {"full": "full", "lora": f"LoRA r={self.rank}", "qlora": f"QLoRA r={self.rank}"}[self.tuner]
        extra = [f"checkpointing {self.checkpointing}"] if self.checkpointing != "none" else []
        extra += [self.optimizer] if self.optimizer != "adamw" else []
        extra += ["offload"] if self.offload else []
        return ", ".join([named, self.dtype, *extra])


def stored_parameters(folder: Path) -> int:
    """Numbers in the safetensors files of a model folder, from their headers alone."""
    n = 0
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        n += sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
    return n


def trainable(shape: dict[str, Any], tuner: str, rank: int) -> int:
    """Parameters that are trained. LoRA: rank * (in + out) of every linear layer but the head."""
    if tuner == "full":
        return shape["parameters"]
    return sum(rank * (i + o) * n for i, o, n in shape["linears"])


def weight_bytes(shape: dict[str, Any], setting: Setting) -> float:
    """The base's weights. Full training keeps float32 and, in half precision, the copies that autocast makes; the same
    again for a reference."""
    n, size = shape["parameters"], BYTES[setting.dtype]
    if setting.tuner == "full":
        return n * (4 if size == 4 else 4 + size) * (2 if setting.reference else 1)
    if setting.tuner == "lora":
        return n * size
    linear = sum(i * o * k for i, o, k in shape["linears"])
    return linear * NF4_BYTES + (n - linear) * size + shape["largest"] * size


def activation_bytes(shape: dict[str, Any], setting: Setting) -> float:
    """Bytes kept for the backward, for each token of a micro-batch.

    A layer keeps two norms in float32, the inputs of its linear layers, q, k, v and the attention's output, and of the
    feed-forward its inner values: gate, its activation, up and their product (without a gate: two). A recomputed layer
    keeps its input; one at a time is there in full.
    """
    size, d = BYTES[setting.dtype], shape["hidden"]
    inner = (4 if shape["gated"] else 2) * shape["ffn"] * shape["experts"]
    layer = 2 * 4 * d + size * (2 * d + 2 * shape["q"] + 2 * shape["kv"] + inner)
    layer += size * 2 * d if setting.tuner == "full" else 4 * 7 * setting.rank
    layers = shape["layers"]
    recomputed = {"none": 0, "selective": layers // 2, "full": layers}[setting.checkpointing]
    kept = (layers - recomputed) * layer + recomputed * size * d + (layer if recomputed else 0)
    return kept / 2 if shape["two_sided"] else kept  # half of an encoder-decoder's tokens are on each side


def parts(shape: dict[str, Any], setting: Setting) -> dict[str, float]:
    """Bytes by purpose: weights, trainable (adapters), gradients, optimizer, activations, head."""
    n = trainable(shape, setting.tuner, setting.rank)
    rows = min(HEAD_CHUNK, setting.tokens)
    return {
        "weights": weight_bytes(shape, setting),
        "trainable": 0.0 if setting.tuner == "full" else 4.0 * n,
        "gradients": 4.0 * n,
        "optimizer": OPTIMIZER_BYTES[setting.optimizer] * n,
        "activations": setting.tokens * activation_bytes(shape, setting),
        "head": rows * shape["vocab"] * (4 + 4 + BYTES[setting.dtype]),
    }


def needs(shape: dict[str, Any], setting: Setting, gpu: bool) -> dict[str, float]:
    """{"device", "cpu", …parts}: bytes on the device that computes and, if that is a GPU, in the CPU's memory."""
    p = parts(shape, setting)
    working = (p["activations"] + p["head"]) * SLACK
    held = p["weights"] + p["trainable"] + p["gradients"] + p["optimizer"]
    if not gpu:
        return {**p, "device": held + working + PROCESS, "cpu": 0.0}
    cpu = 3e9  # the process with its CUDA libraries and staging buffers
    if setting.offload:
        moving = 2 * p["weights"] / shape["layers"] + shape["embedding"] * BYTES[setting.dtype]
        return {**p, "device": moving + working + CONTEXT, "cpu": cpu + held}
    return {**p, "device": held + working + CONTEXT, "cpu": cpu}


def choices(shape: dict[str, Any], base: Setting, gpu: bool) -> list[Setting]:
    """The settings of one tuner, the fastest first: no checkpointing, then more, a smaller optimizer, offload."""
    found = [replace(base, checkpointing=c) for c in CHECKPOINTING]
    if base.optimizer == "adamw" and base.tuner == "full":
        found += [replace(base, checkpointing="full", optimizer="adamw8bit")]
    if gpu:
        found += [replace(base, checkpointing="full", offload=True)]
    return found


def table(shape: dict[str, Any], base: Setting, device_bytes: float, gpu: bool) -> list[dict[str, Any]]:
    """One row a setting of the base's tuner and of the smaller ones: what it needs and whether it fits."""
    order = ("full", "lora", "qlora")
    tuners = order[order.index(base.tuner) :]
    rows = []
    for tuner in tuners:
        for setting in choices(shape, replace(base, tuner=tuner), gpu):
            need = needs(shape, setting, gpu)
            rows.append(
                {
                    "title": setting.title,
                    **asdict(setting),
                    "trainable_parameters": trainable(shape, tuner, setting.rank),
                    "bytes": {k: round(v) for k, v in need.items()},
                    "fits": need["device"] <= device_bytes,
                    "here": setting.here,
                }
            )
    return rows


def longest(shape: dict[str, Any], setting: Setting, device_bytes: float, gpu: bool) -> int:
    """The longest row, alone (or with those of its group) in its micro-batch, that fits; 0 if not even an empty one."""
    nothing = needs(shape, replace(setting, tokens=0), gpu)["device"]
    a_token = activation_bytes(shape, setting) * SLACK
    head = needs(shape, replace(setting, tokens=HEAD_CHUNK), gpu)["device"] - nothing - HEAD_CHUNK * a_token
    return max(0, int((device_bytes - nothing - head) / a_token / setting.together))


def flops(shape: dict[str, Any], tuner: str, rank: int) -> dict[str, float]:
    """Floating-point operations of a training step: `token`, `square` (of a row's length, for attention), `supervised`
    (a token that reaches the head). The forward once, the backward once more for frozen and twice for trained weights.
    """
    linear = sum(i * o * n for i, o, n in shape["linears"]) / (2 if shape["two_sided"] else 1)
    attention = shape["q"] * shape["layers"] / (2 if shape["two_sided"] else 1)
    head = shape["vocab"] * shape["hidden"]
    times = 3 if tuner == "full" else 2
    own = 0 if tuner == "full" else 6 * trainable(shape, tuner, rank)
    return {"token": 2 * times * linear + own, "square": 2 * 3.5 * attention, "supervised": 2 * times * head}
