"""Images -> panoptic masks (Alg. 2).

    python sample.py                           # eight generated scenes, the shipped weights
    python sample.py cat.jpg street.png        # your images
    python sample.py --data coco/ --weights runs/coco --limit 100

    python sample.py --task depth --weights runs/tasks cat.jpg

Leaves in --out: panoptic.json and panoptic/*.png, the COCO panoptic format (a pixel's id is
R + 256 G + 65536 B, 0 = VOID), which evaluate.py --pred reads; overlay/*.png; grid.png with the
first eight images; denoising.png with the prediction after 1, 5, 10, 20, 50 steps of one run
(Fig. S5); noises.png with two noises (Fig. 10). With weights that know classes, segments have the
category_id of their class, and --task semantic draws one segment for each class. --task depth
leaves depth/*.png instead, 16 bits, from 1, the nearest, to 65535, and coloured overlay/*.png.
"""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ldmseg import (
    SAMPLERS, TASKS, LDMSeg, ShapeScenes, base_parser, colorize, colorize_depth, default_weights,
    draw_task, is_main, load_model, open_dataset, overlay, predict_dataset, prepare,
    rank_and_world, read_image, run_script, sampler_of, save_grid, seeded_noise,
    setup_distributed, stable_seed, tasks_of, write_panoptic, write_panoptic_json, write_png,
)  # fmt: skip

SHOWN = (1, 5, 10, 20, 50)


class ImageFiles(list):
    """Image paths as a data set without annotations; an image's id is its file name."""

    def __getitem__(self, index):
        image = read_image(list.__getitem__(self, index))
        name = Path(list.__getitem__(self, index)).name
        return {"image": image, "ids": np.zeros(image.shape[:2], np.int64), "segments": [],
                "image_id": name, "file_name": name}


def parse(argv):
    parser = base_parser(__doc__)
    add = parser.add_argument
    add("paths", nargs="*", metavar="IMAGE", help="image files (default: eight generated scenes)")
    add("--data", help="segment a split of 'shapes', a COCO-layout folder or a COCO JSON")
    add("--weights", metavar="RUN",
        help="run folder or weights file (default: runs/ldm if there, else shipped)")
    add("--steps", type=int, default=50, help="denoising steps (default: 50)")
    add("--sampler", choices=SAMPLERS, default="ddim",
        help="ddim: deterministic given its first noise; ddpm: fresh noise in each step")
    add("--task", choices=("panoptic", *TASKS),
        help="what to draw (default: the first of these that the weights know)")
    add("--out", default="runs/sample", help="output folder (default: %(default)s)")
    return parser.parse_args(argv)


def choose_images(args, size):
    """The data set to segment and how many of its images."""
    if args.paths and args.data:
        raise ValueError("both image files and --data are given, expected one of them")
    if args.paths:
        missing = [p for p in args.paths if not Path(p).is_file()]
        if missing:
            raise FileNotFoundError(f"{missing[0]}: no such image file ({len(missing)} missing)")
        stems = [Path(p).stem for p in args.paths]
        inputs = {Path(p).resolve() for p in args.paths}
        written = [Path(args.out, folder) for folder in ("panoptic", "overlay", "depth")]
        twice = [s for s in stems if stems.count(s) > 1
                 or any((folder / f"{s}.png").resolve() in inputs for folder in written)]
        if twice:
            raise ValueError(f"--out {args.out}: {twice[0]}.png would overwrite an image or another"
                             " result; use another --out, or give each image its own name")
        return ImageFiles(args.paths), args.limit
    if args.data:
        return open_dataset(args.data, args.split, args.images, size, "val"), args.limit
    return ShapeScenes("val", size), args.limit or 8


