"""Panoptic Quality of a model on a data set.

    python evaluate.py                                     # shipped weights, 200 generated scenes
    python evaluate.py --weights runs/coco --data coco/ --steps 1 5 10 50 --json out.json
    python evaluate.py --weights runs/ae --data coco/      # stage 1: reconstruction

The truth is the untouched annotation at its original size. The masks carry no classes, so the
score is class-agnostic. The row "autoencoder" is the truth encoded and decoded, the ceiling.
"""

import time
from functools import partial

from ldmseg import (
    LDMSeg, autocast, base_parser, default_weights, evaluate_pq, int2bits, is_main,
    load_autoencoder, load_model, open_dataset, rank_and_world, read_weights, run_script,
    setup_distributed, write_json,
)  # fmt: skip


def parse(argv):
    parser = base_parser(__doc__)
    add = parser.add_argument
    add("--weights", metavar="RUN", 
        help="run folder or weights file (default: runs/ldm if there, else shipped)")
    add("--data", default="shapes",
        help="'shapes', a COCO-layout folder or a panoptic JSON (default: shapes)")
    add("--steps", type=int, nargs="+", default=[50],
        help="sampling steps; several make a table (default: 50)")
    add("--min-area", type=int, metavar="PIXELS",
        help="drop smaller segments (default: the weights' own; stage 1: 0)")
    add("--json", metavar="OUT", help="write the result here")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device, dtype = setup_distributed(args.device, args.amp)
    path = args.weights or default_weights("runs/ldm")
    model = load_model(path, device) if read_weights(path)[0] == LDMSeg.__name__ else None
    autoencoder, config = load_autoencoder(path, device)
    dataset = open_dataset(args.data, args.split, args.images, config.size, "val")
    min_area = args.min_area if args.min_area is not None else config.min_area if model else 0
    images = min(len(dataset), args.limit or len(dataset))
    for steps in args.steps if model else ():
        model.schedule.timesteps(steps)  # an impossible number of steps stops here

    def score(name, logits_of):
        start = time.time()
        result, _ = evaluate_pq(logits_of, dataset, config, device, min_area, limit=args.limit,
                                seed=args.seed, workers=args.workers)
        seconds = (time.time() - start) * rank_and_world()[1] / images
        if is_main():
            print(f"{name:>12}  " + "  ".join(f"{result['All'][k]:.4f}" for k in ("pq", "sq", "rq"))
                  + f"  {seconds:.3f}")
        return result | {"seconds_per_image": seconds}

    def sample(batch, steps):
        with autocast(device, dtype):
            return model.sample(batch["image"], batch["seed"], steps)

    if is_main():
        print(f"{path} on {images} images of {args.data}, class-agnostic, mask_threshold "
              f"{config.mask_threshold}, min_area {min_area}")
        print(f"{'':>12}  PQ      SQ      RQ      s/image")
    ceiling = score("autoencoder", lambda batch: autoencoder(int2bits(batch["ids"], config.bits)))
    sweep = [score(f"{n} steps", partial(sample, steps=n)) | {"steps": n}
             for n in (args.steps if model else ())]
    if args.json and is_main():
        result = {"sweep": sweep} if len(sweep) > 1 else (sweep or [ceiling])[0]
        write_json(args.json, result | {"autoencoder": ceiling["All"]})


if __name__ == "__main__":
    run_script(main)
