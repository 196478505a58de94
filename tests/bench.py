"""Speed, run by hand: python tests/bench.py followed by one of these names

scenes  generated scenes per second in one process, at 64 and 256 pixels
ae      stage 1's training step against a plain one, one thread: CPU time and peak memory
data    a training sample of photographs against decoding its two files, one thread: CPU time
growth  CPU time and peak memory of both stages' steps and of sampling against image size, ids,
        segments and batch, one thread
ldm     stage 2's training step against a plain one, one thread: CPU time
sample  sampling by batch; sample.py from start to end, and what its imports take
pq      Panoptic Quality of 640x480 pairs with 12 segments: times and their ratios, one thread
post    logits of the shipped weights to maps of 12 megapixels, against the plain way
paper   one training step of each stage at the paper's size, random weights: time, peak memory
device  the paper's model in bf16 on a GPU (--tiny: rehearsed on the CPU), random weights: time,
        images per second and peak memory of sampling, training, and each way to run them;
        stops after --seconds 100; --only compile --seconds 300: torch.compile, -h: more
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

STARTED = time.perf_counter()
if sys.argv[1:2] in (["ae"], ["ldm"], ["data"], ["growth"], ["pq"]):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = "1"
REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from scipy import ndimage  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import clip_grad_norm_  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from torchvision.io import decode_png, read_file  # noqa: E402
from torchvision.models import convnext  # noqa: E402

from ldmseg import (  # noqa: E402
    PRESETS, SD_VAE, VOID, LayerNorm2d, LDMSeg, MaskAutoencoder, PanopticDataset, PanopticQuality,
    ShapeScenes, Upsample, ae_loss, compact_ids, distribute, id2rgb, image_tensor, int2bits,
    keep_freed_memory, load_model, make_ema, make_optimizer, most_probable, prepare, read_image,
    resize_nearest, sample_uncertain_points, segments_of, setup_distributed, write_json, write_png,
)  # fmt: skip
from train_ae import candidate_coords  # noqa: E402

CATEGORIES = [{"id": 1, "name": "segment", "isthing": 1}]


def scenes():
    for size, count in ((64, 500), (256, 100)):
        dataset = ShapeScenes("train", size)
        start = time.perf_counter()
        for index in range(count):
            dataset[index]
        print(f"{size} pixels: {count / (time.perf_counter() - start):.0f} scenes per second")


def milliseconds(functions, rounds=7, clock=time.perf_counter):
    """Median time of each of {name: function}, measured in turns: drifts hit all alike."""
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            function()
            times[name].append(1e3 * (clock() - start))
    return {name: np.median(values) for name, values in times.items()}


def wavy_regions(rng, height=480, width=640, segments=12):
    """An id map: `segments` regions around random centres with wavy borders, 24-bit ids, VOID."""
    centres = rng.random((segments + 1, 2)) * (height, width)
    place = np.indices((height, width), np.float32)
    for axis in place:
        axis += 60 * ndimage.gaussian_filter(rng.standard_normal((height, width)), 8)
    distance = [((place - c[:, None, None].astype(np.float32)) ** 2).sum(0) for c in centres]
    ids = np.append(0, 1 + rng.choice(2**24 - 1, segments, replace=False))
    return ids[np.argmin(distance, 0)]


def write_pairs(folder, unique, repeats):
    """`unique` pairs of maps as COCO panoptic files, each used by `repeats` image ids."""
    rng, maps = np.random.default_rng(0), {}
    for name in ("gt", "pred"):
        maps[name], annotations = [wavy_regions(rng) for _ in range(unique)], []
        for i, ids in enumerate(maps[name]):
            write_png(folder / name / f"{i}.png", id2rgb(ids))
            annotations += [{"image_id": i * repeats + j, "file_name": f"{i}.png",
                             "segments_info": segments_of(ids)} for j in range(repeats)]
        write_json(folder / f"{name}.json", {"annotations": annotations, "categories": CATEGORIES})
    return list(zip(maps["gt"], maps["pred"]))


def pq_update(folder):
    """One process: `update` on arrays and from files against its parts and against hotcoco."""
    pairs = write_pairs(folder, unique=20, repeats=1)
    images = [(gt, segments_of(gt), pred, segments_of(pred)) for gt, pred in pairs]
    metric = PanopticQuality(CATEGORIES)
    files = [[str(folder / name / f"{i}.png") for name in ("gt", "pred")] for i in range(20)]
    small = [[np.unique(ids, return_inverse=True)[1].reshape(ids.shape) for ids in pair]
             for pair in pairs]  # fmt: skip
    functions = {
        "np.bincount over gt * 16 + pred, ids given as 0..12":
            lambda: [np.bincount((gt * 16 + pred).ravel()) for gt, pred in small],
        "decoding the files": lambda: [decode_png(read_file(f)) for pair in files for f in pair],
        "update on arrays": lambda: [metric.update(*image) for image in images],
        "update from PNG files": lambda: [
            metric.update(read_image(gt, True), image[1], read_image(pred, True), image[3])
            for (gt, pred), image in zip(files, images)],
    }  # fmt: skip
    try:
        from hotcoco import panoptic

        functions["hotcoco from the same files"] = lambda: panoptic.PanopticEval(
            folder / "gt.json", folder / "pred.json").evaluate()
    except ImportError:
        print("hotcoco is not installed: no comparison with it")
    times = {name: value / len(pairs) for name, value in milliseconds(functions).items()}
    for name, value in times.items():
        print(f"{name:>52}: {value:6.2f} ms a pair")
    bincount, decoding, arrays, files, *hotcoco = times.values()
    print(f"on arrays / bincount: {arrays / bincount:.2f}")
    for name, other in zip(("decoding", "hotcoco"), (decoding, *hotcoco)):
        print(f"from files / {name}: {files / other:.2f}")


def pq_command(folder):
    """The whole command on 500 and 5,000 pairs: peak memory; 5,000 pairs: one and two workers."""
    write_pairs(folder, unique=50, repeats=100)
    code = ("import resource, sys, evaluate; evaluate.main(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    for limit, workers in ((500, 1), (5000, 1), (5000, 2)):
        command = [sys.executable, "-c", code, "--gt", f"{folder}/gt.json", "--pred",
                   f"{folder}/pred.json", "--limit", str(limit), "--workers", str(workers)]
        start = time.perf_counter()
        output = subprocess.run(command, check=True, cwd=REPO, capture_output=True).stdout
        print(f"evaluate.py, {limit} pairs, --workers {workers}: {time.perf_counter() - start:.1f} "
              f"s, peak memory of a worker {int(output.split()[-1]) / 2**10:.0f} MiB")


def pq():
    with tempfile.TemporaryDirectory() as folder:
        pq_update(Path(folder, "few"))
        pq_command(Path(folder, "many"))


def post(size=(3000, 4000)):
    def plain(logits):
        logits = F.interpolate(logits[None], scale_factor=2, mode="bilinear")
        probability, ids = F.interpolate(logits, size, mode="bilinear")[0].softmax(0).max(0)
        return ids.masked_fill(probability < 0.5, 0)

    for name in ("tiny", "photos"):
        model = load_model(name)
        image = image_tensor(ShapeScenes("val", 128)[3]["image"], model.config.size)[None]
        logits = model.sample(image, [(0, 0)], model.config.eval_steps)[0]
        different = (plain(logits) != most_probable(logits, size, 0.5)).sum().item()
        times = milliseconds({"ours": lambda: most_probable(logits, size, 0.5),
                              "the plain way": lambda: plain(logits)}, rounds=3)
        print(f"{name}, {len(logits)} ids:", *(f"{k} {v:.0f} ms," for k, v in times.items()),
              f"ratio {times['ours'] / times['the plain way']:.2f}, {different} pixels differ")


def status(name):  # MiB: VmRSS, this process's memory; VmHWM, its peak
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index(f"{name}:") + 1]) / 2**10


def report(name, start):
    taken = time.perf_counter() - start
    print(f"{name}: {taken:.1f} s, peak memory {status('VmHWM') / 2**10:.1f} GiB", flush=True)


def teraflop(function):
    """10^12 operations of the convolutions and matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e12


