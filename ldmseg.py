"""LDMSeg in one file: panoptic segmentation as latent diffusion over bit-encoded masks.

The method of "A Simple Latent Diffusion Approach for Panoptic Segmentation and Mask Inpainting"
(Van Gansbeke and De Brabandere, ECCV 2024), in the order of the paper:

    ids -> bits in {-1, +1} -> shallow encoder -> z (4 channels, 1/8 resolution)        stage 1
    z * scale + noise, image latents -> UNet -> the noise; self-conditioned on x0       stage 2
    Gaussian noise -> DDIM, guided by the image -> z -> shallow decoder -> softmax over N ids

Shapes: B batch, C channels, H W pixels, h w = H/8 W/8 latent cells, N ids, S segments, P points.
Ids: int64 maps in [0, N-1]; 0 is VOID (unlabelled: never a target, never counted), segments are
1..N-1 in random order. Images: float in [-1, 1]. In a mask called `valid`, 1 means "counts".

    Eq. 1  p(y | z_t, z_i) p(z_t)        the two stages: train_ae.py, train_ldm.py
    Eq. 2  autoencoder loss              ae_loss (weight decay: make_optimizer)
    Eq. 3  forward process               NoiseSchedule.add_noise, inverse: .predict_x0
    Eq. 4  noise loss (Alg. 1)           LDMSeg.diffusion_loss, NoiseSchedule.weights
    Eq. 5  DDIM step (Alg. 2)            LDMSeg.denoise
    Alg. 3 mask inpainting               LDMSeg.inpaint
    Supp. A post-processing; tasks       postprocess, merge_panoptic; LDMSeg.predict
"""

import argparse
import colorsys
import json
import math
import os
import sys
import time
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from glob import iglob
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from numpy.lib.format import read_array
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save
from scipy import ndimage
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.io import ImageReadMode, decode_png
from torchvision.models.convnext import LayerNorm2d
from torchvision.transforms import v2
from tqdm import tqdm

# ---- 1. Configuration (Sec. 4.1) ---------------------------------------------------------------


TASKS = ("instance", "semantic", "depth")


@dataclass(frozen=True)
class Config:
    """Everything that defines a model and its training; the defaults are the `tiny` preset."""

    preset: str = "tiny"
    # data and mask codes
    size: int = 64  # images and masks are resized to a square of this many pixels
    bits: int = 4  # N = 2 ** bits ids, VOID included
    codes: str = "bit"  # how ids are written: "bit", "colour" or "positional" (Table S1)
    min_segment: int = 10  # smaller segments (pixels, after resizing) are VOID in training
    # stage 1: autoencoder
    ae_widths: tuple = (16, 32, 64, 128)  # channels at 1/1, 1/2, 1/4, 1/8 resolution
    latent_channels: int = 4
    target: str = "ids"  # what the autoencoder compresses: "ids" or "depth"
    latents: str = "deterministic"  # or "gaussian": mean and variance, sampled in training
    kl_weight: float = 0.0  # of Gaussian latents' divergence from a standard Gaussian (Fig. 8)
    points: int = 410  # points where the losses are computed, per image and per segment
    ae_steps: int = 1650
    ae_batch: int = 32
    ae_lr: float = 2e-3
    ae_clip: float = 3.0  # gradient norm
    # stage 2: diffusion
    mask_scale: float = 0.0  # multiplies mask latents; 0: measured, so that their std is mask_std
    mask_std: float = 0.7
    depth_scale: float = 0.0  # multiplies depth latents
    image_scale: float = 0.0  # multiplies image latents; 0: the image encoder's own
    prediction: str = "v"  # what the UNet predicts: "eps" (paper) or "v"
    loss_weights: str = "paper"  # over the timesteps: "paper", "released" or "none"
    self_condition: float = 0.5  # share of the training steps with self-conditioning
    given: float = 0.0  # share of the training samples with given parts of the mask (Sec. 3.3)
    tasks: tuple = ()  # several of TASKS, told apart by an embedding (Supp. A); (): instance alone
    task_width: int = 64  # of the embeddings
    categories: str = ""  # JSON of the classes that semantic weights know, filled in from the data
    image_encoder: str = "patch"  # or, pretrained and frozen, "sd" (paper) or "dinov2"
    dinov2: str = "facebook/dinov2-base"  # folder or hub id
    encoder_json: str = ""  # architecture of a pretrained image encoder, filled in when loaded
    stem_widths: tuple = (32, 64, 128)  # trainable image stem: channels at 1/2, 1/4, 1/8
    unet_widths: tuple = (96, 128)
    unet_attention: tuple = (1, 1)  # 1: self-attention at this level
    unet_layers: int = 1  # residual blocks per level
    unet_heads: int = 4
    ldm_steps: int = 3000
    ldm_batch: int = 16
    ldm_lr: float = 5e-4
    ldm_clip: float = 1.0
    freeze_time: int = 0  # 1: pretrained time embedding stays as it is, as the authors released
    checkpointing: int = 0  # 1: recompute activations in the backward pass: less memory
    compile: int = 0  # 1: torch.compile the UNet
    zero: int = 0  # 1: each process keeps a part of the optimizer's state (ZeRO stage 1)
    eval_steps: int = 20  # sampling steps of the evaluations during training
    # both stages
    warmup: int = 200  # steps
    lr_schedule: str = "constant"  # after the warm-up: "constant" or "cosine" (to 1e-6)
    weight_decay: float = 0.05
    ema: float = 0.999  # decay of the weights' moving average; 0: off
    # post-processing
    mask_threshold: float = 0.5  # less confident pixels are VOID
    min_area: int = 16  # smaller predicted segments (pixels of the original image) are VOID

    def __post_init__(self):
        levels, positive = len(self.unet_widths), range(1, 10**9)
        cell = 8 * 2 ** (levels - 1)  # of the UNet's lowest resolution, in pixels
        allowed = dict(
            target=("ids", "depth"), codes=("bit", "colour", "positional"),
            latents=("deterministic", "gaussian"), prediction=("eps", "v"),
            loss_weights=("paper", "released", "none"),
            lr_schedule=("constant", "cosine"), image_encoder=("patch", "sd", "dinov2"),
            size=range(cell, 10**9, cell), bits=range(1, 11), eval_steps=range(1, 1001),
            latent_channels=positive, points=positive, ae_steps=positive, ae_batch=positive,
            ldm_steps=positive, ldm_batch=positive)  # fmt: skip
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                expected = values if isinstance(values, tuple) else f"{values[0]}, {values[1]}, ..."
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")
        for name, count in dict(ae_widths=4, stem_widths=3, unet_attention=levels).items():
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {count} numbers")
        if self.ae_widths[-1] % 32:
            raise ValueError(f"ae_widths end in {self.ae_widths[-1]}, expected a multiple of 32")
        if len(set(self.tasks)) < len(self.tasks) or set(self.tasks) - set(TASKS):
            raise ValueError(f"tasks are {self.tasks}, expected different ones of {TASKS}")
        classes = len(json.loads(self.categories or "[]"))
        if "semantic" in self.tasks and classes >= self.num_ids:
            raise ValueError(f"{classes} classes do not fit into {self.num_ids - 1} ids; train "
                             f"both stages with --set bits={classes.bit_length()}")
        if self.kl_weight and self.latents != "gaussian":
            raise ValueError(f"kl_weight is {self.kl_weight}, which needs latents=gaussian")

    @property
    def num_ids(self):
        return 2**self.bits

    @property
    def needs_depth(self):
        return self.target == "depth" or "depth" in self.tasks


PRESETS = {
    "tiny": Config(),
    "paper": Config(
        preset="paper", size=512, bits=7, ae_widths=(32, 64, 128, 256), points=12544,
        ae_steps=60_000, ae_batch=16, ae_lr=1e-4, mask_scale=0.18215, image_scale=0.18215,
        prediction="eps", task_width=768, image_encoder="sd", unet_widths=(320, 640, 1280, 1280),
        unet_attention=(1, 1, 1, 0), unet_layers=2, unet_heads=8, freeze_time=1, ldm_steps=200_000,
        ldm_batch=256, ldm_lr=1e-4, min_area=512,
    ),
}  # fmt: skip


NOT_BY_SET = ("preset", "target", "tasks", "categories")  # but by flags, or from the data


def override(config, assignments):
    """Replace fields of `config` by ["FIELD=VALUE", ...]; tuples are comma-separated.
    Raises ValueError that names the field, the value and the type expected."""
    types, changes = {f.name: f.type for f in fields(Config) if f.name not in NOT_BY_SET}, {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in types:
            raise ValueError(f"--set {assignment}: expected FIELD=VALUE with a field that -h lists")
        kind = types[name]
        try:
            changes[name] = tuple(map(int, text.split(","))) if kind is tuple else kind(text)
        except ValueError:
            raise ValueError(f"--set {name}: got {text!r}, expected {kind.__name__}") from None
    return replace(config, **changes)


# ---- 2. Mask codes (Sec. 3.1, "Encoding") ------------------------------------------------------

VOID = 0


def int2bits(ids, n):
    """Analog bits of segment ids.

    ids (B, H, W) int64 in [0, 2^n - 1] -> float (B, n, H, W) in {-1, +1}, least significant bit
    first; a VOID pixel is 0 in every plane. Raises ValueError when an id needs more than n bits.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < 2**n:
        raise ValueError(f"ids reach {int(ids.max())}, expected 0 to {2**n - 1} with {n} bits; "
                         "use more bits (--set bits=...)")
    shifts = torch.arange(n, device=ids.device).view(1, n, 1, 1)
    bits = (ids[:, None] >> shifts & 1).float() * 2 - 1  # (B, n, H, W)
    return bits * (ids[:, None] != VOID)


def bits2int(bits):
    """Inverse of int2bits: float (B, n, H, W) -> int64 ids (B, H, W); all-zero pixels are VOID."""
    shifts = torch.arange(bits.shape[1], device=bits.device).view(1, -1, 1, 1)
    return ((bits > 0).long() << shifts).sum(1)


def code_table(config):
    """The code of every id, float (N, C) in [-1, 1], VOID all zeros: the rows of Table S1.

    "bit": `int2bits`, C = bits; "colour": N points of a regular grid of the RGB cube, C = 3;
    "positional": sines and cosines of NeRF at 4 frequencies, C = 8.
    """
    ids = torch.arange(config.num_ids, device="cpu")
    if config.codes == "bit":
        return int2bits(ids.view(1, 1, -1), config.bits)[0, :, 0].T
    if config.codes == "colour":
        levels = 2 * math.ceil(config.num_ids ** (1 / 3) / 2 - 1e-9)  # even: no colour is zero
        grid = torch.linspace(-1, 1, levels)
        table = torch.cartesian_prod(grid, grid, grid)[ids * levels**3 // config.num_ids].flip(1)
    else:
        angle = (2 * ids / (config.num_ids - 1) - 1)[:, None] * math.pi * 2.0 ** torch.arange(4)
        table = torch.cat([angle.sin(), angle.cos()], 1)
    return table * (ids != VOID)[:, None]


def random_relabel(ids, num_ids, generator=None):
    """Give the segments of one map random distinct ids in [1, num_ids - 1]; VOID stays VOID.
    ids: int64 (H, W) in [0, num_ids - 1]. Randomness comes from `generator` (torch's, CPU)."""
    table = F.pad(1 + torch.randperm(num_ids - 1, generator=generator), (1, 0), value=VOID)
    return table[ids]


def rgb2id(rgb):
    """COCO panoptic colours uint8 (..., 3) -> int32 ids (...): R + 256 G + 65536 B."""
    return (rgb.astype(np.float32) @ np.float32([1, 256, 65536])).astype(np.int32)  # exact, fast


def id2rgb(ids):
    """Inverse of rgb2id: int ids (...) in [0, 2^24 - 1] -> uint8 (..., 3)."""
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)


# ---- 3. Shallow autoencoder (Sec. 3.1, "Architectural Design") ---------------------------------


def conv3x3(c_in, c_out, stride=1):
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1)


