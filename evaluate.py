"""Panoptic Quality of a model on a data set, or of saved predictions.

    python evaluate.py                                     # shipped weights, 200 generated scenes
    python evaluate.py --weights runs/coco --data coco/ --steps 1 5 10 50 --json out.json
    python evaluate.py --weights runs/ae --data coco/      # stage 1: reconstruction
    python evaluate.py --gt panoptic_val2017.json --pred predictions.json --per-class

The truth is the untouched annotation at its original size. Masks without classes (instance) are
scored class-agnostically; the row "autoencoder" is the truth encoded and decoded, the ceiling.
Depth is compared in the space of the truth's values (MiDaS: inverse depth), after least-squares
scale and shift of each image. With --gt and --pred, two files in the COCO panoptic format (JSON,
PNGs with id = R + 256 G + 65536 B) are compared: PQ, SQ, RQ averaged over the N categories that
occur, mIoU and pixel accuracy of the classes that the segments imply.
"""

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset

from ldmseg import (
    SAMPLERS, TASKS, PanopticQuality, base_parser, default_weights, evaluate_tasks, headline,
    image_count, is_main, load_model, open_dataset, predict_dataset, progress, rank_and_world,
    read_image, read_panoptic, run_script, sampler_of, setup_distributed, tasks_of, write_json,
)  # fmt: skip


def parse(argv):
    parser = base_parser(__doc__)
    add = parser.add_argument
    add("--weights", metavar="RUN",
        help="run folder or weights file (default: runs/ldm if there, else shipped)")
    add("--data", default="shapes",
        help="'shapes', a COCO-layout folder or a COCO JSON (default: shapes)")
    add("--steps", type=int, nargs="+", default=[50],
        help="sampling steps; several make a table (default: 50)")
    add("--sampler", choices=SAMPLERS, default="ddim", help="see sample.py (default: ddim)")
    add("--task", choices=("panoptic", *TASKS),
        help="what to score (default: all that the weights can do)")
    add("--min-area", type=int, metavar="PIXELS",
        help="drop smaller segments (default: the weights' own; stage 1: 0)")
    add("--gt", metavar="JSON", help="compare files, no model: the truth")
    add("--pred", metavar="JSON", help="and the predictions")
    add("--gt-dir", metavar="DIR", help="the truth's PNGs (default: --gt without .json)")
    add("--pred-dir", metavar="DIR", help="the predictions' PNGs (default: --pred without .json)")
    add("--allow-missing", action="store_true",
        help="segments of images without a prediction count as missed")
    add("--class-agnostic", action="store_true", help="with --gt: all categories are one")
    add("--per-class", action="store_true",
        help="a row for each category, with --gt or for the task panoptic")
    add("--json", metavar="OUT", help="write the result here")
    return parser.parse_args(argv)


class PanopticPairs(Dataset):
    """The truth and the prediction of each image of two panoptic JSONs -> that image's counts.

    An item is PanopticQuality's (state, odd) of one image. Raises FileNotFoundError or ValueError
    naming the file, the image, what was found and what was expected.
    """

    def __init__(self, gt, pred, gt_dir, pred_dir, allow_missing, class_agnostic):
        truth = read_panoptic(gt)
        self.new_metric = partial(PanopticQuality, truth["categories"], class_agnostic)
        self.truth = truth["annotations"]
        prediction = read_panoptic(pred, truth["categories"], class_agnostic)
        self.prediction = {a["image_id"]: a for a in prediction["annotations"]}
        self.folders = [Path(folder or Path(file).with_suffix(""))
                        for file, folder in ((gt, gt_dir), (pred, pred_dir))]
        for folder in self.folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: no such folder of PNGs, expected beside its "
                                        "JSON; --gt-dir and --pred-dir name others")
        images = [a["image_id"] for a in self.truth]
        missing = [i for i in images if i not in self.prediction]
        if missing and not allow_missing:
            raise ValueError(f"{pred}: no prediction for {len(missing)} of {len(images)} images, "
                             f"the first is {missing[0]}; --allow-missing counts them as missed")
        if extra := sorted(self.prediction.keys() - set(images), key=str):
            raise ValueError(f"{pred}: predictions for {len(extra)} images that {gt} does not "
                             f"have, the first is {extra[0]}")
        names = [{c["id"]: c.get("name") for c in file.get("categories") or ()
                  if isinstance(c, dict)} for file in (truth, prediction)]  # optional in the second
        if is_main() and not class_agnostic and names[1] and names[0] != names[1]:
            print(f"warning: {pred} and {gt} have different categories; compared by their ids",
                  file=sys.stderr)

    def __len__(self):
        return len(self.truth)

    def __getitem__(self, index):
        truth, metric = self.truth[index], self.new_metric()
        prediction = self.prediction.get(truth["image_id"])
        try:
            path = self.folders[0] / truth["file_name"]
            gt_rgb = read_image(path)
            if prediction:
                path = self.folders[1] / prediction["file_name"]
                pred_rgb, segments = read_image(path), prediction["segments_info"]
            else:
                pred_rgb, segments = np.zeros_like(gt_rgb), []
            metric.update(gt_rgb, truth["segments_info"], pred_rgb, segments)
        except (FileNotFoundError, ValueError) as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise type(error)(f"{path}: image {truth['image_id']}: {reason}") from None
        return metric.state, metric.odd


def add_up(items):
    """Sums of (state, odd) over a batch."""
    return [sum(counts) for counts in zip(*items)]


