"""LDMSeg in one file: panoptic segmentation as latent diffusion over bit-encoded masks.

"A Simple Latent Diffusion Approach for Panoptic Segmentation and Mask Inpainting" (Van
Gansbeke and De Brabandere, ECCV 2024). Part I is the method, in the order of the paper: stop
at part II if you came for it. Part II: data and metrics; part III: flags, ranks, run folders.

    ids -> bits in {-1, +1} -> shallow encoder -> z (4 channels, 1/8 resolution)   stage 1
    z * scale + noise, image latents -> UNet -> the noise; self-conditioned        stage 2
    Gaussian noise -> DDIM, guided by the image -> z -> decoder -> softmax over N ids

    Eq. 1  p(y | z_t, z_i) p(z_t)        the two stages: train_ae.py, train_ldm.py
    Eq. 2  autoencoder loss              ae_loss (weight decay: make_optimizer)
    Eq. 3  forward process               NoiseSchedule.add_noise, inverse: .predict_x0
    Eq. 4  noise loss (Alg. 1)           LDMSeg.diffusion_loss, .errors, NoiseSchedule.weights
           ids of its segments           match_ids, LDMSeg.match_to
    Eq. 5  DDIM step                     NoiseSchedule.step
    Alg. 2 sampling; Alg. 3 inpainting   LDMSeg.sample; LDMSeg.inpaint
    Supp. A post-processing; tasks       postprocess, merge_panoptic; LDMSeg.predict
    beyond  samples that agree           merge_samples, LDMSeg.sample_tasks
    Pix2Seq-D, the closest relative      Pix2SeqD, AnalogBits, CosineSchedule

Shapes: B batch, C channels, H W pixels, h w = H/8 W/8 latent cells, N ids, S segments, P
points. Ids: int64 in [0, N-1]; 0 is VOID (unlabelled: never a target, never counted).
Images: float in [-1, 1]. In masks called `valid` or `known`, 1 means "counts" or "given".
"""

import argparse
import atexit
import colorsys
import ctypes
import difflib
import gc
import hashlib
import json
import math
import os
import signal
import struct
import sys
import zlib
from collections import OrderedDict, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache, partial
from glob import iglob
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from tokenize import TokenError
from types import UnionType
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from tqdm import tqdm

# ========================================================================================
# Part I. The method
# ========================================================================================

# ---- 1. Configuration (Sec. 4.1) -------------------------------------------------------

class UserError(ValueError):
    """A mistake in flags, files or arguments: scripts print its line and exit 2."""

def require(condition, message):
    if not condition:
        raise UserError(message)

VOID = 0
TASKS = ("instance", "semantic", "depth")
SAMPLERS = {"ddim": 0.0, "ddpm": 1.0}  # eta of `NoiseSchedule.step`
# ranges of numbers, ends included
COUNT, WIDTH, SHARE, AMOUNT, ABOVE_0 = (1, 1e9), (1, 8192), (0, 1), (0, 1e9), (1e-9, 1e9)

def knob(default, help, allowed=None, stage="both"):
    """A field of Config. allowed: its choices, or its (lowest, highest); stage: the training
    script whose --set may change it, "ae", "ldm" or "both"; None: neither's."""
    return field(default=default, metadata=dict(help=help, allowed=allowed, stage=stage))

@dataclass(frozen=True)
class Config:
    """Everything that defines a model and its training, by default the preset `tiny`."""

    preset: str = knob("tiny", "where the other fields start", stage=None)
    size: int = knob(64, "images and masks become squares of this many pixels", WIDTH)
    min_segment: int = knob(10, "smaller segments (pixels) are VOID in training", AMOUNT)
    # stage 1
    target: str = knob("ids", "what it compresses", ("ids", "depth"), None)
    bits: int = knob(4, "N = 2 ** bits ids, VOID too; stage 2: of space=pixels", (1, 10))
    codes: str = knob("bit", "of ids (Table S1)", ("bit", "colour", "positional"), "ae")
    ae_widths: tuple = knob((16, 32, 64, 128), "channels at 1/1 to 1/8", WIDTH, "ae")
    latent_channels: int = knob(8, "of the mask latents; paper: 4", WIDTH, "ae")
    latents: str = knob("deterministic", "kind (Fig. 8)", ("deterministic", "gaussian"), "ae")
    kl_weight: float = knob(0.0, "of the KL term of gaussian latents", AMOUNT, "ae")
    points: int = knob(410, "per image (cross-entropy) or segment (mask)", (1, 1e6), "ae")
    ae_steps: int = knob(4500, "optimizer steps", COUNT, "ae")
    ae_batch: int = knob(16, "images per step", COUNT, "ae")
    ae_lr: float = knob(2e-3, "learning rate", AMOUNT, "ae")
    ae_clip: float = knob(3.0, "highest gradient norm", ABOVE_0, "ae")
    # stage 2
    space: str = knob("latents", "pixels: Pix2Seq-D", ("latents", "pixels"), "ldm")
    bits_scale: float = knob(0.1, "of pixels: b of the bits -b, b", ABOVE_0, "ldm")
    pixel_loss: str = knob("ce", "of pixels", ("ce", "l2"), "ldm")
    loss_power: float = knob(0.2, "of pixels: weights 1 / area ** p", SHARE, "ldm")
    td: float = knob(1.0, "of pixels: steps that the next time is ahead", (0, 10), "ldm")
    ids: str = knob("matched", "of segments: what the noise favours", ("matched", "random"), "ldm")
    timestep_power: float = knob(1.0, "1: uniform; above 1: more near T", (1, 8), "ldm")
    mask_scale: float = knob(0.0, "factor s of mask latents; 0: gives mask_std", AMOUNT, "ldm")
    mask_std: float = knob(0.7, "standard deviation of mask latents", ABOVE_0, "ldm")
    depth_scale: float = knob(0.0, "of depth latents; 0: measured", AMOUNT, "ldm")
    image_scale: float = knob(0.0, "of image latents; 0: the encoder's", AMOUNT, "ldm")
    prediction: str = knob("v", "what the UNet predicts; paper: eps", ("eps", "v"), "ldm")
    loss_weights: str = knob("paper", "over time", ("paper", "released", "none"), "ldm")
    self_condition: float = knob(0.5, "share of self-conditioned steps", SHARE, "ldm")
    given_share: float = knob(0.0, "share of samples with given blocks", SHARE, "ldm")
    previous: float = knob(0.0, "share of samples with the frame before", SHARE, "ldm")
    tasks: tuple = knob((), "several, told apart by an embedding (Supp. A)", TASKS, None)
    task_width: int = knob(64, "of the embeddings of tasks", WIDTH, "ldm")
    categories: str = knob("", "JSON of the classes of semantic weights", stage=None)
    image_encoder: str = knob("patch", "one of IMAGE_ENCODERS", stage=None)
    encoder_json: str = knob("", "architecture of a pretrained image encoder", stage=None)
    dinov2: str = knob("facebook/dinov2-base", "folder or hub id of DINOv2", stage="ldm")
    stem_widths: tuple = knob((32, 64, 112), "of patch, to 1/8; lite0: the last", WIDTH, "ldm")
    unet_widths: tuple = knob((96, 128), "channels of the UNet's levels", WIDTH, "ldm")
    unet_attention: tuple = knob((1, 1), "1: self-attention at this level", SHARE, "ldm")
    unet_layers: int = knob(1, "residual blocks per level", (1, 64), "ldm")
    unet_heads: int = knob(4, "heads of the self-attention", (1, 64), "ldm")
    ldm_steps: int = knob(2100, "optimizer steps", COUNT, "ldm")
    ldm_batch: int = knob(8, "images per step", COUNT, "ldm")
    ldm_lr: float = knob(1e-3, "learning rate", AMOUNT, "ldm")
    ldm_clip: float = knob(1.0, "highest gradient norm", ABOVE_0, "ldm")
    freeze_time: int = knob(0, "1: keep the pretrained time embedding", SHARE, "ldm")
    checkpointing: int = knob(0, "1: recompute activations, less memory", SHARE, "ldm")
    compile: int = knob(0, "1: torch.compile the UNet", SHARE, "ldm")
    eval_steps: int = knob(2, "sampling steps, unless --steps is given", (1, 1000), "ldm")
    eval_samples: int = knob(8, "samples to merge, unless --samples is given", (1, 1000), "ldm")
    sampling_power: float = knob(3.0, "of their timesteps, as timestep_power", (1, 8), "ldm")
    # both stages
    crop: float = knob(1.0, "least share of an image in random crops", (0.01, 1))
    jitter: float = knob(0.0, "of brightness, contrast and saturation", SHARE)
    warmup: int = knob(200, "steps until the full learning rate", AMOUNT)
    lr_schedule: str = knob("cosine", "after the warm-up", ("constant", "cosine"))
    weight_decay: float = knob(0.05, "of AdamW, none on norms and biases", AMOUNT)
    ema: float = knob(0.999, "decay of the weights' moving average; 0: off", SHARE)
    zero: int = knob(0, "1: ranks share the optimizer's state (ZeRO stage 1)", SHARE)
    mask_threshold: float = knob(0.5, "less confident pixels become VOID", SHARE)
    min_area: int = knob(16, "smaller predicted segments (pixels) become VOID", AMOUNT)

    def __post_init__(self):
        def check(name, fits, expected):
            require(fits, f"{name} is {getattr(self, name)!r}, expected {expected}")
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata["allowed"]
            values = value if f.type is tuple else (value,)
            if allowed and isinstance(allowed[0], str):
                check(f.name, set(values) <= set(allowed), f"one of {allowed}")
            elif allowed:
                fits = all(allowed[0] <= v <= allowed[1] for v in values)
                check(f.name, fits, "{:g} to {:g}".format(*allowed))
        levels, classes = len(self.unet_widths), len(json.loads(self.categories or "[]"))
        cell = 4 * 2**levels  # pixels of a position at the UNet's lowest resolution
        check("size", self.size % cell == 0, f"a multiple of {cell}")
        check("ae_widths", len(self.ae_widths) == 4 and self.ae_widths[-1] % 32 == 0,
              "4 numbers, the last a multiple of 32")
        check("stem_widths", [w % 8 for w in self.stem_widths] == [0] * 3, "3 multiples of 8")
        check("unet_widths", not any(w % 32 or w % self.unet_heads for w in self.unet_widths),
              f"multiples of 32 and of unet_heads, {self.unet_heads}")
        check("unet_attention", len(self.unet_attention) == levels, f"{levels} numbers")
        check("tasks", len(set(self.tasks)) == len(self.tasks), "different ones")
        check("space", not (self.in_pixels and self.needs_depth), "latents for task depth")
        check("codes", not self.in_pixels or self.codes == "bit", "bit with space=pixels")
        check("kl_weight", not self.kl_weight or self.latents == "gaussian", "latents=gaussian")
        check("bits", "semantic" not in self.tasks or classes < self.num_ids,
              f"{classes.bit_length()}, of stage 1, for {classes} classes and VOID")

    num_ids = property(lambda self: 2**self.bits)
    in_pixels = property(lambda self: self.space == "pixels")
    needs_depth = property(lambda self: "depth" in (self.target, *self.tasks))

    @property
    def latent_shape(self):  # of x0: (C, h, w); of pixels the bits at 1/4 of the size
        side = self.size // (4 if self.in_pixels else 8)
        return self.bits if self.in_pixels else self.latent_channels, side, side

    @property
    def trained_tasks(self):  # without config.tasks, one
        return self.tasks or ("depth" if self.target == "depth" else "instance",)

    @property
    def known_tasks(self):  # the default first; "panoptic" is merged of two
        both = {"instance", "semantic"} <= set(self.tasks)
        return ("panoptic", *self.tasks) if both else self.trained_tasks

    def task(self, wanted=None):  # wanted, by default the first, if these weights know it
        task, known = wanted or self.known_tasks[0], ", ".join(self.known_tasks)
        require(task in self.known_tasks, f"--task {task}: these weights know {known}")
        return task

PIXELS = dict(  # of --set space=pixels
    self_condition=0.0, mask_threshold=0.0, eval_steps=10, eval_samples=1)
PRESETS = {
    "tiny": Config(),
    "paper": Config(
        preset="paper", size=512, bits=7, ae_widths=(32, 64, 128, 256), points=12544,
        latent_channels=4, stem_widths=(32, 64, 128), ae_steps=60_000, ae_batch=16,
        ae_lr=1e-4, ids="random", sampling_power=1.0,
        mask_scale=0.18215, image_scale=0.18215, prediction="eps", task_width=768,
        image_encoder="sd", unet_widths=(320, 640, 1280, 1280), unet_attention=(1, 1, 1, 0),
        unet_layers=2, unet_heads=8, freeze_time=1, ldm_steps=200_000, ldm_batch=256,
        ldm_lr=1e-4, eval_steps=50, eval_samples=1, lr_schedule="constant", min_area=512)}

# ---- 2. Randomness and ranks -----------------------------------------------------------

PURPOSES = """scene order task sample points noise timestep self-condition blocks strokes
              motion""".split()

def random_generator(seed, purpose, position):
    """The one source of randomness: a NumPy generator that depends on these three alone.
    So a resumed run, any number of ranks and any batch size draw the same numbers. position:
    the number of a sample or step (int >= 0), or an image's id."""
    if not isinstance(position, (int, np.integer)) or position < 0:
        position = int.from_bytes(f"name {position}".encode())  # a string as one large number
    return np.random.default_rng([int(position), seed, PURPOSES.index(purpose)])

def gaussian_latents(generators, config, device):
    """Standard normal noise, float32 (B, *latent_shape): drawn from one generator per image."""
    noise = [g.standard_normal(config.latent_shape, np.float32) for g in generators]
    return torch.from_numpy(np.stack(noise)).to(device)

def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def is_main():
    return rank_and_world()[0] == 0

