"""Stage 2: train the denoising UNet on mask latents, given image latents (Sec. 3.2).

    python train_ldm.py                                     # generated scenes, on a laptop
    python train_ldm.py --data coco/ --ae runs/ae --out runs/coco
    python train_ldm.py --tasks instance semantic depth     # several tasks (Supp. A)
    torchrun --nproc_per_node 8 train_ldm.py --preset paper --data coco/ --accumulate 2 \\
        --set checkpointing=1

The same command again resumes. Leaves model.safetensors, config.json, log.jsonl, checkpoint.pt and
a picture per evaluation (image | truth | autoencoder alone | prediction) in the run folder.
"""

import json
import random
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from ldmseg import (
    NETWORK, TASKS, LDMSeg, Meter, NoiseSchedule, TrainingStream, colorize,
    colorize_depth, default_weights, distribute, evaluate_tasks, headline, is_main, learning_rate,
    load_model, load_sd_unet, log_line, make_ema, make_optimizer, override, pretrained_encoder,
    progress, resume_run, run_script, sampler_of, save_grid, save_run, seeded_noise,
    setup_distributed, stable_seed, start_from, tasks_of, training_config, training_data,
    training_loader, training_parser,
)  # fmt: skip


def parse(argv):
    parser = training_parser(__doc__, "ldm")
    add = parser.add_argument
    add("--ae", nargs="+", metavar="RUN",
        help="stage 1's run, or the authors' ae.pt (default: runs/ae if there, else shipped);\n"
             "for the task depth another after it (default: runs/ae_depth)")
    add("--tasks", nargs="+", choices=TASKS, default=[],
        help="tasks to learn, told apart by an embedding (default: instance alone, without one)")
    add("--sd", metavar="DIR_OR_ID",
        help="start from Stable Diffusion v1 (folder or hub id), a run of this script (the same\n"
             "network, any tasks), or none: random weights\n"
             "(default: CompVis/stable-diffusion-v1-4 with --preset paper, else none)")
    add("--image-encoder", choices=("patch", "sd", "dinov2"),
        help="patch: a small stem, trained; sd, dinov2: pretrained, frozen (default: paper sd,\n"
             "else patch); dinov2 is read from --set dinov2=DIR_OR_ID")
    args = parser.parse_args(argv)
    args.sd = args.sd or ("CompVis/stable-diffusion-v1-4" if args.preset == "paper" else "none")
    return args


def build_model(config, autoencoders, sd):
    """LDMSeg with the trained autoencoders, and the weights that `sd` names. Raises ValueError
    naming the field where that is a run of another network."""
    run = encoder_weights = None
    if Path(sd, "model.safetensors").exists() or sd.endswith(".safetensors"):
        run = load_model(sd, kind=LDMSeg)
        for name in NETWORK:
            theirs, ours = getattr(run.config, name), getattr(config, name)
            if theirs != ours:
                raise ValueError(f"--sd {sd}: its {name} is {theirs}, expected {ours}; use the "
                                 "same flags and --set")
        config = replace(config, encoder_json=run.config.encoder_json)
    elif config.image_encoder != "patch":
        encoder_weights, config = pretrained_encoder(config, sd)
    model = LDMSeg(config)
    if encoder_weights:
        model.image_encoder.layers.load_state_dict(encoder_weights)
    if run:
        start_from(run, model)
    elif sd != "none":
        load_sd_unet(model.unet, sd)
    elif is_main() and (config.preset == "paper" or config.image_encoder == "sd"):
        print("--sd none: the UNet starts from RANDOM weights"
              + ", the frozen image encoder STAYS random" * (config.image_encoder == "sd"))
    if sd != "none":
        model.unet.time_embedding.requires_grad_(not config.freeze_time)
    for name, autoencoder in zip(("autoencoder", "depth_autoencoder"), autoencoders):
        getattr(model, name).load_state_dict(autoencoder.state_dict())
    return model


def origin(autoencoders, sd):
    """What a resumed run must share besides its Config: where the model started from."""
    weights = b"".join(v.cpu().numpy().tobytes() for autoencoder in autoencoders
                       for v in autoencoder.state_dict().values())
    return {"--ae": f"with checksum {zlib.crc32(weights):08x}",
            "--sd": "none" if sd == "none" else "pretrained"}


def wrap(model, config):
    """The model as the loop calls it: recomputing, compiled, distributed, where asked for."""
    if config.checkpointing:
        model.unet.enable_gradient_checkpointing()
    if config.compile:
        model.unet.compile()
    return distribute(model)


def timesteps_of(seeds):
    """Uniform timesteps int64 (B,) in [0, T - 1], each from its sample's seed."""
    return torch.tensor([stable_seed("timestep", int(s)) * NoiseSchedule.T >> 32 for s in seeds])


