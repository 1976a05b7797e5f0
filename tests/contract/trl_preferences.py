"""What TRL makes of given pairs and marked answers, in float32. Runs in the benchmarks' environment that has TRL.

`trl_preferences.py TASK.json OUT.json`. The task: folders `policy` and `reference`; `pairs` and `marked`, rows of token
ids in the words of TRL's collators; `logps`, log-probabilities [[preferred, rejected], …] for the losses that TRL has
as functions of them alone. Written: {case: {"loss", "grad_norm"}} and {case: [losses]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

ASKED, SAID = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
PAIR = {"prompt": ASKED, "chosen": SAID, "rejected": SAID}
MARKED = {"prompt": ASKED, "completion": SAID}
# case -> (trainer, its options, a row to make it with, where its rows are in the task)
TRAINED: dict[str, tuple[Any, Any, list[dict[str, Any]], str]] = {
    "dpo": (DPOTrainer, DPOConfig, [PAIR, PAIR], "pairs"),
    "ipo": (DPOTrainer, DPOConfig, [PAIR, PAIR], "pairs"),
    "kto": (KTOTrainer, KTOConfig, [{**MARKED, "label": True}, {**MARKED, "label": False}], "marked"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1},
    "ipo": {"beta": 0.1, "loss_type": ["ipo"]},
    "kto": {"beta": 0.1, "per_device_train_batch_size": 2},
}


def step(task: dict[str, Any], case: str, folder: str) -> dict[str, float]:
    """Loss and gradient norm of one batch of all rows."""
    trainer_class, config, sample, rows = TRAINED[case]
    common = {
        "output_dir": folder,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "gradient_checkpointing": False,
    }
    policy, reference = task["policy"], task["reference"]
    if case == "kto":  # the other way round its KL is below 0, which counts as 0
        policy, reference = reference, policy
    trainer = trainer_class(
        model=load(policy),
        ref_model=load(reference),
        args=config(**common, **OPTIONS[case]),
        train_dataset=Dataset.from_list(sample),
        processing_class=AutoTokenizer.from_pretrained(task["policy"]),
    )
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(task[rows]))
    loss.backward()
    norms = [p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]
    return {"loss": float(loss.detach()), "grad_norm": float(torch.stack(norms).norm())}


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def losses(task: dict[str, Any]) -> dict[str, list[float]]:
    """Of functions of log-probabilities alone: SimPO and CPO's first part (given sums or means), ORPO's second part."""
    chosen, rejected = torch.tensor(task["logps"]).T
    own = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), alpha=0.0, label_smoothing=0.0)
    simpo = SimpleNamespace(**own.__dict__, loss_type="simpo", beta=2.0, simpo_gamma=1.0)
    cpo = SimpleNamespace(**own.__dict__, loss_type="sigmoid", beta=0.1)
    orpo = SimpleNamespace(**own.__dict__, beta=0.1)
    return {
        "simpo": CPOTrainer.cpo_loss(simpo, chosen, rejected)[0].tolist(),
        "cpo": CPOTrainer.cpo_loss(cpo, chosen, rejected)[0].tolist(),
        "orpo": (-ORPOTrainer.odds_ratio_loss(orpo, chosen, rejected)[0]).tolist(),
    }


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        found = {case: step(task, case, folder) for case in TRAINED}
    Path(sys.argv[2]).write_text(json.dumps({**found, **losses(task)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