def sum_over_ranks(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

def global_mean_count(count):
    """This rank's count, a tensor -> float: the mean over ranks, at least 1 in total. A rank
    divides its sum of losses by it; DDP averages, so all get the mean over all ranks."""
    return sum_over_ranks(count.float()).clamp(min=1) / rank_and_world()[1]

# ---- 3. Mask codes (Sec. 3.1, "Encoding") ----------------------------------------------

def int2bits(ids, n):
    """Analog bits: ids (B, H, W) -> float (B, n, H, W), -1 or +1, lowest first; VOID 0."""
    low, high = (ids.min(), ids.max()) if ids.numel() else (0, 0)
    fits = 0 <= low and high < 2**n
    require(fits, f"ids {low} to {high}, expected 0 to {2**n - 1} with {n} bits")
    shifts = torch.arange(n, device=ids.device).view(1, n, 1, 1)
    bits = ((ids[:, None] >> shifts) & 1).float() * 2 - 1  # (B, n, H, W)
    return bits * (ids[:, None] != VOID)

def bits2int(bits):
    """Inverse of int2bits: float (B, n, H, W) -> int64 ids (B, H, W); all zero is VOID."""
    shifts = torch.arange(bits.shape[1], device=bits.device).view(1, -1, 1, 1)
    return ((bits > 0).long() << shifts).sum(1)

def code_table(config):
    """Codes of all ids, float (N, C) in [-1, 1], VOID zero (Table S1): bits; "colour", a grid
    in the RGB cube; "positional", NeRF's sines and cosines at 4 frequencies."""
    ids, N = torch.arange(config.num_ids, device="cpu"), config.num_ids
    if config.codes == "bit":
        return int2bits(ids.view(-1, 1, 1), config.bits)[:, :, 0, 0]
    if config.codes == "colour":
        levels = next(n for n in range(2, N + 2, 2) if n**3 >= N)  # even: none is zero
        grid = torch.linspace(-1, 1, levels)
        table = torch.cartesian_prod(grid, grid, grid)[ids * levels**3 // N].flip(1)
    else:
        angle = torch.outer((2 * ids / (N - 1) - 1) * math.pi, 2.0 ** torch.arange(4))
        table = torch.cat([angle.sin(), angle.cos()], 1)
    return table * (ids != VOID)[:, None]

def starts_of_runs(values):
    """NumPy (P,) -> the places where a run of equal values begins: far fewer than P in a mask."""
    return np.append(0, np.flatnonzero(values[1:] != values[:-1]) + 1)

def compact_ids(ids, listed):
    """NumPy ids of any size -> 1 + their index in the list `listed`; 0 if not in it."""
    if len(listed) == 0:
        return np.zeros(np.shape(ids), np.int64)
    flat, order = np.ravel(ids), np.argsort(listed)
    start = starts_of_runs(flat)
    rank = np.searchsorted(listed, flat[start], sorter=order)  # in the sorted list
    place = order[rank.clip(max=len(order) - 1)]
    found = np.where(np.asarray(listed)[place] == flat[start], place + 1, 0)
    return found.repeat(np.diff(start, append=flat.size)).reshape(np.shape(ids))

def random_relabel(ids, num_ids, generator):
    """Random distinct ids for the segments of NumPy ids in [0, N-1]; VOID stays."""
    new_id = np.append(VOID, 1 + generator.permutation(num_ids - 1))
    return new_id[ids]

def match_ids(ids, eps, id_latents):
    """The new id of each old one, int64 (B, N): those that Gaussian noise favours, the
    permutation whose latents are nearest to eps; VOID stays. ids int64 (B, H, W), eps
    (B, 4, h, w), id_latents (N, 4). NOTE: paper: random ids; here the noise chooses them,
    because an image with its noise then has one right mask, and few steps find it."""
    from scipy.optimize import linear_sum_assignment
    N, cells = len(id_latents), eps.shape[-2:]

    # how well a cell's noise fits the latent of each id: -|eps - latent|^2 / 2 + constant
    fit = torch.einsum("bchw,nc->bnhw", eps, id_latents)
    fit = fit - 0.5 * id_latents.square().sum(1).view(1, N, 1, 1)

    # summed over a segment's cells, by the share of their pixels that are in it
    share = [F.adaptive_avg_pool2d((ids == segment).float(), cells) for segment in range(N)]
    score = torch.einsum("bshw,bnhw->bsn", torch.stack(share, 1), fit)  # (B, N, N): old, new

    # the best assignment, without VOID; old ids of no pixel score 0 and take what is left
    score = score[:, 1:, 1:].cpu().numpy()
    new_ids = 1 + np.stack([linear_sum_assignment(one, maximize=True)[1] for one in score])
    return F.pad(torch.from_numpy(new_ids), (1, 0)).to(ids.device)  # VOID stays

# ---- 4. Shallow autoencoder (Sec. 3.1, "Architectural Design") -------------------------

conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)

def require_memory(config):
    """UserError where a 3x3 convolution of each width and layer, and what the first one makes of
    one mask, all float32, would not fit in the machine's memory."""
    squares = [width**2 for width in config.ae_widths + config.unet_widths * config.unet_layers]
    needed = 4 * (9 * sum(squares) + config.ae_widths[0] * config.size**2)
    if not hasattr(os, "sysconf"):  # Windows
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    require(needed < there, f"this Config needs {needed / 2**30:.0f} GiB at least, this machine "
            f"has {there / 2**30:.0f}; expected a smaller size, fewer layers or widths")

def fast_layout(x):
    """Activations (B, C, H, W): contiguous on CPUs without AVX-512, which take the gradients of
    the weights of channels-last convolutions at a fifth of the rate; else as they are."""
    slow = x.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512"
    return x.contiguous() if slow else x

class Upsample(nn.ConvTranspose2d):
    """By 2: (B, C, h, w) -> (B, C, 2h, 2w). 2x2 kernels at stride 2 are one matrix product."""

    def __init__(self, width):
        super().__init__(width, width, 2, stride=2)

    def forward(self, x):
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (4 C, C)
        y = F.linear(x.movedim(1, -1), weight, self.bias.repeat(4))  # (B, h, w, 4 C)
        y = y.unflatten(-1, (2, 2, -1)).transpose(2, 3)  # (B, h, 2, w, 2, C)
        return y.flatten(3, 4).flatten(1, 2).movedim(-1, 1)

class LayerNorm2d(nn.LayerNorm):  # over the channels of (B, C, H, W)
    def forward(self, x):
        return fast_layout(super().forward(x.movedim(1, -1)).movedim(-1, 1))

class MaskAutoencoder(nn.Module):
    """Compresses mask codes by 8, decodes N logits at H/2; of target "depth": depth."""

    def __init__(self, config):
        super().__init__()
        require_memory(config)
        self.config, widths, width = config, config.ae_widths, config.ae_widths[-1]
        is_depth = config.target == "depth"
        codes = torch.empty(0, 1) if is_depth else code_table(config)  # (N, C); depth: C = 1
        self.register_buffer("codes", codes, persistent=False)

        moments = 2 if config.latents == "gaussian" else 1  # mean and log variance, or mean
        outputs = 1 if is_depth else config.num_ids
        encoder = [conv3x3(codes.shape[1], widths[0]), nn.SiLU()]
        for c_in, c_out in pairwise(widths):
            encoder += [conv3x3(c_in, c_in), conv3x3(c_in, c_out, stride=2), nn.SiLU()]
        encoder += [conv3x3(width, width), nn.GroupNorm(32, width, eps=1e-6), nn.SiLU(),
                    conv3x3(width, config.latent_channels * moments)]
        self.encoder = nn.Sequential(*encoder)
        decoder = [conv3x3(config.latent_channels, width)]
        for _ in range(2):
            decoder += [Upsample(width), LayerNorm2d(width, eps=1e-6), nn.SiLU()]
        decoder += [nn.GroupNorm(32, width, eps=1e-5), nn.SiLU()]
        self.decoder = nn.Sequential(*decoder, conv3x3(width, outputs))

    def code(self, ids):  # (B, H, W) -> (B, C, H, W); depth is its own code, 0 for NaN
        if self.config.target == "depth":
            return ids.nan_to_num(0)[:, None]
        return fast_layout(F.embedding(ids, self.codes).permute(0, 3, 1, 2))

    def encode(self, codes):  # (B, C, H, W) -> mean latents (B, 4, h, w), unscaled
        return self.encoder(codes)[:, : self.config.latent_channels]  # no log variance

    def decode(self, z):  # (B, 4, h, w), unscaled -> logits (B, N, H/2, W/2)
        return self.decoder(z)

    def reconstruct(self, ids):  # (B, H, W) -> logits (B, N, H/2, W/2)
        return self.decode(self.encode(self.code(ids)))

    def forward(self, ids, eps=None):
        """Training: ids or depth (B, H, W) -> logits (B, N, H/2, W/2), KL divergence (mean
        over B; 0 if deterministic). eps (B, 4, h, w): the noise of gaussian latents."""
        if self.config.latents == "deterministic":
            return self.reconstruct(ids), torch.zeros((), device=ids.device)
        mean, log_var = self.encoder(self.code(ids)).float().chunk(2, 1)
        log_var = log_var.clamp(-30, 20)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum((1, 2, 3)).mean()
        return self.decode(mean + (0.5 * log_var).exp() * eps), kl

# ---- 5. Autoencoder loss: cross-entropy, BCE and Dice at uncertain points (Eq. 2) ------

def sample_uncertain_points(uncertainty, points):
    """PointRend: uncertainty of M random candidates per row, (R, M), M >= points -> indices
    int64 (R, points): 3/4 are the most uncertain, 1/4 any."""
    R, M = uncertainty.shape
    chosen = int(0.75 * points)
    first_random = M - (points - chosen)  # the last candidates are as random as any others
    top = uncertainty[:, :first_random].topk(chosen).indices  # (R, chosen)
    uniform = torch.arange(first_random, M, device=top.device).expand(R, -1)
    return torch.cat([top, uniform], 1)

def pixels_around(coords, height, width):
    """Of the 4 pixels around each place (B, M, 2) in [-1, 1]: y * width + x, at the border the
    nearest, and the bilinear weight, (B, M, 4) each."""
    position = ((coords + 1) * coords.new_tensor([width, height]) - 1) / 2  # 0: a pixel's centre
    corner = position.floor()[:, :, None] + coords.new_tensor([(0, 0), (1, 0), (0, 1), (1, 1)])
    weight = (1 - (position[:, :, None] - corner).abs()).prod(-1)  # (B, M, 4)
    x, y = corner[..., 0].clamp(0, width - 1).long(), corner[..., 1].clamp(0, height - 1).long()
    return y * width + x, weight

def ae_loss(logits, ids, coords, points):
    """Eq. 2: cross-entropy + BCE + Dice, and these parts; means over all ranks without VOID.
    logits (B, N, H/2, W/2), ids int64 (B, H, W), coords (B, M, 2) in [-1, 1]: candidates, of
    which the `points` that are uncertain count. NOTE: PointRend draws candidates per segment;
    here an image's segments share them, because one sampling of the logits serves all. NOTE:
    the released mask loss counts VOID as negative of every segment; here it is left out,
    because unlabelled is not background."""
    # logits of every id at the candidate places, sums over 4 cells whose N logits lie together
    B, N, h, w = logits.shape
    cell, weight = pixels_around(coords, h, w)
    cell = cell + h * w * torch.arange(B, device=ids.device)[:, None, None]
    table = logits.float().movedim(1, -1).reshape(-1, N)
    values = F.embedding_bag(cell.flatten(0, 1), table, mode="sum",
                             per_sample_weights=weight.flatten(0, 1)).view(B, -1, N)  # (B, M, N)

    # true ids of the pixels around them, and of the nearest one
    pixel, weight = pixels_around(coords, *ids.shape[1:])
    labels = ids.flatten(1).gather(1, pixel.flatten(1)).view(pixel.shape)  # (B, M, 4)
    nearest = labels.gather(2, weight.argmax(2, keepdim=True))[..., 0]  # (B, M)

    # which of the N ids is it? asked where the best two are closest
    first, second = values.detach().topk(2).values.unbind(2)
    uncertainty = (second - first).masked_fill(nearest == VOID, -1e9)
    chosen = sample_uncertain_points(uncertainty, points)
    target = nearest.gather(1, chosen)  # (B, P)
    chosen_logits = values.gather(1, chosen[..., None].expand(-1, -1, N))  # (B, P, N)
    ce = F.cross_entropy(chosen_logits.flatten(0, 1), target.flatten(), ignore_index=VOID,
                         reduction="sum")
    ce = ce / global_mean_count((target != VOID).sum())

    # is the point inside of this segment? asked of the segments that there are
    present = torch.zeros(B, N, dtype=torch.bool, device=ids.device)
    present.scatter_(1, ids.flatten(1), True)
    present[:, VOID] = False
    image, segment = present.nonzero(as_tuple=True)  # (S,)
    inside = (weight[image] * (labels[image] == segment[:, None, None])).sum(2)  # (S, M)
    logit, valid = values.transpose(1, 2)[image, segment], nearest[image] != VOID

    # where the logit is near 0
    uncertainty = (-logit.detach().abs()).masked_fill(~valid, -1e9)
    chosen = sample_uncertain_points(uncertainty, points)
    counts = valid.gather(1, chosen).float()
    logit, truth = logit.gather(1, chosen), inside.gather(1, chosen) * counts  # (S, P)
    bce = F.binary_cross_entropy_with_logits(logit, truth, weight=counts, reduction="none")
    bce = bce.sum(1) / counts.sum(1).clamp(min=1)  # (S,)
    probability = logit.sigmoid() * counts
    dice = 1 - (2 * (probability * truth).sum(1) + 1) / ((probability + truth).sum(1) + 1)
    segments = global_mean_count(logit.new_tensor(len(logit)))
    parts = {"ce": ce, "bce": bce.sum() / segments, "dice": dice.sum() / segments}
    return sum(parts.values()), {name: part.detach() for name, part in parts.items()}

# ---- 6. Logits -> segments (Supp. A) ---------------------------------------------------

def resize_nearest(array, size):
    """NumPy map (H, W) -> (height, width) = size: of each new pixel's centre, the old pixel."""
    height, width = size
    y = (2 * np.arange(height) + 1) * array.shape[0] // (2 * height)
    x = (2 * np.arange(width) + 1) * array.shape[1] // (2 * width)
    return array.take(y, 0).take(x, 1)  # contiguous, unlike array[y][:, x]

def neighbours(count, length):
    """Bilinear interpolation of `count` values to `length`: the two that each result lies
    between, int64 (length,), and the share of the second."""
    position = ((torch.arange(length) + 0.5) * (count / length) - 0.5).clamp(min=0)
    first = position.long()
    return first, (first + 1).clamp(max=count - 1), position - first

def most_probable(logits, size, threshold=0.0, values_at_once=2**22, nearest=False):
    """Logits of an image (N, H/2, W/2), upsampled x2, then to (height, width) = size, softmax ->
    ids int32 (height, width); VOID where the highest probability is below `threshold`. Where
    four logits leave no doubt the pixels between them are not computed, the others in bands:
    a photograph of N logits would take gigabytes. nearest: logits (N, H/4, W/4) of pixels,
    the ids are upsampled instead."""
    if nearest:
        probability, ids = logits.float().softmax(0).max(0)
        ids = ids.masked_fill(probability < threshold, VOID).int().cpu()
        return torch.from_numpy(resize_nearest(ids.numpy(), size))
    logits = F.interpolate(logits[None].float(), scale_factor=2, mode="bilinear")[0].cpu()
    N, H, W = logits.shape
    (top, _, down), (left, right, across) = neighbours(H, size[0]), neighbours(W, size[1])

    # no doubt: the winner's lowest corner is above the highest ones of all others together
    corners = F.pad(logits, (0, 1, 0, 1), mode="replicate")
    highest, lowest = F.max_pool2d(corners, 2, 1), -F.max_pool2d(-corners, 2, 1)  # (N, H, W)
    least, winner = lowest.max(0)
    others = (highest.scatter(0, winner[None], -math.inf) - least).exp().sum(0)
    doubt = others > 0.999 * min(1, 1 / max(threshold, 1e-9) - 1)
    ids = winner.int()[top][:, left]

    # elsewhere, some rows of logits at a time, one where the image is wide
    for rows in doubt.any(1).nonzero()[:, 0].split(max(1, 2**16 // (N * size[1]))):
        # interpolate along these rows and the next ones, at the pixels in doubt
        x = doubt[rows].any(0)[left].nonzero()[:, 0]
        two = corners[:, torch.stack([rows, rows + 1]), :-1]
        two = two[..., left[x]].lerp_(two[..., right[x]], across[x])  # (N, 2, R, X)

        # then between the two
        between = torch.isin(top, rows).nonzero()[:, 0]
        for y in between.split(max(1, values_at_once // (N * len(x) + 1))):
            row, share = torch.searchsorted(rows, top[y]), down[y, None]
            values = two[:, 0, row].lerp_(two[:, 1, row], share)  # (N, Y, X)
            best, id = values.max(0)
            probability = 1 / values.sub_(best).exp_().sum(0)
            ids[y[:, None], x] = id.masked_fill(probability < threshold, VOID).int()
    return ids

def postprocess(logits, size, mask_threshold, min_area, nearest=False):
    """Logits (N, H/2, W/2) -> ids int32 (height, width); unsure pixels, small segments VOID.
    NOTE: released code also filters by overlap; here not, because the paper does not."""
    ids = most_probable(logits, size, mask_threshold, nearest=nearest)
    areas = sum(torch.bincount(rows.flatten(), minlength=len(logits)) for rows in ids.split(256))
    for id in ((areas > 0) & (areas < min_area)).nonzero():
        ids[ids == id] = VOID
    return ids

def merge_panoptic(instance_logits, semantic_logits, size, isthing, mask_threshold, min_area,
                   nearest=False):
    """Supp. A: an instance takes the class that most of its pixels have in the semantic map,
    and is VOID where none has one; stuff of a class is one segment. isthing: of the classes
    1..K. Returns ids int32 (height, width) = size, and {id: class}."""
    ids = postprocess(instance_logits, size, mask_threshold, min_area, nearest)
    N = len(instance_logits)
    classes = most_probable(semantic_logits, size, nearest=nearest)
    votes = torch.bincount((ids * N + classes).flatten(), minlength=N * N).view(N, N)
    votes = votes[:, 1 : len(isthing) + 1]  # (N, K)
    class_of, first_of = {}, {}  # {id: class}, {stuff class: its id}
    table = torch.zeros(N, dtype=torch.int32)
    for id in range(1, N):
        if votes[id].any():
            winner = 1 + int(votes[id].argmax())  # the lowest in a tie
            table[id] = id if isthing[winner - 1] else first_of.setdefault(winner, id)
            class_of[int(table[id])] = winner
    return table[ids], class_of

def merge_samples(logits, given=(), least=0.3):
    """What samples of an image agree on: logits (K, N, h, w), whose ids differ -> (N, h, w),
    segments 1, 2, ... from the most to the least agreed on. given: ids that mean the same in
    all samples, and in the result. NOTE: paper: one sample; here, if asked, several, because
    what is in one of them alone is mostly wrong. least: of agreement."""
    K, N, h, w = logits.shape
    probability = logits.float().softmax(1)[:, 1:].flatten(2).flatten(0, 1)  # (K (N-1), h w)
    ids = list(range(1, N)) * K  # of its rows

    # the agreement on a segment: its IoU with the most similar one of another sample, mean;
    # a given one is similar to that of its id alone
    mask = (probability > 0.5).float()
    both, area = mask @ mask.T, mask.sum(1)
    iou = both / (area[:, None] + area - both).clamp(min=1)
    kind = torch.tensor([id if id in given else VOID for id in ids], device=iou.device)
    iou = iou.masked_fill(kind[:, None] != kind, 0)
    iou, place = iou.unflatten(1, (K, N - 1)).max(2)  # (K (N-1), K)
    agreement = (iou.sum(1) - 1) / (K - 1)  # without itself
    place = place + (N - 1) * torch.arange(K, device=place.device)

    # one after the other, given ones first, where there is room: the mean over samples that
    # have it
    order = agreement.argsort(descending=True, stable=True).tolist()
    merged, unused = {}, sorted({*ids} - {*given}, reverse=True)
    taken = torch.zeros_like(mask[0], dtype=torch.bool)
    for s in sorted(order, key=lambda s: ids[s] not in given):
        is_given = ids[s] in given
        if not is_given and (agreement[s] < least or not unused):
            break
        is_merged = is_given and ids[s] in merged
        if not is_merged and mask[s][taken].sum() < 0.5 * area[s]:
            share = probability[place[s][iou[s] > 0.5]].mean(0)
            merged[ids[s] if is_given else unused.pop()] = share
            taken |= share > 0.5

    # logits of shares that sum up to 1, the rest VOID
    result = torch.zeros(N, h * w, device=logits.device)
    for id, share in merged.items():
        result[id] = share
    result /= result.sum(0).clamp(min=1)
    result[VOID] = 1 - result.sum(0)
    return result.clamp(min=1e-6).log().view(N, h, w)

def segments_of(ids, category_of=()):
    """COCO's segments_info of a map (H, W). category_of: {id: category}, by default 1."""
    segments, category_of = [], dict(category_of)
    for id in np.setdiff1d(ids, [VOID]).tolist():
        inside = ids == id
        x, y = np.flatnonzero(inside.any(0)).tolist(), np.flatnonzero(inside.any(1)).tolist()
        segments.append({"id": id, "category_id": category_of.get(id, 1),
                         "area": int(inside.sum()), "iscrowd": 0,
                         "bbox": [x[0], y[0], x[-1] - x[0] + 1, y[-1] - y[0] + 1]})
    return segments

def draw(outputs, task, size, config):
    """An image's {task: output} -> NumPy ids int32 (height, width), segments_info; of task
    "depth" float (height, width) in [-1, 1], None."""
    if task == "depth":
        depth = F.interpolate(outputs[task][None].float(), size, mode="bilinear")[0, 0]
        return depth.cpu().numpy(), None
    classes, class_of = json.loads(config.categories or "[]"), {}
    options = config.mask_threshold, config.min_area, config.in_pixels  # of postprocess
    if task == "instance":
        ids = postprocess(outputs[task], size, *options)
    elif task == "semantic":
        ids = most_probable(outputs[task], size, nearest=config.in_pixels)
        ids[ids > len(classes)] = VOID
        class_of = {place: place for place in range(1, len(classes) + 1)}
    else:
        ids, class_of = merge_panoptic(outputs["instance"], outputs["semantic"], size,
                                       [c["isthing"] for c in classes], *options)
    ids = ids.numpy()
    return ids, segments_of(ids, {id: classes[c - 1]["id"] for id, c in class_of.items()})

# ---- 7. Noise schedule and loss weights (Eq. 3, 5) -------------------------------------

class NoiseSchedule(nn.Module):
    """Stable Diffusion's `scaled_linear` schedule of T = 1000 steps."""

    T = 1000

    def __init__(self):
        super().__init__()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, self.T, dtype=torch.float64) ** 2
        self.register_buffer("alpha_bar", (1 - betas).cumprod(0).float(), persistent=False)

    def alpha_bar_at(self, t):  # int or int64 (B,); -1: x0 itself
        t = torch.as_tensor(t, device=self.alpha_bar.device)
        return torch.where(t < 0, 1, self.alpha_bar[t])

    def signal_and_noise(self, t):  # sqrt of alpha_bar_t and 1 - alpha_bar_t, (B, 1, 1, 1)
        alpha_bar = self.alpha_bar_at(t).view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x0, eps, t):  # Eq. 3
        signal, noise = self.signal_and_noise(t)
        return signal * x0 + noise * eps

    def predict_x0(self, z_t, eps, t):  # Eq. 3 solved for x0
        signal, noise = self.signal_and_noise(t)
        return (z_t - noise * eps) / signal

    def step(self, x0, eps, t, t_next, eta=0.0, fresh_noise=0.0):
        """Eq. 5: z at t_next (-1, of pixels 0: x0 itself), of predicted x0, eps (B, 4, h, w) at t.
        eta 0: DDIM (paper); 1: DDPM, where fresh_noise replaces a part of eps."""
        alpha_bar, alpha_bar_next = self.alpha_bar_at(t), self.alpha_bar_at(t_next)
        variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
        sigma = eta * variance.sqrt()  # of DDIM, Eq. 16
        rest = (1 - alpha_bar_next - sigma**2).clamp(min=0)  # rounding may go below
        z = alpha_bar_next.sqrt() * x0 + rest.sqrt() * eps
        return z + sigma * fresh_noise

    def weights(self, kind):  # of the loss at each timestep, float (T,)
        j, snr = torch.arange(self.T), self.alpha_bar / (1 - self.alpha_bar)
        return {"paper": ((j + 1) / (0.25 * self.T)).clamp(max=1).to(snr),
                "released": snr.clamp(max=2) / snr, "none": torch.ones_like(snr)}[kind]

    def timesteps(self, steps, power=1.0):
        """S = steps ints from T - 1 down; power 1: evenly spaced, 2: half of them above 3/4 T.
        NOTE: paper: subtracts T // S; here the list is rounded, so that it spans T where S does
        not divide T."""
        require(1 <= steps <= self.T, f"{steps} sampling steps, expected 1 to {self.T}")
        return [round(self.T - self.T * (i / steps) ** power) - 1 for i in range(steps)]

def noise_of_samples(noise, samples):
    """B pairs (seed, position) -> K B, for K samples of each; the first are the same B."""
    return [(seed, f"{position} {k}" if k else position)
            for k in range(samples) for seed, position in noise]

def noise_and_timesteps(positions, config, seed, device):
    """eps (B, 4, h, w) and t int64 (B,), of pixels float, of samples at these positions."""
    positions, T = positions.tolist(), NoiseSchedule.T
    noise = [random_generator(seed, "noise", p) for p in positions]
    draws = [random_generator(seed, "timestep", p).random() for p in positions]
    past = [T * draw**config.timestep_power for draw in draws]  # since T
    t = [T - x if config.in_pixels else T - 1 - int(x) for x in past]
    return gaussian_latents(noise, config, device), torch.tensor(t, device=device)

# ---- 8. The UNet on concatenated latents, the image encoders (Sec. 3.2) ----------------

def build_unet(config, image_channels):
    """Stable Diffusion's UNet, random, over [z_t, z_image, x0_previous] (B, 4 + C + 4, h, w).
    Without config.tasks nothing feeds cross-attention, which is then removed."""
    from diffusers import UNet2DConditionModel
    channels, gives_logits = config.latent_shape[0], config.in_pixels and config.pixel_loss == "ce"
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.unet_attention]
    unet = UNet2DConditionModel(
        in_channels=2 * channels + image_channels,
        out_channels=config.num_ids if gives_logits else channels, down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        block_out_channels=config.unet_widths, layers_per_block=config.unet_layers,
        cross_attention_dim=config.task_width,
        attention_head_dim=config.unet_heads)  # diffusers' name for their number
    for module in unet.modules():
        if hasattr(module, "attn2") and not config.tasks:
            module.attn2 = module.norm2 = None
    nn.init.zeros_(unet.conv_out.weight)  # at first it predicts nothing
    return unet

def image_tensor(image, size):
    """image uint8 (H, W, 3) -> float (3, size, size) in [-1, 1], antialiased."""
    fits = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size
    require(fits, f"image: {image.dtype} {image.shape}, expected uint8 (H, W, 3), as of read_image")
    image = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    image = F.interpolate(image, (size, size), mode="bilinear", antialias=True)[0]
    return image.float().div_(127.5).sub_(1)

class PatchStem(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> latents (B, channels, h, w), as all encoders. NOTE:
    paper: pretrained latents; here also this stem, because it needs no weights."""

    def __init__(self, config):
        super().__init__()
        self.channels, self.scale, layers = config.stem_widths[-1], 1.0, []
        for c_in, c in pairwise((3, *config.stem_widths)):
            layers += [conv3x3(c_in, c, stride=2), nn.GroupNorm(8, c), nn.SiLU(),
                       conv3x3(c, c), nn.GroupNorm(8, c), nn.SiLU()]
        self.layers = nn.Sequential(*layers, conv3x3(self.channels, self.channels))

    def forward(self, image):
        return self.layers(image)

def run_frozen(layers, image):
    """No gradient; all in bfloat16, weights too, if autocast asks for it, which itself would keep
    norms in float32 (a fifth slower on a GPU); else in float32: float16 overflows."""
    kind = image.device.type
    asked = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    dtype = torch.bfloat16 if asked == torch.bfloat16 else torch.float32
    weights = {name: weight.to(dtype) for name, weight in layers.state_dict().items()}
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        return functional_call(layers, weights, image.to(dtype))

class StableDiffusionEncoder(nn.Module):
    """The paper's image latents: the means of Stable Diffusion's frozen encoder."""

    def __init__(self, config):
        from diffusers import AutoencoderKL
        super().__init__()
        vae = AutoencoderKL(**json.loads(config.encoder_json))
        self.layers = nn.Sequential(vae.encoder, vae.quant_conv).requires_grad_(False)
        self.channels, self.scale = vae.config.latent_channels, vae.config.scaling_factor

    def forward(self, image):
        return run_frozen(self.layers, image)[:, : self.channels].float()

class DINOv2Encoder(nn.Module):
    """Frozen patch tokens of DINOv2, one for each latent cell (Table S3)."""

    def __init__(self, config):
        from transformers import Dinov2Config, Dinov2Model
        super().__init__()
        shape = Dinov2Config(**json.loads(config.encoder_json))
        self.layers = Dinov2Model(shape).requires_grad_(False)
        self.channels, self.scale = shape.hidden_size, 1.0

    def forward(self, image):
        """Images (B, 3, 8 h, 8 w) in [-1, 1] -> tokens (B, channels, h, w)."""
        h, w, patch = image.shape[-2] // 8, image.shape[-1] // 8, self.layers.config.patch_size
        image = F.interpolate(image, (patch * h, patch * w), mode="bilinear", antialias=True)
        mean, std = (image.new_tensor(values).view(3, 1, 1)
                     for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        image = (image / 2 + 0.5 - mean) / std
        tokens = run_frozen(self.layers, image).last_hidden_state[:, 1:]  # without CLS
        return tokens.float().mT.unflatten(2, (h, w))  # (B, C, h, w)

class Lite0Block(nn.Sequential):
    """Expand, filter, project; the batch norms are folded into the convolutions."""

    def __init__(self, c_in, c, kernel, stride=1, expansion=6):
        from torchvision.ops import Conv2dNormActivation
        convolve = partial(Conv2dNormActivation, norm_layer=None, activation_layer=nn.ReLU6)
        wide, pad = c_in * expansion, kernel // 2
        super().__init__(
            convolve(c_in, wide, 1) if expansion > 1 else nn.Identity(),
            # as TensorFlow: at stride 2 one less at the top and left
            nn.ZeroPad2d(2 * (pad - 1, pad)) if stride == 2 else nn.Identity(),
            convolve(wide, wide, kernel, stride, 0 if stride == 2 else pad, groups=wide),
            convolve(wide, c, 1, activation_layer=None))
        self.residual = stride == 1 and c_in == c

    def forward(self, x):
        return x + super().forward(x) if self.residual else super().forward(x)

class Lite0Encoder(nn.Module):
    """Frozen features of EfficientNet-Lite0, of strides 8, 16 and 32 in the image at twice its
    size, brought to the latent cells, and a small trained projection."""

    def __init__(self, config):
        from torchvision.ops import Conv2dNormActivation
        super().__init__()
        stem = Conv2dNormActivation(3, 32, 3, 2, 0, norm_layer=None, activation_layer=nn.ReLU6)
        layers, c_in = [nn.ZeroPad2d((0, 1, 0, 1)), stem, Lite0Block(32, 16, 3, 1, 1)], 16
        for c, kernel, stride, repeats in ((24, 3, 2, 1), (40, 5, 2, 1), (80, 3, 2, 2),
                                           (112, 5, 1, 2), (192, 5, 2, 3), (320, 3, 1, 0)):
            layers += [Lite0Block(c_in, c, kernel, stride)]
            layers += [Lite0Block(c, c, kernel) for _ in range(repeats)]
            c_in = c
        self.layers = nn.Sequential(*layers).requires_grad_(False)
        self.channels, self.scale = config.stem_widths[-1], 1.0
        self.projection = nn.Sequential(
            nn.Conv2d(40 + 112 + 320, self.channels, 1), nn.GroupNorm(8, self.channels),
            nn.SiLU(), conv3x3(self.channels, self.channels))

    def forward(self, image):
        """Images (B, 3, H, W) in [-1, 1] -> features (B, channels, h, w)."""
        cells, features = [n // 8 for n in image.shape[-2:]], []
        x = F.interpolate(image, scale_factor=2, mode="bilinear")
        for part in (self.layers[:7], self.layers[7:13], self.layers[13:]):  # to 8, 16, 32
            x = run_frozen(part, x)
            features.append(F.interpolate(x.float(), cells, mode="bilinear"))
        return self.projection(torch.cat(features, 1))

IMAGE_ENCODERS = {"patch": PatchStem, "sd": StableDiffusionEncoder, "dinov2": DINOv2Encoder,
                  "lite0": Lite0Encoder}

# ---- 9. The model: its loss (Eq. 4, Alg. 1), sampling (Alg. 2), inpainting (Alg. 3) ----

class LDMSeg(nn.Module):
    """Eq. 1: stage 1's frozen autoencoder; the image encoder and UNet of stage 2."""

    make_autoencoder, make_schedule = MaskAutoencoder, NoiseSchedule

    def __init__(self, config):
        super().__init__()
        names = ", ".join(IMAGE_ENCODERS)
        require(config.image_encoder in IMAGE_ENCODERS,
                f"image encoder {config.image_encoder}, expected one of {names}")
        self.config, self.schedule = config, self.make_schedule()
        self.autoencoder = self.make_autoencoder(config).requires_grad_(False)
        self.image_encoder = IMAGE_ENCODERS[config.image_encoder](config)
        self.unet = build_unet(config, self.image_encoder.channels)
        if config.tasks:
            self.task_embedding = nn.Embedding(len(config.tasks), config.task_width)
        if "depth" in config.tasks:
            depth = MaskAutoencoder(replace(config, target="depth"))
            self.depth_autoencoder = depth.requires_grad_(False)
        weights = self.schedule.weights(config.loss_weights)
        self.register_buffer("loss_weights", weights, persistent=False)

    device = property(lambda self: self.loss_weights.device)
    matched = property(lambda self: self.config.ids == "matched")

    def timesteps(self, steps):  # of sampling: S pairs, a timestep and the next, at last -1
        listed = self.schedule.timesteps(steps, self.config.sampling_power)
        return [*pairwise([*listed, -1])]

    def encode_image(self, image):  # (B, 3, H, W) -> z_image (B, C, h, w), scaled
        scale = self.config.image_scale or self.image_encoder.scale
        return self.image_encoder(image) * scale

    @torch.no_grad()
    def encode_mask(self, ids):  # (B, H, W) -> mask latents (B, 4, h, w), scaled
        z = self.autoencoder.encode(self.autoencoder.code(ids))
        return z.float() * self.config.mask_scale

    def match_to(self, ids, z):
        """ids int64 (B, H, W) -> the same map with the ids that z (B, 4, h, w) favours, noise or
        latents, if config.ids says so, and the new id of each old one, int64 (B, N)."""
        new_ids = torch.arange(self.config.num_ids, device=ids.device).expand(len(ids), -1)
        if self.matched:
            with torch.autocast(ids.device.type, enabled=False):  # small differences decide
                new_ids = match_ids(ids, z, self.id_latents.to(ids.device))
        return new_ids.gather(1, ids.flatten(1)).view_as(ids), new_ids

    @cached_property
    def id_latents(self):
        """Latents of each id, (N, 4), scaled: the middle cell of a map of nothing else. They
        are kept: the autoencoder is frozen."""
        size, ids = self.config.size, torch.arange(self.config.num_ids, device=self.device)
        maps = [self.encode_mask(id.expand(1, size, size)) for id in ids]
        return torch.cat(maps)[:, :, size // 16, size // 16]

    @torch.no_grad()
    def clean_latents(self, ids, depth, task):
        """x0 (B, 4, h, w), scaled, and its valid pixels (B, H, W): of depth in the samples
        whose task is depth (task int64 (B,)), else of ids; depth None: no sample is."""
        x0, valid = self.encode_mask(ids), ids != VOID
        if depth is None:
            return x0, valid
        z = self.depth_autoencoder.encode(self.depth_autoencoder.code(depth)).float()
        is_depth = (task == self.config.tasks.index("depth")).view(-1, 1, 1)  # (B, 1, 1)
        x0 = torch.where(is_depth[..., None], z * self.config.depth_scale, x0)
        return x0, torch.where(is_depth, depth.isfinite(), valid)

    def encode_previous(self, ids):
        """ids (B, H, W) of the frames before -> z_previous (B, 4, h, w), zero where all VOID, and
        bool (B, 1, 1, 1), where not."""
        there = (ids != VOID).any(2).any(1).view(-1, 1, 1, 1)
        return self.encode_mask(ids) * there, there

    def encode_known(self, ids, known):
        """ids, known bool (B, H, W) -> z_known (B, 4, h, w), of ids that are VOID where unknown;
        bool (B, 1, h, w): cells with any known pixel, with all known."""
        known = known & (ids != VOID)
        share = F.avg_pool2d(known.float()[:, None], 8)
        return self.encode_mask(ids * known), share > 0, share >= 1

    def decode(self, z, task="instance", output=None):  # -> logits, depth (B, N or 1, H/2, W/2)
        if task == "depth":
            return self.depth_autoencoder.decode(z / self.config.depth_scale)
        return self.autoencoder.decode(z / self.config.mask_scale)

    def predict(self, z_t, z_image, x0_previous, t, task=0):
        """The UNet's output, and the x0 and eps that it implies, (B, 4, h, w). t: (B,) or one
        number, as task, a place in config.trained_tasks (Supp. A). NOTE: paper: predicts eps;
        here also v, because a small, random UNet learns it sooner."""
        t = torch.as_tensor(t, device=z_t.device).expand(len(z_t))
        context = None
        if self.config.tasks:
            task = torch.as_tensor(task, device=z_t.device).expand(len(z_t))
            context = self.task_embedding(task)[:, None]  # (B, 1, width)
        inputs = torch.cat([z_t, z_image, x0_previous], 1)
        output = self.unet(inputs, t, encoder_hidden_states=context).sample.float()
        return output, *self.x0_and_eps(output, z_t, t)

    def x0_and_eps(self, output, z_t, t):  # that the UNet's output implies
        if self.config.prediction == "eps":
            return self.schedule.predict_x0(z_t, output, t), output
        signal, noise = self.schedule.signal_and_noise(t)
        return signal * z_t - noise * output, noise * z_t + signal * output

    def errors(self, output, x0, eps, t, ids):
        """Of the UNet's output, (B, h, w), and their weights, which it broadcasts with."""
        signal, noise = self.schedule.signal_and_noise(t)
        target = eps if self.config.prediction == "eps" else signal * eps - noise * x0
        return (output - target).square().mean(1), self.loss_weights[t].view(-1, 1, 1)

    def diffusion_loss(self, image, ids, eps, t, self_condition, known=None, previous=None,
                       task=0, depth=None, z_image=None):
        """Eq. 4: squared error of the prediction (eps or v), weighted by timestep; and without
        weights. image (B, 3, H, W), ids int64, known bool, depth (B, H, W), eps (B, 4, h, w)
        Gaussian, t, task (places in config.tasks) int64 (B,). self_condition: feed a first
        estimate of x0 (Sec. 4.1, Analog Bits); known: feed these pixels, for `inpaint`;
        previous: feed these ids of the frame before (VOID: there is none), for videos; z_image:
        the image's latents, where a cache has them. NOTE:
        paper: a sum over C, h, w, a mean over images; here a mean over all cells that are not
        VOID, because the learning rate then fits all sizes, and VOID has no truth."""
        # each segment takes the id that its noise favours; classes have one answer already, and
        # so has what the frame before shows
        matched, _ = self.match_to(ids, eps)
        is_class = [name == "semantic" for name in self.config.trained_tasks]
        is_class = torch.tensor(is_class, device=ids.device)
        keep = is_class[task].view(-1, 1, 1)
        x0_previous = torch.zeros_like(eps)
        if previous is not None:
            x0_previous, there = self.encode_previous(previous)
            keep = keep | there[:, 0]
        ids = torch.where(keep, ids, matched)

        # z_t = f_t(y) * s; z_i = f_i(x) * s
        x0, valid = self.clean_latents(ids, depth, task)
        z_image = self.encode_image(image) if z_image is None else z_image

        # z_t = scheduler.add_noise(z_t, noise, j)
        z_t = self.schedule.add_noise(x0, eps, t)

        # self-conditioning on a first estimate of x0, or zero; given parts replace it
        z_known, touched = torch.zeros_like(z_t), torch.zeros_like(z_t, dtype=torch.bool)
        if known is not None:
            z_known, touched, _ = self.encode_known(ids, known)
        x0_previous = torch.where(touched, z_known, x0_previous)
        if self_condition:
            with torch.no_grad():
                _, estimate, _ = self.predict(z_t, z_image, x0_previous, t, task)
            x0_previous = torch.where(touched, z_known, estimate)

        # noise_pred = h(z_c, j)
        output, _, _ = self.predict(z_t, z_image, x0_previous, t, task)

        # loss = mean((noise_pred - noise)**2 * weights[j]), cells whose centre is not VOID
        error, weights = self.errors(output, x0, eps, t, ids)
        valid = F.interpolate(valid.float()[:, None], z_t.shape[-2:], mode="nearest-exact")
        error = error * valid[:, 0]  # (B, h, w)
        weighted = error * weights
        count = global_mean_count(valid.sum())
        return weighted.sum() / count, error.detach().sum() / count

    forward = diffusion_loss  # what DDP calls

    @torch.no_grad()
    def sample(self, image, noise, steps, eta=0.0, task="instance", previous=None,
               return_all=False):
        """Alg. 2, self-conditioned (Sec. 4.1): images (B, 3, H, W) -> logits (B, N, H/2, W/2),
        or depth (B, 1, H/2, W/2). noise: B pairs (seed, position), or K B of them, K times the
        images, which gives K B results; eta: as in NoiseSchedule.step; task: one of
        config.trained_tasks; previous: ids int64 (B, H, W) of the frames before; return_all: a
        list, one per step."""
        known = self.config.trained_tasks
        require(task in known, f"task {task}, expected one of {known}")
        generators = [random_generator(seed, "noise", position) for seed, position in noise]

        # z_i = f_i(x) * s; z_t = Gaussian noise
        z_image = self.encode_image(image).repeat(len(noise) // len(image), 1, 1, 1)
        predictions = []  # what `decode` takes, of each step or of the last one
        z_t = first_noise = gaussian_latents(generators, self.config, self.device)
        x0_previous = torch.zeros_like(z_t)
        if previous is not None:
            fits = self.config.self_condition or self.config.previous
            require(fits, "these weights never saw a mask before; train with --set previous=0.5")
            x0_previous, _ = self.encode_previous(previous)
        for t, t_next in self.timesteps(steps):
            # noise_pred = h(z_c, j), self-conditioned on the last estimate of x0
            output, x0, eps = self.predict(z_t, z_image, x0_previous, t, known.index(task))
            x0_previous = x0 if self.config.self_condition else x0_previous
            if not return_all:
                predictions.clear()  # logits of all steps are large
            predictions.append((x0, task, output))

            # z_t = scheduler.step(z_t, noise_pred, j, j_prev), Eq. 5
            eps = first_noise if self.matched else eps
            fresh = gaussian_latents(generators, self.config, self.device) if eta else 0.0
            z_t = self.schedule.step(x0, eps, t, t_next, eta, fresh)

        # y_pred = g(z_t)
        if return_all:
            return [self.decode(*prediction) for prediction in predictions]
        return self.decode(*predictions[-1])

    @torch.no_grad()
    def inpaint(self, image, ids, known, noise, steps, repeats=1):
        """Alg. 3: ids int64 (B, H, W), given where `known`, bool (B, H, W) -> logits
        (B, N, H/2, W/2); the rest as in `sample`. NOTE: paper: the mask is resized to cells;
        here cells with all pixels known are pasted, those with any only fed in self-
        conditioning, because pasting them does harm. NOTE: paper: one pass over each timestep;
        here `repeats`, with noise again on what the last one found (RePaint)."""
        generators = [random_generator(seed, "noise", position) for seed, position in noise]

        # z_i = f_i(x) * s; z_t = Gaussian noise
        samples = len(noise) // len(image)
        z_image = self.encode_image(image).repeat(samples, 1, 1, 1)
        ids, known = ids.repeat(samples, 1, 1), known.repeat(samples, 1, 1)
        z_t = first_noise = gaussian_latents(generators, self.config, self.device)
        timesteps, x0, given = self.timesteps(steps), torch.zeros_like(z_t), ids * known
        task = self.config.trained_tasks.index("instance")

        # given segments take the ids that an estimate without them has there
        feed_back, estimate = bool(self.config.self_condition), x0
        if self.matched:
            # each pass reads the last one's estimate; more than three bring nothing
            for _ in range(3 if feed_back else 1):
                _, estimate, _ = self.predict(z_t, z_image, estimate, timesteps[0][0], task)
            given, _ = self.match_to(given, estimate)

        # z_t_masked = f_t(y) * s; m at 1/8
        z_known, touched, complete = self.encode_known(given, known)
        touched = touched & (feed_back or self.config.given_share > 0)  # or it never saw hints
        for t, t_next in timesteps:
            for repeat in range(repeats):
                if repeat > 0:
                    again = first_noise if self.matched else gaussian_latents(
                        generators, self.config, self.device)
                    z_t = self.schedule.add_noise(x0, again, t)

                # noise_pred = h(z_c, j); z_t without it (Eq. 3 solved) is x0
                x0_previous = torch.where(touched, z_known, feed_back * x0)
                output, x0, eps = self.predict(z_t, z_image, x0_previous, t, task)

                # z_t[:, m] = z_t_masked[:, m]: in x0, where all pixels are known
                x0 = torch.where(complete, z_known, x0)

            # z_t = add_noise(x0, noise_pred, j_prev), Eq. 3: what Eq. 5 does with eta 0
            z_t = self.schedule.step(x0, first_noise if self.matched else eps, t, t_next)

        # y_pred = g(z_t), with the caller's ids, where most of what is given has them
        logits = self.decode(z_t, output=output)
        _, new_ids = self.match_to(ids * known, z_t)
        return logits.gather(1, new_ids[:, :, None, None].expand_as(logits))

    def sample_tasks(self, batch, tasks, steps=None, eta=0.0, samples=None):
        """{task: output}, what `draw` needs for tasks, of a batch {"image", "noise"}, merged of
        `samples`: instances by what they agree on, classes and depth by their mean. Steps and
        samples are by default config.eval_steps and .eval_samples."""
        steps, samples = steps or self.config.eval_steps, samples or self.config.eval_samples
        wanted = {"instance", "semantic", *tasks} if "panoptic" in tasks else set(tasks)
        noise = noise_of_samples(batch["noise"], samples)
        outputs = {task: self.sample(batch["image"], noise, steps, eta, task,
                                     batch.get("previous")) for task in TASKS if task in wanted}
        if samples == 1:
            return outputs
        for task, output in outputs.items():
            several = output.float().unflatten(0, (samples, -1))  # (K, B, N or 1, h, w)
            if task == "instance":
                outputs[task] = torch.stack([merge_samples(one) for one in several.unbind(1)])
            elif task == "semantic":
                outputs[task] = several.softmax(2).mean(0).log()
            else:
                outputs[task] = several.mean(0)
        return outputs

    def inpaint_samples(self, image, ids, known, noise, steps=None, repeats=1, samples=None):
        """`inpaint`, merged of several samples, by default config.eval_samples of at least four
        steps; of a single one at least ten."""
        samples = samples or self.config.eval_samples
        steps = steps or max(self.config.eval_steps, 10 if samples == 1 else 4)
        noise = noise_of_samples(noise, samples)
        logits = self.inpaint(image, ids, known, noise, steps, repeats)
        if samples == 1:
            return logits
        several = logits.unflatten(0, (samples, -1)).unbind(1)  # of an image (K, N, h, w)
        given = [set(one.unique().tolist()) - {VOID} for one in ids * known]
        return torch.stack([merge_samples(*one) for one in zip(several, given)])

    def segment(self, image, steps=None, task=None, seed=0, samples=None):
        """image uint8 (H, W, 3) of any size -> ids int32 (H, W), 0 = VOID, and COCO's
        segments_info, as `draw`. steps, samples: as in `sample_tasks`; task: of
        config.known_tasks, by default the first."""
        task, image = self.config.task(task), np.asarray(image)
        picture = image_tensor(image, self.config.size)[None].to(self.device)
        batch = {"image": picture, "noise": [(seed, 0)]}
        outputs = self.sample_tasks(batch, [task], steps, samples=samples)
        outputs = {name: output[0] for name, output in outputs.items()}
        return draw(outputs, task, image.shape[:2], self.config)

    def complete(self, image, given_mask, steps=None, repeats=1, seed=0, return_confidence=False,
                 samples=None):
        """Complete a mask, int ids (h, w) of the caller's choice, 0 = unknown, of an image uint8
        (H, W, 3) -> as `segment`, what is given unchanged, new segments with other ids.
        steps, samples: as in `inpaint_samples`.
        return_confidence: also the highest probability at each cell of logits, resized, (H, W)."""
        self.config.task("instance")  # or a UserError
        image, mask, N = np.asarray(image), np.asarray(given_mask), self.config.num_ids
        picture = image_tensor(image, self.config.size)[None].to(self.device)
        size, given = image.shape[:2], np.setdiff1d(mask, [VOID])
        fits = (mask.dtype.kind in "iu" and mask.ndim == 2 and 0 < len(given) < N and 0 < given[0]
                and given[-1] < 2**24
                and abs(mask.shape[0] / mask.shape[1] * size[1] / size[0] - 1) < 0.02)
        require(fits, f"mask: {mask.dtype} {mask.shape}, {len(given)} given segments, expected "
                f"ints in the aspect of the image of {size}, of 1 to {N - 1} segments, below 2^24")

        # Alg. 3 at the model's size; a pixel's largest id counts, so that no stroke is lost
        ids = compact_ids(mask, given)
        small = F.adaptive_max_pool2d(torch.from_numpy(ids)[None].float(), self.config.size)
        small = small.long().to(self.device)
        logits = self.inpaint_samples(picture, small, small != VOID, [(seed, 0)], steps, repeats,
                                      samples)[0]

        # what is given comes back unchanged, with the caller's ids; new segments take the
        # lowest ones that are not used
        drawn, _ = draw({"instance": logits}, "instance", size, self.config)
        ids = resize_nearest(ids, size)
        unused = np.setdiff1d(np.arange(1, len(given) + N), given)
        callers_ids = np.array([VOID, *given, *unused], np.int32)
        result = callers_ids[np.where(ids != VOID, ids, drawn)]
        if return_confidence:
            confidence = logits.float().softmax(0).amax(0)[None, None]
            confidence = F.interpolate(confidence, size, mode="bilinear")[0, 0].cpu().numpy()
            return result, segments_of(result), confidence
        return result, segments_of(result)

# ---- 10. Pix2Seq-D (Chen et al., 2023), the closest relative ---------------------------

class AnalogBits(nn.Module):
    """Pix2Seq-D's place of the autoencoder: bits of -b and b at 1/4 of the size, no weights."""

    def __init__(self, config):
        super().__init__()
        require_memory(config)
        self.config = config
        self.register_buffer("codes", config.bits_scale * code_table(config), persistent=False)

    def shrink(self, ids):  # (B, H, W) -> (B, h, w), the pixel at each centre
        size = self.config.latent_shape[1:]
        return F.interpolate(ids[:, None].float(), size, mode="nearest-exact")[:, 0].long()

    def code(self, ids):  # (B, H, W) -> (B, n, h, w)
        return F.embedding(self.shrink(ids), self.codes).permute(0, 3, 1, 2)

    def decode(self, z):  # (B, n, h, w) -> logits (B, N, h, w): the nearest code's is highest
        with torch.autocast(z.device.type, enabled=False):
            fit = torch.einsum("bnhw,kn->bkhw", z, 2 * self.codes)
        fit = fit - self.codes.square().sum(1).view(1, -1, 1, 1)
        return fit * (4 / self.config.bits_scale**2)

    def reconstruct(self, ids):  # (B, H, W) -> logits (B, N, h, w)
        return self.decode(self.code(ids))

class CosineSchedule(NoiseSchedule):
    """Pix2Seq-D's, of times from T to 0 that need not be whole."""

    def alpha_bar_at(self, t):
        t = torch.as_tensor(t, device=self.alpha_bar.device) / self.T
        return ((t + 0.0002) / 1.00025 * (math.pi / 2)).cos().square()

class Pix2SeqD(LDMSeg):
    """Pix2Seq-D (Chen et al., ICCV 2023), the closest relative: x0 are the bits themselves, at
    1/4 of the size, and the UNet gives logits of ids. What it does not define is LDMSeg's.
    NOTE: there a transformer on ResNet-50 features, here LDMSeg's UNet and image encoder,
    because then only the method differs."""

    make_autoencoder, make_schedule = AnalogBits, CosineSchedule

    def timesteps(self, steps):  # their Alg. 2: the next time is td steps further than it need be
        require(steps >= 1, f"{steps} sampling steps, expected at least 1")
        T, td = self.schedule.T, self.config.td
        return [(T - T * k / steps, max(T - T * (k + 1 + td) / steps, 0)) for k in range(steps)]

    def encode_image(self, image):  # (B, 3, H, W) -> z_image (B, C, h, w), at 1/4
        size = self.config.latent_shape[1:]
        return F.interpolate(super().encode_image(image), size, mode="bilinear")

    def encode_mask(self, ids):
        return self.autoencoder.code(ids)

    def encode_known(self, ids, known):  # a cell is a pixel; any known one counts
        ids = F.max_pool2d((ids * known).float(), 4).long()  # the largest id
        there = (ids != VOID)[:, None]
        return self.encode_mask(ids), there, there

    def decode(self, z, task="instance", output=None):  # -> logits (B, N, H/4, W/4)
        return output if self.config.pixel_loss == "ce" else self.autoencoder.decode(z)

    def x0_and_eps(self, output, z_t, t):
        """As LDMSeg's, of logits (B, N, h, w) or, of pixel_loss "l2", bits (B, n, h, w)."""
        if self.config.pixel_loss == "ce":  # the mean of all bits, by their probability
            with torch.autocast(output.device.type, enabled=False):
                x0 = torch.einsum("bkhw,kn->bnhw", output.softmax(1), self.autoencoder.codes)
        else:
            x0 = output * self.config.bits_scale
        signal, noise = self.schedule.signal_and_noise(t)
        return x0, (z_t - signal * x0) / noise

    def errors(self, output, x0, eps, t, ids):
        """Cross-entropy of logits, or squared error of bits, (B, h, w), and the weights of
        pixels: 1 / c**loss_power, c the area of its segment, 1 in the mean over an image."""
        ids = self.autoencoder.shrink(ids)
        if self.config.pixel_loss == "ce":
            error = F.cross_entropy(output, ids, reduction="none")
        else:
            error = (output - x0 / self.config.bits_scale).square().mean(1)
        area = F.one_hot(ids.flatten(1), self.config.num_ids).sum(1)  # (B, N)
        weights = area.gather(1, ids.flatten(1)).view_as(ids) ** -self.config.loss_power
        valid = ids != VOID
        mean = (weights * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
        return error, valid * weights / mean.clamp(min=1e-9).view(-1, 1, 1)

# ========================================================================================
# Part II. Data and metrics
# ========================================================================================

# ---- 11. Metrics: Panoptic Quality (Kirillov et al., 2019), depth ----------------------

class PanopticQuality:
    """Panoptic Quality and mIoU. categories: COCO's; class_agnostic: one for all."""

    def __init__(self, categories, class_agnostic=False):
        self.class_agnostic = class_agnostic
        self.categories = [{"id": 1, "isthing": 1}] if class_agnostic else categories
        rows = {c["id"]: row for row, c in enumerate(self.categories)}
        self.row = defaultdict(int) if class_agnostic else rows
        # rows: categories, ids in no list; columns: sum of IoU, TP, FN, pixels in both,
        # pixels of the truth, its segments of another area in the JSON, FP, pixels predicted
        self.state = np.zeros((len(rows) + 1, 8))

    def all_reduce(self, device):  # sum over ranks
        self.state = sum_over_ranks(torch.from_numpy(self.state).to(device)).cpu().numpy()

    def update(self, gt_ids, gt_segments, pred_ids, pred_segments):
        """Count an image: int ids (H, W) or COCO's colours uint8 (H, W, 3), 0 = VOID, and
        segments_info. UserError where the prediction's disagree. NOTE: the reference takes the
        truth's areas from the JSON; here pixels are counted, because the two can differ."""
        size, shape = gt_ids.shape[:2], pred_ids.shape
        require(shape[:2] == size, f"the prediction is {shape}, expected {size}")
        sides = (gt_ids, gt_segments), (pred_ids, pred_segments)
        gt, pred = (np.array([self.row[s["category_id"]] for s in segments], int)
                    for _, segments in sides)
        crowd = np.array([bool(s.get("iscrowd")) for s in gt_segments], bool)

        # runs of pixels with the same pair of ids: there are far fewer runs than pixels
        change = np.zeros(math.prod(size), bool)
        for ids, _ in sides:
            flat, channels = ids.ravel(), ids.size // change.size
            change[np.flatnonzero(flat[channels:] != flat[:-channels]) // channels + 1] = True
        start = np.append(0, np.flatnonzero(change))

        # pixels of each pair of segments; row and column 0: of ids in no list, 1: VOID
        pair, shape = 0, (len(gt) + 2, len(pred) + 2)
        for ids, segments in sides:
            ids = ids.ravel()[start] if ids.ndim == 2 else rgb2id(ids.reshape(-1, 3)[start])
            pair = pair * shape[1] + compact_ids(ids, [VOID, *(s["id"] for s in segments)])
        pixels = np.diff(start, append=change.size)
        overlap = np.bincount(pair, pixels, math.prod(shape)).reshape(shape)
        gt_area, area, void = overlap[2:].sum(1), overlap[:, 2:].sum(0), overlap[1, 2:]
        unlisted = overlap[:, 0].sum()
        unseen = [s["id"] for s, pixels in zip(pred_segments, area) if not pixels]
        require(not unlisted and not unseen, f"the prediction has {unlisted:.0f} pixels of "
                f"ids not in its list, and none of {unseen[:5]} in its list")

        # overlap of segments of one category; the union leaves out the truth's VOID
        both = overlap[2:, 2:] * (gt[:, None] == pred)
        union = gt_area[:, None] + area - both - void

        # they match where IoU > 0.5, crowds never; other truth is missed, unless a crowd
        match = (both > 0.5 * union) & ~crowd[:, None]
        iou, missed = (match * both / union.clip(min=1)).sum(1), ~match.any(1) & ~crowd

        # a prediction without one is wrong, unless mostly VOID and its class's last crowd
        later_crowd = np.triu(gt[:, None] == gt, 1) & crowd
        ignored = void + both[crowd & ~later_crowd.any(1)].sum(0)
        wrong = ~match.any(0) & (ignored <= 0.5 * area)

        # add them up by class, with pixels for mIoU and what disagrees with the JSON
        other = [s.get("area", a) != a for s, a in zip(gt_segments, gt_area)]
        of_truth = np.stack([iou, match.any(1), missed, both.sum(1), gt_area, other], 1)
        np.add.at(self.state[:, :6], gt, of_truth)
        np.add.at(self.state[:, 6:], pred, np.stack([wrong, overlap[2:, 2:].sum(0)], 1))
        self.state[-1, 4] += overlap[0].sum()

    def compute(self):
        """{"All", "Things", "Stuff": {"pq", "sq", "rq", "n"}, ...}: means over the n classes
        that occur; "miou", "pixel_accuracy": of pixels that are not VOID in the truth."""
        iou, tp, fn, both, truth, _, fp, predicted = self.state[:-1].T
        weight = tp + 0.5 * fp + 0.5 * fn
        scores = {"pq": iou / weight.clip(min=0.5), "sq": iou / tp.clip(min=1),
                  "rq": tp / weight.clip(min=0.5)}
        seen, thing = weight > 0, np.array([c["isthing"] for c in self.categories], bool)
        result = {}
        for name, group in ("All", seen), ("Things", seen & thing), ("Stuff", seen & ~thing):
            n = int(group.sum())
            result[name] = {k: v[group].sum().item() / max(n, 1) for k, v in scores.items()}
            result[name]["n"] = n
        scores |= {"tp": tp.astype(int), "fp": fp.astype(int), "fn": fn.astype(int)}
        result["per_class"] = {str(c["id"]): {k: v[row].item() for k, v in scores.items()}
                               for row, c in enumerate(self.categories) if seen[row]}
        if not self.class_agnostic:
            union = truth + predicted - both
            miou = (both / union.clip(min=1)).sum() / max((union > 0).sum(), 1)
            accuracy = both.sum() / max(truth.sum(), 1)
            result |= {"miou": miou.item(), "pixel_accuracy": accuracy.item()}
        return result

def panoptic_quality(truth, prediction):
    """Class-agnostic {"pq", "sq", "rq", "n"} of two int maps (H, W), 0 = VOID."""
    metric = PanopticQuality([], class_agnostic=True)
    metric.update(truth, segments_of(truth), prediction, segments_of(prediction))
    return metric.compute()["All"]

class DepthQuality:
    """Means over images of AbsRel, RMSE and delta < 1.25, in the unit of the truth."""

    def __init__(self):
        self.state = np.zeros(4)  # sums of the three, images

    all_reduce = PanopticQuality.all_reduce

    def update(self, truth, predicted):
        """Count an image, (H, W): truth > 0 or NaN, predicted up to scale and shift."""
        if (valid := np.isfinite(truth)).any():
            truth, predicted = truth[valid], predicted[valid]
            columns = np.stack([predicted, np.ones(len(truth))], 1)
            ours = columns @ np.linalg.lstsq(columns, truth, rcond=None)[0]
            rmse = np.sqrt(np.square(ours - truth).mean())
            near = (ours < 1.25 * truth) & (truth < 1.25 * ours)
            self.state += np.abs(ours / truth - 1).mean(), rmse, near.mean(), 1

    def compute(self):
        abs_rel, rmse, delta1 = (self.state[:3] / max(self.state[3], 1)).tolist()
        return {"abs_rel": abs_rel, "rmse": rmse, "delta1": delta1, "n": int(self.state[3])}

# ---- 12. Generated scenes --------------------------------------------------------------

sin, maximum, minimum = np.sin, np.maximum, np.minimum
STUFF = {  # tint; contrast, waves across and down, how far they bend
    "sky": ((0.55, 0.7, 0.95), 0.1, 1, 7, 2), "hills": ((0.5, 0.5, 0.45), 0.2, 12, 8, 4),
    "grass": ((0.4, 0.65, 0.3), 0.22, 70, 31, 3), "sand": ((0.85, 0.75, 0.5), 0.13, 2, 45, 2.5),
    "water": ((0.3, 0.5, 0.7), 0.2, 14, 38, 6)}  # fmt: skip
THINGS = {  # outlines, below 1 inside; x, y: local coordinates, r: distance from their origin
    "ball": lambda x, y, r: r,
    "box": lambda x, y, r: maximum(abs(x), 1.25 * abs(y)) / 0.9,
    "cone": lambda x, y, r: maximum(1.73 * abs(x) + y, -2 * y) / 1.25,
    "star": lambda x, y, r: r / (0.78 + 0.26 * sin(5 * np.arctan2(y, x))),
    "ring": lambda x, y, r: maximum(r, 1 + 1.2 * (0.36 - r)),
    "cross": lambda x, y, r: maximum(r / 1.2, minimum(abs(x), abs(y)) / 0.4),
    "blob": lambda x, y, r: r / (0.8 + 0.2 * sin(3 * np.arctan2(y, x)))}  # has no label
NAMES = [*STUFF, *THINGS]

class ShapeScenes(Dataset):
    """Generated scenes. Items: image uint8 (H, W, 3), ids int64 (H, W), 0 = VOID, segments
    [{"id", "category_id"}], image_id, file_name, depth float32 (H, W) in [0, 1], 1 far."""

    LENGTH = {"train": 100_000, "val": 200}
    categories = [{"id": i, "name": name, "isthing": int(name in THINGS)}
                  for i, name in enumerate(NAMES[:-1], start=1)]

    def __init__(self, split, size):
        require(split in self.LENGTH, f"split {split!r} of shapes, expected train or val")
        self.split, centres = split, (np.arange(size, dtype=np.float32) + 0.5) / size
        self.x, self.y = centres[None], centres[:, None]  # to the right, down

    def __len__(self):
        return self.LENGTH[self.split]

    def __getitem__(self, index):
        return self.frame(range(len(self))[index], 0)  # or an IndexError

    def frame(self, number, time):
        """The item of scene `number`, `time` frames later (int): its things move."""
        seed = list(self.LENGTH).index(self.split)
        rng, motion = (random_generator(seed, p, number) for p in ("scene", "motion"))
        shift = time * motion.uniform(-0.035, 0.035, (6, 2))  # of things, to the right, down
        layers = [*self.regions(rng), *self.things(rng, shift)]

        # paint from far to near, each layer with a contact shadow
        shape = self.y.size, self.x.size
        ids, depth = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        image = np.zeros((*shape, 3), np.float32)
        for id, (_, outline, colour, distance) in enumerate(layers, 1):
            inside = outline < 1
            np.multiply(image, np.float32(0.72), image, where=(outline < 1.3)[..., None])
            image[inside], ids[inside] = colour, id
            np.copyto(depth, distance, where=inside)

        # haze, contrast, noise
        haze = (0.55 * depth**1.5)[..., None]
        image = image * (1 - haze) + haze * rng.uniform(0.6, 0.95, 3).astype(np.float32)
        image = (image - 0.5) * rng.uniform(0.8, 1.1) + rng.uniform(0.45, 0.58)
        image += rng.uniform(0.01, 0.05) * rng.standard_normal(image.shape, np.float32)

        # blobs, and the little that is left of hidden things, are VOID
        large = np.bincount(ids.ravel(), minlength=len(layers) + 1) >= 0.02 * ids.size
        segments = [{"id": id, "category_id": 1 + NAMES.index(name)}
                    for id, (name, *_) in enumerate(layers, 1) if large[id] and name != "blob"]
        ids[~np.isin(ids, [s["id"] for s in segments])] = VOID
        image = (image.clip(0, 1) * 255).astype(np.uint8)
        return {"image": image, "ids": ids, "depth": depth, "segments": segments,
                "image_id": number, "file_name": f"{self.split}{number:06d}.png"}

    def regions(self, rng):
        """One to three, far to near: name, outline (H, W), colours of its P pixels (P, 3),
        distance (broadcasts to (H, W))."""
        x, y, near = self.x, self.y, 0.75 + self.y  # waves are longer where it is near
        names = [NAMES[rng.integers(2)], *rng.permutation(NAMES[2:5])]
        tops = np.sort(rng.permutation(rng.uniform((0.2, 0.5), (0.5, 0.75)))[: rng.integers(3)])
        for name, top in zip(names[rng.integers(2) :], [-1.0, *tops.tolist()]):
            tint, contrast, across, down, bend = STUFF[name]
            a, b, c, d, e = rng.uniform(0, 2 * np.pi, 5).tolist()
            border = top + rng.uniform(0.01, 0.045) * sin(rng.uniform(3, 9) * x + a)
            border += rng.uniform(0.005, 0.04) * sin(rng.uniform(12, 30) * x + b)
            waves = sin(across * x / near + bend * sin(9 * y + c) + d) * sin(down * y / near + e)
            colour = np.float32(0.55 * np.array(tint) + 0.45 * rng.uniform(0.1, 0.95, 3))
            distance = {"sky": 1.0, "hills": 0.9}.get(name, 0.95 - 0.75 * y)
            outline = 1 + 30 * (border - y)
            colour = colour * (1 + contrast * waves[outline < 1][..., None])
            yield name, outline, colour, distance

    def things(self, rng, shift):
        """Two to six from far to near, lit from one side; yields the same."""
        light, palette, placed = rng.uniform(-0.7, 0.7), rng.uniform(0.1, 0.95, (2, 3)), []
        for distance in np.sort(rng.uniform(0.1, 0.75, rng.integers(2, 7)))[::-1].tolist():
            # of eight places the one that hides least of other things, by gaps below 0
            radius = rng.uniform(0.2, 0.265) * (1.2 - 0.65 * distance)
            foot = 1.0 - 0.9 * distance + rng.uniform(-0.15, 0.15, 8) - 0.6 * radius
            u, v = rng.random(8), foot.clip(0.04, 0.96)
            gaps = [np.hypot(u - a, v - b) - 0.75 * (radius + other) for a, b, other in placed]
            best = np.min(gaps, axis=0, initial=0).argmax()
            placed.append((float(u[best]), float(v[best]), radius))

            # its outline, turned by a random angle
            right, down = shift[len(placed) - 1]
            dx = (self.x - placed[-1][0] - right) / radius
            dy = (self.y - placed[-1][1] - down) / radius
            offset = dx + 1j * dy
            turned = offset * complex(np.exp(2j * np.pi * rng.random()))
            name = str(rng.choice(list(THINGS), p=[0.16] * 6 + [0.04]))
            outline = THINGS[name](turned.real, turned.imag, np.hypot(dx, dy))

            # its colour, perhaps shared; plain, striped or checked; shaded, with a rim
            colour = palette[rng.integers(2)] if rng.random() < 0.4 else rng.uniform(0.1, 0.95, 3)
            inside = outline < 1
            offset, turned, rim = offset[inside], turned[inside], outline[inside] > 0.82
            bands = 0.3 * np.sign(sin(rng.uniform(4, 9) * turned.real))
            checks = bands * np.sign(sin(rng.uniform(4, 9) * turned.imag))
            paint = [0, 0, bands, checks][rng.integers(4)]
            shade = 0.95 + 0.4 * (light * offset.real - 0.8 * offset.imag)
            shade = shade - 0.3 * rim - 0.25 * distance
            colour = (np.float32(colour) * ((1 + paint) * shade)[..., None]).clip(0, 1)
            yield name, outline, colour, distance

# ---- 13. Files: images, depth, COCO panoptic and instances -----------------------------

def rgb2id(rgb):
    """COCO panoptic colours uint8 (..., 3) -> int32 ids (...): R + 256 G + 65536 B."""
    return (rgb.astype(np.float32) @ np.float32([1, 256, 65536])).astype(np.int32)  # exact

def id2rgb(ids):
    """Inverse of rgb2id: int ids (...) in [0, 2^24 - 1] -> uint8 (..., 3)."""
    return np.asarray(ids).astype("<u4")[..., None].view(np.uint8)[..., :3]  # low bytes first

def write_png(path, array):
    with replacing(path) as temporary:
        Image.fromarray(array).save(temporary, "PNG")

@contextmanager
def reading(place, what):
    """Context that only reads `place`, a file or part of it: errors are the user's."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError,
            ArithmeticError, MemoryError, SyntaxError, TokenError, struct.error, zlib.error,
            SafetensorError, UnpicklingError, BadZipFile, Image.DecompressionBombError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        known = {UserError: error, FileNotFoundError: f"no such {what}",
                 UnidentifiedImageError: f"no {what} that Pillow can read",
                 UnpicklingError: "code in it would have to run, which is refused"}
        message = known.get(type(error), f"not a readable {what} ({reason})")
        raise UserError(f"{place}: {message}") from None

def read_image(path, exact=False):
    """Image file -> uint8 (H, W, 3), turned as its EXIF tag says. exact: of a mask, which must
    be a PNG of 8 bits. Grey of more bits is scaled; white is the first of 1, 255, 4095, 65535
    and its highest value that is not below that."""
    with reading(path, "image"):
        require(Path(path).is_file() or not Path(path).exists(), "no regular file")
        data = Path(path).read_bytes()
        if exact:
            fits = data.startswith(b"\x89PNG") and data[24] <= 8
            require(fits, "expected a PNG of 8 bits per channel")
            if b"eXIf" not in data and b"XML:com.adobe.xmp" not in data:  # faster than Pillow
                from torchvision.io import ImageReadMode, decode_png
                data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                return decode_png(data, ImageReadMode.RGB).permute(1, 2, 0).numpy()
        image = ImageOps.exif_transpose(Image.open(BytesIO(data)))
        if image.mode[0] in "IF":  # integers of over 8 bits, floats
            values = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
            black, highest = min(values.min(), 0), values.max()
            white = next((w for w in (1, 255, 4095, 65535) if highest <= w), highest)
            values = 255 * (values - black) / (white - black)
            image = Image.fromarray(values.astype(np.uint8))
        return np.asarray(image.convert("RGB"))

def read_depth(path, size):
    """.npy of floats or .png of 16 bits -> float32 (H, W) = size, NaN what is not > 0."""
    path = path.with_suffix(".npy" if path.with_suffix(".npy").exists() else ".png")
    with reading(path, "depth map, .npy or .png"):
        depth = np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path))
        fits = depth.dtype.name in ("uint16", "float16", "float32", "float64")
        require(fits and depth.shape == size, f"{depth.dtype} {depth.shape}, expected "
                f"16-bit integers or floats {size}")
        depth = depth.astype(np.float32)
        return np.where((depth > 0) & np.isfinite(depth), depth, np.float32(np.nan))

def draw_instances(segments, size):
    """COCO polygons or RLE of segments -> ids int32 (H, W) = size, the smaller on top."""
    from pycocotools.coco import COCO
    from pycocotools.mask import area, decode

    coco, masks, ids = COCO(), {}, np.zeros(size, np.int32)
    coco.imgs = {0: {"height": size[0], "width": size[1]}}
    for segment in segments:
        shape, expected = segment.get("segmentation"), f"expected the {size} pixels of its image"
        with reading(f"segmentation {str(shape)[:60]}", "polygon [[x, y, ...]] or RLE"):
            require(shape, "a box without an outline, expected polygons or RLE")
            for xy in shape if isinstance(shape, list) else ():  # infinity would hang
                fits = len(xy) >= 6 and np.abs(np.reshape(xy, (-1, 2))).max() < 1e6
                require(fits, "expected three or more pairs x, y")
            if isinstance(shape, dict):  # another size crashes, another sum shifts
                counts = shape["counts"]
                fits = isinstance(counts, str) or sum(counts) == math.prod(size)
                require(fits and (*shape["size"],) == size, expected)
            rle = coco.annToRLE({"image_id": 0, "segmentation": shape})
            mask = masks[segment["id"]] = decode(rle) > 0  # undefined after the last run
            require(mask.sum() == area(rle), expected)
    for id in sorted(masks, key=lambda id: -masks[id].sum()):
        ids[masks[id]] = id
    return ids

def number(value):  # of a JSON that may have "17" for 17; what is no number stays
    return int(value) if isinstance(value, str) and value.isdecimal() else value

def index_entries(kind, entries, **fields):
    """{key: entry} of a JSON's list. fields: the type or the values that fit; the first is the
    key. UserError where a field does not fit or a key is there twice."""
    key, index = next(iter(fields)), {}
    for entry in entries:
        for name, allowed in fields.items():
            value = entry.get(name) if allowed is str else number(entry.get(name))
            is_type = isinstance(allowed, (type, UnionType))
            if not (isinstance(value, allowed) if is_type else value in allowed):
                raise UserError(f"{kind}: {name} is {value!r}, expected {allowed}")
            entry[name] = value
        require(entry[key] not in index, f"{kind}: {key} {entry[key]!r} twice, expected once")
        index[entry[key]] = entry
    return index

def read_coco(path, category_ids=None):
    """A COCO JSON -> its categories, images, annotations, each {id: entry}, checked.
    Instances become segments 1, 2, ... of an annotation with "file_name" "". category_ids:
    of segments, int or a set, and no categories; by default the file's."""
    with reading(path, "annotation file"):
        data = json.loads(Path(path).read_text("utf-8-sig"))
        annotations, listed = data.get("annotations", ()), data.get("categories", ())
        if not any("segments_info" in a for a in annotations):
            groups = defaultdict(list)
            for a in annotations:
                group = groups[number(a["image_id"])]
                group.append(a | {"id": len(group) + 1})
            annotations = [{"image_id": id, "file_name": "", "segments_info": group}
                           for id, group in groups.items()]
            listed = [{"isthing": 1} | c for c in listed]
        images = index_entries("image", data.get("images", ()), id=int | str, file_name=str)
        annotations = index_entries("annotation", annotations, image_id=int | str,
                                    file_name=str, segments_info=list)
        categories = index_entries("category", () if category_ids else listed, id=int,
                                   isthing=(0, 1))
        classes = category_ids or set(categories)
        for id, annotation in annotations.items():
            index_entries(f"image {id}: segment", annotation["segments_info"],
                          id=range(1, 2**24), category_id=classes, iscrowd=(0, 1, None))

        # where a tool's path leaves its folder, images are found by their base names
        for entry in (*images.values(), *annotations.values()):
            name = entry["file_name"].replace("\\", "/")
            leaves = name.startswith("/") or ".." in name.split("/")
            entry["file_name"] = os.path.basename(name) if leaves else name
            name.encode()  # half a character is an error, in categories as well
        json.dumps(listed, ensure_ascii=False).encode()
    return categories, images, annotations

class PanopticDataset(Dataset):
    """COCO annotations and images; items as in ShapeScenes. PNGs are in the folder json_path
    without ".json", depth in image_dir + "_depth"."""

    def __init__(self, json_path, image_dir, depth=False):
        self.json_path, self.image_dir, self.depth = Path(json_path), Path(image_dir), depth
        categories, self.images, annotations = read_coco(json_path)
        self.categories, self.annotations = [*categories.values()], [*annotations.values()]
        require(annotations, f"{json_path}: no annotated image, expected at least one")
        self.paths = defaultdict(list)  # base name -> the files below image_dir
        for path in iglob("**/*.*", root_dir=image_dir, recursive=True):
            self.paths[os.path.basename(path)].append(path)

    def __len__(self):
        return len(self.annotations)

    def __getitem__(self, index):
        annotation = self.annotations[index]
        segments, mask_name = annotation["segments_info"], annotation["file_name"]
        place = f"{self.json_path}: image {annotation['image_id']}"
        info = self.images.get(annotation["image_id"])
        require(info, f"{place}: annotated, expected in images")

        # the image, at file_name in image_dir or the only one of that base name
        path = self.image_dir / info["file_name"]
        base = path.name.replace("_gtFine", "")  # of Cityscapes
        places = [info["file_name"]] if path.is_file() else self.paths[base]
        require(len(places) == 1, f"{path}: no such image, its name is {len(places)} times "
                f"below {self.image_dir}: {places}; --images names a folder")
        image = read_image(self.image_dir / places[0])
        size = image.shape[:2]

        # its ids, of a PNG or drawn
        if mask_name:
            place = self.json_path.with_suffix("") / mask_name
            ids = rgb2id(read_image(place, exact=True))
            pixels = ids.shape
        else:
            with reading(place, "annotation"):
                ids = draw_instances(segments, size)
            pixels = info.get("height", size[0]), info.get("width", size[1])
        require(pixels == size, f"{place}: {pixels} pixels, expected {size}")
        flat = ids.ravel()
        found = set(np.unique(flat[starts_of_runs(flat)]).tolist()) - {VOID}

        # a PNG has all ids of its JSON, instances may be hidden
        only_one = sorted(found ^ {s["id"] for s in segments})[:5]
        require(not mask_name or not only_one,
                f"{place}: ids {only_one}, expected in both PNG and JSON")
        segments = [s for s in segments if s["id"] in found]
        record = {"image": image, "ids": ids, "segments": segments, "image_id": info["id"],
                  "file_name": info["file_name"]}
        if self.depth:
            record["depth"] = read_depth(Path(f"{self.image_dir}_depth", places[0]), size)
        return record

def open_dataset(data, split, images, size, kind, depth=False):
    """The data set of --data, --split and --images: "shapes" at `size` pixels, a folder with
    COCO JSONs, or a JSON, in whose path {split} stands for the split. split None: the only one
    that starts with `kind`, "train" or "val", or is alone."""
    path, flag = Path(data), "--train-split" if kind == "train" else "--split"
    if data == "shapes":
        return ShapeScenes(split or kind, size)
    if path.suffix == ".json":
        require(not split or "{split}" in data,
                f"--data {data}: a JSON, expected {flag} only with {{split}} in its path")
        paths = data, images or str(path.parent)
        return PanopticDataset(*(p.replace("{split}", split or kind) for p in paths), depth)

    # COCO and CVAT; Roboflow; labelme, Label Studio
    require(path.is_dir(), f"--data {data}: no such folder, and no JSON")
    for pattern in ("annotations/panoptic_*.json", "annotations/instances_*.json",
                    "*/_annotations.coco.json", "*.json"):
        if files := sorted(path.glob(pattern)):
            break
    file_of = {f.parent.name if f.stem == "_annotations.coco" else
               f.stem.removeprefix("panoptic_").removeprefix("instances_"): f for f in files}
    found = [name for name in file_of if name == split or not split and (
        name.startswith(kind) or len(file_of) == 1)]
    require(len(found) == 1, f"--data {data}: {flag} {split or 'not given'}, expected one "
            f"of {list(file_of)}, from annotations/panoptic_*.json, instances_*.json or a COCO "
            "JSON in it; or --data a JSON, and --images")
    folders = [path / found[0], path / "images" / found[0],
               *sorted(path.glob(f"{found[0]}[!_]*")), path / "images", path]
    folder = next(f for f in folders if f.is_dir())
    return PanopticDataset(file_of[found[0]], images or folder, depth)

# ---- 14. What the model sees of a record, and the order of training --------------------

def relative_depth(depth):
    """float (H, W), NaN = invalid -> [-1, 1], its 2nd and 98th percentiles the ends."""
    valid = depth[np.isfinite(depth)]
    require(len(np.unique(valid)) > 1,
            f"depth has one value or none at {valid.size} valid pixels, expected several")
    low, high = np.percentile(valid, (2, 98))
    if low == high:
        low, high = valid.min(), valid.max()
    return ((depth - low) * (2 / (high - low)) - 1).clip(-1, 1).astype(np.float32)

def random_crop(size, least_share, rng):
    """A part of (height, width) = size, two slices: of least_share to all of its area, as wide
    for its height as 3/4 to 4/3 of the whole."""
    share, aspect = rng.uniform(least_share, 1), (4 / 3) ** rng.uniform(-1, 1)
    height, width = (math.ceil(n * min(1, math.sqrt(share * a)))
                     for n, a in zip(size, (1 / aspect, aspect)))
    y, x = rng.integers(size[0] - height + 1), rng.integers(size[1] - width + 1)
    return slice(y, y + height), slice(x, x + width)

def jitter_colours(image, amount, rng):
    """float (3, H, W) in [-1, 1], of brightness, contrast and saturation times 1 - amount to
    1 + amount each."""
    from torchvision.transforms.v2 import functional
    brightness, contrast, saturation = rng.uniform(1 - amount, 1 + amount, 3).tolist()
    image = functional.adjust_brightness(image / 2 + 0.5, brightness)
    image = functional.adjust_contrast(image, contrast)
    return 2 * functional.adjust_saturation(image, saturation) - 1

def prepare(record, config, rng, augment, task="instance"):
    """An item -> "image" (3, s, s) in [-1, 1], "ids" (s, s), if needed "depth" (s, s) in
    [-1, 1], NaN = invalid. Ids: random ones of the N - 1 largest; of task "semantic" places
    1..K of classes. augment: random flips, crops and colours, segments below
    config.min_segment VOID."""
    # a square, of all or a part; masks and depth by nearest neighbour
    size, flip = (config.size, config.size), augment and rng.random() < 0.5
    part = slice(None)
    if augment and config.crop < 1:
        part = random_crop(record["ids"].shape, config.crop, rng)
    sample = {"image": image_tensor(record["image"][part], config.size)}
    if augment and config.jitter:
        sample["image"] = jitter_colours(sample["image"], config.jitter, rng)
    if config.needs_depth and "depth" in record:
        with reading(record["file_name"], "depth map"):
            depth = relative_depth(record["depth"])
        sample["depth"] = torch.from_numpy(resize_nearest(depth[part], size))

    # segments 1..S; crowds and what is not listed are VOID; the frame before is put below
    segments = [s for s in record["segments"] if not s.get("iscrowd")]
    maps = np.concatenate([resize_nearest(record[name][part], size)
                           for name in ("ids", "previous") if name in record])
    start = starts_of_runs(maps.ravel())
    length = np.diff(start, append=maps.size)
    ids = compact_ids(maps.ravel()[start], [s["id"] for s in segments])  # of each run

    # the places of their classes, or random ids of the largest
    if task == "semantic":
        place = {c["id"]: i for i, c in enumerate(json.loads(config.categories), start=1)}
        ids = np.array([VOID, *(place[s["category_id"]] for s in segments)])[ids]
    else:
        areas = np.bincount(ids, length, minlength=len(segments) + 1)
        areas[VOID] = 0
        largest = np.argsort(-areas, kind="stable")[: config.num_ids - 1]
        least = max(config.min_segment, 1) if augment else 1
        new_ids = compact_ids(np.arange(len(areas)), largest[areas[largest] >= least])
        ids = random_relabel(new_ids, config.num_ids, rng)[ids]
    maps = torch.from_numpy(ids.repeat(length).reshape(maps.shape)).split(config.size)
    sample |= zip(("ids", "previous"), maps)
    return {name: part.flip(-1) if flip else part for name, part in sample.items()}

def keep_blocks(ids, rng, block, drop_rate):
    """Of a map (s, s) which pixels are known, bool: squares of `block` pixels, each dropped
    with probability drop_rate (Fig. 9)."""
    cells = math.ceil(len(ids) / block)
    kept = rng.random((cells, cells)) >= drop_rate
    return kept.repeat(block, 0).repeat(block, 1)[: len(ids), : len(ids)]

class TrainingStream(Dataset):
    """Endless: position -> a prepared sample, "position", "task" (a place in config.tasks)
    and "known" pixels, if there are any. Data sets take turns. A sample depends on seed and
    position only: a resumed run and any number of ranks see the same."""

    def __init__(self, datasets, config, seed, on_bad_sample="error"):
        self.datasets, self.config, self.seed = datasets, config, seed
        self.on_bad_sample, self.bad = on_bad_sample, set()
        require(not config.previous or all(isinstance(d, ShapeScenes) for d in datasets),
                "--set previous: only --data shapes has frames before")

    @lru_cache(maxsize=8)
    def order(self, turn, epoch):
        rng = random_generator(self.seed, "order", f"{turn} {epoch}")
        return rng.permutation(len(self.datasets[turn])).tolist()

    def first_prepared(self, turn, indices, rng, task):
        """The sample of the first of these records that can be read."""
        for index in indices:
            try:
                record = self.datasets[turn][index]
                if self.config.previous:
                    record["previous"] = self.datasets[turn].frame(index, -1)["ids"]
                return prepare(record, self.config, rng, True, task)
            except (UserError, FileNotFoundError) as error:
                if self.on_bad_sample == "error":
                    raise
                if (turn, index) not in self.bad:
                    self.bad.add((turn, index))
                    print(f"skipped, number {len(self.bad)}: {error}", file=sys.stderr)
        raise UserError("none of the samples can be read, expected one")

    def __getitem__(self, position):
        # whose turn is it, and which record first?
        config, tasks = self.config, self.config.trained_tasks
        generator = partial(random_generator, self.seed, position=position)
        number, turn = divmod(position, len(self.datasets))
        epoch, place = divmod(number, len(self.datasets[turn]))
        order = self.order(turn, epoch)
        indices = (order[(place + i) % len(order)] for i in range(len(order)))

        # the sample of a random task
        task = int(generator("task").integers(len(tasks)))
        sample = self.first_prepared(turn, indices, generator("sample"), tasks[task])
        sample |= {"position": position} | ({"task": task} if config.tasks else {})

        # blocks of the mask are given, in a share of the samples
        if config.given_share:
            rng = generator("blocks")
            given = rng.random() < config.given_share and tasks[task] != "depth"
            block = max(1, config.size >> rng.integers(1, 6))
            rate = rng.uniform(0.1, 0.95) if given else 1.0
            sample["known"] = torch.from_numpy(keep_blocks(sample["ids"], rng, block, rate))
        if config.previous and generator("motion").random() >= config.previous:
            sample["previous"][:] = VOID
        return sample

def leave_group(_):  # of processes: Ctrl-C and torchrun's SIGTERM reach the training alone
    os.setpgrp()

def training_loader(stream, batch_size, accumulate, start, stop, workers):
    """This rank's micro-batches of optimizer steps start..stop-1, `accumulate` each."""
    rank, world = rank_and_world()
    micro, rest = divmod(batch_size, accumulate * world)
    require(not rest, f"batch size {batch_size}, expected a multiple of --accumulate x "
            f"processes = {accumulate} x {world}")
    firsts = range(start * batch_size + rank * micro, stop * batch_size, world * micro)
    batches = (range(first, first + micro) for first in firsts)
    return DataLoader(stream, batch_sampler=batches, num_workers=workers,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=leave_group)

# ========================================================================================
# Part III. Running
# ========================================================================================

# ---- 15. Command lines -----------------------------------------------------------------

def whole_number(text, least=1):
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text}, expected at least {least}")
    return int(text)

from_zero = partial(whole_number, least=0)
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
FLAGS = {  # what several scripts read: {group: {flag: options of argparse}}
    "data": {
        "--images": dict(help="a JSON's images; {split} as in --data", metavar="DIR"),
        "--split": dict(help="to evaluate (default: the data's only val*)"),
        "--limit": dict(help="only the first N images", type=whole_number, metavar="N")},
    "model": {
        "--weights": dict(help="run folder, file, tiny (default for scenes) or photos (others)"),
        "--size": dict(help="side of the square that it sees (default: the weights' own)",
                       type=whole_number, metavar="PIXELS")},
    "training": {
        "--train-split": dict(help="default: the data's only train*"),
        "--preset": dict(help="where the Config starts", choices=PRESETS, default="tiny"),
        "--set": dict(help="Config fields, listed below", metavar="FIELD=VALUE",
                      nargs="+", action="extend", default=[]),
        "--accumulate": dict(help="micro-batches per step", type=whole_number, default=1),
        "--eval-every": dict(help="steps between evaluations", type=whole_number, default=500),
        "--on-bad-sample": dict(help="stop at one that cannot be read, or leave it out",
                                choices=("error", "skip"), default="error"),
        "--fresh": dict(help="start over in a run folder", action="store_true")},
    "sampling": {
        "--steps": dict(help="default: the weights' own", type=whole_number),
        "--samples": dict(help="to merge by what they agree on (default: the weights' own)",
                          type=whole_number),
        "--sampler": dict(help="ddpm: fresh noise", choices=SAMPLERS, default="ddim"),
        "--task": dict(help="default: all that they know", choices=("panoptic", *TASKS))},
    "machine": {
        "--device": dict(help="cuda, cuda:1, cpu, ... (default: cuda if there, else cpu)"),
        "--amp": dict(help="default: bf16 on cuda, else off", choices=AMP),
        "--seed": dict(help="of everything random; photographs add their name", type=from_zero,
                       default=0),
        "--workers": dict(help="processes that load data", type=from_zero,
                          default=min(8, (os.cpu_count() or 1) // 2))},
}

class CommandLine(argparse.ArgumentParser):
    """A script's flags: the groups of FLAGS that `shared` names, and `own`, like FLAGS."""

    def __init__(self, description, shared, own, epilog=None):
        super().__init__(description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        for title, known in FLAGS.items():
            group, flags = self.add_argument_group(title), known if title in shared else {}
            for flag, options in (flags | own.get(title, {})).items():
                if options.get("default") not in (None, []):
                    options = options | {"help": options["help"] + " (default: %(default)s)"}
                group.add_argument(flag, **options)

    def error(self, message):
        raise UserError(f"{message}; -h lists the flags")

def stage_fields(stage):  # what --set may change: {name: field of Config}
    return {f.name: f for f in fields(Config) if f.metadata["stage"] in (stage, "both")}

def training_command(description, stage, model_flags):
    """The CommandLine of a training script; -h lists its fields of Config as typed."""
    lines = ["fields of --set, with the values of --preset tiny, and what is allowed:"]
    for name, f in stage_fields(stage).items():
        value = ",".join(map(str, f.default)) if f.type is tuple else f.default
        allowed = f.metadata["allowed"] or ["any"]
        between = ", " if f.type is str else " to "
        allowed = between.join(a if isinstance(a, str) else f"{a:g}" for a in allowed)
        lines.append(f"  {f'{name}={value}':34} {f.metadata['help']} ({allowed})")
    data = {"--data": dict(help="shapes (generated), COCO-layout folders or COCO JSONs",
                           nargs="+", default=["shapes"]),
            "--out": dict(help="run folder", default=f"runs/{stage}")}
    names = {"--steps": f"{stage}_steps", "--batch-size": f"{stage}_batch"}
    sizes = {flag: dict(help=f"the same as --set {name}=N", metavar="N", dest="set",
                        type=f"{name}={{}}".format, action="append")
             for flag, name in names.items()}
    own = {"data": data, "model": model_flags, "training": sizes}
    return CommandLine(description, "data training machine", own, "\n".join(lines))

def override(config, assignments, stage):
    """Change fields of `config` by ["FIELD=VALUE", ...]; tuples are comma-separated."""
    known, changes, other = stage_fields(stage), {}, "ldm" if stage == "ae" else "ae"
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        near = difflib.get_close_matches(name, known, 1) or ["one that -h lists"]
        near = [f"it in train_{other}.py"] if name in stage_fields(other) else near
        require(name in known, f"--set {name}: no field of stage {stage}, expected {near[0]}")
        kind = known[name].type
        with reading(f"--set {assignment}", kind.__name__):
            changes[name] = tuple(map(int, text.split(","))) if kind is tuple else kind(text)
    defaults = PIXELS if changes.get("space") == "pixels" else {}
    return replace(config, **defaults | changes)

def open_training_data(args, config):
    """The training sets of --data, and the evaluated split of the last."""
    require(not args.images or args.data[-1].endswith(".json"), "--images needs a JSON")
    def opened(data, split, kind):
        images = args.images if data.endswith(".json") else None
        return open_dataset(data, split, images, config.size, kind, config.needs_depth)
    train = [opened(data, args.train_split, "train") for data in args.data]
    val = opened(args.data[-1], args.split, "val")
    alike = all(one.categories == val.categories for one in train)
    require(alike or "semantic" not in config.tasks,
            f"--data {' '.join(args.data)}: different categories with --tasks semantic")
    return train, val

def run_script(main):
    """Call main(): a user's mistake becomes one line and exit code 2, Ctrl-C 130."""
    gc.set_threshold(10**5)  # the imports of diffusers would look for garbage all the time
    atexit.register(gc.freeze)  # and so would the end
    try:
        main()
    except (UserError, FileNotFoundError, PermissionError, IsADirectoryError,
            NotADirectoryError, FileExistsError) as error:
        message = str(error).strip().splitlines()[-1]  # after a loader's traceback
        print(message.rpartition(f"{type(error).__name__}: ")[2], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"interrupted {interrupt}".strip(), file=sys.stderr)
        sys.exit(130)

# ---- 16. Devices and ranks, optimizer --------------------------------------------------

DIVERGED = "stopped, the last checkpoint is kept; try a lower ae_lr or ldm_lr"

def setup_distributed(device=None, amp=None):
    """Join torchrun's process group -> device, maker of autocast contexts."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with reading(f"--device {device}", "device"):
        device = torch.empty(1, device=device).device
    on_gpu = device.type == "cuda"
    amp = amp or ("bf16" if on_gpu else "off")
    require(amp != "fp16" or on_gpu, "--amp fp16 needs cuda; on cpu use bf16 or off")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if "RANK" in os.environ and not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # the nodes of several may count otherwise
            # torchrun keeps its store over --max-restarts; addresses there are of dead processes
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank,
                                world_size=world)
        atexit.register(dist.destroy_process_group)
    return device, partial(torch.autocast, device.type, AMP[amp], enabled=amp != "off")

def to_device(model, device):  # on GPUs in the layout in which convolutions are faster
    on_gpu = torch.device(device).type == "cuda"
    return model.to(device, memory_format=torch.channels_last if on_gpu else None)

def distribute(model):  # what a training loop calls: under torchrun DDP's
    options = dict(gradient_as_bucket_view=True, broadcast_buffers=False)
    return DistributedDataParallel(model, **options) if dist.is_initialized() else model

def progress(iterable, description, **options):
    hidden = None if is_main() else True  # None: where there is no terminal
    return tqdm(iterable, description, leave=False, disable=hidden, **options)

def keep_freed_memory():
    """For the whole process: Linux's glibc returns large blocks as soon as they are free, and the
    kernel then clears new ones, which takes longer than a SiLU. Kept, a step on a CPU takes down
    to 0.65 of the time, with up to half as much memory again (RESULTS.md)."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # of glibc alone; the numbers are from its malloc.h
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: how much stays

def training_steps(start, stop, description, device):
    """Yields (step, caught): the first Ctrl-C and the first SIGTERM only join the list
    `caught`, so that no step is cut in two; the next of each does what it always does."""
    if device.type == "cpu":
        keep_freed_memory()
    caught, launcher = [], os.getppid()
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    def catch(number, _):
        caught.append(number)
        signal.signal(number, before[number])
    try:
        for number in before:
            signal.signal(number, catch)
        for step in progress(range(start, stop), description, total=stop, initial=start):
            if "RANK" in os.environ and os.getppid() != launcher:
                caught.append("torchrun, which was killed")
            yield step, caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt("after the last step")

def any_rank(value, device):
    return bool(sum_over_ranks(torch.tensor(float(bool(value)), device=device)))

def make_optimizer(model, lr, config):
    """AdamW; the weight decay is Eq. 2's last term, none on norms and biases."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if p.ndim > 1]},
              {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}]
    options = dict(lr=lr, weight_decay=config.weight_decay, fused=True)
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
    """Exponential moving average of the weights (Table S3). NOTE: paper: decay 0.999; here
    it warms up as (1 + n) / (10 + n), because short runs would average their start."""
    def update(averages, weights, n):
        torch._foreach_lerp_(averages, weights, 1 - min(decay, float((1 + n) / (10 + n))))

    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=update)
    for average, weight in zip(ema.module.parameters(), model.parameters()):
        if not (weight.requires_grad and decay):
            average.data = weight.data  # one copy is enough of what is not averaged
    return ema

def training_state(model, lr, config, amp, device):  # all that a run needs to go on
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    return {"model": model, "ema": make_ema(model, config.ema),
            "optimizer": make_optimizer(model, lr, config), "scaler": scaler}

def update_weights(state, lr, max_norm):
    """An optimizer step of a `training_state` and its averages. Returns False where gradients
    were not finite, on any rank, and nothing was changed."""
    optimizer, scaler = state["optimizer"], state["scaler"]
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(state["model"].parameters(), max_norm)
    finite = bool(norm.isfinite())
    if finite or scaler.is_enabled():  # which leaves them out itself
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if finite:
        state["ema"].update_parameters(state["model"])
    return finite

def means(batches):
    """Of [{"loss": scalar, ...}, ...] over batches and ranks, where the loss is finite;
    "skipped": how many, if any, were not."""
    batches = default_collate(batches)
    finite = batches["loss"].isfinite()
    sums = [values[finite].sum() for values in batches.values()]
    sums = sum_over_ranks(torch.stack([*sums, finite.sum(), (~finite).sum()]))
    *sums, count, skipped = sums.tolist()
    result = {name: total / count for name, total in zip(batches, sums)} if count else {}
    return result | ({"skipped": int(skipped)} if skipped else {})

# ---- 17. Run folders and weights -------------------------------------------------------

SHIPPED = {name: Path(__file__).parent / "assets" / f"{name}.safetensors"
           for name in ("tiny", "photos")}  # of generated scenes; of photographs
SD_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
          "down_block_types": ["DownEncoderBlock2D"] * 4}  # of version 1, without decoder
# the authors' parts -> our prefixes; their VAE's names, also those of an old diffusers
OFFICIAL_PARTS = {"vae": "", "vae_semseg": "autoencoder.", "unet": "unet.",
                  "vae_image": "image_encoder.layers."}
OFFICIAL_VAE = {"encoder": "0", "quant_conv": "1", "query": "to_q", "key": "to_k",
                "value": "to_v", "proj_attn": "to_out.0"}
# of flags and Config, what a resumed run may change
FREE = """accumulate amp cache_latents device eval_every fresh limit on_bad_sample out
          set split workers ae_steps ldm_steps eval_steps eval_samples sampling_power checkpointing
          compile zero""".split()

@contextmanager
def writing(path):
    """Context that only writes `path`: an error, as a full disk, is the user's."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: not written ({error})") from None

@contextmanager
def replacing(path):
    """Write to a name of the rank's own, then rename: a file is whole or absent."""
    temporary = Path(path).with_name(f".{Path(path).name}.{rank_and_world()[0]}.part")
    with writing(path):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))

def log_line(log, **values):
    """Append one JSON object to the file of `open_log` and print it, on rank 0."""
    if is_main():
        with writing(log.name):
            print(json.dumps(values), file=log, flush=True)
        print("  ".join(f"{k} {v:.6g}" for k, v in values.items()), flush=True)

def checksum(about, tensors):  # of weights {name: tensor} and what is said about them
    result = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        result = zlib.crc32(tensor.numpy(), zlib.crc32(name.encode(), result))
    return result

def save_weights(path, model, config, facts=""):
    """Write safetensors for `load_model`. facts: a line about the weights to tell."""
    tensors = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    about = {"model": type(model).__name__, "config": asdict(config), "facts": facts}
    about["crc32"] = checksum(about, tensors)
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"ldmseg": json.dumps(about)}))

def save_run(out, step, config, settings, state):
    """Write a run folder, to use (the averages) and to resume. All ranks call it."""
    if hasattr(state["optimizer"], "consolidate_state_dict"):  # ZeRO
        state["optimizer"].consolidate_state_dict()
    if is_main():
        for weights in (*state["model"].parameters(), *state["ema"].parameters()):
            require(weights.isfinite().all(), f"not finite at step {step}: {DIVERGED}")
        if step:  # before the first one there is nothing to use
            save_weights(f"{out}/model.safetensors", state["ema"].module, config,
                         f"{step} steps on {' '.join(settings['data'])}")
            write_json(f"{out}/config.json", asdict(config))
        content = {name: part.state_dict() for name, part in state.items()}
        latest = Path(out, "checkpoint.pt")  # written last: it vouches for all
        with replacing(latest) as temporary:
            with open(temporary, "wb") as file:
                torch.save(content | {"step": step, "settings": settings}, file)
            if latest.exists():
                latest.replace(Path(out, "checkpoint.previous.pt"))

def load_checkpoint(out):
    """The latest checkpoint of a run folder, of the two that are kept; None where none is. One
    that is damaged is said, and the one before is taken."""
    paths = [Path(out, name) for name in ("checkpoint.pt", "checkpoint.previous.pt")]
    paths = [path for path in paths if path.exists()]
    for path in paths:
        try:
            with reading(path, "checkpoint"), ZipFile(path) as file:
                require(file.testzip() is None, "damaged")
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except UserError as error:
            if path == paths[-1]:
                raise UserError(f"{error}; --fresh starts over") from None
            print(f"{error}; the one before is taken", file=sys.stderr)

def resume_run(args, config, state, steps):
    """Load checkpoint.pt, unless --fresh, into `state`, {name: module, ...}. Returns its step,
    or 0, and the settings that a resumed run must share."""
    settings = {k: v for k, v in (vars(args) | asdict(config)).items() if k not in FREE}
    checkpoint = None if args.fresh else load_checkpoint(args.out)
    anywhere = any_rank(checkpoint, next(state["model"].parameters()).device)
    require(bool(checkpoint) == anywhere, f"{args.out}: only some processes see its checkpoint")
    if not checkpoint:
        return 0, settings
    stored, step = checkpoint["settings"], checkpoint["step"]
    for name, ours in sorted(settings.items()):
        require(ours == stored.get(name), f"{args.out}: its run has {name} {stored.get(name)}, "
                f"this command {ours}; use the same, another --out, or --fresh")
    for name, part in state.items():
        if checkpoint[name]:  # a scaler that was off has no state
            part.load_state_dict(checkpoint[name])
    if is_main():
        print(f"{args.out}: finished at step {step}; --fresh starts over" if step >= steps else
              f"{args.out}: resuming from step {step}")
    return step, settings

def open_log(args, device):
    """log.jsonl of the run folder, on rank 0, which locks the folder while it is open; --fresh
    starts over. UserError where another process trains, or would replace a run."""
    import fcntl  # not on Windows
    log, problem = None, ""
    if is_main():
        Path(args.out).mkdir(parents=True, exist_ok=True)
        log = open(f"{args.out}/log.jsonl", "a")
        full = log.tell() or Path(args.out, "model.safetensors").exists()
        if full and not args.fresh and not [*Path(args.out).glob("checkpoint*.pt")]:
            problem = "has a run without checkpoint.pt; use another --out, or --fresh"
        try:
            fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = "another process trains in this folder"
    require(not any_rank(problem, device), f"{args.out}: {problem or 'refused by rank 0'}")
    if is_main() and args.fresh:
        log.truncate(0)
        for old in (*Path(args.out).glob("checkpoint*.pt"), Path(args.out, "model.safetensors")):
            old.unlink(missing_ok=True)
    return log

class LatentCache:
    """Latents of a frozen image encoder, float16, of the images that it has seen, which a hash
    tells apart: in memory, where place is "ram", or in a folder, one for each encoder."""

    def __init__(self, model, place):
        encoder, self.model, self.latents = model.image_encoder, model, {}
        frozen = not any(p.requires_grad for p in encoder.parameters())
        require(frozen, "--cache-latents: expected --image-encoder sd or dinov2, all frozen")
        tensors = {name: t.cpu().contiguous() for name, t in encoder.state_dict().items()}
        about = model.config.space, model.config.image_scale or encoder.scale
        number = checksum(about, tensors)
        self.folder = Path(place, f"{number:08x}") if place != "ram" else None

    def __call__(self, images):
        """Images (B, 3, H, W) -> z_image (B, C, h, w) as `LDMSeg.encode_image`, on the CPU."""
        keys = [hashlib.blake2b(image.numpy(), digest_size=16).hexdigest() for image in images]
        found = [self.load(key) for key in keys]
        missing = [i for i, z in enumerate(found) if z is None]
        if missing:
            with torch.no_grad():
                encoded = self.model.encode_image(images[missing].to(self.model.device))
            for i, z in zip(missing, encoded.half().cpu().numpy()):
                self.store(keys[i], z)
                found[i] = z
        return torch.from_numpy(np.stack(found)).float()

    def load(self, key):
        if not self.folder:
            return self.latents.get(key)
        path = self.folder / f"{key}.npy"
        with reading(path, "array; delete this file"):
            return np.load(path) if path.exists() else None

    def store(self, key, z):
        if not self.folder:
            self.latents[key] = z
            return
        with replacing(self.folder / f"{key}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, z)

def convert_official(content, unet_config=None):
    """Config and tensors, in our names, of the authors' {part: {key: tensor}}: "vae", or
    "vae_semseg", "unet", "vae_image". unet_config: of the UNet, in diffusers' names."""
    tensors = {}
    for part, prefix in OFFICIAL_PARTS.items():
        for key, tensor in content.get(part, {}).items():
            words = key.removeprefix("module.").split(".")
            if part == "vae_image":
                words = [OFFICIAL_VAE.get(word, word) for word in words]
            elif part != "unet":  # what is after its identity moves down by one
                place, identity = int(words[1]), {"encoder": 12, "decoder": 1}[words[0]]
                words[1] = str(place - (place > identity))
            if words[0] != "post_quant_conv":  # the decoder's, which is not there
                tensors[prefix + ".".join(words)] = tensor
    changes = {"latents": "gaussian", "loss_weights": "released"}
    if "vae_image" in content:
        bias = "image_encoder.layers.0.down_blocks.{}.resnets.0.conv1.bias"
        widths = [len(tensors[bias.format(i)]) for i in range(4)]
        changes["encoder_json"] = json.dumps(SD_VAE | {"block_out_channels": widths})
    if unet_config:
        down = unet_config["down_block_types"]
        changes |= {"size": 8 * unet_config["sample_size"],
                    "unet_attention": tuple(int("Attn" in name) for name in down),
                    "unet_widths": tuple(unet_config["block_out_channels"]),
                    "unet_layers": unet_config["layers_per_block"],
                    "unet_heads": unet_config["attention_head_dim"]}
    return replace(PRESETS["paper"], **changes), tensors

def load_official(path, unet_config=None):
    """The authors' ae.pt -> MaskAutoencoder, ldmseg.pt -> LDMSeg, "ema" as its UNet."""
    # their settings may be an EasyDict, read as a dict: nothing is imported or run
    settings = torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")])
    with reading(path, "file of the authors (a run is given by its folder)"), settings:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content.get("ema"):
            content["unet"] = content["ema"]
        config, tensors = convert_official(content, unet_config)
        model = (LDMSeg if "unet" in content else MaskAutoencoder)(config)
        model.load_state_dict(tensors)
    model.facts = "of the authors"
    return model

def load_model(path="photos", device="cpu", kind=nn.Module, size=None):
    """LDMSeg or MaskAutoencoder, in evaluation mode, of a run folder, a weights file, one
    of SHIPPED ("photos": photographs; "tiny": generated scenes) or the authors' .pt files.
    `.config` is its Config, but for another `size`, `.facts` a line about it. UserError unless
    a `kind`, and finite."""
    file = Path(path, "model.safetensors") if Path(path).is_dir() else Path(path)
    file = file if file.exists() else SHIPPED.get(str(path), file)
    if file.suffix == ".pt":
        model = load_official(file)
    else:
        with reading(file, "weights file or run folder"), safe_open(file, "pt") as weights:
            about = json.loads(weights.metadata()["ldmseg"])
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}
            written = about.pop("crc32", None)
            require(written in (None, checksum(about, tensors)), "damaged: another checksum")
            stored = about["config"]  # another version's may have other fields
            values = {f.name: f.type(stored[f.name]) for f in fields(Config) if f.name in stored}
            config = replace(PRESETS[stored["preset"]], **values)
            kinds = {one.__name__: one for one in (LDMSeg, Pix2SeqD, MaskAutoencoder)}
            model = kinds[about["model"]](config)
            model.facts = about.get("facts", "")
            model.load_state_dict({name: t.float() for name, t in tensors.items()})
    for name, tensor in model.state_dict().items():
        require(tensor.isfinite().all(), f"{path}: {name} has values that are not finite")
    for part in model.modules():
        if size and isinstance(getattr(part, "config", None), Config):
            part.config = replace(part.config, size=size)
    ours = type(model).__name__
    require(isinstance(model, kind), f"{path}: a {ours}, expected a {kind.__name__}")
    return to_device(model, device).eval()

def start_script(args, kind=nn.Module, scenes=True):
    """The model of --weights, by default a shipped one, its device, and what makes an autocast
    context. Says which weights. scenes: generated ones are the default, not photographs."""
    device, autocast = setup_distributed(args.device, args.amp)
    path = Path(args.weights or SHIPPED["tiny" if scenes else "photos"])
    model, log = load_model(path, device, kind, args.size), path / "log.jsonl"
    if is_main():
        lines = log.read_text().splitlines() if log.exists() else []
        scored = [line for line in lines if "pq" in line or "abs_rel" in line]
        print(f"weights: {path}: {model.facts}", *scored[-1:])
    return model, device, autocast

# ---- 18. Evaluation: data set -> predict -> segments -> metric -------------------------

def evaluation_batches(dataset, config, device, seed=0, workers=0, limit=None, batch_size=16):
    """This rank's share of the first `limit` images in batches: records, and {"image",
    "ids", ..., "noise"} of them; noise and ids depend on seed and image id only."""
    rank, world = rank_and_world()
    indices = range(len(dataset))[:limit][rank::world]
    size = min(batch_size, max(1, 2**20 // config.size**2))
    loader = DataLoader(Subset(dataset, indices), size, num_workers=workers, collate_fn=list,
                        worker_init_fn=leave_group)
    for records in progress(loader, "predicting"):
        noise = [(seed, record["image_id"]) for record in records]
        generators = [random_generator(seed, "sample", id) for _, id in noise]
        samples = [prepare(r, config, g, False) for r, g in zip(records, generators)]
        batch = {k: v.to(device) for k, v in default_collate(samples).items()}
        yield records, batch | {"noise": noise}

@torch.no_grad()
def evaluate(predict, tasks, dataset, config, device, pictures=0, **options):
    """{task: metric's result} over a data set and all ranks; (record, {task: map}) of the
    first `pictures` images. predict: a batch -> {task: outputs (B, ...)}."""
    metrics = {task: DepthQuality() if task == "depth" else
               PanopticQuality(dataset.categories, task == "instance") for task in tasks}
    shown = []
    for records, batch in evaluation_batches(dataset, config, device, **options):
        outputs = predict(batch)
        for i, record in enumerate(records):
            one, drawn = {task: output[i] for task, output in outputs.items()}, {}
            for task, metric in metrics.items():
                drawn[task], segments = draw(one, task, record["ids"].shape, config)
                if task == "depth":
                    metric.update(record["depth"], drawn[task])
                else:
                    metric.update(record["ids"], record["segments"], drawn[task], segments)
            if len(shown) < pictures:
                shown.append((record, drawn))
    for metric in metrics.values():
        metric.all_reduce(device)
    return {task: metric.compute() for task, metric in metrics.items()}, shown

# ---- 19. Pictures and results ----------------------------------------------------------

def align_ids(ids, truth):
    """Renumber int ids (H, W): a segment that matches one of `truth` (IoU > 0.5) has its
    id, others have ids above all of truth's."""
    renamed = np.where(ids == VOID, VOID, ids + truth.max() + 1)
    for id in np.setdiff1d(truth, [VOID]):
        theirs = truth == id
        for other in np.setdiff1d(ids[theirs], [VOID]):
            ours = ids == other
            if (theirs & ours).sum() > 0.5 * (theirs | ours).sum():
                renamed[ours] = id
    return renamed

PALETTE = np.uint8([
    255 * np.array(colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.45 + i % 3 / 4, 0.95 - 0.3 * (i % 2)))
    for i in range(1, 252)])  # a prime: ids of pure colours, 2**8 or 2**16 apart, differ

def colorize(drawn, truth=None, image=None):
    """Map (H, W) -> uint8 (H, W, 3). Ids: a colour each, of the segment of `truth` that it
    matches, over `image`; VOID grey stripes or the image. Depth, float: bright to dark, NaN
    black."""
    if drawn.dtype.kind == "f":
        low, high = np.nanmin(drawn), np.nanmax(drawn)
        near = (high - drawn[..., None]) / max(high - low, 1e-9)
        return np.nan_to_num(near * (215, 190, 60) + (40, 30, 90)).astype(np.uint8)
    ids = drawn if truth is None else align_ids(drawn, truth)
    picture, stripe = np.empty((*ids.shape, 3), np.uint8), max(2, len(ids) // 32)
    for y, row in enumerate(picture):  # row by row: indices and floats would take gigabytes
        void = ids[y] == VOID
        row[:] = PALETTE[(ids[y] - 1) % len(PALETTE)]
        if image is None:
            row[void] = 51 + 38 * ((y + np.flatnonzero(void)) // stripe % 2)[:, None]
        else:
            row[~void] = 0.45 * image[y, ~void] + 0.55 * row[~void]
            row[void] = image[y, void]
    return picture

def save_grid(path, titles, rows, width=192):
    """A PNG of rows of uint8 pictures (H, W, 3), in the aspect of the row's first one."""
    strips = [np.full((18, len(titles) * (width + 4), 3), 255, np.uint8)]
    for row in rows:
        size = width, max(1, round(width * row[0].shape[0] / row[0].shape[1]))
        cells = [Image.fromarray(one).resize(size, Image.BOX) for one in row]
        strips.append(np.hstack([ImageOps.expand(c, (0, 0, 4, 4), "white") for c in cells]))
    canvas = Image.fromarray(np.vstack(strips))
    for x, title in enumerate(titles):
        ImageDraw.Draw(canvas).text((x * (width + 4) + 4, 3), title, fill="black")
    write_png(path, np.asarray(canvas))

def keep_inputs(out, *folders):
    """UserError where results in --out would be among the inputs in these folders."""
    results = {Path(out, name).resolve() for name in ("panoptic", "overlay", "depth")}
    for folder in map(Path, folders):
        above = {folder.resolve(), *folder.resolve().parents}
        require(not results & above and Path(out).resolve() != folder.resolve(), f"--out {out}: "
                f"results would replace inputs in {folder}; use another --out")

def write_panoptic(out, name, record, ids, segments):
    """panoptic/NAME.png and overlay/NAME.png -> two entries of panoptic.json."""
    name = str(Path(name).with_suffix(".png"))
    write_png(Path(out, "panoptic", name), id2rgb(ids))
    write_png(Path(out, "overlay", name), colorize(ids, image=record["image"]))
    image = {"id": record["image_id"], "file_name": record["file_name"],
             "height": ids.shape[0], "width": ids.shape[1]}
    return image, {"image_id": image["id"], "file_name": name, "segments_info": segments}

def write_panoptic_json(out, entries, categories=""):
    """panoptic.json of `write_panoptic`'s entries; categories: JSON."""
    images, annotations = zip(*entries)
    categories = json.loads(categories or '[{"id": 1, "name": "segment", "isthing": 1}]')
    write_json(Path(out, "panoptic.json"), {
        "images": images, "annotations": annotations, "categories": categories})
