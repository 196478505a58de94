"""Complete partial masks (Sec. 3.3, Alg. 3).

    python inpaint.py --image street.jpg --mask partial.png --variations 4
    python inpaint.py --data shapes --strokes                                     # Fig. 9

With --image: the mask (PNG or .npy, any size) holds segment ids, 0 = unknown; a palette PNG's index
is the id, an RGB PNG's is R + 256 G + 65536 B. What it gives comes back unchanged; a region that
continues a given segment has its id, new segments have ids that the mask does not use. Leaves in
--out: panoptic.json, panoptic/*.png, overlay/*.png as sample.py does, and picture.png (image |
given | completed | confidence; with --variations also where they differ).

With --data: blocks of the truth are dropped and completed; a row of the table is a block size and a
drop rate. "PQ" counts all pixels as the model draws them, "dropped" only the dropped ones, "ids" is
the share of the dropped pixels of partly given segments that have the given id. Beside it: filling
with the nearest given label, and sampling without the mask. Leaves table.json and picture.png.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from ldmseg import (
    VOID, CommandLine, LDMSeg, PanopticQuality, UserError, align_ids, colorize, draw,
    evaluation_batches, is_main, keep_blocks, keep_inputs, open_dataset, random_generator,
    read_image, reading, require, resize_nearest, rgb2id, run_script, save_grid, segments_of,
    start_script, whole_number, write_json, write_panoptic, write_panoptic_json,
)  # fmt: skip

METHODS = ("completion", "nearest label", "without the mask")


def parse(argv):
    args = CommandLine(__doc__, "data model machine", {
        "data": {
            "--data": dict(help="the experiment, on 'shapes', a COCO-layout folder or a COCO JSON"),
            "--image": dict(help="image to segment"),
            "--mask": dict(help="its partial mask"),
            "--out": dict(help="folder of the results", default="runs/inpaint"),
            "--json": dict(help="where the table goes (default: table.json in --out)")},
        "sampling": {
            "--steps": dict(help="default: at least 4, of one sample 10", type=whole_number),
            "--samples": dict(help="to merge (the weights'; variations: 1)", type=whole_number),
            "--variations": dict(help="completions to draw", type=whole_number, default=1),
            "--repeats": dict(help="passes over a timestep", type=whole_number, default=1),
            "--drop-rate": dict(help="shares of the blocks to drop", metavar="R", type=float,
                                nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9]),
            "--block": dict(help="block sizes (default: the model's side / 32, ... / 2)",
                            type=whole_number, nargs="+", metavar="PIXELS"),
            "--strokes": dict(help="also strokes, three a segment", action="store_true")},
    }).parse_args(argv)
    fits = bool(args.data) != bool(args.image) and bool(args.image) == bool(args.mask)
    require(fits, "expected --image and --mask, or --data")
    require(args.data or not args.images, "--images goes with --data")
    require(all(0 < rate < 1 for rate in args.drop_rate),
            f"--drop-rate {args.drop_rate}, expected rates between 0 and 1")
    return args


# ---- one image ----


@np.errstate(invalid="ignore")  # a float that is no int64 is found by comparing
def read_mask(path):
    """Partial mask, .npy or PNG -> int64 ids (H, W), 0 = unknown, as transparent pixels are. A
    palette's index is the id, a colour is R + 256 G + 65536 B. UserError where it has no ids."""
    opaque = np.ones((1, 1), bool)
    with reading(path, "mask"):
        if Path(path).suffix == ".npy":
            values = np.load(path, mmap_mode="r")  # whose header cannot ask for memory
        else:
            image = Image.open(path)
            require(image.format != "JPEG", "JPEG changes ids, expected PNG or .npy")
            if "A" in image.getbands():
                alpha = np.asarray(image.getchannel("A"))
                opaque, image = alpha > 0, image.getchannel(0) if image.mode == "LA" else image
                require(np.isin(alpha, (0, 255)).all(), "half transparent: antialiased?")
            plain = image.mode in ("1", "L", "P", "I", "I;16")
            values = np.asarray(image if plain else image.convert("RGB"))
        ids = (rgb2id(values) if values.ndim == 3 else values).astype(np.int64)
    count, low, high = len(np.unique(ids)), ids.min(initial=0), ids.max(initial=0)
    whole = values.dtype == np.uint8 if values.ndim == 3 else (ids == values).all()
    fits = whole and ids.ndim == 2 and 0 < count <= 2000 and low >= 0 and high < 2**24
    require(fits, f"{path}: {values.shape}, {count} values from {low} to {high}, expected 0 "
            "(unknown) and ids of segments, below 2^24; is it a picture?")

    # thin ids, mostly between those beside them, come from antialiased edges
    lowest, highest = ndimage.minimum_filter(ids, 3), ndimage.maximum_filter(ids, 3)
    thin = np.setdiff1d(ids, ids[lowest == highest])
    edges = [int(i) for i in thin if np.mean((lowest < i) & (i < highest), where=ids == i) > 0.5]
    require(len(edges) < 2, f"{path}: ids {edges[:3]} lie between their neighbours': antialiased?")
    return ids * opaque