def score_files(args):
    """PanopticQuality of --gt and --pred; the images are split over ranks and --workers."""
    device, _ = setup_distributed("cpu", "off")
    pairs = PanopticPairs(args.gt, args.pred, args.gt_dir, args.pred_dir, args.allow_missing,
                          args.class_agnostic)
    rank, world = rank_and_world()
    images = image_count(pairs, args.limit)
    # batches are summed where they are made, in an order that no number of workers changes
    loader = DataLoader(Subset(pairs, range(rank, images, world)), 16, num_workers=args.workers,
                        collate_fn=add_up)
    metric = pairs.new_metric()
    for state, odd in progress(loader, len(loader), "comparing"):
        metric.state += state
        metric.odd += odd
    metric.all_reduce(device)
    odd = ("segments have another area than their pixels; pixels were counted",
           "pixels have an id that the JSON does not list; they belong to no segment and are not "
           "VOID")
    for count, what in zip(metric.odd.astype(int).tolist(), odd):
        if count and is_main():
            print(f"warning: {args.gt}: {count} {what}", file=sys.stderr)
    return metric.compute(), metric.categories, images


def print_table(result, categories, per_class):
    """All, Things and Stuff, then the categories."""
    print(f"{'':>20}  PQ      SQ      RQ      N")
    for group in ("All", "Things", "Stuff")[: 3 if len(categories) > 1 else 1]:
        row = result[group]
        print(f"{group:>20}  {row['pq']:.4f}  {row['sq']:.4f}  {row['rq']:.4f}  {row['n']}")
    if "miou" in result:
        print(f"mIoU {result['miou']:.4f}  pixel accuracy {result['pixel_accuracy']:.4f}")
    if per_class and len(categories) > 1:
        print(f"{'category':>20}  PQ      SQ      RQ      TP, FP, FN")
        for category in categories:
            if row := result["per_class"].get(str(category["id"])):
                print(f"{category.get('name', category['id'])!s:>20}  {row['pq']:.4f}  "
                      f"{row['sq']:.4f}  {row['rq']:.4f}  {row['tp']}, {row['fp']}, {row['fn']}")


def as_json(results):
    """One object of the results of tasks, in the format of --gt and --pred."""
    merged = {}
    for task, result in results.items():  # "panoptic" is the first
        keys = ("miou", "pixel_accuracy") if task == "semantic" else result
        alone = task == "depth" or task == "instance" and "All" in merged
        merged |= {task: result} if alone else {key: result[key] for key in keys}
    return merged


def score_weights(args):
    """The sweep over --steps and the autoencoder's own score, printed as a table."""
    device, autocast = setup_distributed(args.device, args.amp)
    path = args.weights or default_weights("runs/ldm")
    model = load_model(path, device)
    config, autoencoder = model.config, getattr(model, "autoencoder", model)
    target = autoencoder.config.target
    own = "depth" if target == "depth" else "instance"  # the task of the autoencoder alone
    tasks = list(tasks_of(config, args.task))
    dataset = open_dataset(args.data, args.split, args.images, config.size, "val",
                           "depth" in tasks)
    if args.min_area is not None or model is autoencoder:
        config = replace(config, min_area=args.min_area or 0)
    images, sweep = image_count(dataset, args.limit), []
    for steps in args.steps if model is not autoencoder else ():
        model.schedule.timesteps(steps)  # an impossible number of steps stops here

    def reconstruct(batch):
        return [{own: one} for one in autoencoder.reconstruct(batch[target])]

    def score(name, tasks, logits_of, titles):
        start = time.time()
        results, _ = evaluate_tasks(tasks, logits_of, dataset, config, device, limit=args.limit,
                                    seed=args.seed, workers=args.workers)
        seconds = (time.time() - start) * rank_and_world()[1] / images
        numbers = [n for task in tasks for n in headline(task, results[task]).items()]
        if is_main() and titles:
            print(" " * 12 + "".join(f"{title:>8}" for title, _ in numbers) + "  s/image (loading,"
                  f" scoring included; {', '.join(tasks)})")
        if is_main():
            print(f"{name:>12}" + "".join(f"{v:8.4f}" for _, v in numbers) + f"{seconds:9.3f}")
            if args.per_class and "panoptic" in tasks:
                print_table(results["panoptic"], dataset.categories, True)
        return as_json(results) | {"seconds_per_image": seconds}

    if is_main():
        print(f"{path} on {images} images of {args.data}, mask_threshold {config.mask_threshold}, "
              f"min_area {config.min_area}; instance is class-agnostic")
    ceiling = score("autoencoder", [own], reconstruct, titles=True)
    for steps in args.steps if model is not autoencoder else ():
        sample = sampler_of(model, tasks, steps, SAMPLERS[args.sampler], autocast)
        if not sweep:  # the first call is slow
            list(predict_dataset(sample, dataset, config, device, limit=1))
        titles = tasks != [own] and not sweep
        sweep.append(score(f"{steps} steps", tasks, sample, titles) | {"steps": steps})
    result = {"sweep": sweep} if len(sweep) > 1 else (sweep or [ceiling])[0]
    return result | {"autoencoder": ceiling.get("All", ceiling)}


def main(argv=None):
    args = parse(argv)
    if (args.gt is None) != (args.pred is None) or args.gt and args.weights:
        raise ValueError("expected --gt and --pred together, without --weights")
    if args.gt:
        result, categories, images = score_files(args)
        if is_main():
            print(f"{args.pred} against {args.gt}, {images} images"
                  + ", class-agnostic" * args.class_agnostic)
            print_table(result, categories, args.per_class)
    else:
        result = score_weights(args)
    if args.json and is_main():
        write_json(args.json, result)


if __name__ == "__main__":
    run_script(main)
