"""Images -> panoptic masks (Alg. 2).

    python sample.py                                 # eight generated scenes
    python sample.py cat.jpg photos/ "*.png"         # your images: files, folders, patterns
    python sample.py --samples 1 --steps 50 cat.jpg  # one sample, as in the paper
    python sample.py --data coco/ --weights runs/coco --limit 100
    python sample.py --task depth --weights runs/tasks cat.jpg
    python sample.py --video frames/ --weights runs/video

Leaves in --out: panoptic.json and panoptic/*.png, the COCO panoptic format (a pixel's id is
R + 256 G + 65536 B, 0 = VOID), which evaluate.py --pred reads; overlay/*.png; grid.png with the
first eight images; denoising.png with the predictions along one sample's run (Fig. S5); noises.png
with two samples (Fig. 10). With weights that know classes, segments have the category_id of their
class, and --task semantic draws one segment for each class. --task depth leaves depth/*.png
instead, 16 bits, from 1, the nearest, to 65535, and coloured overlay/*.png. With --video, images of
a folder in the order of their names (2 before 10), each is also given the mask of the one before:
ids persist.
"""

import re
from collections import Counter
from glob import glob
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ldmseg import (
    SAMPLERS, CommandLine, LDMSeg, ShapeScenes, UserError, colorize, draw, evaluation_batches,
    is_main, keep_inputs, open_dataset, rank_and_world, read_image, require, resize_nearest,
    run_script, save_grid, start_script, write_panoptic, write_panoptic_json, write_png,
)  # fmt: skip

SHOWN = (1, 2, 4, 10, 20, 50)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class ImageFiles(list):
    """Image paths as a data set without annotations; an image's id is its file name."""

    def __getitem__(self, index):
        path = Path(list.__getitem__(self, index))
        image = read_image(path)
        return {"image": image, "ids": np.zeros(image.shape[:2], np.int64), "segments": [],
                "image_id": path.name, "file_name": path.name}


def parse(argv):
    args = CommandLine(__doc__, "data model sampling machine", {"data": {
        "--data": dict(help="segment a split of 'shapes', a COCO-layout folder or a COCO JSON"),
        "paths": dict(help="image files, folders of them, quoted patterns (default: eight "
                      "generated scenes)", nargs="*", metavar="IMAGE"),
        "--video": dict(help="folder of frames", metavar="FRAMES_DIR"),
        "--out": dict(help="folder of the results", default="runs/sample"),
    }}).parse_args(argv)
    if bool(args.paths) + bool(args.data) + bool(args.video) > 1 or args.images and not args.data:
        raise UserError("expected image files, --video, or --data, with which --images goes")
    if args.video:
        require(Path(args.video).is_dir(), f"--video {args.video}: no such folder of frames")
        args.paths = [args.video]
    return args


def in_order(path):  # frame 2 before frame 10
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def image_paths(args):
    """The files that the command line names, as a data set."""
    paths = []
    for name in args.paths:
        folder = Path(name).is_dir()
        found = sorted(Path(name).iterdir() if folder else map(Path, glob(name)), key=in_order)
        found = [p for p in found if not folder or
                 p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]  # fmt: skip
        if not found and not Path(name).is_file():
            raise FileNotFoundError(f"{name}: no such image file, or no image in this folder")
        paths += found or [Path(name)]
    return ImageFiles(paths)


def choose_images(args, size):
    """The data set to segment and how many of its images. UserError where two images would have
    one result."""
    if args.paths:
        dataset = image_paths(args)
        names = [path.name for path in dataset]
        keep_inputs(args.out, *{path.parent for path in dataset})
    elif args.data and args.data != "shapes":
        dataset = open_dataset(args.data, args.split, args.images, size, "val")
        names = [image["file_name"] for image in dataset.images.values()]
        keep_inputs(args.out, dataset.image_dir, dataset.json_path.with_suffix(""))
        require(dataset.json_path.resolve() != Path(args.out, "panoptic.json").resolve(),
                f"--out {args.out}: would replace {args.data}; use another --out")
    else:
        return ShapeScenes(args.split or "val", size), args.limit or (None if args.data else 8)
    results = Counter(Path(name).with_suffix(".png") for name in names)
    twice = [str(name) for name, count in results.items() if count > 1]
    require(not twice, f"--out {args.out}: two images would both become {twice[:1]}; give each "
            "its own name")
    return dataset, args.limit


def write_result(out, record, drawn, segments):
    """The files of one image; returns its entries of panoptic.json, None for depth."""
    if segments is not None:
        return write_panoptic(out, record["file_name"], record, drawn, segments)
    name = Path(record["file_name"]).with_suffix(".png")
    write_png(out / "depth" / name, (1 + 32767 * (drawn.clip(-1, 1) + 1)).astype(np.uint16))
    write_png(out / "overlay" / name, colorize(drawn))


