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
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from ldmseg import (
    IMAGE_ENCODERS, SD_VAE, SHIPPED, TASKS, LDMSeg, Meter, NoiseSchedule, TrainingStream, UserError,
    any_rank, distribute, evaluate, gaussian_latents, is_main, learning_rate, load_model, log_line,
    make_ema, make_optimizer, open_training_data, picture, random_generator, require, resume_run,
    run_script, save_grid, save_run, setup_distributed, summary, training_command, training_config,
    training_loader, training_steps,
)  # fmt: skip

NETWORK = (  # what two runs must share for one to start from the other
    "prediction", "bits", "codes", "latents", "ae_widths", "task_width", "image_encoder",
    "image_scale", "stem_widths", "unet_widths", "unet_attention", "unet_layers", "unet_heads")


def parse(argv):
    parser = training_command(__doc__, "ldm")
    add = partial(parser.add, "model")
    add("--ae", "stage 1's run, for task depth another, or the authors' ae.pt (default: runs/ae if "
        "there, else shipped; runs/ae_depth)", nargs="+", metavar="RUN")
    add("--tasks", "to learn, told apart by an embedding (default: instance, without one)",
        nargs="+", choices=TASKS, default=[])
    add("--sd", "start from Stable Diffusion v1 (folder or hub id), a run of this script (the same "
        "network, any tasks), or none: random weights (default: preset paper "
        "CompVis/stable-diffusion-v1-4, else none)", metavar="RUN_OR_ID")
    add("--image-encoder", "patch: a small stem, trained; pretrained and frozen: sd; dinov2, of "
        "--set dinov2 (default: preset paper sd, else patch)", choices=IMAGE_ENCODERS)
    args = parser.parse_args(argv)
    args.sd = args.sd or ("CompVis/stable-diffusion-v1-4" if args.preset == "paper" else "none")
    return args


# ---- where training starts ----


def inherit_autoencoders(args):
    """The trained autoencoders of --ae, of ids and with that task of depth, and the Config with
    their codes, shape and scales."""
    changes = {"tasks": tuple(args.tasks)}
    if args.image_encoder:
        changes |= {"image_encoder": args.image_encoder, "image_scale": 0.0}  # 0: its own
    config = training_config(args, "ldm", **changes)
    paths = args.ae or ["runs/ae" if Path("runs/ae/model.safetensors").exists() else SHIPPED]
    if config.needs_depth and len(paths) == 1:
        paths = [*paths, "runs/ae_depth"]
    shown, count = " ".join(map(str, paths)), 1 + config.needs_depth
    require(len(paths) == count,
            f"--ae {shown}: expected {count} of them with --tasks {' '.join(args.tasks)}")
    if is_main():
        print(f"autoencoder: {shown}")
    models = []
    for path, target, scale in zip(paths, ("ids", "depth"), ("mask_scale", "depth_scale")):
        model = load_model(path)
        models.append(getattr(model, "autoencoder", model))  # of either stage
        theirs = models[-1].config
        if target == "ids":
            names = ("codes", "bits", "ae_widths", "latents")
            config = replace(config, **{name: getattr(theirs, name) for name in names})
        measured = theirs.mask_scale * config.mask_std / theirs.mask_std
        config = replace(config, **{scale: getattr(config, scale) or measured})
        expected = {"target": target, "size": config.size, "ae_widths": config.ae_widths}
        for name, ours in expected.items():
            require(getattr(theirs, name) == ours, f"--ae {path}: its {name} is "
                    f"{getattr(theirs, name)}, expected {ours}; train stage 1 with the same --set")
    return models, config


def from_pretrained(kind, path, subfolder=""):
    """A diffusers or transformers model of class `kind` from a folder or the hub."""
    file = Path(path, subfolder, "config.json")
    if (Path(path).exists() or Path(path).is_absolute()) and not file.exists():
        raise FileNotFoundError(f"{file}: no such file, expected a pretrained {kind.__name__}")
    try:
        model, info = kind.from_pretrained(path, subfolder=subfolder, output_loading_info=True,
                                           low_cpu_mem_usage=False)  # quiet without accelerate
    except Exception as error:  # whatever these libraries raise
        raise UserError(f"{path}: no {kind.__name__} could be loaded from this folder or hub id "
                        f"({' '.join(str(error).split())[:200]})") from None
    if missing := set(info["missing_keys"]) - {"embeddings.mask_token"}:
        raise UserError(f"{path}: lacks {len(missing)} weights, the first {min(missing)}")
    return model


