"""Stage 2: train the denoising UNet on mask latents, given image latents (Sec. 3.2).

    python train_ldm.py                                     # generated scenes, on a laptop
    python train_ldm.py --sd photos --data my/ --steps 600  # yours, from the shipped weights
    python train_ldm.py --tasks instance semantic depth     # several tasks (Supp. A)
    python train_ldm.py --set space=pixels                  # Pix2Seq-D instead
    torchrun --nproc_per_node 8 train_ldm.py --preset paper --data coco/ --accumulate 2

The same command again resumes. Leaves model.safetensors, config.json, log.jsonl, checkpoint.pt
and pictures (image | truth | autoencoder alone | each task) in the run folder.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ldmseg import (
    DIVERGED, IMAGE_ENCODERS, PRESETS, SD_VAE, SHIPPED, TASKS, LatentCache, LDMSeg, Pix2SeqD,
    TrainingStream, any_rank, colorize, distribute, evaluate, is_main, learning_rate, load_model,
    log_line, means, noise_and_timesteps, open_log, open_training_data, override, random_generator,
    reading, require, resume_run, run_script, save_grid, save_run, setup_distributed, to_device,
    training_command, training_loader, training_state, training_steps, update_weights,
)  # fmt: skip


def parse(argv):
    args = training_command(__doc__, "ldm", {
        "--ae": dict(nargs="+", metavar="RUN", help="stage 1's run, for task depth another, or "
                     "ae.pt (default: --sd's, runs/ae if there, else tiny; runs/ae_depth)"),
        "--tasks": dict(nargs="+", choices=TASKS, default=[], help="to learn (default: instance)"),
        "--sd": dict(metavar="RUN_OR_ID", help="start from Stable Diffusion v1, a folder or hub id "
                     "(default of preset paper), a run, photos or tiny (whose Config --set then "
                     "changes), or none: random weights"),
        "--image-encoder": dict(choices=IMAGE_ENCODERS, help="patch: trained; frozen: sd, dinov2, "
                                "lite0 (default: preset paper sd, else patch)"),
        "--cache-latents": dict(metavar="DIR", help="keep those of images, of the encoders sd "
                                "and dinov2, in this folder, or ram")}).parse_args(argv)
    args.sd = args.sd or ("CompVis/stable-diffusion-v1-4" if args.preset == "paper" else "none")
    return args


def load_parts(args):
    """The run of --sd, None if it is none; the trained autoencoders of --ae, of ids and, for task
    depth, of depth; the Config, that of the run or --preset, with their codes and scales. Steps
    and batch are those of --preset: a run may be of a larger machine."""
    config, paths, run = PRESETS[args.preset], args.ae, None
    is_run = args.sd in SHIPPED or Path(args.sd, "model.safetensors").exists()
    if is_run or args.sd.endswith(".safetensors"):
        run, paths = load_model(args.sd, kind=LDMSeg), paths or [args.sd]
        config = replace(run.config, tasks=(), categories="", mask_scale=0.0, depth_scale=0.0,
                         ldm_steps=config.ldm_steps, ldm_batch=config.ldm_batch)
    if args.image_encoder not in (None, config.image_encoder):  # 0: its own scale
        config = replace(config, image_encoder=args.image_encoder, image_scale=0.0)
    config = replace(override(config, args.set, "ldm"), tasks=tuple(args.tasks))
    if config.in_pixels:
        require(not args.ae and (run or args.sd == "none"),
                "--set space=pixels: expected no --ae, and --sd none or a run with it")
        return run, [], config
    require("bits=" not in " ".join(args.set), "--set bits: expected of train_ae.py")
    paths = paths or ["runs/ae" if Path("runs/ae/model.safetensors").exists() else "tiny"]
    if config.needs_depth and len(paths) == 1:
        paths = [*paths, "runs/ae_depth"]
    require(len(paths) == 1 + config.needs_depth, f"--ae: {len(paths)} runs for these tasks")
    args.ae = paths  # a resumed run has the same
    models = [run if run and path == args.sd else load_model(path) for path in paths]
    models = [getattr(model, "autoencoder", model) for model in models]  # of either stage
    if is_main():
        print("autoencoder:", *paths)
    config = replace(config, **{name: getattr(models[0].config, name) for name in (
        "bits", "codes", "latents", "latent_channels", "ae_widths")})
    for path, model, target in zip(paths, models, ("ids", "depth")):
        theirs, scale = model.config, "mask_scale" if target == "ids" else "depth_scale"
        measured = theirs.mask_scale * config.mask_std / theirs.mask_std
        config = replace(config, **{scale: getattr(config, scale) or measured})
        fits = theirs.size == config.size or "size=" in " ".join(args.set)  # convolutions do
        require(theirs.target == target and fits, f"--ae {path}: of {theirs.target} at "
                f"{theirs.size} pixels, expected {target} at {config.size}, or --set size")
    return run, models, config


def from_pretrained(kind, path, subfolder=""):
    """A diffusers or transformers model of class `kind` from a folder or the hub."""
    with reading(path, f"{subfolder or kind.__name__} in a folder or hub id"):
        model, info = kind.from_pretrained(path, subfolder=subfolder, output_loading_info=True,
                                           low_cpu_mem_usage=False)  # quiet without accelerate
        missing = set(info["missing_keys"]) - {"embeddings.mask_token"}
        require(not missing, f"lacks {len(missing)} weights, the first {min(missing, default=0)}")
    return model


def load_sd_unet(unet, path):
    """Copy the weights of a Stable Diffusion v1 folder or hub id into a UNet of `build_unet`.
    The kernel of `conv_in` goes to z_t, the other input channels start at zero: at first the
    output is that of Stable Diffusion's UNet without cross-attention, whatever the image."""
    from diffusers import UNet2DConditionModel
    tensors = from_pretrained(UNet2DConditionModel, path, "unet").state_dict()
    kernel, channels = tensors["conv_in.weight"], unet.config.out_channels
    padding = (0, 0, 0, 0, 0, unet.config.in_channels - channels)
    tensors["conv_in.weight"] = torch.nn.functional.pad(kernel, padding)
    with reading(path, "UNet of Stable Diffusion v1, which the paper's preset expects"):
        require(kernel.shape[1] == channels, f"{kernel.shape[1]} inputs, expected {channels}")
        unet.load_state_dict({name: tensors[name] for name in unet.state_dict()})


