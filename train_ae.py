"""Stage 1: train the mask autoencoder (Sec. 3.1). It sees masks only, never an image.

    python train_ae.py                                     # generated scenes, on a laptop
    python train_ae.py --data shapes coco/ --set bits=7    # several data sets
    python train_ae.py --target depth                      # the depth autoencoder (Supp. A)
    torchrun --nproc_per_node 8 train_ae.py --preset paper --data coco/

The same command again resumes. Leaves model.safetensors, config.json, log.jsonl, checkpoint.pt and
a picture per evaluation (mask | reconstruction) in the run folder.
"""

from dataclasses import replace

import torch
from torch.nn.utils import clip_grad_norm_

from ldmseg import (
    MaskAutoencoder, Meter, PanopticQuality, TrainingStream, ae_loss, candidate_coords, colorize,
    colorize_depth, depth_loss, distribute, evaluate_tasks, is_main, learning_rate, log_line,
    make_ema, make_optimizer, postprocess, progress, resume_run, run_script, save_grid, save_run,
    seeded_noise, segments_of, setup_distributed, tasks_of, training_config, training_data,
    training_loader, training_parser,
)  # fmt: skip


@torch.no_grad()
def latent_std(autoencoder, stream, device, count=128):
    """Standard deviation of the latents of the stream's first `count` samples."""
    latents = []
    for first in range(0, count, 16):
        targets = [stream[i][autoencoder.config.target] for i in range(first, first + 16)]
        targets = torch.stack(targets).to(device)
        latents.append(autoencoder.encode(autoencoder.code(targets)))
    return torch.cat(latents).std().item()


def evaluate(autoencoder, val, config, device, args):
    """Reconstruction PQ (no area filter) and mIoU (Table S1), and rows of pictures.

    mIoU is over the N - 1 random ids that the autoencoder was given, at its own resolution. Of a
    depth autoencoder: the depth metrics.
    """
    task = tasks_of(config)[0]
    options = dict(limit=args.limit or 200, workers=args.workers, seed=args.seed, pictures=8)
    by_id = PanopticQuality([{"id": i, "isthing": 1} for i in range(1, config.num_ids)])

    def reconstruct(batch):
        logits = autoencoder.reconstruct(batch[config.target])
        for truth, one in zip(batch["ids"].cpu().numpy(), logits) if task == "instance" else ():
            ids = postprocess(one, truth.shape, 0, 0).cpu().numpy()
            by_id.update(truth, segments_of(truth, None), ids, segments_of(ids, None))
        return [{task: one} for one in logits]

    results, kept = evaluate_tasks([task], reconstruct, val, replace(config, min_area=0), device,
                                   **options)
    if task == "depth":
        return results[task], [[colorize_depth(m) for m in (record[task], drawn[task])]
                               for record, drawn in kept]
    by_id.all_reduce(device)
    rows = [[colorize(record["ids"]), colorize(drawn[task])] for record, drawn in kept]
    pq, sq, rq = (results[task]["All"][name] for name in ("pq", "sq", "rq"))
    return dict(reconstruction_pq=pq, sq=sq, rq=rq, miou=by_id.compute()["miou"]), rows


def parse(argv):
    parser = training_parser(__doc__, "ae")
    parser.add_argument("--target", choices=("ids", "depth"), default="ids",
                        help="what to compress (default: ids; depth goes to runs/ae_depth)")
    args = parser.parse_args(argv)
    if args.target == "depth" and args.out == parser.get_default("out"):
        args.out += "_depth"
    return args, replace(training_config(args, "ae"), target=args.target)


def main(argv=None):
    args, config = parse(argv)
    device, autocast = setup_distributed(args.device, args.amp)
    train, val, _ = training_data(args, config)
    stream = TrainingStream(train, config, args.seed)

    torch.manual_seed(args.seed)
    model = MaskAutoencoder(config).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config.ae_lr, config)
    ema = make_ema(model, config.ema)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    state = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    (start, settings), steps = resume_run(args, config, state), config.ae_steps
    if start >= steps:
        return is_main() and print(f"finished at step {start}; --fresh starts over")
    loader = training_loader(stream, config.ae_batch, args.accumulate, start, steps, args.workers)

    net, meter, batches = distribute(model), Meter(), iter(loader)
    gaussian = config.latents == "gaussian"
    for step in progress(range(start, steps), steps, "stage 1", start):
        for micro in range(1, args.accumulate + 1):
            net.require_backward_grad_sync = micro == args.accumulate  # DDP: once per step
            batch = next(batches)
            target = batch[config.target].to(device, non_blocking=True)
            eps = seeded_noise(batch["seed"], config, device) if gaussian else None
            with autocast():
                logits, kl = net(target, eps)  # (B, N, H/2, W/2)
                if config.target == "depth":
                    loss, parts = depth_loss(logits, target), {}
                else:
                    coords = candidate_coords(batch["seed"], config.points, device)
                    loss, parts = ae_loss(logits, target, coords, config.points)
                loss = loss + config.kl_weight * kl
            scaler.scale(loss / args.accumulate).backward()
            meter.add(len(target), loss=loss, kl=kl, **parts)
        lr = learning_rate(step, steps, config.ae_lr, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), config.ae_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        ema.update_parameters(model)

        done = step + 1
        evaluating = done % args.eval_every == 0 or done == steps
        if done % 50 == 0 or evaluating:
            log_line(args.out, step=done, lr=lr, **meter.means())
            meter = Meter()
        if evaluating:
            averaged = ema.module.eval()
            scores, rows = evaluate(averaged, val, config, device, args)
            std = latent_std(averaged, stream, device)
            log_line(args.out, step=done, **scores, latent_std=std)
            if is_main():
                save_grid(f"{args.out}/step{done:06d}.png", ["truth", "reconstruction"], rows)
            measured = replace(config, mask_scale=config.mask_scale or config.mask_std / std)
            save_run(args.out, done, averaged, measured, settings, state)
            meter = Meter()  # its clock starts again


if __name__ == "__main__":
    run_script(main)
