"""Readers of a run's events that copy its curves to other tools: one file a tool, one line in this table."""

from tunewright.core.registry import Table

LOGGERS = Table(
    "logger",
    {
        "mlflow": "tunewright.jobs.loggers.mlflow:MLflow",
        "tensorboard": "tunewright.jobs.loggers.tensorboard:TensorBoard",
        "wandb": "tunewright.jobs.loggers.wandb:WandB",
    },
)