def small_copy(record, width=384):
    """The record for pictures: of an image of many megapixels a smaller one."""
    height, full_width = record["image"].shape[:2]
    width = min(width, full_width)
    size = max(1, round(width * height / full_width)), width
    return record | {name: resize_nearest(record[name], size) for name in ("image", "ids")}


def pictures_of(record, drawn, task, has_truth):
    """A row of grid.png: image | truth | prediction | overlay."""
    if task == "depth":
        return [record["image"], colorize(drawn)]
    truth = record["ids"] if has_truth else None
    return [record["image"], *([colorize(truth)] if has_truth else []), colorize(drawn, truth),
            colorize(drawn, truth, record["image"])]


def picture_of(model, output, task, record):
    drawn, _ = draw({task: output}, task, record["image"].shape[:2], model.config)
    return colorize(drawn)


def draw_denoising(model, records, images, task, args, path):
    """Fig. S5: the predicted mask along one run."""
    noise = [(args.seed, r["image_id"]) for r in records]
    outputs = model.sample(images, noise, args.steps, SAMPLERS[args.sampler], task, return_all=True)
    shown = [step for step in range(1, args.steps + 1) if step in SHOWN or step == args.steps]
    save_grid(path, ["image", *(f"step {step}" for step in shown)], [
        [r["image"], *(picture_of(model, outputs[s - 1][i], task, r) for s in shown)]
        for i, r in enumerate(records)])


def draw_noises(model, records, images, task, args, path):
    """Fig. 10: the same images from two noises, each shared by all images; the ids differ."""
    outputs = [model.sample(images, [(args.seed, f"noise {n}")] * len(records), args.steps,
                            SAMPLERS[args.sampler], task) for n in (1, 2)]
    save_grid(path, ["image", "noise 1", "noise 2"], [
        [r["image"], *(picture_of(model, output[i], task, r) for output in outputs)]
        for i, r in enumerate(records)])


def main(argv=None):
    args = parse(argv)
    model, device, autocast = start_script(args, LDMSeg, scenes=args.data in (None, "shapes")
                                           and not args.paths)
    task = model.config.task(args.task or ("instance" if args.video else None))
    args.steps = args.steps or model.config.eval_steps
    dataset, limit = choose_images(args, model.config.size)
    if args.video:
        require(rank_and_world()[1] == 1, "--video: a frame needs the one before; one process")
        require(task == "instance", f"--video: expected --task instance, not {task}")
        args.samples = 1  # merging would number their segments anew
    out, entries, rows, first, images = Path(args.out), [], [], [], []
    previous = torch.zeros(1, model.config.size, model.config.size, dtype=torch.long)
    with autocast():
        for records, batch in evaluation_batches(dataset, model.config, device, args.seed,
                                                 args.workers, limit, 1 if args.video else 16):
            if args.video:  # all frames have one noise
                batch |= {"noise": [(args.seed, 0)], "previous": previous.to(device)}
            eta = SAMPLERS[args.sampler]
            outputs = model.sample_tasks(batch, [task], args.steps, eta, args.samples)
            for i, record in enumerate(records):
                one = {name: output[i] for name, output in outputs.items()}
                drawn, segments = draw(one, task, record["image"].shape[:2], model.config)
                entries.append(write_result(out, record, drawn, segments))
                if args.video:
                    small = resize_nearest(drawn, previous.shape[1:])
                    previous = torch.from_numpy(small)[None].long()
                if len(rows) < 8:
                    first.append(small_copy(record))
                    images.append(batch["image"][i])
                    rows.append(pictures_of(first[-1], resize_nearest(
                        drawn, first[-1]["image"].shape[:2]), task, not args.paths))

        gathered = [entries]
        if dist.is_initialized():
            gathered = [None] * rank_and_world()[1]
            dist.all_gather_object(gathered, entries)
        if not is_main():
            return
        entries = [e for turn in zip_longest(*gathered) for e in turn if e]  # the data set's order
        if task != "depth":
            classes = model.config.categories if task != "instance" else ""
            write_panoptic_json(out, entries, classes)
        titles = ["truth"] * (task != "depth" and not args.paths) + ["prediction", "overlay"]
        save_grid(out / "grid.png", ["image", *titles][: len(rows[0])], rows)
        if not args.video:  # they draw each image alone
            single = "instance" if task == "panoptic" else task
            shown = model, first[:4], torch.stack(images[:4]), single, args
            draw_denoising(*shown, out / "denoising.png")
            draw_noises(*shown, out / "noises.png")
    print(f"results -> {out}/ (see grid.png{'' if args.video else ', denoising.png, noises.png'})")


if __name__ == "__main__":
    run_script(main)
