"""Stands for tools/finetune.py: scores that follow from the options, and every way to fail.

With a file `hold` beside the sweep's folder, seed 2 waits until it is gone. Every call leaves a line in `calls`.
"""

import json
import os
import sys
import time
from pathlib import Path


def main(argv: list[str]) -> int:
    options = {name.removeprefix("--"): value for name, value in zip(argv[::2], argv[1::2], strict=True)}
    output, seed, rate = Path(options["output"]), int(options["seed"]), float(options["learning_rate"])
    root = output.parents[3]
    with (root / "calls").open("a") as calls:
        calls.write(f"{rate} {seed}\n")
    print(f"threads {os.environ['OMP_NUM_THREADS']}")
    while seed == 2 and (root / "hold").exists():
        time.sleep(0.01)
    if rate == 4:
        print("out of memory")
        return 1
    if rate == 5:
        print("error: --train_file: no such file")
        return 2
    accuracy = (seed + 10 * rate) / 100
    epoch = {"accuracy": accuracy, "mcc": accuracy - 1, "loss": float("nan") if rate == 3 else 0.5}
    if options["task"] == "mnli_plus":  # a folder for each of the tasks, and metrics beside them
        output.mkdir(parents=True)
        (output / "metrics.json").write_text(json.dumps({"tasks": {}}))
        output /= "mnli"
    output.mkdir(parents=True)
    (output / "model.safetensors").write_text("weights")
    lines = [{"label": label, "prediction": "a" if rate == 2 and seed > 2 else label} for label in "ab"]
    (output / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (output / "metrics.json").write_text(json.dumps({**epoch, "epochs": [epoch], "score_names": ["accuracy", "mcc"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