def ids_of(config, batch, segments):
    """Maps int64 (B, s, s): wavy regions, VOID and `segments` others in each."""
    rng = np.random.default_rng(0)
    maps = [wavy_regions(rng, 512, 512, segments) for _ in range(batch)]
    maps = [compact_ids(ids, np.unique(ids[ids != VOID])) for ids in maps]
    return torch.from_numpy(np.stack([resize_nearest(ids, [config.size] * 2) for ids in maps]))


def plain_ae_loss(logits, ids, points, scale=2, coords=None):
    """Eq. 2 without sharing: logits upsampled to full size, a float mask of full size and
    candidates of its own for each segment. coords (B, M, 2): an image's segments share these."""
    def sample(maps, places, mode="bilinear"):
        return F.grid_sample(maps, places[:, :, None], mode, "border", False)[..., 0]

    def choose(maps, image, uncertainty):
        count = 4 * points - int(0.75 * points)
        places = torch.rand(len(maps), count, 2) * 2 - 1 if coords is None else coords[image]
        with torch.no_grad():
            void = sample(labels[image], places, "nearest")[:, 0] == VOID
            uncertain = uncertainty(sample(maps, places)).masked_fill(void, -1e9)
            chosen = sample_uncertain_points(uncertain, points)
        return places.gather(1, chosen[..., None].expand(-1, -1, 2))

    labels, logits = ids[:, None].float(), logits.float()
    if scale > 1:
        logits = F.interpolate(logits, scale_factor=scale, mode="bilinear")
    places = choose(logits, range(len(ids)), lambda v: v.topk(2, 1).values.diff(dim=1)[:, 0])
    target = sample(labels, places, "nearest")[:, 0].long()
    ce = F.cross_entropy(sample(logits, places), target, ignore_index=VOID)

    found = [(i, s) for i, one in enumerate(ids) for s in one.unique().tolist() if s != VOID]
    masks = torch.stack([(ids[i] == s).float() for i, s in found])[:, None]  # (S, 1, H, W)
    image, segment = torch.tensor(found).T
    maps = logits[image, segment][:, None]  # (S, 1, H, W)
    places = choose(maps, image, lambda v: -v[:, 0].abs())
    counts = (sample(labels[image], places, "nearest")[:, 0] != VOID).float()
    logit, truth = sample(maps, places)[:, 0], sample(masks, places)[:, 0] * counts
    bce = F.binary_cross_entropy_with_logits(logit, truth, counts, reduction="none").sum(1)
    probability = logit.sigmoid() * counts
    dice = 1 - (2 * (probability * truth).sum(1) + 1) / ((probability + truth).sum(1) + 1)
    return ce + (bce / counts.sum(1).clamp(min=1) + dice).mean()