class MaskAutoencoder(nn.Module):
    """Compresses mask codes by 8 with three strided convolutions; decodes to N classes at H/2.
    Of depth maps (config.target), one channel in and out: depth for `ids`, depth for `logits`.
    Latents are deterministic by default; Gaussian ones are the ablation of Fig. 8."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        widths, width = config.ae_widths, config.ae_widths[-1]
        depth = config.target == "depth"
        codes = torch.empty(0, 1) if depth else code_table(config)  # (N, C)
        self.register_buffer("codes", codes, persistent=False)
        encoder = [conv3x3(self.codes.shape[1], widths[0]), nn.SiLU()]
        for c_in, c_out in zip(widths, widths[1:]):
            encoder += [conv3x3(c_in, c_in), conv3x3(c_in, c_out, stride=2), nn.SiLU()]
        encoder += [conv3x3(width, width), nn.GroupNorm(32, width, eps=1e-6), nn.SiLU(),
                    conv3x3(width, config.latent_channels * (1 + (config.latents == "gaussian")))]
        decoder = [conv3x3(config.latent_channels, width)]
        for _ in range(2):
            decoder += [nn.ConvTranspose2d(width, width, 2, stride=2),
                        LayerNorm2d(width, eps=1e-6), nn.SiLU()]
        decoder += [nn.GroupNorm(32, width, eps=1e-5), nn.SiLU(),
                    conv3x3(width, 1 if depth else config.num_ids)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)

    def code(self, ids):
        """ids int64 (B, H, W) in [0, N - 1] -> codes (B, C, H, W). Depth float (B, H, W) in [-1, 1]
        is its own code (B, 1, H, W); zero where VOID, in depth NaN."""
        if self.config.target == "depth":
            return ids.nan_to_num(0)[:, None]
        return F.embedding(ids, self.codes).permute(0, 3, 1, 2)

    def encode(self, codes):
        """codes (B, C, H, W) -> mean latents (B, 4, h, w), unscaled."""
        return self.encoder(codes)[:, : self.config.latent_channels]

    def decode(self, z):
        """latents (B, 4, h, w), unscaled -> logits (B, N, H/2, W/2)."""
        return self.decoder(z)

    def reconstruct(self, ids):
        """ids int64 (B, H, W) -> logits (B, N, H/2, W/2)."""
        return self.decode(self.encode(self.code(ids)))

    def forward(self, ids, eps):
        """Training: logits (B, N, H/2, W/2), and the KL divergence of Gaussian latents, which are
        mean + deviation * eps (summed over C, h, w, mean over B); 0 if deterministic."""
        if self.config.latents == "deterministic":
            return self.reconstruct(ids), torch.zeros((), device=ids.device)
        mean, log_variance = self.encoder(self.code(ids)).float().chunk(2, 1)
        log_variance = log_variance.clamp(-30, 20)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
        return self.decode(mean + (0.5 * log_variance).exp() * eps), kl


# ---- 4. Autoencoder losses: cross-entropy, BCE and Dice at uncertain points (Sec. 3.1, Eq. 2) --


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    return rank_and_world()[0] == 0


def global_mean_count(count):
    """A count's mean over ranks (of a total of at least 1), to divide a sum over this rank's part:
    DDP, which averages gradients, then gives the gradient of the mean over all ranks."""
    count = count.float()
    if dist.is_initialized():
        dist.all_reduce(count)
    return count.clamp(min=1) / rank_and_world()[1]


def sample_uncertain_points(uncertainty, points, important=0.75):
    """Choose `points` of random candidates, most of them where the prediction is least certain.

    uncertainty (R, M): of M >= 3 * points + rest candidates at uniformly random places, where rest
    = points - int(important * points). The first M - rest compete for the uncertain places, the
    last `rest` are taken as they are. Returns int64 indices (R, points). Source: PointRend.
    """
    rest = points - int(important * points)
    M = uncertainty.shape[1]
    top = uncertainty[:, : M - rest].topk(points - rest).indices  # (R, points - rest)
    uniform = torch.arange(M - rest, M, device=top.device).expand(len(top), rest)
    return torch.cat([top, uniform], 1)


def labels_around(ids, coords):
    """Ids of the four pixels around coords (B, M, 2) in [-1, 1], bilinear weights: (B, M, 4)."""
    size = torch.tensor(ids.shape[:0:-1], device=ids.device)  # W, H
    position = ((coords + 1) * size - 1) / 2
    corner = torch.tensor([(0, 0), (1, 0), (0, 1), (1, 1)], device=ids.device)
    corner = position.floor()[:, :, None] + corner  # (B, M, 4, 2)
    weight = (1 - (position[:, :, None] - corner).abs()).prod(-1)
    labels = F.grid_sample(ids[:, None].float(), (2 * corner + 1) / size - 1, mode="nearest",
                           align_corners=False, padding_mode="border")
    return labels[:, 0].long(), weight


def ae_loss(logits, ids, coords, points):
    """Reconstruction loss of Eq. 2: cross-entropy + BCE + Dice, each at `points` uncertain points.

    logits (B, N, H/2, W/2), ids int64 (B, H, W), coords (B, M, 2) in [-1, 1]: candidate places,
    see `candidate_coords`. VOID points count nowhere. The cross-entropy is a mean over points, BCE
    and Dice are means over segments; both counts are taken over all ranks. Memory grows with
    segments only by their `points` sampled values. Returns the loss and a dict of its parts.

    NOTE: PointRend draws candidates per segment; here an image's segments share them, because
    one sampling of all N logits then serves every loss.
    NOTE: the released mask loss counts VOID as negative of every segment; here it is left out.
    """
    B, N = logits.shape[:2]
    values = F.grid_sample(logits.float(), coords[:, :, None], align_corners=False,
                           padding_mode="border")[..., 0]  # (B, N, M)
    labels, weight = labels_around(ids, coords)  # (B, M, 4)
    nearest = labels.gather(2, weight.argmax(2, keepdim=True))[..., 0]  # (B, M)
    valid = nearest != VOID

    with torch.no_grad():
        first, second = values.topk(2, dim=1).values.unbind(1)
        chosen = sample_uncertain_points((second - first).masked_fill(~valid, -1e9), points)
    target = nearest.gather(1, chosen)  # (B, P), VOID is ignored by the loss
    picked = values.gather(2, chosen[:, None].expand(-1, N, -1))  # (B, N, P)
    ce = F.cross_entropy(picked, target, ignore_index=VOID, reduction="sum")
    ce = ce / global_mean_count((target != VOID).sum())

    present = torch.zeros(B, N, dtype=torch.bool, device=ids.device)
    present.scatter_(1, ids.flatten(1), True)[:, VOID] = False
    image, segment = present.nonzero(as_tuple=True)  # (S,)
    logit = values[image, segment]  # (S, M)
    with torch.no_grad():
        chosen = sample_uncertain_points(-logit.abs().masked_fill(~valid[image], 1e9), points)
    logit = logit.gather(1, chosen)  # (S, P)
    at = image[:, None], chosen  # (S, P)
    counts = valid[at].float()
    truth = counts * (weight[at] * (labels[at] == segment[:, None, None])).sum(2)
    bce = F.binary_cross_entropy_with_logits(logit, truth, weight=counts, reduction="none")
    bce = bce.sum(1) / counts.sum(1).clamp(min=1)  # (S,)
    probability = logit.sigmoid() * counts
    dice = 1 - (2 * (probability * truth).sum(1) + 1) / ((probability + truth).sum(1) + 1)
    segments = global_mean_count(present.sum())
    bce, dice = bce.sum() / segments, dice.sum() / segments
    return ce + bce + dice, {"ce": ce.detach(), "bce": bce.detach(), "dice": dice.detach()}


def depth_loss(output, depth):
    """Mean absolute error over valid pixels of a decoded depth (B, 1, H/2, W/2), upsampled by 2,
    from depth (B, H, W), NaN = invalid (Supp. A)."""
    valid = depth.isfinite()
    output = F.interpolate(output.float(), depth.shape[1:], mode="bilinear")[:, 0]
    error = (output - depth.nan_to_num(0)).abs() * valid
    return error.sum() / global_mean_count(valid.sum())


def candidate_coords(seeds, points, device):
    """Random candidate places (B, M, 2) in [-1, 1] for `ae_loss`, each image's from its seed."""
    M = 3 * points + points - int(0.75 * points)
    generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]
    return torch.stack([torch.rand(M, 2, generator=g, device=device) for g in generators]) * 2 - 1


# ---- 5. Noise schedule and loss weights (Eq. 3) ------------------------------------------------


class NoiseSchedule(nn.Module):
    """Stable Diffusion's `scaled_linear` schedule of T = 1000 steps."""

    T = 1000

    def __init__(self):
        super().__init__()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, self.T, dtype=torch.float64) ** 2
        self.register_buffer("alpha_bar", (1 - betas).cumprod(0).float(), persistent=False)

    def signal_and_noise(self, t):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to multiply (B, C, h, w)."""
        alpha_bar = self.alpha_bar[t].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x0, eps, t):
        """Eq. 3: z_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps. t: int64 (B,) or ()."""
        signal, noise = self.signal_and_noise(t)
        return signal * x0 + noise * eps

    def predict_x0(self, z_t, eps, t):
        """Eq. 3 solved for x0."""
        signal, noise = self.signal_and_noise(t)
        return (z_t - noise * eps) / signal

    def weights(self, kind):
        """Loss weight of each timestep, float (T,); kind: "paper", "released" or "none"."""
        j, snr = torch.arange(self.T).to(self.alpha_bar), self.alpha_bar / (1 - self.alpha_bar)
        return {"paper": ((j + 1) / (0.25 * self.T)).clamp(max=1),  # linear up to a quarter of T
                "released": snr.clamp(max=2) / snr,
                "none": torch.ones_like(snr)}[kind]

    def timesteps(self, steps):
        """The `steps` timesteps visited in sampling, from T - 1 down, evenly spaced.

        NOTE: Alg. 2 subtracts T // S; here the list ends its intervals and is rounded, because
        then sampling starts at T - 1 for every S.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"{steps} sampling steps, expected 1 to {self.T}")
        return [round(self.T - i * self.T / steps) - 1 for i in range(steps)]


def stable_seed(*parts):
    """A 32-bit seed from numbers and strings, the same on every machine and in every process."""
    return zlib.crc32(repr(parts).encode())


def seeded_noise(seeds, config, device):
    """Gaussian noise (B, 4, h, w); each element depends on its seed only. Drawn on the CPU."""
    shape = (config.latent_channels, config.size // 8, config.size // 8)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds]
    return torch.stack(noise).to(device)


# ---- 6. The UNet on concatenated latents, the image encoders, Stable Diffusion (Sec. 3.2) -------


def build_unet(config, image_channels, cross_attention=0):
    """Stable Diffusion's UNet over [z_t, z_image, x0_previous], random weights.

    Input (B, 4 + image_channels + 4, h, w), output (B, 4, h, w). cross_attention: width of the
    embeddings that it attends to; 0: nothing feeds cross-attention, which is then removed.
    """
    from diffusers import UNet2DConditionModel

    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.unet_attention]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    unet = UNet2DConditionModel(
        in_channels=2 * config.latent_channels + image_channels, down_block_types=down,
        out_channels=config.latent_channels, up_block_types=up, sample_size=config.size // 8,
        block_out_channels=config.unet_widths, layers_per_block=config.unet_layers,
        attention_head_dim=config.unet_heads,  # diffusers' name; in this class, the heads' number
        cross_attention_dim=cross_attention or 32)  # 32: of the layers removed below
    for module in unet.modules():
        if hasattr(module, "attn2") and not cross_attention:
            module.attn2 = module.norm2 = None
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def from_pretrained(kind, path, subfolder=""):
    """A diffusers or transformers model of class `kind` from a folder or the hub, in float32."""
    file = Path(subfolder, "config.json")
    if (Path(path).exists() or Path(path).is_absolute()) and not Path(path, file).exists():
        raise FileNotFoundError(f"{path}: no {file}, expected the folder of a pretrained "
                                f"{kind.__name__}")
    try:
        model, info = kind.from_pretrained(path, subfolder=subfolder, output_loading_info=True,
                                           low_cpu_mem_usage=False)  # quiet without accelerate
        if missing := set(info["missing_keys"]) - {"embeddings.mask_token"}:
            raise ValueError(f"it lacks {len(missing)} weights, the first {min(missing)}")
        return model.float()
    except Exception as error:  # whatever these libraries raise
        raise ValueError(f"{path}: no {kind.__name__} could be loaded from this folder or hub id "
                         f"({' '.join(str(error).split())[:200]})") from None


def load_sd_unet(unet, path):
    """Copy the weights of a Stable Diffusion v1 folder or hub id into a UNet of `build_unet`.

    The kernel of `conv_in` goes to z_t; all other input channels start at zero, so that at first
    the output is that of Stable Diffusion's UNet without cross-attention, whatever the image.
    Raises ValueError naming what differs, e.g. for Stable Diffusion v2 or XL.
    """
    from diffusers import UNet2DConditionModel

    pretrained = from_pretrained(UNet2DConditionModel, path, "unet")
    expected = dict(unet.config) | {"in_channels": unet.config.out_channels}
    for name in sorted(expected.keys() - {"sample_size", "cross_attention_dim"}):
        theirs, ours = pretrained.config.get(name), expected[name]
        # read from JSON, theirs may be a list or null where ours is a tuple or False
        if name[0] != "_" and not np.array_equal(theirs or 0, ours or 0):
            raise ValueError(f"{path}: its UNet has {name} {theirs}, expected {ours}; the paper's "
                             "preset fits Stable Diffusion v1, not v2 or XL")
    tensors = pretrained.state_dict()
    others = unet.config.in_channels - pretrained.config.in_channels
    tensors["conv_in.weight"] = F.pad(tensors["conv_in.weight"], (0, 0, 0, 0, 0, others))
    unet.load_state_dict({name: tensors[name] for name in unet.state_dict()})


