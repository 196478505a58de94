"""Speed, run by hand: python tests/bench.py scenes | pq | paper | device

scenes  generated scenes per second in one process, at 64 and 256 pixels
pq      Panoptic Quality of 640x480 pairs with 12 segments: times and their ratios, one thread
paper   one training step of each stage at the paper's size, random weights: time, peak memory
device  the paper's model in bf16 on a GPU (without one: tiny, a rehearsal): images per second and
        peak memory of both stages by batch size, with checkpointing, compiled; sampling times
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

if sys.argv[1:] == ["pq"]:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = "1"
REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from scipy import ndimage  # noqa: E402
from torch import nn  # noqa: E402
from torchvision.io import decode_png, read_file  # noqa: E402

from ldmseg import (  # noqa: E402
    PRESETS, SD_VAE, LDMSeg, MaskAutoencoder, PanopticQuality, ShapeScenes, ae_loss,
    candidate_coords, id2rgb, make_optimizer, read_image, seeded_noise, segments_of,
)  # fmt: skip


def scenes():
    for size, count in ((64, 500), (256, 100)):
        dataset = ShapeScenes("train", size)
        start = time.perf_counter()
        for index in range(count):
            dataset[index]
        print(f"{size} pixels: {count / (time.perf_counter() - start):.0f} scenes per second")


def milliseconds(functions, rounds=7):
    """Median time of each of {name: function}, measured in turns: drifts hit all alike."""
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


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
    rng, categories = np.random.default_rng(0), [{"id": 1, "name": "a", "isthing": 1}]
    maps = {}
    for name in ("gt", "pred"):
        (folder / name).mkdir()
        maps[name], annotations = [wavy_regions(rng) for _ in range(unique)], []
        for i, ids in enumerate(maps[name]):
            Image.fromarray(id2rgb(ids)).save(folder / name / f"{i}.png")
            segments = [{"id": int(id), "category_id": 1, "iscrowd": 0, "area": int(area)}
                        for id, area in zip(*np.unique(ids, return_counts=True)) if id]
            annotations += [{"image_id": i * repeats + j, "file_name": f"{i}.png",
                             "segments_info": segments} for j in range(repeats)]
        content = {"images": [], "annotations": annotations, "categories": categories}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return list(zip(maps["gt"], maps["pred"]))


def pq():
    with tempfile.TemporaryDirectory() as folder:
        _pq_update(Path(folder, "few"))
        _pq_command(Path(folder, "many"))


def _pq_update(folder):
    """One process: `update` on arrays and from files against its parts and against hotcoco."""
    folder.mkdir()
    pairs = write_pairs(folder, unique=20, repeats=1)
    images = [(gt, segments_of(gt), pred, segments_of(pred)) for gt, pred in pairs]
    metric = PanopticQuality([{"id": 1, "isthing": 1}])
    files = [[str(folder / name / f"{i}.png") for name in ("gt", "pred")] for i in range(20)]

    def histogram():
        for gt, _, pred, _ in images:
            columns, column = np.unique(pred, return_inverse=True)
            rows, row = np.unique(gt, return_inverse=True)
            np.bincount((row * len(columns) + column).ravel())

    def histogram_of_small_ids():
        for gt, pred in small:
            np.bincount((gt * 16 + pred).ravel())

    def update():
        for image in images:
            metric.update(*image)

    def update_from_files():
        for (gt, pred), (_, gt_segments, _, pred_segments) in zip(files, images):
            metric.update(read_image(gt), gt_segments, read_image(pred), pred_segments)

    small = [[np.unique(ids, return_inverse=True)[1].reshape(ids.shape) for ids in pair]
             for pair in pairs]
    functions = {
        "joint histogram (np.unique, np.bincount)": histogram,
        "np.bincount over gt * 16 + pred, ids given as 0..12": histogram_of_small_ids,
        "decoding, torchvision": lambda: [decode_png(read_file(f)) for pair in files for f in pair],
        "decoding, Pillow": lambda: [Image.open(f).load() for pair in files for f in pair],
        "update on arrays": update,
        "update from PNG files": update_from_files,
    }
    try:
        from hotcoco import panoptic

        functions["hotcoco from the same files"] = lambda: panoptic.PanopticEval(
            folder / "gt.json", folder / "pred.json").evaluate()
    except ImportError:
        print("hotcoco is not installed: no comparison with it")
    times = {name: value / len(pairs) for name, value in milliseconds(functions).items()}
    for name, value in times.items():
        print(f"{name:>52}: {value:6.2f} ms a pair")
    (unique, bincount, torchvision, pillow, arrays, png), rest = list(times.values())[:6], times
    print(f"update on arrays / histogram: {arrays / unique:.2f}, / bare bincount: "
          f"{arrays / bincount:.2f}")
    print(f"from files / decoding: torchvision {png / torchvision:.2f}, Pillow {png / pillow:.2f}")
    if "hotcoco from the same files" in rest:
        hotcoco = rest["hotcoco from the same files"]
        print(f"from files / hotcoco: {png / hotcoco:.2f}, on arrays / hotcoco from files: "
              f"{arrays / hotcoco:.2f}")


def _pq_command(folder):
    """The whole command on 500 and 5,000 pairs: peak memory; 5,000 pairs: one and two workers."""
    folder.mkdir()
    write_pairs(folder, unique=50, repeats=100)
    arguments = ["--gt", str(folder / "gt.json"), "--pred", str(folder / "pred.json")]
    seconds = {}
    code = ("import resource, sys, evaluate; evaluate.main(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    for limit, workers in ((500, 1), (5000, 1), (5000, 2)):
        start = time.perf_counter()
        output = subprocess.run([sys.executable, "-c", code, *arguments, "--limit", str(limit),
                                 "--workers", str(workers)], check=True, cwd=REPO,
                                capture_output=True, text=True).stdout
        seconds[limit, workers] = time.perf_counter() - start
        print(f"evaluate.py, {limit} pairs, --workers {workers}: {seconds[limit, workers]:.1f} s, "
              f"peak memory of a worker {int(output.split()[-1]) / 2**10:.0f} MiB")
    print(f"two workers / one: {seconds[5000, 2] / seconds[5000, 1]:.2f}")


def paper():
    """Each stage in a process of its own, so that its peak memory is its own."""
    for stage in ("stage_1", "stage_2"):
        subprocess.run([sys.executable, __file__, stage], check=True)


def report(name, start):
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmHWM"))
    print(f"{name}: {time.perf_counter() - start:.1f} s, peak memory "
          f"{int(peak.split()[1]) / 2**20:.1f} GiB", flush=True)


def stage_1():
    config = PRESETS["paper"]
    model = MaskAutoencoder(config).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config.ae_lr, config)
    blocks = torch.randint(config.num_ids, (2, 8, 8))
    ids = blocks.repeat_interleave(config.size // 8, 1).repeat_interleave(config.size // 8, 2)
    for step in range(2):  # the first also warms up
        start = time.perf_counter()
        logits, _ = model(ids, None)
        ae_loss(logits, ids, candidate_coords([0, 1], config.points, "cpu"),
                config.points)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        report(f"stage 1, step {step + 1}, batch 2 at 512 pixels", start)


def stage_2():
    config = replace(PRESETS["paper"], encoder_json=json.dumps(SD_VAE))
    start = time.perf_counter()
    model = LDMSeg(config)
    nn.init.normal_(model.unet.conv_out.weight)  # a zero would stop the gradient
    report(f"stage 2, model of {sum(p.numel() for p in model.unet.parameters()):,} UNet parameters",
           start)
    ids = torch.ones(1, 512, 512, dtype=torch.long)
    image, eps = torch.randn(1, 3, 512, 512), torch.randn(1, 4, 64, 64)
    start = time.perf_counter()
    loss = model.diffusion_loss(image, ids, eps, torch.tensor([500]), False)
    report("stage 2, forward, batch 1 at 512 pixels", start)
    loss.backward()
    report("stage 2, forward and backward", start)
    assert all(p.grad is not None for p in model.unet.parameters())


CUDA = torch.cuda.is_available()


def seconds(function, rounds=5):
    """Mean time of a call after two that warm up."""
    for call in range(rounds + 2):
        if call == 2:
            torch.cuda.synchronize() if CUDA else None
            start = time.perf_counter()
        function()
    torch.cuda.synchronize() if CUDA else None
    return (time.perf_counter() - start) / rounds


def by_batch_size(name, make_step, batches):
    """Images per second and peak memory of make_step(batch size)(), until memory is full."""
    for batch in batches:
        try:
            torch.cuda.reset_peak_memory_stats() if CUDA else None
            rate = batch / seconds(make_step(batch))
        except torch.cuda.OutOfMemoryError:
            return print(f"{name}, batch {batch}: out of memory")
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if CUDA else "not on a GPU"
        print(f"{name}, batch {batch}: {rate:.2f} images per second, peak {peak}", flush=True)


def device():
    kind = "cuda" if CUDA else "cpu"
    config = replace(PRESETS["paper" if CUDA else "tiny"], encoder_json=json.dumps(SD_VAE),
                     mask_scale=0.18215)
    batches = (1, 2, 4, 8, 16, 32, 64) if CUDA else (2,)

    def trainer(model, loss_of):
        optimizer = make_optimizer(model, 1e-4, config)

        def make_step(batch):
            ids = torch.ones(batch, config.size, config.size, dtype=torch.long, device=kind)
            image = torch.rand(batch, 3, config.size, config.size, device=kind)
            eps = seeded_noise(range(batch), config, kind)

            def step():
                with torch.autocast(kind, torch.bfloat16):
                    loss = loss_of(image, ids, eps)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            return step

        return make_step

    autoencoder = MaskAutoencoder(config).to(kind)
    by_batch_size("stage 1", trainer(autoencoder, lambda image, ids, eps: ae_loss(
        autoencoder(ids, eps)[0], ids, candidate_coords(range(len(ids)), config.points, kind),
        config.points)[0]), batches)
    for option in ("plain", "checkpointing", "compile"):
        model = LDMSeg(config).to(kind)
        if option == "checkpointing":
            model.unet.enable_gradient_checkpointing()
        if option == "compile":
            model.unet.compile()
        by_batch_size(f"stage 2, {option}", trainer(model, lambda image, ids, eps, m=model: m(
            image, ids, eps, torch.full((len(ids),), 500, device=kind), False)), batches)
    for batch in (1, 16):
        image = torch.rand(batch, 3, config.size, config.size, device=kind)
        for steps in (1, 4, 10, 20, 50):
            with torch.autocast(kind, torch.bfloat16):
                time_of = seconds(lambda: model.sample(image, range(batch), steps), rounds=2)
            print(f"sampling, batch {batch}, {steps} steps: {time_of / batch:.3f} s per image")


if __name__ == "__main__":
    benchmarks = {"scenes": scenes, "pq": pq, "paper": paper, "stage_1": stage_1,
                  "stage_2": stage_2, "device": device}
    if sys.argv[1:] not in [[name] for name in benchmarks]:
        sys.exit(__doc__)
    benchmarks[sys.argv[1]]()
