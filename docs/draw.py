"""Draws the picture of the README from a run: ``python docs/draw.py runs/sft/stages/sft docs/images/run.png``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pyarrow.dataset as dataset


def main() -> None:
    stage, picture = Path(sys.argv[1]), sys.argv[2]
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (stage.parents[1] / "events.jsonl").read_text().splitlines()]
    held_out = [(event["step"], event["loss"]) for event in events if event["kind"] == "evaluation"]
    examples = dataset.dataset(sorted((stage / "examples").glob("*.parquet"))).to_table().to_pandas()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
    left.plot([line["step"] for line in lines], [line["loss"] for line in lines], label="loss")
    left.plot(*zip(*held_out, strict=True), "o-", label="on held-out data")
    left.set(xlabel="step", ylabel="nats for each trained token", title="The stage")
    left.legend(frameon=False)
    examples["mean"] = examples["loss"] / examples["tokens"]
    for _, rows in examples.groupby("example_id"):
        right.plot(rows["step"], rows["mean"], linewidth=0.8, alpha=0.4)
    right.set(xlabel="step", title=f"Each of its {examples['example_id'].nunique()} examples")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
