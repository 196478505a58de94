"""Two processes do what one does."""

import json
from types import SimpleNamespace

import inpaint
import ldmseg
import numpy as np
import pytest
import sample
import torch
import torch.distributed as dist
import torch.nn as nn
import train_ae
import train_ldm
from conftest import ae_command, ldm_command, on_two_ranks, small_config
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset


class ConvUNet(nn.Module):
    """One convolution with the UNet's interface, quick to import and to run."""

    def __init__(self, config, image_channels, cross_attention=0):
        super().__init__()
        self.conv = nn.Conv2d(8 + image_channels, 4, 3, padding=1)
        self.context = nn.Linear(cross_attention, 4) if cross_attention else None

    def forward(self, inputs, t, encoder_hidden_states=None):
        output = self.conv(inputs).tanh() + t.view(-1, 1, 1, 1) / 1000
        if self.context:
            output = output + self.context(encoder_hidden_states[:, 0])[..., None, None]
        return SimpleNamespace(sample=output)


def gradients(rank, world):
    """Both losses' gradients over a batch of four images, of which this process sees its part."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 8, (4, 4, 4), generator=generator)
    ids = ids.repeat_interleave(8, 1).repeat_interleave(8, 2)  # (4, 32, 32)
    ids[0] = 2  # the halves differ in segments
    ids[2:, :24] = 0  # and in VOID
    image = torch.randn(4, 3, 32, 32, generator=generator)
    eps = torch.randn(4, 4, 4, 4, generator=generator)
    coords, t = ldmseg.candidate_coords(range(4), 40, "cpu"), torch.tensor([5, 200, 600, 999])
    part = slice(rank * 4 // world, (rank + 1) * 4 // world)
    ids, image, eps, coords, t = ids[part], image[part], eps[part], coords[part], t[part]

    depth = torch.rand(4, 32, 32, generator=generator)
    depth[1, :8], depth[3, :24] = torch.nan, torch.nan
    task = torch.tensor([0, 2, 0, 1])  # depth is a task of the first half only

    torch.manual_seed(0)
    config = small_config()
    several = small_config(tasks=("instance", "semantic", "depth"), task_width=8, depth_scale=0.5)
    models = {"MaskAutoencoder": ldmseg.MaskAutoencoder(config), "LDMSeg": ldmseg.LDMSeg(config),
              "tasks": ldmseg.LDMSeg(several)}  # fmt: skip
    nets = models.values()
    if world > 1:
        nets = [DistributedDataParallel(net) for net in nets]
    autoencoder, ldm, tasks = nets
    ldmseg.ae_loss(autoencoder(ids, None)[0], ids, coords, 40)[0].backward()
    ldm(image, ids, eps, t, True).backward()
    tasks(image, ids, eps, t, True, task=task[part], depth=depth[part]).backward()
    return {f"{kind}.{name}": p.grad for kind, model in models.items()
            for name, p in model.named_parameters() if p.requires_grad}  # fmt: skip


def pq_of_scenes(rank, world):
    """PQ over 20 scenes against their mirror images, of which this process counts its share."""
    scenes = ldmseg.ShapeScenes("val", 32)
    metric = ldmseg.PanopticQuality(scenes.categories)
    for i in range(rank, 20, world):
        scene = scenes[i]
        metric.update(scene["ids"], scene["segments"], scene["ids"][:, ::-1], scene["segments"])
    metric.all_reduce("cpu")
    return metric.compute()


def task_scores(rank, world):
    """The scores of all tasks for random blocks, over five scenes, of which this process counts
    its share."""
    scenes = ldmseg.ShapeScenes("val", 32)  # those that have the first 7 classes only
    kept = [i for i in range(60) if max(s["category_id"] for s in scenes[i]["segments"]) < 8][:5]
    dataset = Subset(scenes, kept)
    dataset.categories = scenes.categories[:7]
    config = small_config(tasks=ldmseg.TASKS, categories=json.dumps(dataset.categories))

    def outputs(batch):
        for seed in batch["seed"]:
            noise = torch.randn(17, 4, 4, generator=torch.Generator().manual_seed(seed)) * 50
            noise = noise.repeat_interleave(4, 1).repeat_interleave(4, 2)  # (17, 16, 16)
            yield {"instance": noise[:8], "semantic": noise[8:16], "depth": noise[16:] / 50}

    tasks = ["panoptic", *ldmseg.TASKS]
    return ldmseg.evaluate_tasks(tasks, outputs, dataset, config, "cpu")[0]


def run_scripts(folder, data, rank):
    """The scripts, from their command lines; one starts when the one before is through."""
    torch.manual_seed(0)
    config = small_config()
    random_weights = folder / f"rank{rank}.safetensors"
    ldmseg.save_weights(random_weights, ldmseg.LDMSeg(config), config, 0)
    inpainting = ["--weights", str(random_weights), "--data", "shapes", "--limit", "5",
                  "--block", "8", "--drop-rate", "0.3", "--strokes", "--steps", "2", "--out",
                  str(folder / "inpaint"), "--device", "cpu", "--workers", "0"]  # fmt: skip
    sampling = ["--weights", str(folder / "ldm"), "--data", str(data), "--steps", "2",
                "--out", str(folder / "samples"), "--device", "cpu", "--workers", "0"]  # fmt: skip
    for main, command in ((train_ae.main, ae_command(data, folder / "ae")),
                          (train_ldm.main, ldm_command(data, folder / "ae", folder / "ldm")),
                          (sample.main, sampling), (inpaint.main, inpainting)):  # fmt: skip
        main(command)
        if dist.is_initialized():
            dist.barrier()


def work(rank, world, folder, data):
    """What each process does; the results go to `folder`."""
    ldmseg.build_unet = ConvUNet
    if world > 1:
        ldmseg.setup_distributed("cpu")
    result = {"gradients": gradients(rank, world), "pq": pq_of_scenes(rank, world),
              "tasks": task_scores(rank, world)}  # fmt: skip
    torch.save(result, folder / f"rank{rank}.pt")
    ldmseg.run_script(lambda: run_scripts(folder, data, rank))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, data):
    """Folders of the results of one process and of two."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ldmseg, "build_unet", ConvUNet)
        work(0, 1, folders[0], data)
    on_two_ranks(work, 2, folders[1], data)
    return folders