def load_sd_unet(unet, path):
    """Copy the weights of a Stable Diffusion v1 folder or hub id into a UNet of `build_unet`. The
    kernel of `conv_in` goes to z_t; all other input channels start at zero, so that at first the
    output is that of Stable Diffusion's UNet without cross-attention, whatever the image."""
    from diffusers import UNet2DConditionModel

    pretrained = from_pretrained(UNet2DConditionModel, path, "unet")
    expected = dict(unet.config) | {"in_channels": unet.config.out_channels}
    for name in sorted(expected.keys() - {"sample_size", "cross_attention_dim"}):
        theirs, ours = pretrained.config.get(name), expected[name]
        # read from JSON, theirs may be a list or null where ours is a tuple or False
        require(name[0] == "_" or np.array_equal(theirs or 0, ours or 0),
                f"{path}: its UNet has {name} {theirs}, expected {ours}; the paper's preset fits "
                "Stable Diffusion v1, not v2 or XL")
    tensors = pretrained.state_dict()
    others = unet.config.in_channels - pretrained.config.in_channels
    tensors["conv_in.weight"] = F.pad(tensors["conv_in.weight"], (0, 0, 0, 0, 0, others))
    unet.load_state_dict({name: tensors[name] for name in unet.state_dict()})


def pretrained_encoder(config, sd):
    """The weights of a frozen image encoder, and `config` with its architecture. sd: Stable
    Diffusion's folder or hub id, or "none": its architecture with random weights."""
    if config.image_encoder == "dinov2":
        from transformers import Dinov2Model, logging

        logging.disable_progress_bar()
        model = from_pretrained(Dinov2Model, config.dinov2)
        patch = model.config.patch_size
        require(patch == 14, f"{config.dinov2}: patches of {patch} pixels, expected 14")
        return model.state_dict(), replace(config, encoder_json=model.config.to_json_string())
    if sd == "none":
        return None, replace(config, encoder_json=json.dumps(SD_VAE))
    from diffusers import AutoencoderKL

    vae = from_pretrained(AutoencoderKL, sd, "vae")
    shape = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    weights = nn.Sequential(vae.encoder, vae.quant_conv).state_dict()
    return weights, replace(config, encoder_json=json.dumps(shape))


def start_from(run, model):
    """Copy a run's image encoder, UNet, and embeddings of the tasks it knows. New cross-attention
    adds nothing at first: the output is the run's."""
    theirs, ours = run.state_dict(), model.state_dict()
    for name, tensor in ours.items():
        if name in theirs and not name.startswith("task_embedding"):
            tensor.copy_(theirs[name])
        elif "attn2.to_out" in name:
            tensor.zero_()
    for row, task in enumerate(model.config.tasks):
        if task in run.config.tasks:
            place = run.config.tasks.index(task)
            ours["task_embedding.weight"][row] = theirs["task_embedding.weight"][place]