def inherit_autoencoders(args):
    """The trained autoencoders of --ae, of ids and with that task of depth, and the Config with
    their codes, shape and scales. Raises ValueError where sizes differ or --set asks for others.
    """
    config = replace(training_config(args, "ldm"), tasks=tuple(args.tasks))
    paths = args.ae or [default_weights("runs/ae")]
    paths = [*paths, *["runs/ae_depth"] * (config.needs_depth and len(paths) == 1)]
    if len(paths) != 1 + config.needs_depth:
        raise ValueError(f"--ae {' '.join(map(str, paths))}: expected {1 + config.needs_depth} of "
                         f"them with --tasks {' '.join(args.tasks)}")
    names, models = ("codes", "bits", "ae_widths", "latent_channels", "latents"), []
    for path, target, scale in zip(paths, ("ids", "depth"), ("mask_scale", "depth_scale")):
        model = load_model(path)
        models.append(getattr(model, "autoencoder", model))  # of either stage
        theirs = models[-1].config
        inherited = {n: getattr(theirs, n) for n in names if target == "ids"}
        measured = theirs.mask_scale * config.mask_std / theirs.mask_std
        inherited |= {scale: getattr(config, scale) or measured}
        config = override(replace(config, **inherited), args.set)
        for name in ("target", "size", *names[2 * (target == "depth") :]):
            expected = getattr(replace(config, target=target), name)
            if getattr(theirs, name) != expected:
                raise ValueError(f"--ae {path}: its {name} is {getattr(theirs, name)}, expected "
                                 f"{expected}; train stage 1 with the same --set")
    if args.image_encoder:  # with its own scale, unless --set says another
        scale = [assignment for assignment in args.set if assignment.startswith("image_scale=")]
        config = replace(config, image_encoder=args.image_encoder, image_scale=0.0)
        config = override(config, scale)
    return models, config


def evaluate(model, val, config, device, autocast, args):
    """Scores of samples, and rows of pictures: image | truth | autoencoder alone | predictions."""
    options = dict(limit=args.limit or 50, workers=args.workers, seed=args.seed, pictures=6)

    def reconstruct(batch):
        return [{"instance": one} for one in model.decode(model.encode_mask(batch["ids"]))]

    tasks = tasks_of(config)
    sample = sampler_of(model, tasks, config.eval_steps, 0.0, autocast)
    ceiling, kept = evaluate_tasks(["instance"], reconstruct, val, config, device, **options)
    scores = {"autoencoder_pq": ceiling["instance"]["All"]["pq"]}
    rows = [[r["image"], colorize(r["ids"]), colorize(drawn["instance"])] for r, drawn in kept]
    results, kept = evaluate_tasks(tasks, sample, val, config, device, **options)
    for task, result in results.items():
        prefix = "" if task == "instance" else f"{task}_"
        scores |= {prefix + name.lower(): v for name, v in headline(task, result).items()}
        for row, (_, drawn) in zip(rows, kept):
            row.append((colorize_depth if task == "depth" else colorize)(drawn[task]))
    return scores, rows


def main(argv=None):
    args = parse(argv)
    device, autocast = setup_distributed(args.device, args.amp)
    autoencoders, config = inherit_autoencoders(args)
    train, val, categories = training_data(args, config)
    if "semantic" in config.tasks:
        config = replace(config, categories=json.dumps(categories))
    stream = TrainingStream(train, config, args.seed)

    torch.manual_seed(args.seed)
    model = build_model(config, autoencoders, args.sd).to(device, memory_format=torch.channels_last)
    config = model.config
    optimizer = make_optimizer(model, config.ldm_lr, config)
    ema = make_ema(model, config.ema)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    state = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    start, settings = resume_run(args, config, state, **origin(autoencoders, args.sd))
    steps = config.ldm_steps
    if start >= steps:
        return is_main() and print(f"finished at step {start}; --fresh starts over")
    loader = training_loader(stream, config.ldm_batch, args.accumulate, start, steps, args.workers)
    net, meter, batches = wrap(model, config), Meter(), iter(loader)
    for step in progress(range(start, steps), steps, "stage 2", start):
        # one coin per optimizer step, the same on all ranks
        coin = random.Random(stable_seed(args.seed, "coin", step)).random()
        for micro in range(1, args.accumulate + 1):
            net.require_backward_grad_sync = micro == args.accumulate  # DDP: once per step
            batch = next(batches)
            seeds = batch.pop("seed")
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            eps, t = seeded_noise(seeds, config, device), timesteps_of(seeds).to(device)
            with autocast():  # Eq. 4
                loss = net(eps=eps, t=t, self_condition=coin < config.self_condition, **batch)
            scaler.scale(loss / args.accumulate).backward()
            meter.add(len(seeds), loss=loss)
        lr = learning_rate(step, steps, config.ldm_lr, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), config.ldm_clip)
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
            scores, rows = evaluate(averaged, val, config, device, autocast, args)
            log_line(args.out, step=done, **scores, sampling_steps=config.eval_steps)
            if is_main():
                save_grid(f"{args.out}/step{done:06d}.png",
                          ["image", "truth", "autoencoder alone", *tasks_of(config)], rows)
            save_run(args.out, done, averaged, config, settings, state)
            meter = Meter()  # its clock starts again


if __name__ == "__main__":
    run_script(main)