def results(outcomes):
    """What the one process returned, and each of the two."""
    one, two = outcomes
    return [torch.load(path) for path in (one / "rank0.pt", two / "rank0.pt", two / "rank1.pt")]


@pytest.mark.parametrize("net", ["MaskAutoencoder", "LDMSeg", "tasks"])
def test_gradients_of_two_ranks_equal_those_of_one_process(outcomes, net):
    one, *ranks = (result["gradients"] for result in results(outcomes))
    names = [name for name in one if name.startswith(net)]
    largest = max(one[name].abs().max().item() for name in names)
    assert largest > 1e-3
    for rank in ranks:
        for name in names:
            torch.testing.assert_close(rank[name], one[name], rtol=1e-5, atol=1e-6 * largest)


def test_pq_of_two_ranks_equals_that_of_one_process(outcomes):
    one, *ranks = (result["pq"] for result in results(outcomes))
    assert 0 < one["All"]["pq"] < 1
    for rank in ranks:
        assert rank["per_class"].keys() == one["per_class"].keys()
        for category, row in one["per_class"].items():
            assert rank["per_class"][category] == pytest.approx(row, rel=1e-12)


def test_scores_of_all_tasks_of_two_ranks_equal_those_of_one_process(outcomes):
    one, *ranks = (result["tasks"] for result in results(outcomes))
    assert one["depth"]["n"] == 5 and 0 < one["semantic"]["miou"] < 1
    for rank in ranks:
        assert rank["panoptic"]["per_class"] == one["panoptic"]["per_class"]
        assert rank["depth"] == pytest.approx(one["depth"], rel=1e-9)
        for task in ("panoptic", "instance", "semantic"):
            for group in ("All", "Things", "Stuff"):
                assert rank[task][group] == pytest.approx(one[task][group], rel=1e-9)
        assert rank["semantic"]["miou"] == pytest.approx(one["semantic"]["miou"], rel=1e-9)


@pytest.mark.parametrize("stage", ["ae", "ldm"])
def test_training_on_two_ranks_logs_what_one_process_logs(outcomes, stage):
    one, two = ((folder / stage / "log.jsonl").read_text().splitlines() for folder in outcomes)
    assert len(one) == len(two) == 2
    for ours, theirs in zip(map(json.loads, two), map(json.loads, one)):
        measured = {k: v for k, v in theirs.items() if k != "images_per_second"}
        assert {k: ours[k] for k in measured} == pytest.approx(measured, rel=1e-3)


def test_two_ranks_write_the_samples_of_one_process(outcomes):
    one, two = (sorted((folder / "samples").rglob("*")) for folder in outcomes)
    assert [path.name for path in one] == [path.name for path in two]
    listed = [json.loads((folder / "samples" / "panoptic.json").read_text()) for folder in outcomes]
    assert listed[0]["images"] == listed[1]["images"]
    for image in listed[0]["images"]:
        masks = [ldmseg.read_image(folder / "samples" / "panoptic" / image["file_name"])
                 for folder in outcomes]
        assert (masks[0] != masks[1]).any(-1).mean() < 0.05 and np.unique(masks[0]).size > 1


def test_the_inpainting_table_of_two_ranks_is_that_of_one_process(outcomes):
    one, two = (json.loads((folder / "inpaint" / "table.json").read_text()) for folder in outcomes)
    assert [row["block"] for row in one] == [row["block"] for row in two] == [8, "strokes", 8]
    for ours, theirs in zip(two, one):
        assert ours["nearest label"] == pytest.approx(theirs["nearest label"], rel=1e-12)
        for method in ("completion", "without the mask"):  # a pixel may round to another id
            assert ours[method] == pytest.approx(theirs[method], abs=0.002)
        assert 0.1 < theirs["nearest label"]["pq"] < 1 and theirs["completion"]["ids"] > 0.01