SD_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,  # of version 1
          "down_block_types": ["DownEncoderBlock2D"] * 4,
          "up_block_types": ["UpDecoderBlock2D"] * 4}


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


class ImageEncoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> image latents (B, channels, h, w), unscaled.

    "sd" (the paper): the mean latents of Stable Diffusion's frozen encoder; "dinov2" (Table S3):
    frozen patch tokens, one for each latent cell. Both are built as config.encoder_json says.
    NOTE: here also "patch": a convolutional stem trained together with the UNet, because it needs
    no pretrained weights.
    """

    def __init__(self, config):
        super().__init__()
        self.kind, self.channels, self.scale = config.image_encoder, config.stem_widths[-1], 1.0
        if self.kind == "patch":
            layers = []
            for c_in, c in zip((3, *config.stem_widths), config.stem_widths):
                layers += [conv3x3(c_in, c, stride=2), nn.GroupNorm(8, c), nn.SiLU(),
                           conv3x3(c, c), nn.GroupNorm(8, c), nn.SiLU()]
            self.layers = nn.Sequential(*layers, conv3x3(self.channels, self.channels))
        elif self.kind == "sd":
            from diffusers import AutoencoderKL

            vae = AutoencoderKL(**json.loads(config.encoder_json))
            self.layers = nn.Sequential(vae.encoder, vae.quant_conv).requires_grad_(False)
            self.channels, self.scale = vae.config.latent_channels, vae.config.scaling_factor
        else:
            from transformers import Dinov2Config, Dinov2Model

            self.layers = Dinov2Model(Dinov2Config(**json.loads(config.encoder_json)))
            self.layers.requires_grad_(False)
            self.channels = self.layers.config.hidden_size

    def forward(self, image):
        """Differentiable for "patch" only."""
        if self.kind == "patch":
            return self.layers(image)
        kind, (h, w) = image.device.type, [side // 8 for side in image.shape[-2:]]
        bf16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.bfloat16
        # else float32: float16 overflows in Stable Diffusion's encoder
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16, bf16):
            if self.kind == "sd":
                return self.layers(image)[:, : self.channels].float()
            image = v2.functional.resize(image, [14 * h, 14 * w], antialias=True)
            image = v2.functional.normalize(image / 2 + 0.5, (0.485, 0.456, 0.406),
                                            (0.229, 0.224, 0.225))
            tokens = self.layers(image).last_hidden_state[:, 1:]  # (B, h w, C), without CLS
            return tokens.float().mT.unflatten(2, (h, w))


# ---- 7-9. The model: its loss (Eq. 4, Alg. 1), sampler (Eq. 5, Alg. 2), inpainting (Alg. 3) -----

SAMPLERS = {"ddim": 0.0, "ddpm": 1.0}  # the value of eta


class LDMSeg(nn.Module):
    """The frozen mask autoencoder, and the image encoder and UNet that stage 2 trains."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.autoencoder = MaskAutoencoder(config).requires_grad_(False)
        self.image_encoder = ImageEncoder(config)
        self.unet = build_unet(config, self.image_encoder.channels,
                               config.task_width if config.tasks else 0)
        if config.tasks:
            self.task_embedding = nn.Embedding(len(config.tasks), config.task_width)
        if "depth" in config.tasks:
            self.depth_autoencoder = MaskAutoencoder(replace(config, target="depth"))
            self.depth_autoencoder.requires_grad_(False)
        self.schedule = NoiseSchedule()
        self.register_buffer("loss_weights", self.schedule.weights(config.loss_weights),
                             persistent=False)

    def encode_image(self, image):
        """image (B, 3, H, W) in [-1, 1] -> z_image (B, C, h, w), scaled."""
        return self.image_encoder(image) * (self.config.image_scale or self.image_encoder.scale)

    @torch.no_grad()
    def encode_mask(self, ids):
        """ids int64 (B, H, W) -> mask latents (B, 4, h, w), scaled."""
        z = self.autoencoder.encode(self.autoencoder.code(ids)).float()
        return z * self.config.mask_scale

    @torch.no_grad()
    def encode_depth(self, depth):
        """depth (B, H, W) in [-1, 1], NaN = invalid -> latents (B, 4, h, w), scaled."""
        z = self.depth_autoencoder.encode(self.depth_autoencoder.code(depth)).float()
        return z * self.config.depth_scale

    def decode(self, z, task="instance"):
        """Scaled latents (B, 4, h, w) -> logits (B, N, H/2, W/2), or depth (B, 1, H/2, W/2)."""
        if task == "depth":
            return self.depth_autoencoder.decode(z / self.config.depth_scale)
        return self.autoencoder.decode(z / self.config.mask_scale)

    def predict(self, z_t, z_image, x0_previous, t, task=None):
        """One UNet call at timesteps t int64 (B,). Returns its output, and what it says of x0, eps.

        task int64 (B,): places in config.tasks; cross-attention sees their embeddings (Supp. A).
        The output estimates eps, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0.
        NOTE: paper eps; here also v, because a small UNet from random weights learns it sooner.
        """
        inputs = torch.cat([z_t, z_image, x0_previous], 1)
        context = None if task is None else self.task_embedding(task)[:, None]  # (B, 1, width)
        output = self.unet(inputs, t, encoder_hidden_states=context).sample.float()
        if self.config.prediction == "eps":
            return output, self.schedule.predict_x0(z_t, output, t), output
        signal, noise = self.schedule.signal_and_noise(t)
        return output, signal * z_t - noise * output, noise * z_t + signal * output

    def diffusion_loss(self, image, ids, eps, t, self_condition, known=None, task=None, depth=None):
        """Eq. 4: weighted squared error of the prediction, over cells that are not VOID.

        image (B, 3, H, W), ids int64 (B, H, W), eps (B, 4, h, w) Gaussian, t int64 (B,),
        self_condition: make a first estimate of x0 without gradient and feed it (Analog Bits).
        known bool (B, H, W): pixels given as in `inpaint` (the finetuning that Sec. 3.3 suggests),
        task int64 (B,): places in config.tasks; depth (B, H, W): replaces ids where it is the task.
        NOTE: Alg. 1 sums over C, h, w; here a mean, like the released code, because clipping and
        the learning rate then do not depend on the resolution. The weights multiply the error of
        what is predicted: with v, they are not those of the paper's noise error.
        """
        x0, valid = self.encode_mask(ids), ids != VOID  # (B, 4, h, w), (B, H, W)
        if depth is not None:
            of_depth = (task == self.config.tasks.index("depth")).view(-1, 1, 1)
            x0 = torch.where(of_depth[..., None], self.encode_depth(depth), x0)
            valid = torch.where(of_depth, depth.isfinite(), valid)
        z_image = self.encode_image(image)
        z_t = self.schedule.add_noise(x0, eps, t)
        given, partly, _ = self.give(ids, known)
        x0_previous = torch.zeros_like(z_t)
        if self_condition:
            with torch.no_grad():
                hint = torch.where(partly, given, x0_previous)
                x0_previous = self.predict(z_t, z_image, hint, t, task)[1]
        x0_previous = torch.where(partly, given, x0_previous)
        output = self.predict(z_t, z_image, x0_previous, t, task)[0]
        target = eps
        if self.config.prediction == "v":
            signal, noise = self.schedule.signal_and_noise(t)
            target = signal * eps - noise * x0
        valid = F.interpolate(valid.float()[:, None], z_t.shape[-2:], mode="nearest-exact")[:, 0]
        error = (output - target).square().mean(1) * valid  # (B, h, w)
        error = error * self.loss_weights[t].view(-1, 1, 1)
        return error.sum() / global_mean_count(valid.sum())

    forward = diffusion_loss  # what DDP calls

    def give(self, ids, known, known_share=1.0):
        """What a partial mask says of the latents (Alg. 3).

        ids int64 (B, H, W); known bool (B, H, W): its pixels that count, if not VOID; the others
        are zero in the codes. None: nothing is known. Returns latents (B, 4, h, w), scaled, and
        two masks (B, 1, h, w): the cells that know any pixel, and those that know at least
        `known_share` of theirs.
        """
        if known is None:
            nothing = torch.zeros(3, device=self.loss_weights.device)
            return nothing[0], *nothing[1:].bool()
        known = known & (ids != VOID)
        share = F.avg_pool2d(known.float()[:, None], 8)
        return self.encode_mask(ids * known), share > 0, share >= known_share

    def task_of(self, name, count):
        """The places int64 (count,) of a task in config.tasks; None for weights without tasks.
        Raises ValueError that lists the tasks of these weights."""
        tasks = self.config.tasks or TASKS[:1]
        if name not in tasks:
            raise ValueError(f"--task {name}: these weights know {', '.join(tasks)}")
        place = torch.full((count,), tasks.index(name), device=self.loss_weights.device)
        return place if self.config.tasks else None

    def denoise(self, z_image, noise, steps, eta=0.0, seeds=(), task=None, give=None, repeats=1):
        """Alg. 2, and 3. Yields the predicted x0 (B, 4, h, w), scaled, after each step.

        eta 0: DDIM, deterministic; eta 1: DDPM (ancestral sampling), which draws fresh noise in
        each step, an image's from its seed. task: see `predict`; give, repeats: see `inpaint`.
        """
        def fresh_noise(*step):
            keys = [stable_seed(int(seed), *step) for seed in seeds]
            return seeded_noise(keys, self.config, noise.device)

        given, partly, known = give or self.give(None, None)
        z_t, x0 = noise, torch.zeros_like(noise)
        timesteps = self.schedule.timesteps(steps)
        for now, after in zip(timesteps, timesteps[1:] + [None]):
            t = torch.full((len(noise),), now, device=noise.device)
            for repeat in range(repeats):
                if repeat:
                    z_t = self.schedule.add_noise(x0, fresh_noise(now, repeat), t)
                _, x0, eps = self.predict(z_t, z_image, torch.where(partly, given, x0), t, task)
                x0 = torch.where(known, given, x0)
            yield x0
            if after is None:
                return
            # Eq. 5: the predicted x0 with the predicted noise added back, a share of it fresh
            alpha_bar, alpha_bar_next = self.schedule.alpha_bar[[now, after]]
            fresh = eta * ((1 - alpha_bar_next) / (1 - alpha_bar)
                           * (1 - alpha_bar / alpha_bar_next)).sqrt()
            z_t = alpha_bar_next.sqrt() * x0 + (1 - alpha_bar_next - fresh**2).sqrt() * eps
            if eta:
                z_t = z_t + fresh * fresh_noise(after)

    @torch.no_grad()
    def sample(self, image, seeds, steps, eta=0.0, task="instance"):
        """Images (B, 3, H, W) and one noise seed each -> logits (B, N, H/2, W/2), or depth
        (B, 1, H/2, W/2) in [-1, 1]."""
        noise = seeded_noise(seeds, self.config, image.device)
        *_, x0 = self.denoise(self.encode_image(image), noise, steps, eta, seeds,
                              self.task_of(task, len(image)))
        return self.decode(x0, task)

    @torch.no_grad()
    def inpaint(self, image, ids, known, seeds, steps, known_share=1.0, repeats=1):
        """Alg. 3: completes partial masks. Returns logits (B, N, H/2, W/2), latents (B, 4, h, w).

        ids int64 and known bool (B, H, W): see `give`. Cells of which at least `known_share` is
        known keep their given latents. NOTE: the paper does not say what partly known cells do;
        here those that know less hint at x0 in self-conditioning, because pasting them does harm.
        NOTE: paper: one pass over each timestep; here `repeats`, with fresh noise between them as
        in RePaint, because the unknown cells then come to agree with the known ones.
        """
        noise = seeded_noise(seeds, self.config, image.device)
        *_, x0 = self.denoise(self.encode_image(image), noise, steps, 0.0, seeds,
                              self.task_of("instance", len(image)),
                              self.give(ids, known, known_share), repeats)
        return self.decode(x0), x0


NETWORK = (  # what two runs must share for one to start from the other
    "prediction", "latent_channels", "bits", "codes", "latents", "ae_widths",
    "task_width", "image_encoder", "image_scale", "stem_widths", "unet_widths",
    "unet_attention", "unet_layers", "unet_heads")


def start_from(run, model):
    """Copy the image encoder and the UNet of a run, and the embeddings of the tasks it knows. What
    it lacks stays random, but new cross-attention adds nothing at first: the output is the run's.
    """
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


# ---- 10. Logits -> segments (Supp. A) ----------------------------------------------------------