def ae_step_loss(model, ids):
    points = model.config.points
    coords = candidate_coords([np.random.default_rng()] * len(ids), points, ids.device)
    return ae_loss(model(ids)[0], ids, coords, points)[0]


def train_step(optimizer, *losses):  # of micro-batches
    for loss in losses:
        (loss() / len(losses)).backward()
    optimizer.step()
    optimizer.zero_grad()


PLAIN = {"plain": 2, "plain, logits not upsampled": 1}  # name of a way: its `scale`
OURS = {"ours": 1, "ours, --accumulate 2": 2, "ours, --accumulate 4": 4}  # its micro-batches


def ae_step(kind, config, batch, segments):
    """One training step of stage 1, ours or plain, as a function."""
    torch.manual_seed(0)
    model, ids = MaskAutoencoder(config), ids_of(config, batch, segments)
    if kind in OURS:
        keep_freed_memory()
        optimizer = make_optimizer(model, config.ae_lr, config)
        return partial(train_step, optimizer, *(
            partial(ae_step_loss, model, part) for part in ids.chunk(OURS[kind])))
    for layer in model.decoder:  # the same layers, as PyTorch and torchvision have them
        layer.__class__ = {Upsample: nn.ConvTranspose2d, LayerNorm2d: convnext.LayerNorm2d}.get(
            type(layer), type(layer))
    return partial(train_step, torch.optim.AdamW(model.parameters()), lambda: plain_ae_loss(
        model.decode(model.encode(int2bits(ids, config.bits))), ids, config.points, PLAIN[kind]))


