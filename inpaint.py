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

from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from ldmseg import (
    VOID, LDMSeg, PanopticQuality, base_parser, colorize, compact_ids, continue_given,
    default_weights, is_main, keep_blocks, keep_strokes, load_model, open_dataset,
    predict_dataset, prepare, probabilities, random_relabel, read_image, read_mask, run_script,
    save_grid, segment, segments_of, setup_distributed, stable_seed, write_json, write_panoptic,
    write_panoptic_json,
)  # fmt: skip

METHODS = ("completion", "nearest label", "without the mask")


def parse(argv):
    parser = base_parser(__doc__)
    add = parser.add_argument
    add("--image", help="image to segment")
    add("--mask", help="its partial mask")
    add("--variations", type=int, default=1, metavar="K", help="completions to draw (default: 1)")
    add("--data", help="the experiment, on 'shapes', a COCO-layout folder or a panoptic JSON")
    add("--drop-rate", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9], metavar="R",
        help="shares of the blocks to drop (default: 0.1 0.3 0.5 0.7 0.9)")
    add("--block", type=int, nargs="+", metavar="PIXELS",
        help="block sizes, of the model's input (default: side / 32, ... side / 2)")
    add("--strokes", action="store_true", help="also a row with three strokes in each segment")
    add("--known-share", type=float, default=1.0, metavar="S",
        help="a latent cell is known where this share of its pixels is (default: 1)")
    add("--repeats", type=int, default=3, metavar="R",
        help="passes over each timestep, with fresh noise (default: 3; Alg. 3: 1)")
    add("--weights", metavar="RUN",
        help="run folder or weights file (default: runs/ldm if there, else shipped)")
    add("--steps", type=int, default=10, help="denoising steps (default: 10)")
    add("--out", default="runs/inpaint", help="output folder (default: runs/inpaint)")
    add("--json", metavar="OUT", help="where the table goes (default: table.json in --out)")
    args = parser.parse_args(argv)
    if bool(args.data) == bool(args.image) or bool(args.image) != bool(args.mask):
        raise ValueError("expected --image and --mask, or --data")
    if min(args.variations, args.repeats) < 1 or not 0 < args.known_share <= 1:
        raise ValueError(f"--variations {args.variations} --repeats {args.repeats} --known-share "
                         f"{args.known_share}, expected at least 1, at least 1, above 0 to 1")
    return args


def resize(ids, size):
    """Nearest neighbour of any map (H, W) -> (height, width) = `size`."""
    rows, columns = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip(size, ids.shape))
    return ids[rows][:, columns]


def inpaint(model, batch, known, args, autocast):
    """Logits of a batch {"image", "ids", "seed"}, its ids given where `known` (None: nowhere)."""
    with autocast():
        return model.inpaint(batch["image"], batch["ids"], known, batch["seed"], args.steps,
                             args.known_share, args.repeats)[0]


def complete(model, image, ids, args, device, autocast):
    """Yields args.variations completions (ids, confidence), of the size of the image, of partial
    ids (H, W) of any size."""
    config, size, given = model.config, image.shape[:2], np.setdiff1d(ids, [VOID]).tolist()
    if not given or (ids != VOID).all() or len(given) >= config.num_ids:
        raise ValueError(f"{args.mask}: {len(given)} segments given on {(ids != VOID).mean():.0%} "
                         f"of the pixels, expected 1 to {config.num_ids - 1} (the ids of these "
                         "weights), and some pixels to be unknown (0)")
    generator = torch.Generator().manual_seed(args.seed)
    code_of = random_relabel(torch.arange(len(given) + 1), config.num_ids, generator)
    codes = code_of[compact_ids(ids, given)]
    small = F.adaptive_max_pool2d(codes[None].float(), config.size).long()  # no stroke is lost
    small, codes = small.to(device), resize(codes.numpy(), size)
    fresh = (i for i in range(1, 2**24) if i not in set(given))
    id_of = np.array([VOID, *islice(fresh, config.num_ids - 1)])
    id_of[code_of[1:].numpy()] = given
    record = {"image": image, "ids": np.zeros(size, np.int64), "segments": []}
    picture = prepare(record, config, generator, augment=False)["image"][None].to(device)
    for variation in range(args.variations):
        batch = {"image": picture, "ids": small, "seed": [stable_seed(args.seed, variation)]}
        logits = inpaint(model, batch, small != VOID, args, autocast)[0]
        drawn = continue_given(segment(logits, size, config), codes, codes != VOID)
        confidence = probabilities(logits, size).amax(0).cpu().numpy()
        yield id_of[np.where(codes != VOID, codes, drawn)], confidence


def same_segment(first, other):
    """Where two completions (H, W) agree, bool: the same id, or segments that match (IoU > 0.5)."""
    a, b = (np.unique(ids, return_inverse=True)[1].reshape(ids.shape) for ids in (first, other))
    both = np.histogram2d(a.ravel(), b.ravel(), (range(a.max() + 2), range(b.max() + 2)))[0]
    union = both.sum(1, keepdims=True) + both.sum(0) - both
    return (first == other) | (both > 0.5 * union)[a, b] & (first != VOID) & (other != VOID)