def probabilities(logits, size):
    """Logits of one image (N, H/2, W/2) -> softmax (N, height, width), upsampled by 2, then to
    `size` = (height, width)."""
    up = dict(mode="bilinear", align_corners=False)
    logits = F.interpolate(logits[None].float(), scale_factor=2, **up)
    return F.interpolate(logits, size=size, **up)[0].softmax(0)


def postprocess(logits, size, mask_threshold, min_area):
    """Logits of one image (N, H/2, W/2) -> ids int64 (height, width), on the logits' device.

    Pixels less confident than `mask_threshold` and segments smaller than `min_area` pixels become
    VOID. NOTE: the released code's extra filter on overlaps is not used: the paper has none.
    """
    confidence, ids = probabilities(logits, size).max(0)
    ids[confidence < mask_threshold] = VOID
    small = torch.bincount(ids.flatten(), minlength=len(logits)) < min_area
    return ids.masked_fill(small[ids], VOID)


def segment(logits, size, config):
    """`postprocess` with the thresholds of the weights, as a NumPy map."""
    return postprocess(logits, size, config.mask_threshold, config.min_area).cpu().numpy()


def continue_given(drawn, ids, known):
    """A completion int (H, W) with the given ids carried on into its unknown pixels.

    Every connected region of one id that borders on known pixels (known, bool, and ids not VOID)
    but on none of its own id takes the id of most of them: a mask ends at its unknown pixels, the
    objects in the image do not. NOTE: not in the paper, which does not ask for the given ids.
    """
    result, known = drawn.copy(), known & (ids != VOID)
    for id in np.setdiff1d(drawn[~known], [VOID]):
        regions, count = ndimage.label(~known & (drawn == id))
        for number in range(1, count + 1):
            region = regions == number
            border = ids[ndimage.binary_dilation(region) & known]
            if border.size and id not in border:
                result[region] = np.bincount(border).argmax()
    return result


def merge_panoptic(instance_logits, semantic_logits, size, isthing, mask_threshold, min_area):
    """Instances with the classes of a semantic map (Supp. A, "Simple Post-Processing").

    Both logits (N, H/2, W/2); isthing: of the classes 1..K. An instance of `postprocess` takes the
    class of most of its pixels in the semantic argmax (the lowest in a tie; VOID and ids above K
    do not vote; without a vote it is VOID); stuff of one class becomes one segment.
    Returns ids int64 (height, width) and the class of each segment, {id: class}.
    """
    ids, N = postprocess(instance_logits, size, mask_threshold, min_area), len(instance_logits)
    classes = probabilities(semantic_logits, size).argmax(0)
    votes = torch.bincount((ids * N + classes).flatten(), minlength=N * N).view(N, N)
    votes = votes[:, 1 : len(isthing) + 1].cpu()  # (N, K), read one by one below
    table, class_of, stuff = torch.zeros(N, dtype=torch.long), {}, {}
    for id in range(1, N):
        if votes[id].any():
            winner = 1 + int(votes[id].argmax())
            table[id] = id if isthing[winner - 1] else stuff.setdefault(winner, id)
            class_of[int(table[id])] = winner
    return table.to(ids.device)[ids], class_of


# ---- 11. Metrics: Panoptic Quality (Kirillov et al., 2019), depth ------------------------------


def compact_ids(ids, known):
    """Map int ids to 1..len(known) by their place in the list `known`, all others to 0.
    Raises ValueError where an id of `known` repeats."""
    if len(set(known)) < len(known):
        raise ValueError(f"segment ids {known}, expected each once and none {VOID}")
    known = np.array(known)
    order = known.argsort()
    place = order[np.searchsorted(known[order], ids).clip(max=len(known) - 1)]
    return np.where(known[place] == ids, place + 1, 0)


def add_over_ranks(counts, device):
    """Sum a NumPy array over all ranks, in place."""
    if dist.is_initialized():
        total = torch.from_numpy(counts).to(device)
        dist.all_reduce(total)
        counts[:] = total.cpu().numpy()


class PanopticQuality:
    """Panoptic Quality, accumulated image by image, and mIoU of the classes that segments imply.

    categories: [{"id", "isthing", ...}] as in COCO; class_agnostic: one category for everything.
    `state` (categories, 7) float64 adds up over images and ranks: iou_sum, tp, fp, fn of the
    segments, then pixels of the class in both, in the truth, in the prediction. `odd` counts the
    truth's segments with another area in the JSON, and its pixels of ids that are not in its list.
    """

    def __init__(self, categories, class_agnostic=False):
        self.class_agnostic = class_agnostic
        self.categories = [{"id": 1, "isthing": 1}] if class_agnostic else categories
        self.row = {c["id"]: i for i, c in enumerate(self.categories)}
        if len(self.row) < len(self.categories):
            raise ValueError(f"{len(categories)} categories with {len(self.row)} different ids")
        self.state, self.odd = np.zeros((len(self.row), 7)), np.zeros(2)

    def update(self, gt_ids, gt_segments, pred_ids, pred_segments):
        """Count one image: maps, 0 = VOID, and their lists of {"id", "category_id"}.

        The maps: int ids (H, W), or COCO colours uint8 (H, W, 3). Raises ValueError for shapes or
        ids that do not fit. Segments match where IoU > 0.5, the union without the truth's VOID.
        Unmatched truth is missed, unless a crowd; an unmatched prediction is wrong, unless mostly
        over VOID or a crowd of its class (the last of several, like the reference).
        NOTE: the reference takes the truth's areas from the JSON; here pixels, as they can differ.
        """
        overlap = self._joint_histogram(gt_ids, gt_segments, pred_ids, pred_segments)
        gt, pred = self._rows(gt_segments), self._rows(pred_segments)
        crowd = np.array([bool(s.get("iscrowd")) for s in gt_segments], bool)
        both, void, gt_area = overlap[2:, 2:], overlap[1, 2:], overlap[2:].sum(1)
        area = overlap[:, 2:].sum(0)
        union = gt_area[:, None] + area - both - void
        same = gt[:, None] == pred
        match = same & ~crowd[:, None] & (both > 0.5 * union)
        last = {gt[g]: both[g] for g in crowd.nonzero()[0]}  # the last crowd of each class
        ignored = void + [last[row][p] if row in last else 0 for p, row in enumerate(pred)]
        g, p = match.nonzero()
        np.add.at(self.state, (gt[g], 0), both[g, p] / union[g, p])
        np.add.at(self.state, (gt[g], 1), 1)
        np.add.at(self.state, (pred[~match.any(0) & (ignored <= 0.5 * area)], 2), 1)
        np.add.at(self.state, (gt[~match.any(1) & ~crowd], 3), 1)
        np.add.at(self.state, (gt, 4), (both * same).sum(1))
        np.add.at(self.state, (gt, 5), gt_area)
        np.add.at(self.state, (pred, 6), both.sum(0))
        other_area = sum(s.get("area", a) != a for s, a in zip(gt_segments, gt_area))
        self.odd += other_area, overlap[0].sum()

    def _rows(self, segments):
        try:
            return np.array([self.row[1 if self.class_agnostic else s["category_id"]]
                             for s in segments], int)
        except KeyError as error:
            raise ValueError(f"a segment has unknown category {error}") from None

    @staticmethod
    def _joint_histogram(gt_ids, gt_segments, pred_ids, pred_segments):
        """Pixel counts (2 + gt segments, 2 + predicted): row and column 0 unknown ids, 1 VOID.
        Counts runs of pixels with equal pairs of ids: there are far fewer runs than pixels."""
        if gt_ids.shape[:2] != pred_ids.shape[:2]:
            raise ValueError(f"the prediction is {pred_ids.shape[:2]}, expected {gt_ids.shape[:2]}")
        change = np.zeros(gt_ids.shape[0] * gt_ids.shape[1], bool)
        change[0] = True
        for ids in (gt_ids, pred_ids):
            flat, channels = ids.ravel(), ids.size // change.size
            change[np.flatnonzero(flat[channels:] != flat[:-channels]) // channels + 1] = True
        start = np.flatnonzero(change)
        gt_ids, pred_ids = (
            ids.ravel()[start] if ids.ndim == 2 else rgb2id(ids.reshape(-1, 3)[start])
            for ids in (gt_ids, pred_ids))
        row = compact_ids(gt_ids, [VOID] + [s["id"] for s in gt_segments])
        column = compact_ids(pred_ids, [VOID] + [s["id"] for s in pred_segments])
        pixels = np.diff(start, append=change.size)
        shape = len(gt_segments) + 2, len(pred_segments) + 2
        counts = np.bincount(row * shape[1] + column, pixels, shape[0] * shape[1]).reshape(shape)
        if not column.all():
            raise ValueError(f"the prediction has pixels of segment {pred_ids[column.argmin()]}, "
                             "which is not in its list")
        if not (seen := counts[:, 2:].any(0)).all():
            raise ValueError(f"the prediction lists segment {pred_segments[seen.argmin()]['id']}, "
                             "but no pixel has this id")
        return counts

    def all_reduce(self, device):
        """Add the counts of all ranks."""
        add_over_ranks(self.state, device)
        add_over_ranks(self.odd, device)

    def compute(self):
        """{"All", "Things", "Stuff": {"pq", "sq", "rq", "n"}, "per_class": {...}}, values in 0..1.

        Means over the n categories that occur; all 0 with n = 0 where none does. With classes also
        "miou" over the classes with pixels in truth or prediction, and "pixel_accuracy"; pixels
        that the truth leaves VOID do not count, those that only the prediction does are wrong.
        """
        iou, tp, fp, fn, both, truth, predicted = self.state.T
        seen = tp + fp + fn > 0
        segments = np.maximum(tp + 0.5 * fp + 0.5 * fn, 0.5)
        scores = {"pq": iou / segments, "sq": iou / np.maximum(tp, 1), "rq": tp / segments}
        thing = np.array([bool(c["isthing"]) for c in self.categories], bool)
        result = {}
        for name, group in (("All", seen), ("Things", seen & thing), ("Stuff", seen & ~thing)):
            n = int(group.sum())
            means = {k: float(v[group].sum() / max(n, 1)) for k, v in scores.items()}
            result[name] = means | {"n": n}
        result["per_class"] = {
            str(self.categories[i]["id"]): {k: float(v[i]) for k, v in scores.items()}
            | {"tp": int(tp[i]), "fp": int(fp[i]), "fn": int(fn[i])} for i in seen.nonzero()[0]}
        if not self.class_agnostic:
            union = truth + predicted - both
            result["miou"] = float((both / np.maximum(union, 1)).sum() / max((union > 0).sum(), 1))
            result["pixel_accuracy"] = float(both.sum() / max(truth.sum(), 1))
        return result


def align_depth(predicted, truth):
    """predicted float (H, W), up to scale and shift -> in truth's units, by least squares over the
    valid pixels of truth float (H, W), NaN = invalid."""
    valid = np.isfinite(truth)
    columns = np.stack([predicted[valid], np.ones(valid.sum())], 1, dtype=np.float64)
    scale, shift = np.linalg.lstsq(columns, truth[valid], rcond=None)[0]
    return scale * predicted + shift


class DepthQuality:
    """Mean absolute relative error, root mean squared error and the share of pixels with a ratio
    below 1.25, means over images of `align_depth`'s result; in the space of the truth's values."""

    def __init__(self):
        self.state = np.zeros(4)  # sums of the three over images, images

    def update(self, truth, predicted):
        """Count one image: float (H, W), truth > 0 or NaN = invalid."""
        valid = np.isfinite(truth)
        if valid.any():
            ours, truth = align_depth(predicted, truth)[valid], truth[valid]
            ratio = np.maximum(ours / truth, truth / ours.clip(min=1e-9))
            self.state += (np.abs(ours / truth - 1).mean(), np.sqrt(np.square(ours - truth).mean()),
                           (ratio < 1.25).mean(), 1)

    def all_reduce(self, device):
        add_over_ranks(self.state, device)

    def compute(self):
        """{"abs_rel", "rmse", "delta1", "n" images}."""
        values = (self.state[:3] / max(self.state[3], 1)).tolist()
        return dict(zip(("abs_rel", "rmse", "delta1"), values)) | {"n": int(self.state[3])}


# ---- 12. Data: generated scenes, COCO panoptic files, training samples -------------------------


class ShapeScenes(Dataset):
    """Generated scenes, no files: shapes at various distances over wavy, textured regions.

    Scene i is a pure function of (split, i, size). An item is a dict: image uint8 (H, W, 3), ids
    int64 (H, W) with 0 = VOID, segments [{"id", "category_id", "iscrowd"}], image_id, file_name,
    and depth float32 (H, W) in [0, 1], 1 the farthest. Near things are larger, lower, brighter and
    in front; far ones fade into haze. Colours are shared between classes and between instances.
    """

    LENGTH = {"train": 100_000, "val": 200}
    STUFF = {"sky": (0.55, 0.7, 0.95), "hills": (0.5, 0.5, 0.45), "grass": (0.4, 0.65, 0.3),
             "sand": (0.85, 0.75, 0.5), "water": (0.3, 0.5, 0.7)}  # usual tints
    THINGS = ("ball", "box", "cone", "star", "ring", "cross")
    categories = [{"id": i, "name": name, "isthing": int(i > 5)}
                  for i, name in enumerate((*STUFF, *THINGS), start=1)]  # fmt: skip

    def __init__(self, split, size):
        if split not in self.LENGTH:
            raise ValueError(f"split {split!r} of shapes, expected one of {tuple(self.LENGTH)}")
        self.split, self.size = split, size
        centres = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.x, self.y = np.meshgrid(centres, centres)

    def __len__(self):
        return self.LENGTH[self.split]

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index}, expected 0 to {len(self) - 1}")
        rng = np.random.default_rng([index, tuple(self.LENGTH).index(self.split)])
        image, ids, depth, categories, horizon = self._background(rng)
        light = rng.uniform(-0.7, 0.7)
        palette = rng.uniform(0.1, 0.95, (2, 3))  # colours that things may share
        kinds = list(rng.integers(len(self.THINGS), size=rng.integers(2, 7)))
        if rng.random() < 0.2:
            kinds.insert(rng.integers(len(kinds) + 1), -1)  # a blob without a label
        distances = np.sort(rng.uniform(0.1, 0.75, len(kinds)))[::-1].tolist()
        placed = []
        for kind, z in zip(kinds, distances):
            window, inside = self._paint(
                rng, image, depth, z, horizon, light, palette, placed, kind)
            categories.append(0 if kind < 0 else 1 + len(self.STUFF) + int(kind))
            ids[window][inside] = len(categories)
        haze = (0.55 * depth**1.5)[..., None]
        image = image * (1 - haze) + haze * rng.uniform(0.6, 0.95, 3).astype(np.float32)
        image = (image - 0.5) * rng.uniform(0.8, 1.1) + rng.uniform(0.45, 0.58)
        image += rng.uniform(0.01, 0.05) * rng.standard_normal(image.shape, dtype=np.float32)
        areas = np.bincount(ids.ravel(), minlength=len(categories) + 1)
        segments = [{"id": i, "category_id": category, "iscrowd": 0}
                    for i, category in enumerate(categories, start=1)
                    if category and areas[i] >= 0.02 * ids.size]
        ids[~np.isin(ids, [s["id"] for s in segments])] = VOID  # and what is left of hidden things
        return {"image": (image.clip(0, 1) * 255).astype(np.uint8), "ids": ids, "depth": depth,
                "segments": segments, "image_id": index,
                "file_name": f"{self.split}{index:06d}.png"}

    def _background(self, rng):
        """One to three stuff regions, from far (top) to near (bottom)."""
        x, y, count = self.x, self.y, rng.integers(1, 4)
        borders = ([], [rng.uniform(0.25, 0.7)], rng.uniform((0.2, 0.55), (0.4, 0.75)))[count - 1]
        region = np.zeros(y.shape, np.int64)
        for border in borders:
            for frequency in (rng.uniform(0.4, 1.5), rng.uniform(2, 5)):
                wave = np.sin(2 * np.pi * (frequency * x[0] + rng.random()))
                border = border + rng.uniform(0.005, 0.045) * wave
            region += y > border
        horizon = float(borders[0]) if count > 1 else 0.0
        classes = rng.permutation(5)[:1]
        if count > 1:  # sky or hills on top, ground below
            classes = np.append(rng.integers(2), 2 + rng.permutation(3)[: count - 1])
        ground = np.clip(0.85 - 0.65 * (y - horizon) / (1 - horizon), 0.15, 0.85)
        image, depth = np.empty((*y.shape, 3), np.float32), np.empty_like(y)
        for i, kind in enumerate(classes):
            tint = np.array(tuple(self.STUFF.values())[kind])
            colour = 0.55 * tint + 0.45 * rng.uniform(0.1, 0.95, 3)
            inside = region == i
            texture = self._texture(rng, kind, x[inside], y[inside], 1.6 - ground[inside])
            image[inside] = colour.astype(np.float32) * (1 + texture[:, None])
            depth[inside] = (1.0, 0.9)[kind] if kind < 2 else ground[inside]
        return image, region + 1, depth, [int(kind) + 1 for kind in classes], horizon

    @staticmethod
    def _texture(rng, kind, x, y, near):
        """Brightness pattern of a stuff class at pixels x, y; finer where `near` is small."""
        (a, b, c), sin = rng.uniform(0, 2 * np.pi, 3).tolist(), np.sin
        return (
            lambda: 0.3 * (y - 0.3) + 0.12 * sin(7 * y + a + 2 * sin(4 * x + b)),  # soft clouds
            lambda: 0.25 * np.abs((5 * x + 3 * np.abs(y - 0.5) + a) % 1 - 0.5),  # ridges
            lambda: 0.22 * sin(70 * x / near + 3 * sin(23 * y + a)) * sin(31 * y / near + b),
            lambda: 0.13 * sin(45 * y / near + 2.5 * sin(9 * x + a)),  # ripples
            lambda: 0.2 * sin(38 * y / near + a) * sin(14 * x / near + 6 * sin(11 * y + b) + c),
        )[kind]()

    def _paint(self, rng, image, depth, z, horizon, light, palette, placed, kind):
        """Paint one thing (kind -1: a blob) at distance z; returns its window and where in it."""
        radius = rng.uniform(0.2, 0.265) * (1.2 - 0.65 * z)
        foot = horizon + (0.85 - z) / 0.65 * (1 - horizon)  # where the ground has this distance
        for _ in range(8):  # look for a place that does not hide another thing
            cx = rng.uniform(0, 1)
            cy = min(max(foot - 0.6 * radius + rng.uniform(-0.12, 0.12), 0.04), 0.96)
            if all(math.hypot(cx - a, cy - b) > 0.75 * (radius + r) for a, b, r in placed):
                break
        placed.append((cx, cy, radius))
        reach, row, column = (int(n * self.size) for n in (1.25 * radius, cy, cx))
        window = tuple(slice(max(n - reach - 2, 0), n + reach + 3) for n in (row, column))
        angle = rng.uniform(0, 2 * np.pi)
        dx, dy = (self.x[window] - cx) / radius, (self.y[window] - cy) / radius
        u = dx * math.cos(angle) + dy * math.sin(angle)
        v = dy * math.cos(angle) - dx * math.sin(angle)
        outline = self._outline(kind, u, v)
        base = palette[rng.integers(2)] if rng.random() < 0.4 else rng.uniform(0.1, 0.95, 3)
        base = base.astype(np.float32)
        frequency, pattern = rng.uniform(4, 9), rng.integers(4)  # plain, checks, stripes, plain
        paint = 0.3 * np.sign(np.sin(frequency * u)) * (1 <= pattern <= 2)
        if pattern == 1:
            paint *= np.sign(np.sin(frequency * v))
        if kind < 0:
            paint = 0.25 * rng.standard_normal(u.shape)
        shade = 0.95 + 0.4 * (light * dx - 0.8 * dy) - 0.3 * (outline > 0.82) - 0.25 * z
        inside = outline < 1
        image[window][(outline < 1.3) & ~inside] *= 0.72  # contact shadow on what is behind
        image[window][inside] = (base * ((1 + paint) * shade)[..., None]).clip(0, 1)[inside]
        depth[window][inside] = z
        return window, inside

    @staticmethod
    def _outline(kind, u, v):
        """A function of the local coordinates that is below 1 inside the shape."""
        radius, angle, x, y = np.sqrt(u * u + v * v), np.arctan2(v, u), np.abs(u), np.abs(v)
        return (
            lambda: radius,  # ball
            lambda: np.maximum(x, 1.25 * y) / 0.9,  # box
            lambda: np.maximum(1.73 * x + v, -2 * v) / 1.25,  # cone
            lambda: radius / (0.78 + 0.26 * np.cos(5 * angle)),  # star
            lambda: np.maximum(radius, 1 + 1.2 * (0.36 - radius)),  # ring
            lambda: np.maximum(np.maximum(x, y), np.minimum(x, y) / 0.45),  # cross
            lambda: radius / (0.8 + 0.2 * np.sin(3 * angle)),  # blob
        )[kind]()


