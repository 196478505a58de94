"""Stage 2: train the denoising UNet on mask latents, given image latents (Sec. 3.2).

    python train_ldm.py                                     # generated scenes, on a laptop
    python train_ldm.py --data coco/ --ae runs/ae --out runs/coco
    torchrun --nproc_per_node 8 train_ldm.py --preset paper --data coco/ --accumulate 2 \\
        --set checkpointing=1

The same command again resumes. Leaves model.safetensors, config.json, log.jsonl, checkpoint.pt and
a picture per evaluation (image | truth | prediction | autoencoder alone) in the run folder.
"""

import json
import random
import zlib
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.utils import clip_grad_norm_

from ldmseg import (
    SD_VAE, Config, LDMSeg, Meter, NoiseSchedule, TrainingStream, colorize, default_weights,
    distribute, evaluate_pq, from_pretrained, is_main, learning_rate, load_model, load_sd_unet,
    log_line, make_ema, make_optimizer, override, progress, resume_run, run_script, save_grid,
    save_run, seeded_noise, setup_distributed, stable_seed, training_config, training_data,
    training_loader, training_parser,
)  # fmt: skip


def parse(argv):
    parser = training_parser(__doc__, "ldm")
    add = parser.add_argument
    add("--ae", metavar="RUN",
        help="stage 1's run, or the authors' ae.pt (default: runs/ae if there, else shipped)")
    add("--sd", metavar="DIR_OR_ID",
        help="start from Stable Diffusion v1 (folder or hub id), a run of this script, or none:\n"
             "random weights (default: CompVis/stable-diffusion-v1-4 if --preset paper, else none)")
    add("--image-encoder", choices=("patch", "sd", "dinov2"),
        help="patch: a small stem, trained; sd, dinov2: pretrained, frozen (default: paper sd,\n"
             "else patch); dinov2 is read from --set dinov2=DIR_OR_ID")
    args = parser.parse_args(argv)
    args.sd = args.sd or ("CompVis/stable-diffusion-v1-4" if args.preset == "paper" else "none")
    return args


def pretrained_encoder(config, sd):
    """The weights of a frozen image encoder, and `config` with its architecture.

    sd: Stable Diffusion's folder or hub id, or "none": its architecture with random weights.
    """
    if config.image_encoder == "dinov2":
        from transformers import Dinov2Model, logging

        logging.disable_progress_bar()
        model = from_pretrained(Dinov2Model, config.dinov2)
        if model.config.patch_size != 14:
            raise ValueError(f"{config.dinov2}: patches of {model.config.patch_size} pixels, "
                             "expected a DINOv2 with patches of 14")
        return model.state_dict(), replace(config, encoder_json=model.config.to_json_string())
    from diffusers import AutoencoderKL

    if sd == "none":
        return None, replace(config, encoder_json=json.dumps(SD_VAE))
    vae = from_pretrained(AutoencoderKL, sd, "vae")
    about = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    weights = nn.Sequential(vae.encoder, vae.quant_conv).state_dict()
    return weights, replace(config, encoder_json=json.dumps(about))


def continue_from(run, config, autoencoder):
    """LDMSeg with the image encoder and UNet of a run, and this command's autoencoder and Config.

    Raises ValueError naming the field where the run has another network.
    """
    start = load_model(run, kind=LDMSeg)
    for name in ("prediction", "latent_channels", "image_encoder", "stem_widths", "unet_widths",
                 "unet_attention", "unet_layers", "unet_heads"):
        theirs, ours = getattr(start.config, name), getattr(config, name)
        if theirs != ours:
            raise ValueError(f"--sd {run}: its {name} is {theirs}, expected {ours}; use the same "
                             f"--preset, --set or --image-encoder")
    model = LDMSeg(replace(config, encoder_json=start.config.encoder_json))
    for part, weights in (("autoencoder", autoencoder), ("image_encoder", start.image_encoder),
                          ("unet", start.unet)):
        getattr(model, part).load_state_dict(weights.state_dict())
    return model


def build_model(config, autoencoder, sd):
    """LDMSeg with the trained autoencoder, and the weights that `sd` names."""
    if Path(sd, "model.safetensors").exists() or sd.endswith(".safetensors"):
        return continue_from(sd, config, autoencoder)
    encoder_weights = None
    if config.image_encoder != "patch":
        encoder_weights, config = pretrained_encoder(config, sd)
    model = LDMSeg(config)
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    if encoder_weights:
        model.image_encoder.layers.load_state_dict(encoder_weights)
    if sd != "none":
        load_sd_unet(model.unet, sd)
        model.unet.time_embedding.requires_grad_(not config.freeze_time)
    elif is_main() and (config.preset == "paper" or config.image_encoder == "sd"):
        print("--sd none: the UNet starts from RANDOM weights"
              + ", the frozen image encoder STAYS random" * (config.image_encoder == "sd"))
    return model


