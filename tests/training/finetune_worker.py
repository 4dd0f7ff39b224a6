"""One process of a fine-tuning in several.

python finetune_worker.py FOLDER SETTINGS.json; FOLDER gets weights and curves.
"""

import json
import os
import sys
from pathlib import Path

import torch

from fullrank.training.finetune import finetune
from fullrank.training.finetune_config import FinetuneRun


def main(folder, settings):
    for name, values in json.loads(Path(settings).read_text()).items():
        run = FinetuneRun.of(values)
        tuned = finetune(run, out=Path(folder) / name, progress=False)
        found = {
            "weights": {n: p.detach() for n, p in tuned.tuned.named_parameters()},
            "losses": [s.loss for s in tuned.history.steps],
            "metrics": [e.metric for e in tuned.history.evaluations],
            "tokens": tuned.history.steps[-1].tokens,
        }
        torch.save(found, Path(folder) / f"{name}-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
