"""Do ids persist from frame to frame? Run by hand: python tests/video.py WEIGHTS [WEIGHTS ...]

Generated scenes whose things move, one frame after the other. Four ways to number the segments:
previous   sampling starts from the mask of the frame before (sample.py --video)
noise      each frame alone, all from one noise, which favours ids by their place
IoU        each frame alone, all from one noise; then ids by IoU with the frame before
own noise  each frame alone, from its own noise; then ids by IoU
Printed: PQ of the frames; of the true segments that are in two frames in a row, the share of
pixels in the second with the id that most of the segment had in the first ("kept"), and the same
of things alone.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldmseg import (  # noqa: E402
    VOID, PanopticQuality, ShapeScenes, draw, image_tensor, load_model, segments_of,
)  # fmt: skip


def renumber(ids, previous):
    """ids (H, W) with the ids of `previous`, (H, W), by the best assignment by IoU; segments
    without overlap take ids that are free."""
    ours, theirs = np.setdiff1d(ids, [VOID]), np.setdiff1d(previous, [VOID])
    iou = np.array([[np.sum((ids == a) & (previous == b)) / np.sum((ids == a) | (previous == b))
                     for b in theirs] for a in ours]).reshape(len(ours), len(theirs))  # fmt: skip
    matched = {ours[a]: theirs[b] for a, b in zip(*linear_sum_assignment(-iou)) if iou[a, b] > 0}
    free = iter(np.setdiff1d(np.arange(1, 1000), theirs))
    result = np.zeros_like(ids)
    for id in ours:
        result[ids == id] = matched.get(id) or next(free)
    return result


def kept(before, now, things):
    """Pixels of true segments seen in two frames, records with "drawn", and those with the id
    that most of the segment had before: counts (2,) of things, or of all."""
    counts = np.zeros(2)
    isthing = {c["id"]: c["isthing"] for c in ShapeScenes.categories}
    for segment in now["segments"]:
        was, there = (record["ids"] == segment["id"] for record in (before, now))
        if was.any() and (isthing[segment["category_id"]] or not things):
            id = np.bincount(before["drawn"][was]).argmax()
            counts += there.sum(), ((now["drawn"][there] == id) & (id != VOID)).sum()
    return counts


def run(model, way, scenes, frames, steps, stride):
    """PQ, and the share of pixels that keep their id, of all segments and of things."""
    size = model.config.size
    dataset, metric = ShapeScenes("val", size), PanopticQuality([], class_agnostic=True)
    counts, before = np.zeros((2, 2)), [None] * scenes
    for time in range(frames):
        records = [dataset.frame(number, stride * time) for number in range(scenes)]
        images = torch.stack([image_tensor(record["image"], size) for record in records])
        noise = [(0, f"{i} {time if way == 'own noise' else 0}") for i in range(scenes)]
        previous = None
        if way == "previous" and time:
            previous = torch.from_numpy(np.stack([one["drawn"] for one in before])).long()
        logits = model.sample(images, noise, steps, previous=previous)
        for i, record in enumerate(records):
            drawn, _ = draw({"instance": logits[i]}, "instance", (size, size), model.config)
            metric.update(record["ids"], record["segments"], drawn, segments_of(drawn))
            if way in ("IoU", "own noise") and time:
                drawn = renumber(drawn, before[i]["drawn"])
            record["drawn"] = drawn
            if time:
                counts += kept(before[i], record, False), kept(before[i], record, True)
            before[i] = record
    return metric.compute()["All"]["pq"], *(counts[:, 1] / counts[:, 0])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+", help="run folders, tiny")
    parser.add_argument("--scenes", type=int, default=25)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--stride", type=int, default=1, help="every how many frames")
    args = parser.parse_args()
    for weights in args.weights:
        model = load_model(weights)
        print(f"{weights}, {args.scenes} scenes of {args.frames} frames, every {args.stride}, "
              f"{args.steps} steps")  # fmt: skip
        for way in ("previous", "noise", "IoU", "own noise"):
            pq, all_kept, things_kept = run(model, way, args.scenes, args.frames, args.steps,
                                            args.stride)  # fmt: skip
            print(f"{way:>10}: PQ {pq:.3f}, kept {all_kept:.3f}, of things {things_kept:.3f}",
                  flush=True)


if __name__ == "__main__":
    main()