def cost(steps, make_step, *arguments):
    """Median CPU time in ms of `steps` steps after a first one, and the MiB by which they made
    this process grow."""
    torch.set_num_threads(1)
    step = make_step(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    before = status("VmRSS")
    step()
    return milliseconds({"": step}, steps, time.process_time)[""], status("VmHWM") - before


def in_a_child(*arguments):  # `cost`, in a process that has its own peak
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(cost, arguments)


def ae():
    torch.set_num_threads(1)
    for preset, batch, segments, rounds in (("tiny", 16, 15, 9), ("paper", 2, 20, 2)):
        config = PRESETS[preset]
        arguments = config, batch, segments
        print(f"{preset}: batch {batch}, {config.size} pixels, {config.num_ids} ids, {segments} "
              "segments in an image", flush=True)
        ways = *PLAIN, *(kind for kind, parts in OURS.items() if parts <= batch)
        costs = [[in_a_child(3, ae_step, kind, *arguments) for kind in ways]
                 for _ in range(rounds)]

        # the same points, the same loss
        ids, side, points = ids_of(*arguments), config.size // 2, config.points
        logits = torch.randn(batch, config.num_ids, side, side).requires_grad_()
        coords = candidate_coords([np.random.default_rng(0)] * batch, points, "cpu")
        losses = {kind: partial(plain_ae_loss, logits, ids, points, scale)
                  for kind, scale in PLAIN.items()}
        losses["ours"] = lambda: ae_loss(logits, ids, coords, points)[0]
        torch.testing.assert_close(losses["ours"](), plain_ae_loss(logits, ids, points, 1, coords))
        print("    of noise, at points of their own:",
              *(f"{kind} {loss().item():.3f};" for kind, loss in losses.items()))

        times, peaks = (dict(zip(ways, column)) for column in np.median(costs, 0).T)
        gradients = milliseconds({kind: lambda loss=loss: torch.autograd.grad(loss(), logits)
                                  for kind, loss in losses.items()}, rounds, time.process_time)
        for kind in ways:
            step, peak = times[kind], peaks[kind]
            print(f"    {kind:>27}: step {step:6.0f} ms, {step / times['plain']:.2f} of plain; "
                  f"peak memory {peak:5.0f} MiB, {peak / peaks['plain']:.2f} of it", flush=True)
        print("    the losses alone, ms:", *(f"{kind} {taken:.0f};"
                                             for kind, taken in gradients.items()))
        square = torch.randn(1024, 1024)
        product = milliseconds({"": lambda: square @ square}, 20, time.process_time)[""]
        ours = 1e6 * teraflop(ae_step("plain", *arguments)) / times["ours"]  # as many
        peak = 2e3 * 1.024**3 / product
        print(f"    ours {ours:.0f} GFLOP/s, a matrix product {peak:.0f}: share {ours / peak:.2f}")


def data():
    torch.set_num_threads(1)
    rng, config = np.random.default_rng(0), PRESETS["paper"]
    for height, width in ((480, 640), (1024, 2048)):
        with tempfile.TemporaryDirectory() as temporary:
            folder, ids = Path(temporary), wavy_regions(rng, height, width, 20)
            paths = folder / "photo.jpg", folder / "panoptic" / "0.png"
            noise = ndimage.gaussian_filter(rng.standard_normal((height, width, 3)), (1, 1, 0))
            photo = (id2rgb(ids) / 2 + 64 + 90 * noise).clip(0, 255).astype(np.uint8)
            write_png(paths[1], id2rgb(ids))
            Image.fromarray(photo).save(paths[0], quality=90)
            write_json(folder / "panoptic.json", {
                "images": [{"id": 0, "file_name": "photo.jpg"}], "categories": CATEGORIES,
                "annotations": [{"image_id": 0, "file_name": "0.png",
                                 "segments_info": segments_of(ids)}]})
            dataset = PanopticDataset(folder / "panoptic.json", folder)
            times = milliseconds({
                "decoding the two files": lambda: [
                    read_image(path, exact) for path, exact in zip(paths, (False, True))],
                "a record": lambda: dataset[0],
                "a training sample": lambda: prepare(
                    dataset[0], config, np.random.default_rng(0), True)},
                15, time.process_time)  # fmt: skip
            sizes = " and ".join(f"{path.stat().st_size / 1e3:.0f} kB" for path in paths)
        print(f"{width} x {height}, {sizes}, to {config.size} pixels:")
        for name, taken in times.items():
            ratio = taken / times["decoding the two files"]
            print(f"    {name:>22}: {taken:6.1f} ms, ratio {ratio:.2f}")


def growth_step(kind, size, bits, segments, batch):
    """A step of training or ten of sampling with the widths of tiny, as a function."""
    config = replace(PRESETS["tiny"], size=size, bits=bits, points=size**2 // 10, mask_scale=1.0)
    if kind == "stage 1":
        return ae_step("ours", config, batch, segments)
    torch.manual_seed(0)
    model = LDMSeg(config)
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.02)  # 0 has no gradient
    model.id_latents = torch.randn(config.num_ids, config.latent_channels)  # once in a training
    image = torch.rand(batch, 3, size, size) * 2 - 1
    if kind == "sampling":
        return partial(model.sample, image, [(0, place) for place in range(batch)], 10)
    ids, t = ids_of(config, batch, segments), torch.full((batch,), 500)
    eps = torch.randn(batch, config.latent_channels, size // 8, size // 8)
    optimizer = make_optimizer(model, config.ldm_lr, config)
    return partial(train_step, optimizer, lambda: model(image, ids, eps, t, True)[0])


def growth():
    import diffusers.models  # here, not in each child  # noqa: F401

    middle = {"size": 256, "bits": 7, "segments": 20, "batch": 1}
    others = {"size": (512, 768), "bits": (5, 8), "segments": (5, 80), "batch": (4,)}
    points = [middle] + [middle | {name: v} for name, values in others.items() for v in values]
    print("pixels  ids  segments  batch | stage 1, stage 2, 10 steps of sampling")
    for point in points:
        row = "{size:6} {ids:4} {segments:9} {batch:6}".format(ids=2 ** point["bits"], **point)
        for kind in ("stage 1", "stage 2", "sampling"):
            taken, peak = in_a_child(1, growth_step, kind, *point.values())
            row += f" | {taken / 1e3:6.2f} s {peak:5.0f} MiB"
        print(row, flush=True)


def stage_1():
    config = PRESETS["paper"]
    model = MaskAutoencoder(config)
    optimizer = make_optimizer(model, config.ae_lr, config)
    ids = torch.randint(config.num_ids, (2, 8, 8)).repeat_interleave(64, 1).repeat_interleave(64, 2)
    for step in range(2):  # the first also warms up
        start = time.perf_counter()
        train_step(optimizer, lambda: ae_step_loss(model, ids))
        report(f"stage 1, step {step + 1}, batch 2 at 512 pixels", start)


def stage_2():
    start = time.perf_counter()
    model = LDMSeg(replace(PRESETS["paper"], encoder_json=json.dumps(SD_VAE)))
    torch.nn.init.normal_(model.unet.conv_out.weight)  # a zero would stop the gradient
    count = sum(p.numel() for p in model.unet.parameters())
    report(f"stage 2, model of {count:,} UNet parameters", start)
    ids, eps = torch.ones(1, 512, 512, dtype=torch.long), torch.randn(1, 4, 64, 64)
    start = time.perf_counter()
    loss, _ = model(torch.randn(1, 3, 512, 512), ids, eps, torch.tensor([500]), False)
    report("stage 2, forward, batch 1 at 512 pixels", start)
    loss.backward()
    report("stage 2, forward and backward", start)


def paper():
    for stage in ("stage_1", "stage_2"):  # each in a process that has its own peak memory
        subprocess.run([sys.executable, __file__, stage], check=True)


def replayed(unet):
    """The UNet's forward as a CUDA graph, which its first call captures for inputs like those."""
    forward, graph, kept = partial(type(unet).forward, unet), [], {}
    # weights in bfloat16 need no autocast; its cached casts would not live as long as the graph
    enabled = unet.dtype == torch.float32
    autocast = torch.autocast(unet.device.type, torch.bfloat16, enabled, cache_enabled=False)

    def call(z, t, encoder_hidden_states=None):
        if not graph:
            kept.update(z=z.to(unet.dtype, copy=True), t=t.clone())
            with autocast:
                forward(kept["z"], kept["t"], None)
                graph.append(torch.cuda.CUDAGraph())
                with torch.cuda.graph(graph[0]):
                    kept["output"] = forward(kept["z"], kept["t"], None)
        kept["z"].copy_(z)
        kept["t"].copy_(t)
        graph[0].replay()
        return kept["output"]

    return call


def plain_loss(model, image, ids, eps, t):
    """Eq. 4 the plain way: in every step an image encoded, a first estimate with its graph."""
    z_image = model.encode_image(image)
    z_t = model.schedule.add_noise(model.encode_mask(ids), eps, t)
    _, estimate, _ = model.predict(z_t, z_image, torch.zeros_like(z_t), t)
    output, _, _ = model.predict(z_t, z_image, estimate, t)
    return (output - eps).square().mean()


def ldm(batch=2):
    vae = SD_VAE | {"block_out_channels": [32, 64, 128, 128]}
    config = replace(PRESETS["paper"], size=128, unet_widths=(96, 160, 320, 320),
                     encoder_json=json.dumps(vae))  # fmt: skip
    model = LDMSeg(config)
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.02)  # 0 has no gradient
    ids, image = ids_of(config, batch, 20), torch.randn(batch, 3, 128, 128)
    eps, t = torch.randn(batch, 4, 16, 16), torch.full((batch,), 500)
    cached = model.encode_image(image)
    trainable = [p for p in model.parameters() if p.requires_grad]
    fused = torch.optim.AdamW(trainable, 1e-6, fused=True)
    plain = torch.optim.AdamW(trainable, 1e-6, foreach=False)

    def step(estimates=(True, False), z_image=cached, optimizer=fused):
        for estimate in estimates:  # two steps, as the coin would have it
            loss = partial(model.diffusion_loss, image, ids, eps, t, estimate, z_image=z_image)
            train_step(optimizer, lambda: loss()[0])

    def plain_steps():
        for _ in range(2):
            train_step(plain, lambda: plain_loss(model, image, ids, eps, t))

    times = milliseconds({
        "the plain way": plain_steps, "ours": step,
        "an estimate in every step": partial(step, (True, True)),
        "images encoded again": partial(step, z_image=None),
        "AdamW not fused": partial(step, optimizer=plain)}, 7, time.process_time)  # fmt: skip
    print(f"two steps of stage 2, batch {batch}, 128 pixels, Stable Diffusion v1 at a quarter of "
          "its width, float32; the plain way, ours, and ours but for one thing")  # fmt: skip
    for name, taken in times.items():
        print(f"{name:>25} {taken:7.0f} ms, {taken / times['the plain way']:.2f}")


def sample(steps=10):
    model, dataset = load_model("tiny"), ShapeScenes("val", 64)
    images = torch.stack([image_tensor(dataset[i]["image"], 64) for i in range(16)])
    draws = {batch: partial(model.sample, images[:batch], [(0, i) for i in range(batch)], steps)
             for batch in (1, 4, 16)}  # fmt: skip
    for batch, taken in milliseconds(draws, 5).items():
        rate = 1e6 * teraflop(draws[batch]) / taken
        print(f"{steps} steps, batch {batch:>2}: {taken / batch:.0f} ms an image, {rate:.0f} "
              "GFLOP/s")  # fmt: skip

    # what the image's half of conv_in could save, computed once and not in every step
    z, half = torch.randn(1, 128, 8, 8), torch.nn.Conv2d(112, 96, 3, padding=1)
    with torch.no_grad():
        times = milliseconds({"a step": lambda: model.unet(z, torch.tensor([500]), None),
                              "half": lambda: half(z[:, :112])}, 30)  # fmt: skip
    print(f"the image's half of conv_in is {times['half'] / times['a step']:.3f} of a step")

    with tempfile.TemporaryDirectory() as folder:
        commands = {"import torch": ["-c", "import torch"],
                    "import of the UNet": ["-c", "from diffusers import UNet2DConditionModel"],
                    "sample.py": [REPO / "sample.py", "--out", folder]}  # fmt: skip
        run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
        times = milliseconds({name: partial(run, [sys.executable, *command])
                              for name, command in commands.items()}, 3)  # fmt: skip
    print(", ".join(f"{name} {taken / 1e3:.1f} s" for name, taken in times.items()))


class DeviceTable:
    """The paper's model with random weights on a GPU; tiny: a small one, on the CPU."""

    def __init__(self, tiny):
        config, vae, self.kind = PRESETS["paper"], SD_VAE, "cpu" if tiny else "cuda"
        self.batches, self.draws = (32, 64, 96), ((1, 50), (16, 50), (64, 1))
        if tiny:
            config = replace(config, size=64, points=99, unet_widths=(32, 32, 64, 64))
            vae = vae | {"block_out_channels": [32] * 4}
            self.batches, self.draws = (1, 2), ((1, 3), (2, 1))
        self.config = replace(config, encoder_json=json.dumps(vae))
        self.device, self.autocast = setup_distributed(self.kind, "bf16")
        with self.device:  # where the weights are drawn
            self.model = LDMSeg(self.config).to(self.device, memory_format=torch.channels_last)
        torch.nn.init.normal_(self.model.unet.conv_out.weight, std=0.02)  # 0 has no gradient
        one, two = (teraflop(partial(self.draw, 1, steps)) for steps in (1, 2))
        self.flops_to_draw = lambda steps: one + (steps - 1) * (two - one)
        self.start()
        self.flops_to_train = teraflop(partial(self.two_steps, self.inputs(1))) / 2
        self.optimizer = self.ema = None  # no memory while it samples

    def row(self, name, images, function, flops=0.0, first=None):
        """Print seconds of the first call and of the median of one or two more, images and 10^12
        operations (`flops`: of an image) a second, peak memory, which it returns; or the error."""
        seconds, gpu = [], self.kind == "cuda"
        torch.cuda.reset_peak_memory_stats() if gpu else None
        try:
            for call in (first or function, function, function):
                if sum(seconds[1:]) > 1.5:
                    break
                begin = time.perf_counter()
                call()
                torch.cuda.synchronize() if gpu else None
                seconds.append(time.perf_counter() - begin)
        except Exception as error:  # out of memory, say: the next rows still run
            print(f"{name:44} {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            peak = None
        else:
            taken, peak = np.median(seconds[1:]), torch.cuda.max_memory_allocated() / 2**30
            rate = images / taken
            print(f"{name:44} first {seconds[0]:5.2f}, then {taken:6.3f} s, {rate:7.2f} images/s, "
                  f"{flops * rate:4.0f} TFLOP/s, {peak:5.1f} GiB")
        sys.stdout.flush()
        torch.cuda.empty_cache()
        return peak

    def draw(self, batch, steps):
        image = torch.rand(batch, 3, self.config.size, self.config.size, device=self.device)
        with self.autocast():
            return self.model.sample(image, [(0, place) for place in range(batch)], steps)

    def draw_row(self, kind, batch, steps):
        self.row(f"sampling, {kind}, batch {batch}, {steps} steps", batch, partial(
            self.draw, batch, steps), self.flops_to_draw(steps), partial(self.draw, batch, 1))

    def sample(self):
        unet = self.model.unet
        for kind in ("as it is", "graph", "graph of bfloat16", "bfloat16 too, cudnn.benchmark"):
            unet.bfloat16() if "bfloat16" in kind else None
            torch.backends.cudnn.benchmark = "cudnn" in kind
            for batch, steps in self.draws:
                if kind != "as it is":
                    unet.forward = replayed(unet)
                self.draw_row(kind, batch, steps)
                vars(unet).pop("forward", None)
        torch.backends.cudnn.benchmark = False
        unet.float()

    def inputs(self, batch):
        """Images (B, 3, H, W), ids (B, H, W) of 16 segments, eps (B, 4, h, w), t (B,)."""
        size, side = self.config.size, self.config.size // 4
        ids = torch.randint(1, self.config.num_ids, (batch, 4, 4))
        inputs = (torch.rand(batch, 3, size, size) * 2 - 1,
                  ids.repeat_interleave(side, 1).repeat_interleave(side, 2),
                  torch.randn(batch, 4, size // 8, size // 8), torch.randint(1000, (batch,)))
        return [x.to(self.device) for x in inputs]

    def start(self, layout=torch.channels_last, zero=0):
        """Training from here, plain unless the row changes that."""
        self.net, self.optimizer, self.ema = self.model.to(memory_format=layout), None, None
        self.net.zero_grad()
        self.optimizer = make_optimizer(self.net, 1e-4, replace(self.config, zero=zero))
        self.ema = make_ema(self.model, self.config.ema)
        self.scaler = torch.amp.GradScaler(self.kind, enabled=False)

    def two_steps(self, inputs, z_image=None):
        """What train_ldm.py does in a step with self-conditioning and in one without; z_image:
        latents of --cache-latents."""
        for self_condition in (True, False):
            with self.autocast():
                loss, _ = self.net(*inputs, self_condition, z_image=z_image)
            self.scaler.scale(loss).backward()
            assert all(p.grad is not None for p in self.model.unet.parameters())
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.model.parameters(), self.config.ldm_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.ema.update_parameters(self.model)
        assert loss.isfinite() and self.model.unet.conv_out.weight.isfinite().all()

    def train_row(self, kind, batch, change=lambda: None, cached=False):
        inputs, cells = self.inputs(batch), self.config.size // 8
        z_image = torch.randn(batch, 4, cells, cells, device=self.device) if cached else None
        steps = partial(self.two_steps, inputs, z_image)
        return self.row(f"stage 2, {kind}, batch {batch}", 2 * batch, steps, self.flops_to_train,
                        lambda: (change(), steps()))

    def train(self):
        batch, encoder = self.batches[0], self.model.image_encoder
        image, ids, _, _ = self.inputs(batch)
        model = MaskAutoencoder(self.config).to(self.device, memory_format=torch.channels_last)
        optimizer, loss = make_optimizer(model, 1e-4, self.config), self.autocast()(ae_step_loss)
        self.row(f"stage 1, batch {batch}", batch,
                 lambda: train_step(optimizer, lambda: loss(model, ids)))
        self.row(f"image encoder, batch {batch}", batch, partial(self.autocast()(encoder), image))
        with torch.no_grad(), self.autocast():  # autocast's own way, norms in float32
            self.row(f"image encoder's layers, batch {batch}", batch,
                     partial(encoder.layers, image))
            latents, mixed = encoder(image), encoder.layers(image)[:, :4]
        exact = encoder(image)
        for name, z in (("bfloat16", latents), ("autocast", mixed)):
            print(f"    latents of {name}: {(z - exact).norm() / exact.norm():.4f} from float32's")
        self.start()
        for cached in (False, True):
            for batch in self.batches:
                kind = "latents from a cache" if cached else "as it is"
                if self.train_row(kind, batch, cached=cached) is None:
                    break

    def modes(self):
        """Stage 2 with one change at a time, which the first call of its row makes."""
        unet, cudnn, peaks, autocast = self.model.unet, torch.backends.cudnn, {}, self.autocast

        def fp16():
            self.autocast = setup_distributed(self.kind, "fp16")[1]
            self.scaler = torch.amp.GradScaler(self.kind)

        def ranks(zero):
            os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
            setup_distributed(self.kind)
            self.start(zero=zero)
            self.net = distribute(self.model)

        for kind, change in {
            "as it is": lambda: None, "checkpointing": unet.enable_gradient_checkpointing,
            "fp16": fp16, "DDP of one rank": partial(ranks, 0), "ZeRO of one": partial(ranks, 1),
            "contiguous": partial(self.start, torch.contiguous_format),
            "cudnn.benchmark": partial(setattr, cudnn, "benchmark", True),
        }.items():  # fmt: skip
            self.start()
            peaks[kind] = self.train_row(kind, self.batches[0], change)
            if kind == "checkpointing" and all(peaks.values()):
                print(f"    {peaks[kind] / peaks['as it is']:.2f} of the memory")
            if kind == "fp16" and peaks[kind]:
                print(f"    loss scale {self.scaler.get_scale():.0f}")
            unet.disable_gradient_checkpointing()
            cudnn.benchmark, self.autocast = False, autocast

    def compile(self):  # minutes
        unet, encoder = self.model.unet, self.model.image_encoder.layers
        encoder.compile(dynamic=False)
        unet.bfloat16().forward = replayed(unet)
        self.draw_row("graph of bfloat16, encoder compiled", *self.draws[-1])
        vars(unet).pop("forward")
        unet.compile(dynamic=False)
        for batch, steps in self.draws[1:]:
            self.draw_row("both compiled, bfloat16", batch, steps)
        unet.float()
        self.start()
        self.train_row("UNet compiled, cache", self.batches[0], cached=True)


def device(*options):
    parser = argparse.ArgumentParser("bench.py device")
    parser.add_argument("--only", nargs="+", choices=["sample", "train", "modes", "compile"],
                        default=["sample", "train", "modes"], help="groups of rows")  # fmt: skip
    parser.add_argument("--seconds", type=int, default=100, help="after which it stops")
    parser.add_argument("--tiny", action="store_true", help="rehearse on the CPU")
    args = parser.parse_args(options)
    if not (args.tiny or torch.cuda.is_available()):
        return print("no CUDA GPU, so nothing to measure; --tiny rehearses it on the CPU")

    def stop(*_):
        print(f"stopped after {args.seconds} seconds", flush=True)
        os._exit(0)  # also in the middle of a compilation

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, args.seconds + STARTED - time.perf_counter()))
    table = DeviceTable(args.tiny)
    name = "CPU" if args.tiny else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}; ready after {time.perf_counter() - STARTED:.0f} s",
          flush=True)
    for group in args.only:
        getattr(table, group)()
    if dist.is_initialized():
        dist.destroy_process_group()
    print(f"done after {time.perf_counter() - STARTED:.0f} s", flush=True)


if __name__ == "__main__":
    functions = scenes, ae, ldm, sample, data, growth, pq, post, paper, stage_1, stage_2, device
    benchmarks = {f.__name__: f for f in functions}
    name, *options = sys.argv[1:] or [""]
    if name not in benchmarks or (options and name != "device"):
        sys.exit(__doc__)
    benchmarks[name](*options)