def pretrained_encoder(config, sd):
    """The weights of an image encoder's `layers`, None where none are pretrained, and `config`
    with its architecture. sd: as --sd, a folder or hub id, or "none"."""
    weights, shape = None, ""
    if config.image_encoder == "dinov2":
        from transformers import Dinov2Model
        model = from_pretrained(Dinov2Model, config.dinov2)
        weights, shape = model.state_dict(), model.config.to_json_string()
    elif config.image_encoder == "lite0":
        weights = load_model("photos").image_encoder.layers.state_dict()
    elif config.image_encoder == "sd" and sd == "none":
        shape = json.dumps(SD_VAE)
    elif config.image_encoder == "sd":
        from diffusers import AutoencoderKL
        vae = from_pretrained(AutoencoderKL, sd, "vae")
        weights = torch.nn.Sequential(vae.encoder, vae.quant_conv).state_dict()
        shape = json.dumps({k: v for k, v in vae.config.items() if not k.startswith("_")})
    return weights, replace(config, encoder_json=shape)


def start_from(run, model):
    """Copy a run's image encoder, UNet, and embeddings of the tasks it knows. New cross-
    attention adds nothing at first: the output is the run's."""
    for name in ("space bits latent_channels pixel_loss prediction task_width image_encoder "
                 "image_scale stem_widths unet_widths unet_attention unet_layers unet_heads"
                 ).split():
        theirs, ours = getattr(run.config, name), getattr(model.config, name)
        require(theirs == ours, f"--sd: the {name} of this run is {theirs}, expected {ours}")
    theirs, ours = run.state_dict(), model.state_dict()
    given = {k: v for k, v in theirs.items() if k.startswith(("image_encoder.", "unet."))}
    for name in model.load_state_dict(given, strict=False).missing_keys:
        if "attn2.to_out" in name:
            ours[name].zero_()
    for row, task in enumerate(model.config.tasks):
        if task in run.config.tasks:
            place = run.config.tasks.index(task)
            ours["task_embedding.weight"][row] = theirs["task_embedding.weight"][place]


def build_model(config, autoencoders, sd, run=None):
    """LDMSeg with the trained autoencoders and the other weights of `run`, or what `sd` names."""
    encoder_weights, config = (None, config) if run else pretrained_encoder(config, sd)
    model = (Pix2SeqD if config.in_pixels else LDMSeg)(config)
    if encoder_weights:
        model.image_encoder.layers.load_state_dict(encoder_weights)
    if run:
        start_from(run, model)
    elif sd != "none":
        load_sd_unet(model.unet, sd)
    elif is_main() and (config.preset == "paper" or config.image_encoder == "sd"):
        frozen = ", and of the encoder sd, which STAYS so" if config.image_encoder == "sd" else ""
        print(f"--sd none: RANDOM weights of the UNet{frozen}")
    if config.freeze_time and sd != "none":
        model.unet.time_embedding.requires_grad_(False)
    for name, autoencoder in zip(("autoencoder", "depth_autoencoder"), autoencoders):
        with reading("--ae", f"{name}; use the same --set for both"):
            getattr(model, name).load_state_dict(autoencoder.state_dict())
    if config.checkpointing:
        model.unet.enable_gradient_checkpointing()
    if config.compile:
        model.unet.compile()
    return model


