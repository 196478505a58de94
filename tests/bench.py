"""Speed, run by hand: python tests/bench.py scenes | pq | paper | device

scenes  generated scenes per second in one process, at 64 and 256 pixels
pq      Panoptic Quality of 640x480 pairs with 12 segments: times and their ratios, one thread
paper   one training step of each stage at the paper's size, random weights: time, peak memory
device  the paper's model in bf16 on a GPU (without one: tiny, a rehearsal): images per second and
        peak memory of both stages by batch size, with checkpointing, compiled; sampling times
"""

import json
import os
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
from scipy import ndimage  # noqa: E402
from torchvision.io import decode_png, read_file  # noqa: E402

from ldmseg import (  # noqa: E402
    PRESETS, SD_VAE, LDMSeg, MaskAutoencoder, PanopticQuality, ShapeScenes, ae_loss, id2rgb,
    make_optimizer, read_image, segments_of, write_json, write_png,
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


def milliseconds(functions, rounds=7):
    """Median time of each of {name: function}, measured in turns: drifts hit all alike."""
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
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
            metric.update(read_image(gt), image[1], read_image(pred), image[3])
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


def report(name, start):
    words, taken = Path("/proc/self/status").read_text().split(), time.perf_counter() - start
    peak = int(words[words.index("VmHWM:") + 1]) / 2**20
    print(f"{name}: {taken:.1f} s, peak memory {peak:.1f} GiB", flush=True)


def ae_step_loss(model, ids):
    points = model.config.points
    coords = candidate_coords([np.random.default_rng()] * len(ids), points, ids.device)
    return ae_loss(model(ids)[0], ids, coords, points)[0]


def train_step(optimizer, loss):
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()


def stage_1():
    config = PRESETS["paper"]
    model = MaskAutoencoder(config).to(memory_format=torch.channels_last)
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


def device():
    from torch.utils.benchmark import Timer

    cuda = torch.cuda.is_available()
    kind, batches = ("cuda", (1, 2, 4, 8, 16, 32, 64)) if cuda else ("cpu", (2,))
    config = replace(PRESETS["paper" if cuda else "tiny"], encoder_json=json.dumps(SD_VAE),
                     mask_scale=0.18215)  # fmt: skip
    size, autocast = config.size, torch.autocast(kind, torch.bfloat16)

    def seconds(function, rounds=5):
        timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
        return timer.timeit(rounds).mean  # after two calls that warm up

    for name in ("stage 1", "stage 2, plain", "stage 2, checkpointing", "stage 2, compile"):
        model = (MaskAutoencoder if name == "stage 1" else LDMSeg)(config).to(kind)
        if "checkpointing" in name:
            model.unet.enable_gradient_checkpointing()
        if "compile" in name:
            model.unet.compile()
        for batch in batches:
            inputs = (torch.rand(batch, 3, size, size), torch.ones(batch, size, size).long(),
                      torch.randn(batch, 4, size // 8, size // 8), torch.full((batch,), 500))
            inputs, optimizer = [x.to(kind) for x in inputs], make_optimizer(model, 1e-4, config)
            loss = autocast(lambda: ae_step_loss(model, inputs[1]) if name == "stage 1"
                            else model(*inputs, False)[0])  # fmt: skip
            try:
                torch.cuda.reset_peak_memory_stats() if cuda else None
                rate = batch / seconds(lambda: train_step(optimizer, loss))
            except torch.cuda.OutOfMemoryError:
                print(f"{name}, batch {batch}: out of memory")
                break
            peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if cuda else "no GPU"
            print(f"{name}, batch {batch}: {rate:.2f} images per second, peak {peak}", flush=True)
    for batch in (1, 16):
        image = torch.rand(batch, 3, size, size, device=kind)
        for steps in (1, 4, 10, 20, 50):
            draw = autocast(lambda: model.sample(image, [(0, 0)] * batch, steps))
            time_of = seconds(draw, 2)
            print(f"sampling, batch {batch}, {steps} steps: {time_of / batch:.3f} s per image")


if __name__ == "__main__":
    benchmarks = {f.__name__: f for f in (scenes, pq, paper, stage_1, stage_2, device)}
    if sys.argv[1:] not in [[name] for name in benchmarks]:
        sys.exit(__doc__)
    benchmarks[sys.argv[1]]()