def complete_image(model, args, device, autocast):
    """One image: files in --out, and a row of pictures."""
    image, name = read_image(args.image), Path(args.image).name
    ids = read_mask(args.mask)
    if abs(ids.shape[0] / ids.shape[1] / (image.shape[0] / image.shape[1]) - 1) > 0.02:
        raise ValueError(f"{args.mask}: {ids.shape[1]} x {ids.shape[0]} pixels, expected the aspect"
                         f" of its image, {image.shape[1]} x {image.shape[0]}")
    several = args.variations > 1
    names = [f"{Path(name).stem}_{k + 1}" for k in range(args.variations)] if several else [name]
    written = [Path(args.out, "panoptic", n).with_suffix(".png") for n in names]
    if Path(args.mask).resolve() in [path.resolve() for path in written]:
        raise ValueError(f"--out {args.out}: would overwrite {args.mask}; use another --out")
    masks, confidence = zip(*complete(model, image, ids, args, device, autocast))
    about = {"image": image, "file_name": name}
    write_panoptic_json(args.out, [
        write_panoptic(args.out, n, about | {"image_id": Path(n).stem}, mask, segments_of(mask))
        for n, mask in zip(names, masks)])
    gray = {"confidence": np.mean(confidence, 0)}
    if several:
        gray["where they differ"] = np.mean([~same_segment(masks[0], m) for m in masks[1:]], 0)
    pictures = [image, *map(colorize, (resize(ids, image.shape[:2]), *masks))]
    pictures += [np.repeat((255 * g).astype(np.uint8)[..., None], 3, 2) for g in gray.values()]
    titles = ["image", "given", *["completed"] * len(masks), *gray]
    save_grid(f"{args.out}/picture.png", titles, [pictures], tile=320)
    print(f"{len(masks)} completed -> {args.out}/ (see picture.png)")


class Scores:
    """Of one method in one row of the table (the sparsity experiment, Fig. 9)."""

    def __init__(self, categories, num_ids):
        self.all, self.dropped = (PanopticQuality(categories, class_agnostic=True) for _ in "12")
        self.by_id = PanopticQuality([{"id": i, "isthing": 1} for i in range(1, num_ids)])

    def add(self, record, drawn, ids, known):
        """drawn: predicted ids; ids, known: what the model was given; all of the truth's size."""
        segments = segments_of(drawn)
        self.all.update(record["ids"], record["segments"], drawn, segments)
        truth = np.where(known & (ids != VOID), VOID, record["ids"])
        left = [s for s in record["segments"] if s["id"] in truth]
        self.dropped.update(truth, left, drawn, segments)
        asked = np.where(~known & np.isin(ids, ids[known]), ids, VOID)
        self.by_id.update(asked, segments_of(asked, None), drawn, segments_of(drawn, None))

    def result(self, device):
        for metric in vars(self).values():
            metric.all_reduce(device)
        pq, dropped = (metric.compute()["All"]["pq"] for metric in (self.all, self.dropped))
        return {"pq": pq, "dropped": dropped, "ids": self.by_id.compute()["pixel_accuracy"]}


def nearest_label(ids, known):
    """ids (H, W), every pixel that is not known or VOID filled by the nearest that is."""
    known = known & (ids != VOID)
    place = ndimage.distance_transform_edt(~known, return_indices=True, return_distances=False)
    return ids[tuple(place)] if known.any() else np.zeros_like(ids)


def run_experiment(model, args, device, autocast):
    """Fig. 9: scores for each (block, drop rate), and the first image's completions."""
    config = model.config
    dataset = open_dataset(args.data, args.split, args.images, config.size, "val")
    blocks = args.block or [max(1, config.size >> i) for i in (5, 4, 3, 2, 1)]
    if not all(1 <= b <= config.size for b in blocks) or not all(0 < r < 1 for r in args.drop_rate):
        raise ValueError(f"--block {blocks} --drop-rate {args.drop_rate}: expected blocks of 1 to "
                         f"{config.size} pixels, the model's input, and rates between 0 and 1")
    known_of = {(block, rate): partial(keep_blocks, block=block, rate=rate)
                for block in blocks for rate in args.drop_rate}
    known_of |= {("strokes", ""): keep_strokes} if args.strokes else {}
    scores = {row: {m: Scores(dataset.categories, config.num_ids) for m in METHODS}
              for row in known_of}
    pictures = []

    def complete_all(batch):
        """For each image: its ids, logits without a mask, and each row's (known, logits)."""
        ids, plain = batch["ids"].cpu().numpy(), inpaint(model, batch, None, args, autocast)
        rows = []
        for keep in known_of.values():
            known = np.stack([keep(*one) for one in zip(ids, batch["seed"])])
            given = torch.from_numpy(known).to(device)
            rows.append(zip(known, inpaint(model, batch, given, args, autocast)))
        return zip(ids, plain, zip(*rows))

    for _, record, (codes, plain, rows) in predict_dataset(
            complete_all, dataset, config, device, args.seed, args.workers, args.limit):
        size = record["ids"].shape
        plain, ids, first = segment(plain, size, config), resize(codes, size), not pictures
        for row, (known, logits) in zip(known_of, rows):
            nearest = resize(nearest_label(codes, known), size)
            known = resize(known, size)
            drawn = continue_given(segment(logits, size, config), ids, known)
            maps = (drawn, nearest, plain)
            for method, drawn in zip(METHODS, maps):
                scores[row][method].add(record, drawn, ids, known)
            if first:
                pictures.append([record["image"], *map(colorize, (ids, ids * known, *maps))])
    table = [{"block": block, "drop_rate": rate} | {m: s.result(device) for m, s in row.items()}
             for (block, rate), row in scores.items()]
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
    device, autocast = setup_distributed(args.device, args.amp)
    model = load_model(args.weights or default_weights("runs/ldm"), device, LDMSeg)
    model.schedule.timesteps(args.steps)  # an impossible number of steps stops here
    (run_experiment if args.data else complete_image)(model, args, device, autocast)


if __name__ == "__main__":
    run_script(main)
