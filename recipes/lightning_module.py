"""LoRA fine-tuning inside a LightningModule: our rows, packing, model and objective, Lightning's loop around them.

    pip install lightning
    python recipes/lightning_module.py smollm2-135m-instruct train.jsonl --out adapter

Read it from top to bottom. `tunewright train` does more (exact resume, plan, artefact); this is for a loop of your own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader

from tunewright.core.example import Group
from tunewright.core.home import find_home
from tunewright.data.render import render_rows
from tunewright.data.tokenizer import Tokenizer
from tunewright.data.validate import check_file, raise_for, read_conversations
from tunewright.models.loader import load_model, materialise
from tunewright.models.policy import Policy
from tunewright.objectives.sft import SFT
from tunewright.ops.packing import pack
from tunewright.ops.types import Batch
from tunewright.train.optim.adamw import AdamW
from tunewright.tuners.lora import LoRA


class Module(lightning.LightningModule):
    """One training step is a whole optimizer step: all its rows, packed into micro-batches without padding."""

    def __init__(self, model: torch.nn.Module, tuner: LoRA, rate: float) -> None:
        super().__init__()
        self.automatic_optimization = False  # the step's loss is divided once, by the weight of all its micro-batches
        self.model, self.tuner, self.rate = model, tuner, rate
        self.policy, self.objective = Policy(model), SFT(SFT.Options())

    def training_step(self, batches: list[Batch], index: int) -> None:
        weight = sum(self.objective.weights(batch)["loss"] for batch in batches)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = 0.0
        for batch in batches:
            part = self.objective(self.policy, batch)["loss"].total / weight
            self.manual_backward(part)
            loss += part.item()
        optimizer.step()
        self.log("train_loss", loss, prog_bar=True)
        print(f"step {self.global_step}: loss {loss:.4f}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return AdamW.build(self.tuner.trainable(), self.rate, AdamW.Options(weight_decay=0.01))

    def transfer_batch_to_device(self, batch: list[Batch], device: torch.device, index: int) -> list[Batch]:
        return [b.to(device) for b in batch]


def read_groups(data: Path, folder: Path) -> list[Group]:
    """The rows of a data file as token ids with a loss weight each. Raises DataError with every bad row."""
    report = check_file(data, min_examples=1)
    raise_for(report, what="training")
    rows = read_conversations(data, report.format)
    return list(render_rows(rows, Tokenizer.load(folder), shape=report.shape, max_length=2048))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a catalogue name or a model folder")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8, help="in one optimizer step")
    args = parser.parse_args()

    lightning.seed_everything(0)
    folder = materialise(args.model, find_home().ensure())
    tuner = LoRA(LoRA.Options(r=8, alpha=16))
    module = Module(tuner.attach(load_model(folder), seed=0), tuner, rate=1e-3)
    steps = DataLoader(
        read_groups(args.data, folder),  # type: ignore[arg-type]
        batch_size=args.rows,
        shuffle=True,
        collate_fn=lambda groups: pack(groups, micro_batch_tokens=2048),
    )
    trainer = lightning.Trainer(
        max_epochs=args.epochs, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(module, steps)
    args.out.mkdir(parents=True, exist_ok=True)
    tuner.save(args.out, str(folder))
    print(f"the adapter is in {args.out}; peft.PeftModel.from_pretrained opens it")


if __name__ == "__main__":
    main()
