"""Who is measured: one line a rival. `--only` chooses among them; the first five are the default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# the allocator keeps what it has: glibc otherwise returns blocks above 32 MiB to the kernel at every free
TUNED = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=17179869184"}


@dataclass(frozen=True)
class Rival:
    """One way to train the same thing.

    program: a file of rivals/, or None for tunewright's own worker. trl: runs in the environment that has TRL.
    env: on top of the environment. options: for the program. warm: steps before the window (more when it compiles).
    same_numbers_as: a rival whose numbers it must share, so that the gates need not run it again.
    """

    program: str | None
    trl: bool = False
    env: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    warm: int = 1
    same_numbers_as: str | None = None


NO_CHECKPOINTING = {"gradient_checkpointing": False}
HALF = {**NO_CHECKPOINTING, "model_init_kwargs": {"dtype": "bfloat16"}}
FUSED = {**HALF, "optim": "adamw_torch_fused"}
PADDING_FREE = {**FUSED, "padding_free": True}

RIVALS: dict[str, Rival] = {
    "ours": Rival(None),
    "trl_default": Rival("trl_sft.py", trl=True),
    "trl_best": Rival("trl_sft.py", trl=True, env=TUNED, options=PADDING_FREE),
    "plain": Rival("plain.py"),
    "plain_tuned": Rival("plain.py", env=TUNED, same_numbers_as="plain"),
    # our own plain path, for the ladder
    "ours_plain": Rival(None, options={"path": "plain"}),
    # steps on the way to trl_best, and what did not help: measured once to choose it
    "trl_no_checkpointing": Rival("trl_sft.py", trl=True, options=NO_CHECKPOINTING),
    "trl_half": Rival("trl_sft.py", trl=True, options=HALF),
    "trl_half_tuned": Rival("trl_sft.py", trl=True, env=TUNED, options=FUSED),
    "trl_nll": Rival("trl_sft.py", trl=True, env=TUNED, options={**FUSED, "loss_type": "nll"}),
    "trl_compile": Rival("trl_sft.py", trl=True, env=TUNED, options={**FUSED, "torch_compile": True}, warm=4),
}
DEFAULT = ("ours", "trl_default", "trl_best", "plain", "plain_tuned")
FULL_OPTIONS = {"model_init_kwargs": {"dtype": "float32"}}


def options_for(rival: Rival, tuner: str) -> dict[str, Any]:
    """The rival's options; full fine-tuning keeps float32 weights for all, or the results would differ."""
    asks_dtype = "model_init_kwargs" in rival.options
    return {**rival.options, **FULL_OPTIONS} if tuner == "full" and asks_dtype else rival.options