def score(model, val, config, device, autocast, args):
    """Scores of samples, and rows: image | truth | autoencoder alone | predictions."""
    run = partial(evaluate, dataset=val, config=config, device=device, pictures=6,
                  limit=args.limit or 50, workers=args.workers, seed=args.seed)
    ceiling, alone = run(lambda batch: {
        "instance": model.autoencoder.reconstruct(batch["ids"])}, ["instance"])
    sample = partial(model.sample_tasks, tasks=config.known_tasks)
    with autocast():
        results, shown = run(sample, config.known_tasks)
    scores, rows = {"autoencoder_pq": ceiling["instance"]["All"]["pq"]}, []
    for task, result in results.items():
        numbers, prefix = result | result.get("All", {}), "" if task == "instance" else f"{task}_"
        scores |= {prefix + k: v for k, v in numbers.items() if isinstance(v, float)}
    for (record, reconstruction), (_, drawn) in zip(alone, shown):
        maps = record["ids"], *reconstruction.values(), *drawn.values()
        rows.append([record["image"], *(colorize(one, record["ids"]) for one in maps)])
    return scores, rows


def main(argv=None):
    args = parse(argv)
    device, autocast = setup_distributed(args.device, args.amp)
    run, autoencoders, config = load_parts(args)
    train, val = open_training_data(args, config)
    if "semantic" in config.tasks:
        config = replace(config, categories=json.dumps(val.categories))
    stream = TrainingStream(train, config, args.seed, args.on_bad_sample)

    torch.manual_seed(args.seed)
    model = to_device(build_model(config, autoencoders, args.sd, run), device)
    cache = LatentCache(model, args.cache_latents) if args.cache_latents else None
    del run, autoencoders  # the model has copies
    config, steps = model.config, model.config.ldm_steps
    state = training_state(model, config.ldm_lr, config, args.amp, device)
    start, settings = resume_run(args, config, state, steps)
    if start >= steps:
        return
    loader = training_loader(stream, config.ldm_batch, args.accumulate, start, steps, args.workers)
    log = open_log(args, device)
    if not start:
        save_run(args.out, 0, config, settings, state)
    net, history, batches, failures = distribute(model), [], iter(loader), 0
    for step, interrupts in training_steps(start, steps, "stage 2", device):
        # one coin per optimizer step, the same on all ranks
        coin = random_generator(args.seed, "self-condition", step).random() < config.self_condition
        for micro in range(1, args.accumulate + 1):
            net.require_backward_grad_sync = micro == args.accumulate  # DDP: once per step
            batch = next(batches)
            eps, t = noise_and_timesteps(batch.pop("position"), config, args.seed, device)
            with autocast():  # Eq. 4
                if cache:
                    batch["z_image"] = cache(batch["image"])
                batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
                loss, error = net(eps=eps, t=t, self_condition=coin, **batch)
            state["scaler"].scale(loss / args.accumulate).backward()
            history.append({"loss": loss.detach(), "error": error})
        lr = learning_rate(step, steps, config.ldm_lr, config)
        failures = 0 if update_weights(state, lr, config.ldm_clip) else failures + 1
        require(failures < 10, f"10 steps in a row without a finite loss: {DIVERGED}")

        done, stopping = step + 1, any_rank(interrupts, device)
        evaluating = done % args.eval_every == 0 or done == steps
        if done % 50 == 0 or evaluating:
            log_line(log, step=done, lr=lr, **means(history))
            history.clear()
        if evaluating or stopping:
            save_run(args.out, done, config, settings, state)
        if stopping:
            raise KeyboardInterrupt(f"at step {done}, saved in {args.out}: same command goes on")
        if evaluating:
            scores, rows = score(state["ema"].module.eval(), val, config, device, autocast, args)
            log_line(log, step=done, **scores, sampling_steps=config.eval_steps)
            if is_main():
                save_grid(f"{args.out}/step{done:06d}.png",
                          ["image", "truth", "autoencoder alone", *config.known_tasks], rows)


if __name__ == "__main__":
    run_script(main)
