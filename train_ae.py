"""Stage 1: train the mask autoencoder (Sec. 3.1). It sees masks only, never an image.

    python train_ae.py                                     # generated scenes, on a laptop
    python train_ae.py --data shapes coco/ --set bits=7    # several data sets
    python train_ae.py --target depth                      # the depth autoencoder (Supp. A)
    torchrun --nproc_per_node 8 train_ae.py --preset paper --data coco/

The same command again resumes. Leaves model.safetensors, config.json, log.jsonl, checkpoint.pt and
a picture per evaluation (mask | reconstruction) in the run folder.
"""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from ldmseg import (
    DIVERGED, PRESETS, MaskAutoencoder, PanopticQuality, TrainingStream, ae_loss, any_rank,
    colorize, distribute, evaluate, gaussian_latents, global_mean_count, is_main, learning_rate,
    log_line, means, open_log, open_training_data, override, postprocess, random_generator, require,
    resume_run, run_script, save_grid, save_run, segments_of, setup_distributed, to_device,
    training_command, training_loader, training_state, training_steps, update_weights,
)  # fmt: skip


def candidate_coords(generators, points, device):
    """Random places (B, M, 2) in [-1, 1] where `ae_loss` looks: more than it chooses, so that
    three quarters of its `points` are the most uncertain of three times as many."""
    M = 3 * points + points - int(0.75 * points)
    coords = np.stack([generator.random((M, 2), np.float32) for generator in generators])
    return torch.from_numpy(coords).to(device) * 2 - 1


def noise_and_coords(positions, config, seed, device):
    """What is random for samples at these positions of the stream: eps (B, 4, h, w), which only
    Gaussian latents use, and the candidate places of `ae_loss`."""
    positions = positions.tolist()
    noise = [random_generator(seed, "noise", p) for p in positions]
    points = [random_generator(seed, "points", p) for p in positions]
    eps = gaussian_latents(noise, config, device)
    return eps, candidate_coords(points, config.points, device)


def depth_loss(output, depth):
    """Mean absolute error over valid pixels of a decoded depth (B, 1, H/2, W/2), upsampled by 2,
    from depth (B, H, W), NaN = invalid (Supp. A)."""
    valid = depth.isfinite()
    output = F.interpolate(output.float(), depth.shape[1:], mode="bilinear")[:, 0]
    error = (output - depth.nan_to_num(0)).abs() * valid
    return error.sum() / global_mean_count(valid.sum())


@torch.no_grad()
def latent_std(autoencoder, stream, device, count=128):
    """Standard deviation of the latents of the stream's first `count` samples."""
    latents = []
    for first in range(0, count, 16):
        targets = [stream[i][autoencoder.config.target] for i in range(first, first + 16)]
        targets = torch.stack(targets).to(device)
        latents.append(autoencoder.encode(autoencoder.code(targets)))
    std = torch.cat(latents).std().item()
    require(math.isfinite(std), f"weights are not finite, nor are latents: {DIVERGED}")
    return std


def score(autoencoder, val, config, device, args):
    """Reconstruction PQ (no area filter) and mIoU (Table S1), and rows of pictures.

    mIoU is over the N - 1 random ids that the autoencoder was given, at its own resolution. Of a
    depth autoencoder: the depth metrics.
    """
    task = config.task()
    by_id = PanopticQuality([{"id": i, "isthing": 1} for i in range(1, config.num_ids)])
    own_id = {id: id for id in range(config.num_ids)}

    def reconstruct(batch):
        logits = autoencoder.reconstruct(batch[config.target])
        for truth, one in zip(batch["ids"].cpu().numpy(), logits) if task == "instance" else ():
            ids = postprocess(one, truth.shape, 0, 0).numpy()
            by_id.update(truth, segments_of(truth, own_id), ids, segments_of(ids, own_id))
        return {task: logits}

    results, shown = evaluate(reconstruct, [task], val, replace(config, min_area=0), device, 8,
                              limit=args.limit or 200, workers=args.workers, seed=args.seed)
    name = "depth" if task == "depth" else "ids"
    rows = [[colorize(record[name]), colorize(drawn[task], record["ids"])]
            for record, drawn in shown]
    if task == "depth":
        return results[task], rows
    by_id.all_reduce(device)
    pq, sq, rq = (results[task]["All"][name] for name in ("pq", "sq", "rq"))
    return dict(pq=pq, sq=sq, rq=rq, miou=by_id.compute()["miou"]), rows


def parse(argv):
    parser = training_command(__doc__, "ae", {
        "--target": dict(help="what to compress; depth goes to runs/ae_depth", default="ids",
                         choices=("ids", "depth"))})
    args = parser.parse_args(argv)
    if args.target == "depth" and args.out == parser.get_default("out"):
        args.out += "_depth"
    return args, override(replace(PRESETS[args.preset], target=args.target), args.set, "ae")


def main(argv=None):
    args, config = parse(argv)
    device, autocast = setup_distributed(args.device, args.amp)
    train, val = open_training_data(args, config)
    stream = TrainingStream(train, config, args.seed, args.on_bad_sample)

    torch.manual_seed(args.seed)
    model = to_device(MaskAutoencoder(config), device)
    state = training_state(model, config.ae_lr, config, args.amp, device)
    steps = config.ae_steps
    start, settings = resume_run(args, config, state, steps)
    if start >= steps:
        return
    loader = training_loader(stream, config.ae_batch, args.accumulate, start, steps, args.workers)
    log = open_log(args, device)
    if not start:
        save_run(args.out, 0, config, settings, state)
    net, history, batches, failures = distribute(model), [], iter(loader), 0
    for step, interrupts in training_steps(start, steps, "stage 1", device):
        for micro in range(1, args.accumulate + 1):
            net.require_backward_grad_sync = micro == args.accumulate  # DDP: once per step
            batch = next(batches)
            target = batch[config.target].to(device, non_blocking=True)
            eps, coords = noise_and_coords(batch["position"], config, args.seed, device)
            with autocast():  # Eq. 2
                logits, kl = net(target, eps)  # (B, N, H/2, W/2)
                if config.target == "depth":
                    loss, parts = depth_loss(logits, target), {}
                else:
                    loss, parts = ae_loss(logits, target, coords, config.points)
                loss = loss + config.kl_weight * kl
            state["scaler"].scale(loss / args.accumulate).backward()
            history.append({"loss": loss.detach(), "kl": kl.detach(), **parts})
        lr = learning_rate(step, steps, config.ae_lr, config)
        failures = 0 if update_weights(state, lr, config.ae_clip) else failures + 1
        require(failures < 10, f"10 steps in a row without a finite loss: {DIVERGED}")

        done, stopping = step + 1, any_rank(interrupts, device)
        evaluating = done % args.eval_every == 0 or done == steps
        if done % 50 == 0 or evaluating:
            log_line(log, step=done, lr=lr, **means(history))
            history.clear()
        if evaluating or stopping:
            averaged = state["ema"].module.eval()
            std = latent_std(averaged, stream, device)
            scaled = replace(config, mask_scale=config.mask_scale or config.mask_std / std)
            save_run(args.out, done, scaled, settings, state)
        if stopping:
            raise KeyboardInterrupt(f"at step {done}, saved in {args.out}: same command goes on")
        if evaluating:
            scores, rows = score(averaged, val, config, device, args)
            log_line(log, step=done, **scores, latent_std=std)
            if is_main():
                save_grid(f"{args.out}/step{done:06d}.png", ["truth", "reconstruction"], rows)


if __name__ == "__main__":
    run_script(main)
