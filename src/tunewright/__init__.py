"""tunewright: fine-tuning you own."""

__version__ = "0.1.0"