@contextmanager
def reading(path, what):
    """Turn what stops the reading of a file into a FileNotFoundError or ValueError naming it."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such {what}") from None
    except (IndexError, OSError, RuntimeError, SyntaxError, ValueError) as error:
        reason = str(error).splitlines()[0]
        reason = reason.partition(".cpp:")[2].partition(", ")[2] or reason
        raise ValueError(f"{path}: not a readable {what} ({reason}); replace the file") from None


def read_image(path):
    """Image file -> uint8 (H, W, 3). FileNotFoundError or ValueError that names the file."""
    with reading(path, "image"):
        data = Path(path).read_bytes()
        if not data.startswith(b"\x89PNG"):
            return np.asarray(Image.open(BytesIO(data)).convert("RGB"))
        if data[24] == 16:
            raise ValueError("16 bits per channel, expected 8")
        data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_png(data, ImageReadMode.RGB).permute(1, 2, 0).numpy()  # faster than Pillow


@np.errstate(invalid="ignore")  # a float that is no int64 is found by comparing
def read_mask(path):
    """Partial mask, .npy or PNG -> int64 ids (H, W), 0 = unknown.

    A palette's index is the id, a colour is R + 256 G + 65536 B. Raises FileNotFoundError or
    ValueError that names the file, also where it does not look like ids.
    """
    with reading(path, "mask"), open(path, "rb") as file:
        if Path(path).suffix == ".npy":
            values = read_array(file)
        else:
            image = Image.open(file)
            plain = image.mode in ("1", "L", "P", "I", "I;16")
            values = np.asarray(image if plain else image.convert("RGB"))
        ids = (rgb2id(values) if values.ndim == 3 else values).astype(np.int64)
    count, low, high = len(np.unique(ids)), ids.min(initial=0), ids.max(initial=0)
    whole = values.dtype == np.uint8 if values.ndim == 3 else (ids == values).all()
    if not whole or ids.ndim != 2 or not 0 < count <= 2000 or low < 0 or high >= 2**24:
        raise ValueError(f"{path}: {values.shape}, {count} values from {low} to {high}, expected "
                         "0 (unknown) and ids of segments, below 2^24; is it a picture?")
    return ids


def read_depth(path, shape):
    """`path` with the suffix .npy (floats) or .png (16 bits) -> depth float32 (H, W) = shape.

    Its unit stays; what is 0, negative or not finite becomes NaN. Raises FileNotFoundError or
    ValueError that names the file.
    """
    path = path.with_suffix(".npy" if path.with_suffix(".npy").exists() else ".png")
    with reading(path, "depth map, .npy or .png"), open(path, "rb") as file:
        depth = np.asarray(Image.open(file)) if path.suffix == ".png" else read_array(file)
    if depth.shape != shape or depth.dtype.kind != "f" and depth.dtype != np.uint16:
        raise ValueError(f"{path}: {depth.dtype} {depth.shape}, expected 16-bit integers or floats "
                         f"{shape} like its image")
    depth = depth.astype(np.float32)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(np.nan))


def draw_instances(segments, size, where):
    """Draw the "segmentation" of segments, COCO polygons or RLE -> ids int32 (H, W) = size.

    Where they overlap, the one of fewer pixels is on top. Raises ValueError, which starts with
    `where`, if one cannot be drawn.
    """
    from pycocotools import mask as coco

    ids, runs = np.zeros(size, np.int32), []
    for shape in (s.get("segmentation") for s in segments):
        try:
            if isinstance(rle := shape, list):
                for x_y in shape:  # pycocotools never returns from infinity
                    if len(x_y) < 6 or len(x_y) % 2 or not np.abs(x_y).max() < 1e6:
                        raise ValueError("coordinates")
                rle = coco.merge(coco.frPyObjects(shape, *size))
            elif isinstance(shape["counts"], list):
                rle = coco.frPyObjects(shape, *size)
            # pycocotools leaves pixels after the last run undefined
            if tuple(rle["size"]) != size or coco.decode(rle).sum() != coco.area(rle):
                raise ValueError("number of pixels")
        except Exception as error:  # pycocotools raises this very class, too
            raise ValueError(f"{where}: segmentation {str(shape)[:60]} ({error!r}), expected RLE "
                             f"of size {size} or polygons [[x, y, x, y, x, y, ...]]") from None
        runs.append(rle)
    for i in sorted(range(len(runs)), key=lambda i: coco.area(runs[i]), reverse=True):
        ids[coco.decode(runs[i]) > 0] = segments[i]["id"]
    return ids


def _panoptic_problems(data, categories, any_category):
    """What is wrong with the content of a panoptic JSON, one sentence after the other."""
    known = [c["id"] for c in categories]
    if len(set(known)) < len(known) or any(c["isthing"] not in (0, 1) for c in categories):
        yield f"categories {categories}, expected each id once and isthing 0 or 1"
    images, allowed = Counter(a["image_id"] for a in data["annotations"]), set(known)
    for annotation in data["annotations"]:
        where, segments = f"image {annotation['image_id']}", annotation.get("segments_info")
        if segments is None or not isinstance(annotation.get("file_name"), str):
            yield (f"{where} has {sorted(annotation)}, expected image_id, file_name, segments_info;"
                   " is this COCO panoptic JSON, or COCO instances?")
        if images[annotation["image_id"]] > 1:
            yield f"{where} is annotated {images[annotation['image_id']]} times, expected once"
        ids = Counter(s["id"] for s in segments)
        for id, category in ((s["id"], s["category_id"]) for s in segments):
            if type(id) is not int or not VOID < id < 2**24:
                yield f"{where} has segment id {id!r}, expected 1 to 2^24 - 1"
            if ids[id] > 1:
                yield f"{where} lists segment {id} {ids[id]} times, expected once"
            if category not in allowed and not any_category:
                yield f"{where}, segment {id} has category {category!r}, expected one of {known}"


def _group_instances(data):
    """COCO instances in the panoptic form: an image's annotations are its segments 1..S."""
    groups = defaultdict(list)
    for annotation in data["annotations"]:
        group = groups[annotation["image_id"]]
        group.append({"iscrowd": 0} | annotation | {"id": len(group) + 1})
    sizes = {image["id"]: (int(image["height"]), int(image["width"])) for image in data["images"]}
    annotations = [{"image_id": id, "file_name": "", "size": sizes[id], "segments_info": group}
                   for id, group in groups.items()]
    categories = [{"isthing": 1} | c for c in data["categories"]]
    return data | {"categories": categories, "annotations": annotations}