def batch_of(records, model, seed, device):
    """What the model sees of some records: image (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    samples = [prepare(r, model.config, generator, augment=False) for r in records]
    return torch.stack([s["image"] for s in samples]).to(device)


def picture(logits, size, config, task):
    """uint8 (height, width, 3): the colours of what is drawn."""
    drawn, _ = draw_task({task: logits}, task, size, config)
    return colorize_depth(drawn) if task == "depth" else colorize(drawn)


@torch.no_grad()
def draw_denoising(model, records, task, args, device, path):
    """Fig. S5: the predicted mask along one run."""
    image = batch_of(records, model, args.seed, device)
    seeds = [stable_seed(args.seed, r["image_id"]) for r in records]
    noise = seeded_noise(seeds, model.config, device)
    rows = [[r["image"]] for r in records]
    for step, x0 in enumerate(model.denoise(
            model.encode_image(image), noise, args.steps, SAMPLERS[args.sampler], seeds,
            model.task_of(task, len(image))), start=1):
        if step in SHOWN or step == args.steps:
            for row, logits in zip(rows, model.decode(x0, task)):
                row.append(picture(logits, row[0].shape[:2], model.config, task))
    shown = [f"step {s}" for s in range(1, args.steps + 1) if s in SHOWN or s == args.steps]
    save_grid(path, ["image", *shown], rows)


def draw_noises(model, records, task, args, device, path):
    """Fig. 10: the same images from two noises, each shared by all images; the ids differ."""
    image = batch_of(records, model, args.seed, device)
    rows = [[r["image"]] for r in records]
    for noise in (0, 1):
        seeds = [stable_seed(args.seed, "noise", noise)] * len(records)
        logits = model.sample(image, seeds, args.steps, SAMPLERS[args.sampler], task)
        for row, one in zip(rows, logits):
            row.append(picture(one, row[0].shape[:2], model.config, task))
    save_grid(path, ["image", "noise 1", "noise 2"], rows)


def main(argv=None):
    args = parse(argv)
    device, autocast = setup_distributed(args.device, args.amp)
    model = load_model(args.weights or default_weights("runs/ldm"), device, LDMSeg)
    model.schedule.timesteps(args.steps)  # an impossible number of steps stops here
    config, task = model.config, tasks_of(model.config, args.task)[0]
    dataset, limit = choose_images(args, config.size)
    out, entries, rows, first = Path(args.out), [], [], []
    sample = sampler_of(model, [task], args.steps, SAMPLERS[args.sampler], autocast)
    options = dict(seed=args.seed, workers=args.workers, limit=limit)
    for index, record, logits in predict_dataset(sample, dataset, config, device, **options):
        name, image = str(Path(record["file_name"]).with_suffix(".png")), record["image"]
        drawn, segments = draw_task(logits, task, image.shape[:2], config)
        if task == "depth":
            entries.append((index, name))
            write_png(out / "depth" / name, (1 + 32767 * (drawn.clip(-1, 1) + 1)).astype(np.uint16))
            write_png(out / "overlay" / name, colorize_depth(drawn))
        else:
            entries.append((index, write_panoptic(out, name, record, drawn, segments)))
        if len(rows) < 8:
            truth = [] if args.paths or task == "depth" else [colorize(record["ids"])]
            shown = [colorize_depth(drawn)] if task == "depth" else [
                colorize(drawn), overlay(image, drawn)]
            rows.append([image, *truth, *shown])
            first.append(record)

    gathered = [None] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(gathered, entries)
        entries = [e for part in gathered for e in part]
    if not is_main():
        return
    if task != "depth":
        write_panoptic_json(out, [e for _, e in sorted(entries, key=lambda e: e[0])],
                            config.categories if task != "instance" else "")
    titles = ["truth"] * (task != "depth" and not args.paths) + ["prediction", "overlay"]
    save_grid(out / "grid.png", ["image", *titles][: len(rows[0])], rows)
    with autocast():
        single = "instance" if task == "panoptic" else task
        draw_denoising(model, first[:4], single, args, device, out / "denoising.png")
        draw_noises(model, first[:4], single, args, device, out / "noises.png")
    print(f"{len(entries)} images -> {out}/ (see grid.png, denoising.png, noises.png)")


if __name__ == "__main__":
    run_script(main)
