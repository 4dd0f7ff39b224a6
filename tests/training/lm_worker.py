"""One process of a training in several: trains by settings, may press Ctrl-C in the middle.

python lm_worker.py FOLDER SETTINGS.json [STEP]; FOLDER gets weights and curves.
"""

import atexit
import json
import os
import signal
import sys
from pathlib import Path

import torch

from fullrank.datasets.texts import Texts
from fullrank.training import LMTraining, train_lm

SONG = Texts.divided("song", ["the cat sat on the mat and the dog sat on the log. " * 40])


def threads_left(folder, rank):
    # Threads of the process group that outlive it can abort the interpreter as it ends.
    tasks = Path("/proc/self/task")
    left = [p.read_text().strip() for p in tasks.glob("*/comm")]
    Path(folder, f"threads-{rank}.json").write_text(json.dumps(left))


def main(folder, settings, step=None):
    run = LMTraining.of(json.loads(Path(settings).read_text()))
    rank = int(os.environ.get("RANK", "0"))
    # What is registered first is called last.
    atexit.register(threads_left, folder, rank)
    if step is not None and rank == 1:
        from transformers import Trainer

        plain = Trainer.training_step

        def training_step(self, *args, **kwargs):
            # The other process gets no signal: this one has to tell it.
            if self.state.global_step == int(step):
                os.kill(os.getpid(), signal.SIGINT)
            return plain(self, *args, **kwargs)

        Trainer.training_step = training_step
    try:
        trained = train_lm(run, texts=SONG, out=Path(folder) / "run", progress=False)
    except KeyboardInterrupt:
        Path(folder, f"stopped-{rank}").touch()
        return
    found = {
        "weights": {n: p.detach() for n, p in trained.model.named_parameters()},
        "losses": [s.loss for s in trained.history.steps],
        "metrics": [e.metric for e in trained.history.evaluations],
        "tokens": trained.history.steps[-1].tokens,
    }
    torch.save(found, Path(folder) / f"found-{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
