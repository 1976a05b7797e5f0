"""Full fine-tuning side by side: benchmarks.sft with every weight trained.

python -m benchmarks.full --data benchmarks/data/mixed.jsonl --json full.json
"""

from __future__ import annotations

import sys

from benchmarks.sft import main

if __name__ == "__main__":
    sys.exit(main(["--tuner", "full", *sys.argv[1:]]))