def read_panoptic(path, categories=None, any_category=False, instances=False):
    """The content of a COCO panoptic JSON, every annotation checked.

    categories: those its segments may have (default: its own), unless `any_category`.
    instances: COCO instances are accepted too and put into the panoptic form.
    Raises FileNotFoundError or ValueError naming the file, the image and what is wrong.
    """
    expected = ("panoptic JSON (categories; annotations of image_id, file_name, segments_info "
                "with id")
    try:
        data = json.loads(Path(path).read_text())
        if instances and not any("segments_info" in a for a in data["annotations"]):
            expected = ("instances JSON (categories; images of id, height, width; annotations of "
                        "image_id, segmentation")
            data = _group_instances(data)
        categories = data["categories"] if categories is None else categories
        problem = next(_panoptic_problems(data, categories, any_category), None)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such annotation file") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        problem = f"expected COCO {expected}, category_id), got {type(error).__name__}: {error}"
    if problem:
        raise ValueError(f"{path}: {problem}")
    return data


class PanopticDataset(Dataset):
    """Images with COCO annotations, panoptic or instances; items as in ShapeScenes.

    json_path: the annotations; panoptic PNGs are in the folder of the same name without ".json".
    image_dir: the images, in it or in its sub-folders. The annotation is returned untouched, at its
    original size; of instances, those that others hide are left out. depth: items have "depth",
    from the folder image_dir + "_depth" (`read_depth`); otherwise they have none.
    Raises FileNotFoundError or ValueError naming the file, what was found and what was expected.
    """

    def __init__(self, json_path, image_dir, depth=False):
        self.json_path, self.image_dir = Path(json_path), Path(image_dir)
        self.mask_dir = self.json_path.with_suffix("")
        self.depth_dir = Path(f"{self.image_dir}_depth") if depth else None
        data = read_panoptic(json_path, instances=True)
        self.categories = data["categories"]
        try:
            names = {image["id"]: image["file_name"] for image in data["images"]}
            self.records = [(names[a["image_id"]], a) for a in data["annotations"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{json_path}: expected images with id and file_name for every "
                             f"annotation, got {error!r}") from None
        self.segment_counts = [len(a["segments_info"]) for _, a in self.records]
        if not self.records:
            raise ValueError(f"{json_path}: no annotated image, expected at least one")
        mask_dir = None if "size" in self.records[0][1] else self.mask_dir
        for folder in filter(None, (self.image_dir, mask_dir, self.depth_dir)):
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: no such folder, expected beside {json_path}")
        self.places = defaultdict(list)  # base name -> the files below image_dir
        for place in iglob("**/*.*", root_dir=image_dir, recursive=True):
            self.places[os.path.basename(place)].append(place)

    def __len__(self):
        return len(self.records)

    def find(self, file_name):
        """Where an image is in image_dir: at file_name, else at the only path of its base name."""
        if (self.image_dir / file_name).is_file():
            return file_name
        name = Path(file_name).name.replace("_gtFine", "")  # Cityscapes' JSON has it, no image
        if len(found := self.places[name]) != 1:
            raise FileNotFoundError(f"{self.image_dir / file_name}: no such image, and {name} is "
                                    f"{len(found)} times below {self.image_dir}, expected once: "
                                    + ", ".join(found))
        return found[0]

    def __getitem__(self, index):
        file_name, annotation = self.records[index]
        place, segments = self.find(file_name), annotation["segments_info"]
        image = read_image(self.image_dir / place)
        if drawn := "size" in annotation:
            where = f"{self.json_path}: image {annotation['image_id']}"
            ids = draw_instances(segments, annotation["size"], where)
        else:
            where = self.mask_dir / annotation["file_name"]
            ids = rgb2id(read_image(where))
        if ids.shape != image.shape[:2]:
            raise ValueError(f"{where}: {ids.shape} pixels, expected {image.shape[:2]} like "
                             f"its image {file_name}")
        known, found = {s["id"] for s in segments}, set(np.unique(ids).tolist()) - {VOID}
        if drawn:
            segments = [s for s in segments if s["id"] in found]
        elif odd := known ^ found:
            reason = "not in the PNG" if min(odd) in known else f"not in {self.json_path.name}"
            raise ValueError(f"{where}: {len(odd)} segment ids do not agree with the JSON, "
                             f"expected none; the first, {min(odd)}, is {reason}")
        item = {"image": image, "ids": ids, "segments": segments,
                "image_id": annotation["image_id"], "file_name": file_name}
        if self.depth_dir:
            item["depth"] = read_depth(self.depth_dir / place, ids.shape)
        return item


def open_dataset(data, split, images, size, kind, depth=False):
    """The data set that `--data`, `--split` and `--images` name.

    data: "shapes" (generated at `size` pixels), a COCO-layout folder, or a COCO JSON together with
    `images`, "{split}" in both standing for the split. split None: the only one whose name starts
    with `kind` ("train" or "val"); `kind` itself for "{split}". depth: items have "depth".
    """
    if data == "shapes":
        return ShapeScenes(split or kind, size)
    path, flag = Path(data), "--train-split" if kind == "train" else "--split"
    if path.suffix == ".json":
        if images is None:
            raise ValueError(f"--data {data}: a JSON needs its images' folder, add --images DIR")
        if split and "{split}" not in data:
            raise ValueError(f"--data {data}: a JSON is one split, expected no {flag} {split}, or "
                             "{split} in the JSON's path")
        data, images = (name.replace("{split}", split or kind) for name in (data, images))
        return PanopticDataset(data, images, depth)
    if not (path / "annotations").is_dir():
        raise FileNotFoundError(f"--data {data}: no such data, expected 'shapes', a panoptic JSON "
                                "or a folder with annotations/")
    files = path.glob("annotations/panoptic_*.json"), path.glob("annotations/instances_*.json")
    files = {file.stem.partition("_")[2]: file for file in sorted(files[0]) or sorted(files[1])}
    matching = [s for s in files if s == split or split is None and s.startswith(kind)]
    if len(matching) != 1:
        raise ValueError(f"--data {data}: {flag} {split or 'not given'}, expected one of "
                         f"{list(files)}")
    return PanopticDataset(files[matching[0]], images or path / matching[0], depth)


def relative_depth(depth):
    """depth float (H, W), NaN = invalid -> [-1, 1], its 2nd and 98th percentiles the ends.
    Raises ValueError where the valid pixels are all the same, or none."""
    valid = depth[np.isfinite(depth)]
    low, high = np.percentile(valid, (2, 98)) if valid.size else (0, 0)
    if low == high and valid.size:
        low, high = valid.min(), valid.max()
    if low == high:
        raise ValueError(f"depth is {low} at all of its {valid.size} valid pixels, expected more "
                         "than one value")
    return ((depth - low) * (2 / (high - low)) - 1).clip(-1, 1)


def prepare(record, config, generator, augment, task="instance"):
    """A data set's item -> what the model sees: {"image": (3, s, s) in [-1, 1], "ids": (s, s)}.

    Resized to a square (image antialiased, ids nearest); crowds become VOID; ids are random;
    the N - 1 largest segments stay. `augment`: flip with probability 1/2, and segments under
    min_segment pixels become VOID. Randomness comes from `generator` (torch's, CPU).
    task "semantic": ids are the places 1..K of the classes in config.categories. With
    config.needs_depth also "depth" (s, s) in [-1, 1], NaN = invalid, where the item has it.
    """
    segments = [s for s in record["segments"] if not s.get("iscrowd")]
    known, size = [VOID] + [s["id"] for s in segments], [config.size, config.size]
    flip = augment and bool(torch.rand((), generator=generator) < 0.5)

    def resize(array):  # exact below 2^24; centred, as the image
        array = torch.from_numpy(array)[None, None].float()
        array = F.interpolate(array, size, mode="nearest-exact")[0, 0]
        return array.flip(-1) if flip else array

    image = torch.from_numpy(record["image"].copy()).permute(2, 0, 1)
    image = v2.functional.resize(image, size, antialias=True)
    sample = {"image": (image.flip(-1) if flip else image).float() / 127.5 - 1}
    ids = torch.from_numpy(compact_ids(resize(record["ids"]).numpy(), known))
    if task == "semantic":
        place = {c["id"]: i for i, c in enumerate(json.loads(config.categories), start=1)}
        table = torch.tensor([VOID, VOID] + [place[s["category_id"]] for s in segments])
        sample["ids"] = table[ids]
    else:
        areas = torch.bincount(ids.flatten(), minlength=len(known) + 1)
        areas[:2] = 0  # ids that are not listed, VOID
        kept = areas.argsort(descending=True)[: config.num_ids - 1]
        kept = kept[areas[kept] >= (max(1, config.min_segment) if augment else 1)]
        table = torch.zeros(len(areas), dtype=torch.long)
        table[kept] = 1 + torch.arange(len(kept))
        sample["ids"] = random_relabel(table[ids], config.num_ids, generator)
    if config.needs_depth and "depth" in record:
        try:
            sample["depth"] = resize(relative_depth(record["depth"]))
        except ValueError as error:
            raise ValueError(f"{record['file_name']}: {error}") from None
    return sample


def keep_blocks(ids, seed, block, rate):
    """Which pixels of a map (s, s) are known when random blocks are dropped, bool (Fig. 9)."""
    cells = -(-len(ids) // block)
    kept = np.random.default_rng([seed, block]).random((cells, cells)) >= rate
    return kept.repeat(block, 0).repeat(block, 1)[: len(ids), : len(ids)]


def keep_strokes(ids, seed, count=3):
    """Which pixels of a map (s, s) are known after `count` straight strokes between random pixels
    of each segment, bool; where a stroke leaves its segment, it lifts."""
    rng, known = np.random.default_rng(seed), np.zeros(ids.shape, bool)
    way = np.linspace(0, 1, 2 * len(ids))[:, None]
    for id in np.setdiff1d(ids, [VOID]):
        for start, end in rng.choice(np.argwhere(ids == id), (count, 2)):
            y, x = (start + way * (end - start)).round().astype(int).T
            known[y, x] |= ids[y, x] == id
    return known


def keep_some(ids, seed, share):
    """What training gives of a map: with probability `share` blocks or strokes, else nothing."""
    rng = np.random.default_rng(seed)
    if rng.random() >= share:
        return np.zeros(ids.shape, bool)
    if rng.random() < 0.2:
        return keep_strokes(ids, seed, rng.integers(1, 6))
    block = max(1, len(ids) >> rng.integers(1, 6))
    return keep_blocks(ids, seed, block, rng.uniform(0.1, 0.95))


class TrainingStream(Dataset):
    """The endless order of training samples: position p -> a prepared sample, its noise seed and
    task, a place in config.tasks.

    Several data sets take turns, whatever their sizes. Everything random about position p depends
    on (seed, p) only: a resumed run and any number of ranks see the same samples.
    """

    def __init__(self, datasets, config, seed):
        self.datasets, self.config, self.seed = datasets, config, seed
        counts = np.concatenate([getattr(d, "segment_counts", []) for d in datasets])
        if (crowded := int((counts >= config.num_ids).sum())) and is_main():
            print(f"{crowded} of {len(counts)} images have more than {config.num_ids - 1} "
                  "segments: the largest are kept, the rest is VOID in training")

    @lru_cache(maxsize=8)
    def _order(self, turn, epoch):
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "order", turn, epoch))
        return torch.randperm(len(self.datasets[turn]), generator=generator).tolist()

    def __getitem__(self, position):
        place, turn = divmod(position, len(self.datasets))
        epoch, place = divmod(place, len(self.datasets[turn]))
        record = self.datasets[turn][self._order(turn, epoch)[place]]
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "sample", position))
        seed, tasks = stable_seed(self.seed, "noise", position), self.config.tasks or TASKS[:1]
        rng = np.random.default_rng(stable_seed(self.seed, "task", position))  # crc32's bits repeat
        task = int(rng.integers(len(tasks)))
        sample = prepare(record, self.config, generator, True, tasks[task])
        if self.config.given:
            share = self.config.given * (tasks[task] != "depth")
            sample["known"] = torch.from_numpy(keep_some(sample["ids"].numpy(), seed, share))
        if self.config.tasks:
            sample["task"] = task
        return sample | {"seed": seed}


