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

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset

from ldmseg import (
    SAMPLERS, CommandLine, PanopticQuality, UserError, evaluate, evaluation_batches, from_zero,
    is_main, open_dataset, progress, rank_and_world, read_coco, read_image, reading, require,
    run_script, setup_distributed, start_script, whole_number, write_json,
)  # fmt: skip


def parse(argv):
    args = CommandLine(__doc__, "data model sampling machine", {
        "data": {
            "--data": dict(help="'shapes' (generated), a COCO-layout folder or a COCO JSON",
                           default="shapes"),
            "--json": dict(help="write the result to this file", metavar="OUT"),
            "--gt": dict(help="compare files, no model: the truth", metavar="JSON"),
            "--pred": dict(help="and the predictions", metavar="JSON"),
            "--gt-dir": dict(help="the truth's PNGs (default: --gt without .json)", metavar="DIR"),
            "--pred-dir": dict(help="the predictions' PNGs (default: --pred without .json)",
                               metavar="DIR"),
            "--allow-missing": dict(help="segments of images without a prediction count as missed",
                                    action="store_true"),
            "--class-agnostic": dict(help="with --gt: all categories are one", action="store_true"),
            "--per-class": dict(help="a row for each category, with --gt or for task panoptic",
                                action="store_true")},
        "sampling": {
            "--steps": dict(help="of denoising (default: the weights' own)", type=whole_number,
                            nargs="+"),
            "--min-area": dict(help="drop smaller segments (default: the weights' own; stage 1: 0)",
                               type=from_zero, metavar="PIXELS")},
    }).parse_args(argv)
    if (args.gt is None) != (args.pred is None) or args.gt and args.weights:
        raise UserError("expected --gt and --pred together, without --weights")
    if args.images and args.data == "shapes":
        raise UserError("--images goes with --data")
    if args.class_agnostic and not args.gt:
        raise UserError("--class-agnostic goes with --gt")
    return args


class PanopticPairs(Dataset):
    """The truth and the prediction of each image of two panoptic JSONs -> that image's counts,
    PanopticQuality's state. UserError names file and image."""

    def __init__(self, gt, pred, gt_dir, pred_dir, allow_missing, class_agnostic):
        categories, _, truth = read_coco(gt)
        known = int if class_agnostic else set(categories)
        _, _, self.prediction = read_coco(pred, known)
        for file, entries in (gt, truth), (pred, self.prediction):
            require(all(entry["file_name"] for entry in entries.values()), f"{file}: instances, "
                    "without PNGs; expected the COCO panoptic format, or --data for these labels")
        self.new_metric = partial(PanopticQuality, [*categories.values()], class_agnostic)
        self.truth = [*truth.values()]
        self.folders = [Path(folder or Path(file).with_suffix(""))
                        for file, folder in ((gt, gt_dir), (pred, pred_dir))]
        for folder in self.folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: no such folder of PNGs, expected beside its "
                                        "JSON; --gt-dir and --pred-dir name others")
        missing = [image for image in truth if image not in self.prediction]
        if missing and not allow_missing:
            raise UserError(f"{pred}: no prediction for {len(missing)} of {len(truth)} images, "
                            f"the first is {missing[0]}; --allow-missing counts them as missed")
        if extra := sorted(self.prediction.keys() - truth.keys(), key=str):
            raise UserError(f"{pred}: predictions for {len(extra)} images that {gt} does not "
                            f"have, the first is {extra[0]}")

    def __len__(self):
        return len(self.truth)

    def __getitem__(self, index):
        truth, metric = self.truth[index], self.new_metric()
        prediction = self.prediction.get(truth["image_id"])
        gt_rgb = read_image(path := self.folders[0] / truth["file_name"], exact=True)
        pred_rgb, segments = np.zeros_like(gt_rgb), []
        if prediction:
            path = self.folders[1] / prediction["file_name"]
            pred_rgb = read_image(path, exact=True)
            segments = prediction["segments_info"]
        with reading(f"{path}: image {truth['image_id']}", "pair"):
            metric.update(gt_rgb, truth["segments_info"], pred_rgb, segments)
        return metric.state


