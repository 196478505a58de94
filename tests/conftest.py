"""What the tests share: a tiny data set, a model around a stub UNet, and tiny trained runs."""

import json
import logging
import os
import socket
import sys
import time
import traceback
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn as nn

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import evaluate  # noqa: E402
import ldmseg  # noqa: E402
import train_ae  # noqa: E402
import train_ldm  # noqa: E402

IMPORTED = {"diffusers", "transformers"} & sys.modules.keys()  # by what the scripts import

TINY = ["size=32", "warmup=1", "min_segment=4", "min_area=4", "mask_threshold=0"]  # both stages
TINY_AE = [*TINY, "bits=3", "latent_channels=4", "ae_widths=8,16,32,32", "points=40"]
TINY_LDM = [*TINY, "stem_widths=8,8,16", "unet_widths=32,32", "unet_layers=1", "unet_heads=2",
            "eval_steps=2", "eval_samples=1", "self_condition=0.3"]  # fmt: skip

# Per image: height, width, and its segments (id, category, crowd, rows, columns) in the order
# they are painted; what no segment covers is VOID.
SCENES = {
    "train": [
        (30, 44, [(1, 9, 0, (0, 18), (0, 44)), (300, 9, 0, (18, 30), (0, 44)),
                  (70000, 7, 0, (6, 24), (8, 28))]),
        (48, 33, [(5, 9, 0, (0, 48), (0, 33)), (6, 7, 1, (30, 48), (0, 20))]),
        (40, 56, [(900, 7, 0, (10, 40), (0, 30))])],
    "val": [
        (36, 50, [(2, 9, 0, (0, 36), (0, 25)), (1000000, 7, 0, (0, 36), (25, 50))]),
        (52, 40, [(11, 9, 0, (0, 26), (0, 40)), (12, 7, 0, (26, 52), (0, 20)),
                  (13, 7, 1, (26, 52), (20, 36))])],
}  # fmt: skip
CATEGORIES = [{"id": 7, "name": "cell", "isthing": 1}, {"id": 9, "name": "ground", "isthing": 0}]

def pytest_configure(config):
    """pycocotools 2.0.11 warns of NumPy 2 at every mask that it decodes. Models as small as the
    tests' gain nothing from a second thread; on busy cores the threads wait for each other."""
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks are forked, which a GPU does not survive
    train_ae.latent_std = partial(train_ae.latent_std, count=16)  # of 128, half of a run's time
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation:DeprecationWarning")

def paint(height, width, segments):
    """The id map (height, width) of one entry of SCENES."""
    ids = np.zeros((height, width), np.int64)
    for id, _, _, rows, columns in segments:
        ids[slice(*rows), slice(*columns)] = id
    return ids

def write_split(root, split, scenes):
    """Write one split in the COCO panoptic layout; an image's id is 10 + its index."""
    rng = np.random.default_rng(len(split))
    images, annotations = [], []
    for i, (height, width, segments) in enumerate(scenes):
        name, ids = f"{split}{i}.png", paint(height, width, segments)
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        ldmseg.write_png(root / "annotations" / f"panoptic_{split}" / name, colours)
        noise = rng.integers(0, 256, (height, width, 3), np.uint8)
        ldmseg.write_png(root / split / name, noise)
        images.append({"id": 10 + i, "file_name": name, "height": height, "width": width})
        annotations.append({"image_id": 10 + i, "file_name": name, "segments_info": [
            {"id": id, "category_id": category, "iscrowd": crowd}
            for id, category, crowd, _, _ in segments]})  # fmt: skip
    ldmseg.write_json(root / "annotations" / f"panoptic_{split}.json", {
        "images": images, "annotations": annotations, "categories": CATEGORIES})  # fmt: skip

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A read-only folder in the COCO panoptic layout: 3 training and 2 validation images."""
    root = tmp_path_factory.mktemp("data")
    for split, scenes in SCENES.items():
        write_split(root, split, scenes)
    return root

GOLDEN = Path(__file__).parent / "golden"  # reference values; the README there says whose
ON_CPU = ["--device", "cpu", "--workers", "0"]
VAE = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
           block_out_channels=[32, 32, 64, 32], layers_per_block=2)  # of diffusers, small

def ae_command(data, out, *more):
    """Arguments of train_ae.py for two steps of a tiny autoencoder; more: FIELD=VALUE."""
    return ["--data", str(data), "--out", str(out), "--steps", "2", "--batch-size", "4", *ON_CPU,
            "--set", *TINY_AE, *more]  # fmt: skip

def ldm_command(data, ae, out, *more):
    """Arguments of train_ldm.py for two steps on top of that autoencoder; more: FIELD=VALUE."""
    return ["--ae", str(ae), "--data", str(data), "--out", str(out), "--steps", "2",
            "--batch-size", "4", *ON_CPU, "--set", *TINY_LDM, *more]  # fmt: skip

def run_of(runs, out, *more):
    """Arguments of sample.py or inpaint.py for two steps of runs.ldm."""
    return [str(a) for a in ("--weights", runs.ldm, "--out", out, "--steps", 2, *ON_CPU, *more)]

@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, data):
    """Run folders of both stages after two steps: .ae and .ldm."""
    out = tmp_path_factory.mktemp("runs")
    train_ae.main(ae_command(data, out / "ae"))
    train_ldm.main(ldm_command(data, out / "ae", out / "ldm"))
    return SimpleNamespace(ae=out / "ae", ldm=out / "ldm")

@pytest.fixture
def unscored(monkeypatch):
    """Trainings that are not evaluated, for tests of what they learn."""
    for script in (train_ae, train_ldm):
        monkeypatch.setattr(script, "score", lambda *_: ({}, []))

def logged(run):
    """The lines of a run's log."""
    return [*map(json.loads, (run / "log.jsonl").read_text().splitlines())]