def build_model(config, autoencoders, sd):
    """LDMSeg with the trained autoencoders, and the weights that `sd` names."""
    run = encoder_weights = None
    if Path(sd, "model.safetensors").exists() or sd.endswith(".safetensors"):
        run = load_model(sd, kind=LDMSeg)
        for name in NETWORK:
            theirs, ours = getattr(run.config, name), getattr(config, name)
            require(theirs == ours, f"--sd {sd}: its {name} is {theirs}, expected {ours}; use the "
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
        frozen = ", the frozen image encoder STAYS random" if config.image_encoder == "sd" else ""
        print(f"--sd none: the UNet starts from RANDOM weights{frozen}")
    if sd != "none":
        model.unet.time_embedding.requires_grad_(not config.freeze_time)
    for name, autoencoder in zip(("autoencoder", "depth_autoencoder"), autoencoders):
        getattr(model, name).load_state_dict(autoencoder.state_dict())
    if config.checkpointing:
        model.unet.enable_gradient_checkpointing()
    if config.compile:
        model.unet.compile()
    return model


def origin(autoencoders, sd):
    """What a resumed run must share besides its Config: where the model started from."""
    weights = b"".join(v.cpu().numpy().tobytes() for autoencoder in autoencoders
                       for v in autoencoder.state_dict().values())
    return {"--ae": f"with checksum {zlib.crc32(weights):08x}",
            "--sd": "none" if sd == "none" else "pretrained"}


# ---- training ----


def noise_and_timesteps(positions, config, seed, device):
    """eps (B, 4, h, w) and t int64 (B,) of samples at these positions of the stream."""
    positions = positions.tolist()
    noise = [random_generator(seed, "noise", p) for p in positions]
    draws = [random_generator(seed, "timestep", p) for p in positions]
    if config.timesteps == "uniform":
        t = [draw.integers(NoiseSchedule.T) for draw in draws]
    else:  # noisy: half of them are above 3/4 T
        t = [int(NoiseSchedule.T * (1 - (1 - draw.random()) ** 2)) for draw in draws]
    return gaussian_latents(noise, config, device), torch.tensor(t, device=device)


def score(model, val, config, device, autocast, args):
    """Scores of samples, and rows of pictures: image | truth | autoencoder alone | predictions."""
    run = partial(evaluate, dataset=val, config=config, device=device, pictures=6,
                  limit=args.limit or 50, workers=args.workers, seed=args.seed)
    ceiling, alone = run(lambda batch: {"instance": model.autoencoder.reconstruct(batch["ids"])},
                         ["instance"])
    with autocast():
        tasks = config.known_tasks
        predict = partial(model.sample_tasks, tasks=tasks, steps=config.eval_steps)
        results, shown = run(predict, tasks)
    rows, scores = [], {"autoencoder_pq": ceiling["instance"]["All"]["pq"]}
    for (record, reconstruction), (_, drawn) in zip(alone, shown):
        image, ids = record["image"], record["ids"]
        maps = [*reconstruction.items(), *drawn.items()]
        rows.append([image, picture(ids, "instance"), *(picture(one, t, ids) for t, one in maps)])
    for task, result in results.items():
        prefix = "" if task == "instance" else f"{task}_"
        scores |= {prefix + name.lower(): v for name, v in summary(task, result).items()}
    return scores, rows


def main(argv=None):
    args = parse(argv)
    device, autocast = setup_distributed(args.device, args.amp)
    autoencoders, config = inherit_autoencoders(args)
    train, val, categories = open_training_data(args, config)
    if "semantic" in config.tasks:
        config = replace(config, categories=json.dumps(categories))
    stream = TrainingStream(train, config, args.seed)

    torch.manual_seed(args.seed)
    model = build_model(config, autoencoders, args.sd).to(device, memory_format=torch.channels_last)
    config, steps = model.config, model.config.ldm_steps
    optimizer, ema = make_optimizer(model, config.ldm_lr, config), make_ema(model, config.ema)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    state = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    others = origin(autoencoders, args.sd)
    start, settings = resume_run(args, config, state, steps, device, **others)
    if start >= steps:
        return
    loader = training_loader(stream, config.ldm_batch, args.accumulate, start, steps, args.workers)
    net, meter, batches = distribute(model), Meter(), iter(loader)
    for step, interrupts in training_steps(start, steps, "stage 2"):
        # one coin per optimizer step, the same on all ranks
        coin = random_generator(args.seed, "self-condition", step).random() < config.self_condition
        for micro in range(1, args.accumulate + 1):
            net.require_backward_grad_sync = micro == args.accumulate  # DDP: once per step
            batch = next(batches)
            eps, t = noise_and_timesteps(batch.pop("position"), config, args.seed, device)
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            with autocast():  # Eq. 4
                loss, error = net(eps=eps, t=t, self_condition=coin, **batch)
            scaler.scale(loss / args.accumulate).backward()
            meter.add(len(t), loss=loss, error=error)
        lr = learning_rate(step, steps, config.ldm_lr, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), config.ldm_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        ema.update_parameters(model)

        done, stopping = step + 1, any_rank(interrupts, device)
        evaluating = done % args.eval_every == 0 or done == steps
        if done % 50 == 0 or evaluating:
            log_line(args.out, step=done, lr=lr, **meter.means())
            meter = Meter()
        averaged = ema.module.eval()
        if evaluating or stopping:
            save_run(args.out, done, averaged, config, settings, state)
        if stopping:
            raise KeyboardInterrupt(f"at step {done}, saved in {args.out}: same command goes on")
        if evaluating:
            scores, rows = score(averaged, val, config, device, autocast, args)
            log_line(args.out, step=done, **scores, sampling_steps=config.eval_steps)
            if is_main():
                save_grid(f"{args.out}/step{done:06d}.png",
                          ["image", "truth", "autoencoder alone", *config.known_tasks], rows)
            meter = Meter()  # its clock starts again


if __name__ == "__main__":
    run_script(main)