def training_loader(stream, batch_size, accumulate, start, stop, workers):
    """Micro-batches of this rank for the optimizer steps start..stop-1, `accumulate` per step."""
    rank, world = rank_and_world()
    if batch_size % (accumulate * world):
        raise ValueError(f"batch size {batch_size}, expected a multiple of --accumulate x processes"
                         f" = {accumulate} x {world}")
    micro = batch_size // (accumulate * world)
    if is_main():
        print(f"{batch_size} images per step = {world} processes x {micro} images x {accumulate} "
              "accumulated")
    firsts = range(start * batch_size + rank * micro, stop * batch_size, world * micro)
    batches = (range(first, first + micro) for first in firsts)
    return DataLoader(stream, batch_sampler=batches, num_workers=workers,
                      pin_memory=torch.cuda.is_available())


def segments_of(ids, category=1):
    """COCO `segments_info` of an int map (H, W), all of one category; None: the ids themselves."""
    areas, boxes = np.bincount(ids.ravel()), ndimage.find_objects(ids)
    return [{"id": id, "category_id": category or id, "area": int(areas[id]), "iscrowd": 0,
             "bbox": [x.start, y.start, x.stop - x.start, y.stop - y.start]}
            for id, (y, x) in ((i + 1, box) for i, box in enumerate(boxes) if box)]


# ---- 13. Running: command line, devices and ranks, optimizer, run folders, evaluation, pictures 

SHIPPED = Path(__file__).parent / "assets" / "tiny.safetensors"


def run_script(main):
    """Call main(); a user's mistake becomes one line on stderr and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        message = str(error).strip().splitlines()[-1]  # a loader process puts its traceback first
        print(message.removeprefix(f"{type(error).__name__}: "), file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def base_parser(description):
    """The flags that mean the same in every script."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--images", metavar="DIR", help="where the images of a JSON are; {split} as in --data")
    add("--split", help="split to evaluate (default: the data's only val*)")
    add("--limit", type=int, metavar="N",
        help="only the first N images of that split (default: all; in training 200 or 50)")
    add("--device", help="cuda, cuda:1, cpu, ... (default: cuda if there, else cpu)")
    add("--amp", choices=("bf16", "fp16", "off"),
        help="mixed precision (default: bf16 on cuda, else off)")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("--workers", type=int, default=min(8, (os.cpu_count() or 1) // 2), metavar="N",
        help="data loading processes, 0 for none (default: %(default)s)")
    return parser


def training_parser(description, stage):
    """`base_parser` and the flags of both training scripts; stage: "ae" or "ldm"."""
    parser = base_parser(description)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="tiny", help="where the Config starts (default: tiny)")
    add("--set", nargs="+", default=[], action="extend", metavar="FIELD=VALUE",
        help="override Config fields; those of tiny:\n"
             + "\n".join(f"{k}={v}" for k, v in asdict(Config()).items() if k not in NOT_BY_SET))
    add("--data", nargs="+", default=["shapes"],
        help="'shapes' (generated), COCO-layout folders, JSONs, {split} standing for the split\n"
             "(default: shapes); several take turns, the last one is evaluated")
    add("--train-split", metavar="SPLIT", help="to train on (default: the data's only train*)")
    add("--out", default=f"runs/{stage}", help="run folder (default: %(default)s)")
    add("--steps", type=int, help=f"optimizer steps (default: {stage}_steps)")
    add("--batch-size", type=int, metavar="IMAGES",
        help=f"per step, all processes together (default: {stage}_batch)")
    add("--accumulate", type=int, default=1, metavar="N",
        help="micro-batches per step, each divided by its own counts (default: 1)")
    add("--eval-every", type=int, default=500, metavar="STEPS",
        help="evaluate and save (default: 500)")
    add("--fresh", action="store_true", help="start over in an existing run folder")
    return parser


def training_config(args, stage):
    """The Config of a training script: the preset, then --set, --steps, --batch-size."""
    if args.accumulate < 1 or args.eval_every < 1:
        raise ValueError("--accumulate and --eval-every expect at least 1, got "
                         f"{args.accumulate} and {args.eval_every}")
    flags = {f"{stage}_steps": args.steps, f"{stage}_batch": args.batch_size}
    flags = {k: v for k, v in flags.items() if v is not None}
    return replace(override(PRESETS[args.preset], args.set), **flags)


def training_data(args, config):
    """The training sets of `--data`, the evaluated split of the last one, and the categories that
    all share. Raises ValueError where the task "semantic" has none that all share."""
    options = dict(images=args.images, size=config.size, depth=config.needs_depth)
    train = [open_dataset(d, args.train_split, kind="train", **options) for d in args.data]
    val = open_dataset(args.data[-1], args.split, kind="val", **options)
    categories = [[{k: c[k] for k in ("id", "name", "isthing") if k in c} for c in d.categories]
                  for d in (val, *train)]
    if "semantic" in config.tasks:
        for name, ours in zip(args.data, categories[1:]):
            if len(ours) < 2 or ours != categories[0]:
                raise ValueError(f"--data {name}: {len(ours)} categories, expected several for "
                                 "--tasks semantic, the same in all data")
    return train, val, categories[0]


def setup_distributed(device=None, amp=None):
    """Join the process group under torchrun. Returns the torch device and a function without
    arguments that makes the autocast context."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    amp = amp or ("bf16" if device.type == "cuda" else "off")
    if amp == "fp16" and device.type == "cpu":
        raise ValueError("--amp fp16 needs cuda; on cpu use bf16 or off")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return device, partial(torch.autocast, device.type, dtype, enabled=amp != "off")


def distribute(model):
    """The model as a training loop calls it: DDP's under torchrun, else itself."""
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


def progress(iterable, total, description, start=0):
    """A progress bar on rank 0 and only on a terminal."""
    return tqdm(iterable, description, total, initial=start, leave=False,
                disable=not (is_main() and sys.stderr.isatty()))


def make_optimizer(model, lr, config):
    """AdamW; the weight decay is Eq. 2's last term, none on norms and biases."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}]
    options = dict(lr=lr, betas=(0.9, 0.999), fused=True)
    if config.zero and dist.is_initialized():
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
    return torch.optim.AdamW(groups, **options)


def learning_rate(step, steps, peak, config):
    """Linear warm-up to `peak`, then constant or a cosine down to 1e-6."""
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return peak
    done = (step - config.warmup) / max(1, steps - config.warmup)
    return 1e-6 + 0.5 * (peak - 1e-6) * (1 + math.cos(math.pi * done))


def make_ema(model, decay):
    """Exponential moving average of the weights (Table S3).

    NOTE: paper: decay 0.999; here it warms up as (1 + n) / (10 + n), because short runs would
    otherwise average in their first, random weights.
    """
    def update(averages, weights, updates):
        n = float(updates)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + n) / (10 + n)))

    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=update)
    for average, weight in zip(ema.module.parameters(), model.parameters()):
        if not (weight.requires_grad and decay):
            average.data = weight.data  # one copy is enough of what is frozen, or not averaged
    return ema


class Meter:
    """Means of training scalars over batches and ranks."""

    def __init__(self):
        self.sums, self.batches, self.images, self.start = Counter(), 0, 0, time.time()

    def add(self, images, **values):
        self.sums.update({name: value.detach().float() for name, value in values.items()})  # adds
        self.batches, self.images = self.batches + 1, self.images + images

    def means(self):
        """{name: mean, "images_per_second"}. Raises ValueError where the loss is not finite."""
        sums, world = torch.stack(list(self.sums.values())), rank_and_world()[1]
        if world > 1:
            dist.all_reduce(sums)
        result = {k: v / world / self.batches for k, v in zip(self.sums, sums.tolist())}
        if not math.isfinite(result["loss"]):
            raise ValueError(f"loss is {result['loss']}: stopped, the last checkpoint is kept; try "
                             "a lower learning rate (--set ae_lr=... or ldm_lr=...) or --amp off")
        rate = world * self.images / (time.time() - self.start)
        return result | {"images_per_second": rate}


@contextmanager
def replacing(path):
    """Write to a temporary name, then rename: a file is whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def write_png(path, array):
    with replacing(path) as temporary:
        Image.fromarray(array).save(temporary, "PNG")


def save_weights(path, model, config, step, dtype=torch.float32):
    """Write safetensors that `load_model` reads; the Config travels in the file's metadata."""
    tensors = {k: v.to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    about = {"model": type(model).__name__, "step": step, "config": asdict(config)}
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"ldmseg": json.dumps(about)}))


def save_run(out, step, model, config, settings, state):
    """Write a run folder: checkpoint.pt to resume from; model.safetensors, config.json to use.
    To be called on all ranks; rank 0 writes."""
    if hasattr(state["optimizer"], "consolidate_state_dict"):  # ZeRO
        state["optimizer"].consolidate_state_dict()
    if not is_main():
        return
    weights = [*model.parameters(), *state["model"].parameters()]
    if not all(w.isfinite().all() for w in weights):
        raise ValueError(f"weights are not finite at step {step}: stopped, the last checkpoint is "
                         "kept; try a lower learning rate")
    save_weights(Path(out, "model.safetensors"), model, config, step)
    write_json(Path(out, "config.json"), asdict(config))
    state = {name: part.state_dict() for name, part in state.items()}
    with replacing(Path(out, "checkpoint.pt")) as temporary:  # last: it vouches for the others
        torch.save(state | {"step": step, "settings": settings}, temporary)


def resume_run(args, config, state, **others):
    """Load checkpoint.pt into `state` (name -> module, optimizer, ...).

    Returns its step, or 0, and the settings that a resumed run must share: the Config, the data
    and `others`, but not the number of steps, the machine, or how much memory is used. Raises
    ValueError naming the first that differs. With --fresh, an existing run is deleted.
    """
    out, path, log = args.out, Path(args.out, "checkpoint.pt"), Path(args.out, "log.jsonl")
    names = ("data", "images", "train_split", "seed")
    settings = asdict(config) | {name: getattr(args, name) for name in names} | others
    free = ("ae_steps", "ldm_steps", "eval_steps", "checkpointing", "compile", "zero")
    found = [path.exists()] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(found, path.exists())
    if len(set(found)) > 1:
        raise ValueError(f"{out}: only some of the processes see its checkpoint; use a shared disk")
    if args.fresh or not path.exists():
        if is_main():
            log.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        return 0, settings
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        stored = checkpoint.pop("settings")
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint ({str(error).splitlines()[0]}); "
                         "--fresh starts over") from None
    for name in settings | stored:
        ours, theirs = settings.get(name), stored.get(name)
        if ours != theirs and name not in free:
            raise ValueError(f"{out}: its run has {name} {theirs}, this command {ours}; "
                             "use the same, another --out, or --fresh to start over")
    for name, part in state.items():
        if checkpoint[name]:  # a scaler that was off has no state
            part.load_state_dict(checkpoint[name])
    if is_main() and log.exists():  # forget what was logged after the checkpoint, or half a line
        kept = [f"{line}\n" for line in log.read_text().splitlines()
                if line.endswith("}") and json.loads(line)["step"] <= checkpoint["step"]]
        with replacing(log) as temporary:
            temporary.write_text("".join(kept))
    return checkpoint["step"], settings