def origin(autoencoder, sd):
    """What a resumed run must share besides its Config: where the model started from."""
    weights = b"".join(v.cpu().numpy().tobytes() for v in autoencoder.state_dict().values())
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


def inherit_autoencoder(args):
    """The trained autoencoder of --ae, and the Config with its codes, shape and scale.

    Raises ValueError where the two sizes differ or --set asks for another autoencoder.
    """
    path, config = args.ae or default_weights("runs/ae"), training_config(args, "ldm")
    autoencoder = load_model(path)
    autoencoder = getattr(autoencoder, "autoencoder", autoencoder)  # of either stage
    theirs, names = autoencoder.config, ("bits", "codes", "ae_widths", "latent_channels", "latents")
    scale = config.mask_scale or theirs.mask_scale * config.mask_std / theirs.mask_std
    inherited = replace(config, mask_scale=scale, **{n: getattr(theirs, n) for n in names})
    config = override(inherited, args.set)
    for name in (*names, "size"):
        if getattr(config, name) != getattr(theirs, name):
            raise ValueError(f"--ae {path}: its {name} is {getattr(theirs, name)}, expected "
                             f"{getattr(config, name)}; train stage 1 with the same --set")
    if args.image_encoder:  # with its own scale, unless --set says another
        scale = [assignment for assignment in args.set if assignment.startswith("image_scale=")]
        config = replace(config, image_encoder=args.image_encoder,
                         image_scale=override(Config(), scale).image_scale)
    return autoencoder, config


def evaluate(model, val, config, device, autocast, args):
    """PQ of samples, and rows of pictures: image | truth | prediction | autoencoder alone."""
    def sample(batch):
        with autocast():
            return model.sample(batch["image"], batch["seed"], config.eval_steps)

    def reconstruct(batch):
        return model.decode_mask(model.encode_mask(batch["ids"]))

    options = dict(limit=args.limit or 50, workers=args.workers, seed=args.seed, pictures=6)
    scores, kept = evaluate_pq(sample, val, config, device, config.min_area, **options)
    ceiling, best = evaluate_pq(reconstruct, val, config, device, config.min_area, **options)
    rows = [[record["image"], colorize(record["ids"]), colorize(ids), colorize(ids_ae)]
            for (record, ids), (_, ids_ae) in zip(kept, best)]
    return scores["All"], ceiling["All"], rows


def main(argv=None):
    args = parse(argv)
    device, autocast = setup_distributed(args.device, args.amp)
    autoencoder, config = inherit_autoencoder(args)
    train, val = training_data(args, config.size)
    stream = TrainingStream(train, config, args.seed)

    torch.manual_seed(args.seed)
    model = build_model(config, autoencoder, args.sd).to(device, memory_format=torch.channels_last)
    config = model.config
    optimizer = make_optimizer(model, config.ldm_lr, config)
    ema = make_ema(model, config.ema)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    state = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    start, settings = resume_run(args, config, state, **origin(autoencoder, args.sd))
    steps = config.ldm_steps
    if start >= steps:
        return is_main() and print(f"finished at step {start}; --fresh starts over")
    loader = training_loader(stream, config.ldm_batch, args.accumulate, start, steps, args.workers)
    net, meter, batches = wrap(model, config), Meter(), iter(loader)
    for step in progress(range(start, steps), steps, "stage 2", start):
        # one coin per optimizer step, the same on all ranks
        coin = random.Random(stable_seed(args.seed, "coin", step)).random()
        self_condition = coin < config.self_condition
        for micro in range(1, args.accumulate + 1):
            net.require_backward_grad_sync = micro == args.accumulate  # DDP: once per step
            batch = next(batches)
            image, ids, known = (batch[k].to(device, non_blocking=True)
                                 for k in ("image", "ids", "known"))
            eps = seeded_noise(batch["seed"], config, device)
            t = timesteps_of(batch["seed"]).to(device)
            with autocast():
                loss = net(image, ids, eps, t, self_condition,  # Eq. 4
                           known if config.given else None)
            scaler.scale(loss / args.accumulate).backward()
            meter.add(len(ids), loss=loss)
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
            scores, ceiling, rows = evaluate(averaged, val, config, device, autocast, args)
            log_line(args.out, step=done, pq=scores["pq"], sq=scores["sq"], rq=scores["rq"],
                     autoencoder_pq=ceiling["pq"], sampling_steps=config.eval_steps)
            if is_main():
                titles = ["image", "truth", "prediction", "autoencoder alone"]
                save_grid(f"{args.out}/step{done:06d}.png", titles, rows)
            save_run(args.out, done, averaged, config, settings, state)
            meter = Meter()  # its clock starts again


if __name__ == "__main__":
    run_script(main)