def score_files(args):
    """PanopticQuality of --gt and --pred; the images are split over ranks and --workers."""
    device, _ = setup_distributed("cpu", "off")
    pairs = PanopticPairs(args.gt, args.pred, args.gt_dir, args.pred_dir, args.allow_missing,
                          args.class_agnostic)
    (rank, world), images = rank_and_world(), min(len(pairs), args.limit or len(pairs))
    # batches are summed where they are made, in an order that no number of workers changes
    loader = DataLoader(Subset(pairs, range(rank, images, world)), 16, num_workers=args.workers,
                        collate_fn=sum)
    metric = pairs.new_metric()
    for state in progress(loader, "comparing"):
        metric.state += state
    metric.all_reduce(device)
    areas, unlisted = int(metric.state[:, 5].sum()), int(metric.state[-1, 4])
    if areas and is_main():
        print(f"warning: {args.gt}: {areas} segments have another area than their pixels; pixels "
              "were counted", file=sys.stderr)
    if unlisted and is_main():
        print(f"warning: {args.gt}: {unlisted} pixels have an id that the JSON does not list; they "
              "belong to no segment and are not VOID", file=sys.stderr)
    if is_main():
        print(f"{args.pred} against {args.gt}, {images} images"
              + (", class-agnostic" if args.class_agnostic else ""))
        print_table(metric.compute(), metric.categories, args.per_class)
    return metric.compute()


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
    model, device, autocast = start_script(args, scenes=args.data == "shapes")
    config, autoencoder = model.config, getattr(model, "autoencoder", model)
    target = autoencoder.config.target
    tasks = [config.task(args.task)] if args.task else list(config.known_tasks)
    require("panoptic" in tasks or not args.per_class,
            f"--per-class: for task panoptic, not {tasks}")
    dataset = open_dataset(args.data, args.split, args.images, config.size, "val",
                           "depth" in tasks)
    if {"panoptic", "semantic"} & set(tasks):
        ours, theirs = ([(c["id"], c["isthing"]) for c in categories]
                        for categories in (json.loads(config.categories), dataset.categories))
        require(ours == theirs, f"--data {args.data}: {len(theirs)} classes (id, isthing) {theirs},"
                f" expected those of the weights, {ours}")
    if args.min_area is not None or model is autoencoder:
        config = replace(config, min_area=args.min_area or 0)
    options = dict(seed=args.seed, workers=args.workers, limit=args.limit)
    images = min(len(dataset), args.limit or len(dataset))
    samples = args.samples or config.eval_samples
    if is_main():
        merged = "" if model is autoencoder else f"{samples} samples merged, "
        print(f"{images} images of {args.data}, {merged}"
              f"mask_threshold {config.mask_threshold}, min_area {config.min_area}; instance is "
              "class-agnostic; seconds include loading and scoring")

    # the truth, encoded and decoded
    own_task = "depth" if target == "depth" else "instance"
    results, _ = evaluate(lambda batch: {own_task: autoencoder.reconstruct(batch[target])},
                          [own_task], dataset, config, device, **options)
    ceiling, sweep = as_json(results), []
    print_row("autoencoder", results, None, titles=True)
    for steps in () if model is autoencoder else args.steps or [config.eval_steps]:
        predict = partial(model.sample_tasks, tasks=tasks, steps=steps, eta=SAMPLERS[args.sampler],
                          samples=samples)
        with autocast():
            if not sweep:  # the first call is slow
                for _, batch in evaluation_batches(dataset, config, device, limit=1):
                    predict(batch)
            start = time.time()
            results, _ = evaluate(predict, tasks, dataset, config, device, **options)
        seconds = (time.time() - start) * rank_and_world()[1] / images
        print_row(f"{steps} steps", results, seconds, titles=not sweep and tasks != [own_task])
        if args.per_class and "panoptic" in tasks and is_main():
            print_table(results["panoptic"], dataset.categories, True)
        sweep.append(as_json(results) | {"steps": steps, "seconds_per_image": seconds})
    result = {"sweep": sweep} if len(sweep) > 1 else (sweep or [ceiling])[0]
    return result | {"autoencoder": ceiling.get("All", ceiling)}


def summary(task, result):
    """The numbers of a task's result that a row shows: {title: value}."""
    if task == "semantic":
        return {"mIoU": result["miou"]}
    if task == "depth":
        return {"AbsRel": result["abs_rel"], "RMSE": result["rmse"], "delta1": result["delta1"]}
    numbers = {name.upper(): result["All"][name] for name in ("pq", "sq", "rq")}
    if task == "panoptic":
        numbers |= {"PQ_th": result["Things"]["pq"], "PQ_st": result["Stuff"]["pq"]}
    return numbers


def print_row(name, results, seconds, titles):
    """The numbers of tasks in one line, below their titles."""
    numbers = [number for task in results for number in summary(task, results[task]).items()]
    if is_main() and titles:
        print(" " * 12 + "".join(f"{title:>8}" for title, _ in numbers)
              + f"  s/image   ({', '.join(results)})")
    if is_main():
        print(f"{name:>12}" + "".join(f"{value:8.4f}" for _, value in numbers)
              + (f"{seconds:9.3f}" if seconds else ""))


def main(argv=None):
    args = parse(argv)
    result = score_files(args) if args.gt else score_weights(args)
    if args.json and is_main():
        write_json(args.json, result)


if __name__ == "__main__":
    run_script(main)