def complete_image(model, args, autocast):
    """One image: files in --out, and a row of pictures."""
    image, name = read_image(args.image), Path(args.image).name
    given, count = read_mask(args.mask), args.variations
    samples = args.samples or (1 if count > 1 else model.config.eval_samples)
    names = [f"{Path(name).stem}_{k + 1}" for k in range(count)] if count > 1 else [name]
    keep_inputs(args.out, *(Path(file).parent for file in (args.image, args.mask)))
    try:
        with autocast():
            masks, segments, confidence = zip(*(
                model.complete(image, given, args.steps, args.repeats, args.seed + k, True, samples)
                for k in range(count)))
    except UserError as error:
        raise UserError(str(error).replace("mask:", f"{args.mask}:", 1)) from None
    records = [{"image": image, "file_name": name, "image_id": Path(n).stem} for n in names]
    write_panoptic_json(args.out, [write_panoptic(args.out, *result) for result in zip(
        names, records, masks, segments)])
    gray = {"confidence": np.mean(confidence, 0)}
    if count > 1:  # where a pixel is in another segment than in the first completion
        others = [align_ids(mask, masks[0]) != masks[0] for mask in masks[1:]]
        gray["where they differ"] = np.mean(others, 0)
    pictures = [image, *map(colorize, (resize_nearest(given, image.shape[:2]), *masks))]
    pictures += [np.repeat((255 * g).astype(np.uint8)[..., None], 3, 2) for g in gray.values()]
    save_grid(f"{args.out}/picture.png", ["image", "given", *["completed"] * count, *gray],
              [pictures], width=320)
    print(f"{count} completed -> {args.out}/ (see picture.png)")


# ---- the sparsity experiment (Fig. 9) ----


def keep_strokes(ids, generator, count=3):
    """Which pixels of a map (s, s) are known after `count` straight strokes between random pixels
    of each segment, bool; where a stroke leaves its segment, it lifts."""
    known, way = np.zeros(ids.shape, bool), np.linspace(0, 1, 2 * len(ids))[:, None]
    for id in np.setdiff1d(ids, [VOID]):
        for start, end in generator.choice(np.argwhere(ids == id), (count, 2)):
            y, x = (start + way * (end - start)).round().astype(int).T
            known[y, x] |= ids[y, x] == id
    return known


def nearest_label(ids, known):
    """ids (H, W), every pixel that is not known or VOID filled by the nearest that is."""
    known = known & (ids != VOID)
    place = ndimage.distance_transform_edt(~known, return_indices=True, return_distances=False)
    return ids[tuple(place)] if known.any() else np.zeros_like(ids)


class Scores:
    """Of one method in one row of the table."""

    def __init__(self, num_ids):
        self.all, self.dropped = (PanopticQuality([], class_agnostic=True) for _ in range(2))
        self.by_id = PanopticQuality([{"id": i, "isthing": 1} for i in range(1, num_ids)])
        self.own_id = {id: id for id in range(num_ids)}

    def add(self, record, drawn, ids, known):
        """drawn: predicted ids; ids, known: what the model was given; all of the truth's size."""
        segments = segments_of(drawn)
        self.all.update(record["ids"], record["segments"], drawn, segments)

        # only dropped pixels count; the ids of segments that are partly given are asked for
        truth = np.where(known & (ids != VOID), VOID, record["ids"])
        left = [s for s in record["segments"] if s["id"] in truth]
        self.dropped.update(truth, left, drawn, segments)
        asked = np.where(~known & np.isin(ids, ids[known]), ids, VOID)
        self.by_id.update(asked, segments_of(asked, self.own_id), drawn,
                          segments_of(drawn, self.own_id))

    def result(self, device):
        for metric in (self.all, self.dropped, self.by_id):
            metric.all_reduce(device)
        pq, dropped = (metric.compute()["All"]["pq"] for metric in (self.all, self.dropped))
        return {"pq": pq, "dropped": dropped, "ids": self.by_id.compute()["pixel_accuracy"]}