def convert_official(parts, unet_config=None):
    """Config and tensors, in our names, of the authors' files: {part: {key: tensor}}.

    Parts: "vae" (ae.pt), or "vae_semseg", "unet" and "vae_image" (ldmseg.pt, whose image encoder
    is Stable Diffusion's, saved by an older diffusers). unet_config: the UNet's configuration in
    diffusers' names (default: Stable Diffusion v1's).
    """
    parts = {name: {k.removeprefix("module."): v for k, v in part.items()}
             for name, part in parts.items()}
    config, tensors = replace(PRESETS["paper"], latents="gaussian", loss_weights="released"), {}
    for key, tensor in parts["vae_semseg" if "unet" in parts else "vae"].items():
        part, index, name = key.split(".")
        identity = {"encoder": 12, "decoder": 1}.get(part, math.inf)  # has no place in ours
        tensors[f"{part}.{int(index) - (int(index) > identity)}.{name}"] = tensor
    if "unet" not in parts:
        return config, tensors
    tensors = {f"autoencoder.{k}": v for k, v in tensors.items()}
    tensors |= {f"unet.{k}": v for k, v in parts["unet"].items()}
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for key, tensor in parts["vae_image"].items():
        part, _, rest = key.partition(".")
        if part != "post_quant_conv":  # the decoder's, which is not there
            rest = ".".join(names.get(word, word) for word in rest.split("."))
            place = {"encoder": 0, "quant_conv": 1}.get(part, part)
            tensors[f"image_encoder.layers.{place}.{rest}"] = tensor
    widths = [len(v) for k, v in sorted(parts["vae_image"].items())
              if k.startswith("encoder.down_blocks") and k.endswith("resnets.0.conv1.bias")]
    config = replace(config, encoder_json=json.dumps(SD_VAE | {"block_out_channels": widths}))
    if unet_config:
        attention = tuple(int("Attn" in block) for block in unet_config["down_block_types"])
        config = replace(config, size=8 * unet_config["sample_size"], unet_attention=attention,
                         unet_widths=tuple(unet_config["block_out_channels"]),
                         unet_layers=unet_config["layers_per_block"],
                         unet_heads=unet_config["attention_head_dim"])
    return config, tensors


def load_official(path, unet_config=None):
    """The authors' released ae.pt -> MaskAutoencoder, or ldmseg.pt -> LDMSeg.
    Raises ValueError where the file would have to run code to be read, or where a tensor is
    missing, unknown or of another shape."""
    try:
        parts = torch.load(path, map_location="cpu", weights_only=True)
        config, tensors = convert_official(parts, unet_config)
        model = (LDMSeg if "unet" in parts else MaskAutoencoder)(config)
        model.load_state_dict(tensors)
        return model
    except UnpicklingError:
        reason = "code in it would have to run, which is refused"
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise ValueError(f"{path}: not a file of tensors as the authors released ({reason}); a run of "
                     "these scripts is given by its folder")


def load_model(path, device="cpu", kind=nn.Module):
    """LDMSeg or MaskAutoencoder of a run folder, a weights file, or the authors' .pt files.

    In evaluation mode; `.config` is its Config. Raises FileNotFoundError or ValueError naming the
    file, also where the model is not of class `kind`.
    """
    file = Path(path, "model.safetensors") if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{path}: no weights, expected a run folder or .safetensors file")
    if file.suffix == ".pt":
        model = load_official(file)
    else:
        try:
            with safe_open(file, "pt") as weights:
                about = json.loads(weights.metadata()["ldmseg"])
                tensors = {k: weights.get_tensor(k).float() for k in weights.keys()}
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in about["config"].items()}
            models = {"LDMSeg": LDMSeg, "MaskAutoencoder": MaskAutoencoder}
            model = models[about["model"]](Config(**values))
            model.load_state_dict(tensors)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file}: not weights that these scripts wrote ({reason})") from None
    if not isinstance(model, kind):
        raise ValueError(f"{path}: holds a {type(model).__name__}, expected a {kind.__name__}")
    return model.to(device, memory_format=torch.channels_last).eval()


def default_weights(folder):
    """`folder` if it holds weights, else the shipped ones; says which."""
    path = Path(folder) if Path(folder, "model.safetensors").exists() else SHIPPED
    if is_main():
        print(f"weights: {path}")
    return path


def log_line(out, **values):
    """Append one JSON object to log.jsonl and print it, on rank 0."""
    if is_main():
        Path(out).mkdir(parents=True, exist_ok=True)
        with open(Path(out, "log.jsonl"), "a") as file:
            file.write(json.dumps(values) + "\n")
        words = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print("  ".join(words), flush=True)


def image_count(dataset, limit):
    """How many images of a data set count: all, or the first `limit`."""
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}, expected at least 1")
    return min(len(dataset), limit or len(dataset))


@torch.no_grad()
def predict_dataset(output_of, dataset, config, device, seed=0, workers=0, limit=None):
    """Run a model over this rank's share of a data set; yields (index, record, output) per image.

    output_of: a function of the batch {"image", "ids", "seed"} to an output per image, e.g. logits
    (B, N, H/2, W/2); an image's noise seed and ids depend on `seed` and its image id only.
    """
    rank, world = rank_and_world()
    indices = range(rank, image_count(dataset, limit), world)
    batch_size = min(16, max(1, 2**20 // config.size**2))
    loader = DataLoader(Subset(dataset, indices), batch_size, num_workers=workers, collate_fn=list)
    done = 0
    for records in progress(loader, len(loader), "predicting"):
        seeds = [stable_seed(seed, r["image_id"]) for r in records]
        samples = [prepare(r, config, torch.Generator().manual_seed(s), augment=False)
                   for r, s in zip(records, seeds)]
        batch = {k: torch.stack([s[k] for s in samples]).to(device) for k in samples[0]}
        for record, output in zip(records, output_of(batch | {"seed": seeds})):
            yield indices[done], record, output
            done += 1


def tasks_of(config, wanted=None):
    """What weights can do: their tasks, after "panoptic" where they know instance and semantic; of
    these only `wanted`, if given. Raises ValueError that lists them where it is not among them."""
    tasks = config.tasks or (("depth",) if config.target == "depth" else TASKS[:1])
    tasks = ("panoptic", *tasks) if {"instance", "semantic"} <= set(tasks) else tasks
    if wanted not in (None, *tasks):
        raise ValueError(f"--task {wanted}: these weights know {', '.join(tasks)}")
    return (wanted,) if wanted else tasks


def sampler_of(model, tasks, steps, eta, autocast):
    """A function of a batch {"image", "seed"} to {task: logits} of each image, as `draw_task` reads
    them for these tasks."""
    parts = [t for t in TASKS if t in tasks or t != "depth" and "panoptic" in tasks]

    def sample(batch):
        with autocast():
            drawn = [model.sample(batch["image"], batch["seed"], steps, eta, t) for t in parts]
        return [dict(zip(parts, logits)) for logits in zip(*drawn)]

    return sample


def draw_task(logits, task, size, config):
    """An image's {task: logits} -> ids int (height, width) = `size`, NumPy, and its segments_info;
    of "depth" float (height, width) in [-1, 1], None."""
    if task == "instance":
        ids = segment(logits[task], size, config)
        return ids, segments_of(ids)
    if task == "depth":
        depth = F.interpolate(logits[task][None].float(), size, mode="bilinear")[0, 0]
        return depth.cpu().numpy(), None
    categories = json.loads(config.categories)
    if task == "panoptic":
        isthing = [c["isthing"] for c in categories]
        ids, class_of = merge_panoptic(logits["instance"], logits["semantic"], size, isthing,
                                       config.mask_threshold, config.min_area)
    else:
        ids, class_of = probabilities(logits[task], size).argmax(0), range(len(categories) + 1)
        ids = ids.masked_fill(ids > len(categories), VOID)
    ids = ids.cpu().numpy()
    return ids, [s | {"category_id": categories[class_of[s["id"]] - 1]["id"]}
                 for s in segments_of(ids)]


def evaluate_tasks(tasks, logits_of, dataset, config, device, pictures=0, **options):
    """The scores of tasks over a data set and all ranks, and the first predictions.

    logits_of: a function of a batch to {task: logits} of each image. The truth is the untouched
    annotation; "instance" is scored class-agnostically. Returns {task: PanopticQuality.compute() or
    DepthQuality.compute()}, and of the first `pictures` images (record, {task: map}). Raises
    ValueError where the data has other classes than the weights.
    """
    if {"panoptic", "semantic"} & set(tasks):
        ours, theirs = ([(c["id"], c["isthing"]) for c in categories]
                        for categories in (json.loads(config.categories), dataset.categories))
        if ours != theirs:
            raise ValueError(f"the data has {len(theirs)} classes, (id, isthing) {theirs}, expected"
                             f" those of the weights, {ours}")
    metrics = {task: DepthQuality() if task == "depth" else
               PanopticQuality(dataset.categories, class_agnostic=task == "instance")
               for task in tasks}
    kept = []
    for _, record, logits in predict_dataset(logits_of, dataset, config, device, **options):
        size, drawn = record["ids"].shape, {}
        for task, metric in metrics.items():
            drawn[task], segments = draw_task(logits, task, size, config)
            if task == "depth":
                metric.update(record["depth"], drawn[task])
            else:
                metric.update(record["ids"], record["segments"], drawn[task], segments)
        if len(kept) < pictures:
            kept.append((record, drawn))
    for metric in metrics.values():
        metric.all_reduce(device)
    return {task: metric.compute() for task, metric in metrics.items()}, kept


def headline(task, result):
    """The numbers of a task's result that logs and tables show: {name: value}."""
    if task == "semantic":
        return {"mIoU": result["miou"]}
    if task == "depth":
        return {"AbsRel": result["abs_rel"], "RMSE": result["rmse"], "delta1": result["delta1"]}
    numbers = {name.upper(): result["All"][name] for name in ("pq", "sq", "rq")}
    if task == "panoptic":
        numbers |= {"PQ_th": result["Things"]["pq"], "PQ_st": result["Stuff"]["pq"]}
    return numbers


def colorize(ids):
    """int ids (H, W) -> uint8 (H, W, 3): a fixed distinct colour per id, VOID black."""
    palette = np.array([colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.45 + 0.25 * (i % 3),
                                            0.95 - 0.3 * (i % 2)) for i in range(256)])
    palette[0] = 0
    return (palette[np.where(ids > 0, 1 + (ids - 1) % 255, 0)] * 255).astype(np.uint8)


def colorize_depth(depth):
    """float (H, W), NaN = invalid -> uint8 (H, W, 3), from its lowest value, bright yellow, over
    red and violet to its highest, dark; invalid black."""
    low, high = np.nanmin(depth), np.nanmax(depth)
    place = np.nan_to_num(1 - (depth - low) / max(high - low, 1e-9))
    stops = ((40, 130, 220, 250, 255), (30, 40, 70, 160, 250), (90, 140, 90, 50, 160))
    rgb = [np.interp(place, np.linspace(0, 1, 5), stop) for stop in stops]
    return (np.stack(rgb, -1) * np.isfinite(depth)[..., None]).astype(np.uint8)


def overlay(image, ids):
    """Blend uint8 image (H, W, 3) with the colours of its segments; VOID shows the image."""
    mixed = 0.45 * image + 0.55 * colorize(ids)
    return np.where(ids[..., None] == VOID, image, mixed).astype(np.uint8)


def write_panoptic(out, name, record, ids, segments):
    """Write panoptic/NAME.png and overlay/NAME.png; returns its entries of `panoptic.json`."""
    name = str(Path(name).with_suffix(".png"))
    write_png(Path(out, "panoptic", name), id2rgb(ids))
    write_png(Path(out, "overlay", name), overlay(record["image"], ids))
    about = {"id": record["image_id"], "file_name": record["file_name"]}
    return (about | {"height": ids.shape[0], "width": ids.shape[1]},
            {"image_id": about["id"], "file_name": name, "segments_info": segments})


def write_panoptic_json(out, entries, categories=""):
    """panoptic.json of `write_panoptic`'s entries, in the COCO format; categories: as JSON."""
    images, annotations = zip(*entries)
    categories = categories or '[{"id": 1, "name": "segment", "isthing": 1}]'
    write_json(Path(out, "panoptic.json"), {"images": images, "annotations": annotations,
                                            "categories": json.loads(categories)})


def save_grid(path, titles, rows, tile=160):
    """A PNG of uint8 pictures (H, W, 3) in rows, each column under its title."""
    canvas = Image.new("RGB", (len(titles) * (tile + 4), 18 + len(rows) * (tile + 4)), "white")
    draw = ImageDraw.Draw(canvas)
    for x, title in enumerate(titles):
        draw.text((x * (tile + 4) + 4, 3), title, fill="black")
        for y, row in enumerate(rows):
            picture = Image.fromarray(row[x])
            scale = tile / max(picture.size)
            size = [max(1, round(side * scale)) for side in picture.size]
            canvas.paste(picture.resize(size, Image.NEAREST if scale > 1 else Image.LANCZOS),
                         (x * (tile + 4), 18 + y * (tile + 4)))
    write_png(path, np.asarray(canvas))
