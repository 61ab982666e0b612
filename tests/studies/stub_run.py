"""Stands for `kdlab train` and `kdlab evaluate` in the processes of a study: the same files and signals, no torch."""

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

from kdlab.studies import child

FAILS = 13.0  # this weight decay fails
SECONDS = float(os.environ.get("STUB_SECONDS", "0.01"))  # of a step


def note(run: Path, what: str) -> None:
    with open(run / "calls.txt", "a") as file:
        file.write(f"{what} {os.getpid()} {time.time()} {os.environ.get('OMP_NUM_THREADS')} "
                   f"{os.environ.get('CUDA_VISIBLE_DEVICES')}\n")  # fmt: skip


def train(config: dict, run: Path) -> None:
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: asked.append(n))
    if config["train"]["weight_decay"] == FAILS:
        sys.exit("kdlab: error: 13 brings bad luck")
    state = run / "checkpoint.txt"
    done = int(state.read_text()) if state.exists() else 0
    if not done:
        (run / "losses.csv").write_text("epoch,step,lr,grad_norm,total\n")
    for step in range(done, 3 * config["train"]["epochs"]):
        with open(run / "losses.csv", "a") as file:
            file.write(f"{step // 3},{step},0.1,1.0,{1 / (step + 1)}\n")
        time.sleep(SECONDS)
        state.write_text(str(step + 1))
        if asked:
            note(run, "stopped")
            sys.exit(130)
    (run / "detector.safetensors").write_text("weights")


def main(words: list[str]) -> None:
    if words[0] == "train":
        run = Path(words[words.index("--out") + 1])
        note(run, "train")
        train(json.loads(Path(words[1]).read_text()), run)
    else:
        run, split = Path(words[words.index("--run") + 1]), words[words.index("--split") + 1]
        note(run, "evaluate")
        stored = {"split": split, "samples": 1, "mean_ap": 0.5, "nd_score": 0.5, "tp_errors": {}, "label_aps": {}}
        stored |= {"label_tp_errors": {}, "counts": {}}
        (run / "metrics.json").write_text(json.dumps({split: stored}))
    note(run, "end")


if __name__ == "__main__":
    runpy.run_module = lambda *_, **__: main(sys.argv[1:])  # type: ignore[assignment]
    child.main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