def known_pixels(row, ids, noise):
    """What a row (block or "strokes", drop rate) of the table gives of a batch of maps, bool."""
    block, drop_rate = row
    if block == "strokes":
        return np.stack([keep_strokes(one, random_generator(seed, "strokes", position))
                         for one, (seed, position) in zip(ids, noise)])
    return np.stack([keep_blocks(one, random_generator(seed, "blocks", position), block, drop_rate)
                     for one, (seed, position) in zip(ids, noise)])


def run_experiment(model, args, device, autocast):
    """Fig. 9: scores for each (block, drop rate), and the first image's completions."""
    config = model.config
    dataset = open_dataset(args.data, args.split, args.images, config.size, "val")
    blocks = args.block or [max(1, config.size >> i) for i in (5, 4, 3, 2, 1)]
    require(max(blocks) <= config.size, f"--block {blocks}, expected up to {config.size} pixels")
    rows = [(block, rate) for block in blocks for rate in args.drop_rate]
    rows += [("strokes", "")] if args.strokes else []
    scores, pictures = {r: {m: Scores(config.num_ids) for m in METHODS} for r in rows}, []

    def complete(batch, known):
        with autocast():
            return model.inpaint_samples(batch["image"], batch["ids"], known, batch["noise"],
                                         args.steps, args.repeats, args.samples)

    for records, batch in evaluation_batches(dataset, config, device, args.seed, args.workers,
                                             args.limit):
        codes, first = batch["ids"].cpu().numpy(), not pictures
        plain = complete(batch, torch.zeros_like(batch["ids"], dtype=torch.bool))
        for row in rows:
            known_codes = known_pixels(row, codes, batch["noise"])
            logits = complete(batch, torch.from_numpy(known_codes).to(device))
            for i, record in enumerate(records):
                size = record["ids"].shape
                ids, known = (resize_nearest(a[i], size) for a in (codes, known_codes))
                drawn, without = (draw({"instance": one[i]}, "instance", size, config)[0]
                                  for one in (logits, plain))
                nearest = resize_nearest(nearest_label(codes[i], known_codes[i]), size)
                maps = drawn, nearest, without
                for method, drawn in zip(METHODS, maps):
                    scores[row][method].add(record, drawn, ids, known)
                if first and i == 0:
                    shown = ids, ids * known, *(align_ids(one, ids) for one in maps)
                    pictures.append([record["image"], *map(colorize, shown)])
    report(args, blocks, pictures, [
        {"block": block, "drop_rate": rate} | {m: s.result(device) for m, s in row.items()}
        for (block, rate), row in scores.items()])


def report(args, blocks, pictures, table):
    """Print and write the table, with the means over drop rates, and the pictures."""
    for block in dict.fromkeys(blocks):
        rows = [row for row in table if row["block"] == block]
        table.append({"block": block, "drop_rate": "mean"} | {
            m: {k: np.mean([r[m][k] for r in rows]) for k in rows[0][m]} for m in METHODS})
    if is_main():
        print("  block  drop" + "".join(f"{m:>27}" for m in METHODS))
        print(" " * 13 + "         PQ  dropped      ids" * len(METHODS))
        for row in table:
            print(f"{row['block']:>7} {row['drop_rate']:>5}" + "".join(
                "{pq:11.3f}{dropped:9.3f}{ids:9.3f}".format(**row[m]) for m in METHODS))
        write_json(args.json or f"{args.out}/table.json", table)
        save_grid(f"{args.out}/picture.png", ["image", "truth", "given", *METHODS], pictures)


def main(argv=None):
    args = parse(argv)
    model, device, autocast = start_script(args, LDMSeg, scenes=args.data == "shapes")
    model.config.task("instance")  # or a UserError
    if args.data:
        run_experiment(model, args, device, autocast)
    else:
        complete_image(model, args, autocast)


if __name__ == "__main__":
    run_script(main)