@pytest.fixture
def evaluated(tmp_path):
    """A function (arguments) -> the JSON that evaluate.py leaves."""
    def run(*arguments):
        evaluate.main([*ON_CPU, *map(str, arguments), "--json", str(tmp_path / "out.json")])
        return json.loads((tmp_path / "out.json").read_text())

    return run

@pytest.fixture
def complaint(capfd, caplog, monkeypatch):
    """A function (main, arguments) -> the one line on stderr of a script that must fail."""
    for library in ("diffusers", "transformers"):  # their warnings go to stderr as well
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)

    def run(main, *arguments):
        with pytest.raises(SystemExit) as stop:
            ldmseg.run_script(lambda: main([str(a) for a in arguments]))
        # ends the loader's processes; the garbage collector would take 5 s for each
        traceback.clear_frames(stop.value.__context__.__traceback__)
        lines = capfd.readouterr().err.splitlines() + [r.getMessage() for r in caplog.records]
        assert stop.value.code == 2 and len(lines) == 1, lines
        return lines[0]

    return run

def on_two_ranks(work, *arguments):
    """Call work(rank, *arguments) in two processes; fails where they do not come to an end."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]

    def start(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # of torchrun
        work(rank, *arguments)

    # new interpreters would spend their time on imports
    ranks = mp.start_processes(start, nprocs=2, join=False, start_method="fork")
    give_up = time.time() + 240
    while not ranks.join(1):
        if time.time() > give_up:
            for process in ranks.processes:
                process.kill()
            pytest.fail("the two processes wait for each other")

def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def small_config(**changes):
    """The Config of the tiny runs; changes win."""
    config = ldmseg.Config(mask_scale=0.5, ids="random", sampling_power=1.0)
    config = ldmseg.override(config, TINY_AE, "ae")
    return replace(ldmseg.override(config, TINY_LDM, "ldm"), **changes)

class StubUNet(nn.Module):
    """Has the UNet's interface; its output is `function(inputs, t)`."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs, t, encoder_hidden_states=None):
        return SimpleNamespace(sample=self.function(inputs, t))

@pytest.fixture
def stub_model(monkeypatch):
    """A function (output function, class, Config fields) -> a model whose UNet is a StubUNet."""
    def build(function, kind=ldmseg.LDMSeg, **changes):
        monkeypatch.setattr(ldmseg, "build_unet", lambda *_: StubUNet(function))
        torch.manual_seed(0)
        return kind(small_config(**changes))

    return build

class ConvUNet(nn.Module):
    """One convolution with the UNet's interface, quick to import and to run."""

    def __init__(self, config, image_channels):
        super().__init__()
        channels = config.latent_channels
        self.conv = nn.Conv2d(2 * channels + image_channels, channels, 3, padding=1)
        self.context = nn.Linear(config.task_width, channels) if config.tasks else None

    def forward(self, inputs, t, encoder_hidden_states=None):
        output = self.conv(inputs).tanh() + t.view(-1, 1, 1, 1) / 1000
        if self.context:
            output = output + self.context(encoder_hidden_states[:, 0])[..., None, None]
        return SimpleNamespace(sample=output)

def fill_by_rule(key, shape):
    """The tensor that the reference values were made with; see the README beside them."""
    values = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    values = values.astype(np.float32)
    if len(shape) > 1:
        values = values / np.sqrt(np.prod(shape[1:]))
    else:
        values = 0.1 * values + key.endswith("weight")
    return torch.from_numpy(values.astype(np.float32))

def flat(result, prefix=""):
    """A nested result as {"All/pq": 0.5, ...}."""
    parts = [flat(v, f"{prefix}{k}/") if isinstance(v, dict) else {prefix + k: v}
             for k, v in result.items()]
    return {k: v for part in parts for k, v in part.items()}

def areas_of(ids):
    """{id: pixels}, without VOID."""
    return {id: int((ids == id).sum()) for id in np.unique(ids).tolist() if id}

def relative_error(got, expected):
    """Largest deviation over the largest expected value."""
    got, expected = torch.as_tensor(got), torch.as_tensor(expected)
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()
