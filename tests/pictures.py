"""The pictures of the README, from the shipped weights, run by hand: python tests/pictures.py

assets/scenes.png      six of the 200 scenes, their PQ spread evenly from the median to the best
assets/ids.png         the ids that three noises favour and what one step draws, for two of the six;
                       printed: the share of the segments found that have the favoured id
assets/samples.png     four samples, and what eight agree on, for three of the six
assets/inpainting.png  completions of three strokes in each segment, two samples and eight merged,
                       for two of the six

A segment has the colour of the true one that it matches, or of its strokes; VOID is striped.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from inpaint import keep_strokes  # noqa: E402
from ldmseg import (  # noqa: E402
    ShapeScenes, align_ids, colorize, compact_ids, draw, evaluate, gaussian_latents, image_tensor,
    load_model, panoptic_quality, random_generator, save_grid,
)  # fmt: skip


def choose_scenes(model, count=6):
    """Scenes and their predictions: of the better half, evenly spread, the best last."""
    predict = partial(model.sample_tasks, tasks=["instance"])
    scenes = ShapeScenes("val", model.config.size)
    _, shown = evaluate(predict, ["instance"], scenes, model.config, "cpu", pictures=len(scenes))
    pairs = [(record, drawn["instance"]) for record, drawn in shown]
    quality = [panoptic_quality(record["ids"], ids)["pq"] for record, ids in pairs]
    chosen = np.argsort(quality)[np.linspace(len(pairs) // 2, len(pairs) - 1, count).astype(int)]
    print("scene: PQ", {int(i): round(quality[i], 3) for i in chosen})
    return [pairs[i] for i in chosen]


def segmented(record, ids):
    ids = align_ids(ids, record["ids"])
    image = record["image"]
    return [image, colorize(record["ids"]), colorize(ids), colorize(ids, image=image)]


@torch.no_grad()
def favoured_and_drawn(model, record, noise):
    """Maps (64, 64): the truth with the ids that the noise favours, and what one step draws."""
    config, (seed, position) = model.config, noise
    truth = compact_ids(record["ids"], [s["id"] for s in record["segments"]])
    eps = gaussian_latents([random_generator(seed, "noise", position)], config, "cpu")
    favoured, _ = model.match_to(torch.from_numpy(truth)[None], eps)
    logits = model.sample(image_tensor(record["image"], config.size)[None], [noise], 1)
    drawn, _ = draw({"instance": logits[0]}, "instance", truth.shape, config)
    return favoured[0].numpy(), drawn


def agreement(model, scenes, seed=0):
    """Of the segments that one step finds (IoU > 0.5), the share that have the favoured id."""
    same = found = 0
    for record in scenes:
        favoured, drawn = favoured_and_drawn(model, record, (seed, record["image_id"]))
        renamed = align_ids(drawn, favoured)
        for id in np.setdiff1d(np.intersect1d(renamed, favoured), [0]):
            found, same = found + 1, same + (drawn[renamed == id][0] == id)
    return same / found


def sampled(model, record):
    image, truth = record["image"], record["ids"]
    maps = [model.segment(image, samples=1, seed=seed)[0] for seed in range(4)]
    maps.append(model.segment(image)[0])
    return [image, colorize(truth), *(colorize(ids, truth) for ids in maps)]


def completed(model, record):
    generator = random_generator(0, "strokes", record["image_id"])
    given = record["ids"] * keep_strokes(record["ids"], generator)
    one, two = (model.complete(record["image"], given, seed=seed, samples=1)[0] for seed in (0, 1))
    merged, _, confidence = model.complete(record["image"], given, return_confidence=True)
    differ, gray = ((255 * g)[..., None].repeat(3, 2).astype(np.uint8)
                    for g in (one != two, confidence))
    one, two, merged, given = map(colorize, (one, two, merged, given))
    return [record["image"], given, one, two, differ, merged, gray]


if __name__ == "__main__":
    model, assets = load_model("tiny"), REPO / "assets"
    scenes = ShapeScenes("val", model.config.size)
    print(f"one step draws the favoured id in {agreement(model, scenes):.3f} of what it finds")
    chosen = choose_scenes(model)
    halves, records = [segmented(*pair) for pair in chosen], [record for record, _ in chosen]
    rows, titles = [a + b for a, b in zip(halves[::2], halves[1::2])], ["image", "truth"]
    save_grid(assets / "scenes.png", [*titles, "prediction", "overlay"] * 2, rows, 128)
    Image.open(assets / "scenes.png").quantize(256, dither=0).save(assets / "scenes.png")
    save_grid(assets / "samples.png", titles + [f"sample {i}" for i in range(1, 5)] + ["merged"],
              [sampled(model, record) for record in records[:3]], 128)
    pairs = [[favoured_and_drawn(model, record, (noise, 0)) for noise in range(3)]
             for record in records[1:4:2]]
    save_grid(assets / "ids.png", ["image", *["favoured ids", "one step"] * 3], [
        [record["image"], *(colorize(ids) for pair in row for ids in pair)]
        for record, row in zip(records[1:4:2], pairs)], 128)
    titles = ["image", "given", "a sample", "another", "they differ", "merged", "confidence"]
    save_grid(assets / "inpainting.png", titles, [completed(model, r) for r in records[1:4:2]], 128)
