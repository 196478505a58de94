"""Several tasks in one model (Supp. A): embeddings, merging, depth; starting from a run."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import evaluate
import ldmseg
import numpy as np
import pytest
import sample
import torch
import torch.nn.functional as F
import train_ae
import train_ldm
from conftest import (
    ON_CPU, SCENES, ConvUNet, ae_command, gaussian, ldm_command, logged, run_of, small_config,
)  # fmt: skip
from ldmseg import (
    TASKS, DepthQuality, LDMSeg, MaskAutoencoder, ShapeScenes, TrainingStream, UserError,
    int2bits, load_model, merge_panoptic, merge_samples, prepare, read_image, relative_depth,
)  # fmt: skip
from PIL import Image

CLASSES = [{"id": 7, "name": "cell", "isthing": 1}, {"id": 9, "name": "ground", "isthing": 0},
           {"id": 40, "name": "box", "isthing": 1}]  # fmt: skip

def merge_in_loops(instances, classes, isthing, min_area):
    """merge_panoptic of two confident maps (H, W), pixel by pixel."""
    ids, class_of, first_of_class = np.zeros_like(instances), {}, {}
    for id in range(1, 16):
        pixels = [place for place in np.ndindex(ids.shape) if instances[place] == id]
        votes = [sum(classes[place] == c + 1 for place in pixels) for c in range(len(isthing))]
        if len(pixels) >= min_area and any(votes):
            winner = votes.index(max(votes))  # the first one in a tie
            own = id if isthing[winner] else first_of_class.setdefault(winner, id)
            class_of[own] = winner + 1
            for place in pixels:
                ids[place] = own
    return ids, class_of

def logits_of(ids):
    """Logits (16, h, w) that are drawn as the map (h, w), each entry as 2 x 2 pixels."""
    return 200 * F.one_hot(torch.tensor(ids), 16).permute(2, 0, 1).float()

def test_merging_equals_a_loop_over_pixels():
    isthing = [1, 0, 1, 0]
    for seed in range(40):
        maps = np.random.default_rng(seed).integers(0, 8, (2, 4, 4))
        ids, class_of = merge_panoptic(*map(logits_of, maps), (8, 8), isthing, 0.6, 8)
        expected, classes = merge_in_loops(*maps.repeat(2, 1).repeat(2, 2), isthing, 8)
        assert np.array_equal(ids, expected) and class_of == classes

def shares_by_loops(maps, least, given):
    """What merge_samples makes of confident maps (H, W) of 15 ids: shares (16, H W)."""
    def iou(a, b):
        return (a[1] & b[1]).sum() / (a[1] | b[1]).sum() if a[0] == b[0] else 0
    found = [[(id if id in given else 0, (m == id).ravel()) for id in range(1, 16) if id in m]
             for m in maps]  # fmt: skip
    best = [[max(others, key=lambda other: iou(own, other)) for others in found]
            for sample in found for own in sample]  # fmt: skip
    found = sum(found, [])
    agreement = [(sum(iou(own, b) for b in row) - 1) / (len(maps) - 1)
                 for own, row in zip(found, best)]  # fmt: skip
    shares, unused = {}, (id for id in range(1, 16) if id not in given)
    for i in sorted(range(len(best)), key=lambda i: (not found[i][0], -agreement[i])):
        id, own = found[i]
        taken = sum((share > 0.5 for share in shares.values()), np.zeros(own.size, bool))
        wanted = id not in shares and (id or agreement[i] >= least)
        if wanted and (own & taken).sum() < own.sum() / 2:
            alike = [b[1] for b in best[i] if iou(found[i], b) > 0.5]
            shares[id or next(unused)] = np.mean(alike, 0)
    result = np.array([shares.get(id, 0 * taken) for id in range(16)])
    result /= result.sum(0).clip(min=1)
    result[0] = 1 - result.sum(0)
    return result

@pytest.mark.parametrize("given", [[], [5, 2]])
def test_samples_are_merged_as_by_loops_whatever_their_ids(given):
    gains = []
    for seed in range(20):
        rng, maps = np.random.default_rng(seed), []
        regions = rng.permutation(4).reshape(2, 2).repeat(4, 0).repeat(4, 1)
        for _ in range(4):
            others = rng.permutation([id for id in range(1, 16) if id not in given])
            maps.append(np.array([*given, *others])[regions])
            maps[-1][rng.random((8, 8)) < 0.25] = rng.integers(1, 16)  # an accident of its own
        merged = merge_samples(torch.stack([*map(logits_of, maps)]), given)
        merged, expected = merged.exp().numpy(), shares_by_loops(maps, 0.3, given)
        np.testing.assert_allclose(merged.reshape(16, -1), expected, atol=2e-6)
        together, single = (ldmseg.panoptic_quality(1 + regions, ids)["pq"]
                            for ids in (merged.argmax(0), maps[0]))
        gains.append(together - single)
    assert np.mean(gains) > 0.1

# ---- the task embedding ----

def task_config(**changes):
    several = dict(tasks=TASKS, depth_scale=0.25, categories=json.dumps(CLASSES))
    return small_config(**several | changes)

@pytest.fixture
def model(monkeypatch):
    """LDMSeg of three tasks around one convolution, to which the task's embedding adds."""
    monkeypatch.setattr(ldmseg, "build_unet", ConvUNet)
    torch.manual_seed(0)
    return LDMSeg(task_config(tasks=("semantic", "depth", "instance")))

def test_a_task_samples_by_its_own_embedding_alone(model):
    def draw():
        return [model.sample(image, [(0, 0)], 2, task=task) for task in model.config.tasks]

    image, rows = gaussian(1, 3, 32, 32), model.task_embedding.weight.data
    model.decode = lambda z, *_: z
    before = draw()
    rows[[0, 2]] = rows[[2, 0]]
    after = draw()
    assert all(torch.equal(after[i], before[2 - i]) for i in range(3))
    assert not torch.allclose(before[0], before[2], atol=1e-2)

def test_samples_of_an_image_have_noises_of_their_own_and_are_merged_by_task(model):
    image, noise = gaussian(2, 3, 32, 32), [(3, "a"), (3, 7)]
    merged = model.sample_tasks({"image": image, "noise": noise}, TASKS, 2, samples=3)
    for i, (seed, name) in enumerate(noise):
        for task in TASKS:
            single = torch.cat([model.sample(image[[i]], [(seed, position)], 2, task=task)
                                for position in (name, f"{name} 1", f"{name} 2")])
            shares = single.mean(0) if task == "depth" else single.softmax(1).mean(0).log()
            expected = merge_samples(single) if task == "instance" else shares
            torch.testing.assert_close(merged[task][i], expected, rtol=1e-4, atol=1e-4)

def test_each_sample_of_a_batch_has_its_own_task(model):
    """The loss is a mean over the cells that count: 12, 8, 4 and 12 of the four samples."""
    ids, depth = torch.full((4, 32, 32), 5), gaussian(4, 32, 32, seed=1).clamp(-1, 1)
    ids[0, :8], ids[1, :16], depth[2, :24], depth[3, :, :8] = 0, 0, math.nan, math.nan
    batch = dict(image=gaussian(4, 3, 32, 32), ids=ids, depth=depth, eps=gaussian(4, 4, 4, 4),
                 t=torch.tensor([5, 300, 600, 999]), task=torch.tensor([0, 2, 1, 1]))
    single = [model.diffusion_loss(**{k: v[[i]] for k, v in batch.items()}, self_condition=True)[0]
              for i in range(4)]  # fmt: skip
    together, _ = model.diffusion_loss(**batch, self_condition=True)
    expected = sum(n * loss for n, loss in zip((12, 8, 4, 12), single)) / 36
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=0)

def test_depth_is_the_target_exactly_where_it_is_the_task(model):
    ids, depth = torch.full((2, 32, 32), 3), gaussian(2, 32, 32)
    ids[:, :16], depth[:, :, 16:] = 0, math.nan
    x0, valid = model.clean_latents(ids, depth, torch.tensor([2, 1]))  # instance, depth
    mask = model.autoencoder.encoder(int2bits(ids, 3))
    own = model.depth_autoencoder.encoder(depth.nan_to_num(0)[:, None])
    torch.testing.assert_close(x0, torch.stack([0.5 * mask[0], 0.25 * own[1]]))  # their scales
    assert torch.equal(valid, torch.stack([ids[0] > 0, ~depth[1].isnan()]))
    torch.testing.assert_close(model.decode(x0, "depth"), model.depth_autoencoder.decoder(4 * x0))

# ---- depth: its range and scores ----

def test_relative_depth_runs_from_the_2nd_to_the_98th_percentile_of_what_is_valid():
    depth = relative_depth(np.append(np.arange(101.0), [np.nan, np.nan])[None])[0]
    np.testing.assert_allclose(depth[[0, 2, 26, 50, 98, 100]], [-1, -1, -0.5, 0, 1, 1], atol=1e-6)
    assert np.isnan(depth).nonzero()[0].tolist() == [101, 102]

FOUR = (3, 7, 9, 11, math.nan, math.nan), (0, 0, 1, 1, -50, 50)  # aligned to 5 5 10 10
OF_FOUR = {"abs_rel": (2 / 3 + 2 / 7 + 1 / 9 + 1 / 11) / 4, "rmse": 2.5**0.5, "delta1": 0.5, "n": 1}
THREE, EMPTY = ((1, 2, 3), (8, 8, 8)), ((math.nan, math.nan), (1, 2))  # aligned to 2 2 2
OF_THREE = {"abs_rel": 4 / 9, "rmse": (2 / 3) ** 0.5, "delta1": 1 / 3, "n": 1}
NEGATIVE = (1, 0.1, 10), (0, 1, 2)  # aligned to -0.8 3.7 8.2
OF_NEGATIVE = {"abs_rel": (1.8 + 36 + 0.18) / 3, "rmse": 1.8 * 2**0.5, "delta1": 1 / 3, "n": 1}
OF_BOTH = {k: (OF_FOUR[k] + OF_THREE[k]) / 2 for k in OF_FOUR} | {"n": 2}  # the mean over images

@pytest.mark.parametrize("pairs, expected", [([FOUR], OF_FOUR), ([THREE, EMPTY], OF_THREE),
                                             ([NEGATIVE], OF_NEGATIVE), ([FOUR, THREE], OF_BOTH)])
def test_depth_scores_are_those_counted_by_hand(pairs, expected):
    metric = DepthQuality()
    for truth, predicted in pairs:
        metric.update(np.array([truth]), np.array([predicted], np.float32))
    assert metric.compute() == pytest.approx(expected)

# ---- what the model sees of each task ----

def record_of(ids, categories, depth, crowds=()):
    """An item of a data set, ids and depth in vertical stripes; categories: {id: category}."""
    ids, depth = (np.repeat(a, 32 // len(a))[None].repeat(32, 0) for a in (ids, depth))
    segments = [{"id": i, "category_id": c, "iscrowd": i in crowds} for i, c in categories.items()]
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :8] = 255
    return {"image": image, "ids": ids, "segments": segments, "image_id": 3, "file_name": "a.png",
            "depth": depth}  # fmt: skip

class Records(list):
    """Two records as a data set."""

    def __init__(self):
        super().__init__([record_of((1, 2, 0, 4), {1: 7, 2: 9, 4: 40}, (1, 2, 3, 4)),
                          record_of((5, 6), {5: 40, 6: 9}, (1, 2, 2, 1))])
        self.categories = CLASSES

def prepared(record, seed=0, task="semantic", augment=False, **changes):
    return prepare(record, task_config(**changes), np.random.default_rng(seed), augment, task)

@pytest.mark.parametrize("ids, categories, expected", [
    ((500, 2, 70000, 3), {500: 40, 2: 7, 70000: 9, 3: 40}, [3, 1, 2, 3]),
    ((1, 2, 3, 0), {1: 7, 2: 40}, [0, 3, 0, 0]),  # 1 is a crowd, 3 is not listed
    (range(1, 17), {id: 7 + 2 * (id % 2) for id in range(2, 17)}, [0, 1] + 7 * [2, 1])])  # > N ids
def test_semantic_ids_are_the_places_of_the_classes(ids, categories, expected):
    record = record_of(ids, categories, (1, 2), crowds=[1])
    for seed in range(5):  # never relabelled
        drawn = prepared(record, seed)["ids"][:, :: 32 // len(ids)]
        assert drawn.unique(dim=0).tolist() == [expected]

@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_all_flips_with_the_image_in_training_only_and_depth_is_relative(task, augment):
    record, flips = record_of((1, 2, 2, 2), {1: 40, 2: 7}, np.linspace(1, 2, 32)), set()
    record["depth"][5, 7] = np.nan
    for seed in range(20):
        drawn = prepared(record, seed, task, augment)
        flips.add(flip := bool(drawn["image"][0, 0, 0] < 0))
        ids, depth = (drawn[k].flip(-1) if flip else drawn[k] for k in ("ids", "depth"))
        assert ids[0, 0] != ids[0, 8] == ids[0, 31]
        np.testing.assert_allclose(depth, relative_depth(record["depth"]), atol=1e-6)
    assert flips == ({True, False} if augment else {False})

def test_constant_depth_is_an_error_that_names_the_image_where_a_task_needs_it():
    record = record_of((1, 2), {1: 7, 2: 9}, (4.0, 4.0))
    assert "depth" not in prepared(record, tasks=("instance", "semantic"))
    with pytest.raises(UserError, match="^a.png: depth has one value or none at 1024 valid pixels"):
        prepared(record)

def test_tasks_are_drawn_equally_often_and_say_whether_ids_are_classes_and_blocks_given():
    """The second record's two classes are the places 3 and 2; as instances, ids are random."""
    stream = TrainingStream([Records()], task_config(given_share=1.0), seed=4)
    drawn = [stream[p] for p in range(600)]
    for turn in (0, 1):
        counts = np.bincount([s["task"] for s in drawn[turn::2]], minlength=3)
        assert len(counts) == 3 and counts.min() > 70  # of 100, with a standard deviation of 8
    pairs = [{tuple(s["ids"].unique().tolist()) for s in drawn if s["task"] == task
              and len(s["ids"].unique()) == 2} for task in range(3)]  # fmt: skip
    assert pairs[1] == {(2, 3)} and len(pairs[0]) > 10 and len(pairs[2]) > 10
    given = [np.mean([s["known"].any() for s in drawn if s["task"] == t]) for t in range(3)]
    assert given[0] > 0.5 and given[1] > 0.5 and given[2] == 0

# ---- scores ----

def test_perfect_outputs_have_perfect_scores():
    records, outputs = Records(), []
    for record in records:
        place = {s["id"]: {7: 1, 9: 2, 40: 3}[s["category_id"]] for s in record["segments"]}
        ids = record["ids"][::2, ::2]
        classes = np.vectorize(lambda id: place.get(id, 5))(ids)  # 5: no class, drawn as VOID
        half = gaussian(1, 16, 16).clamp(-1, 1)
        up = F.interpolate(half[None], scale_factor=2, mode="bilinear")[0, 0]
        record["depth"] = 3 * up.numpy() + 7
        outputs.append((logits_of(ids), logits_of(classes), half))
    outputs = {task: torch.stack(output) for task, output in zip(TASKS, zip(*outputs))}
    result, _ = ldmseg.evaluate(lambda batch: outputs, ["panoptic", *TASKS], records,
                                task_config(), "cpu")  # fmt: skip
    assert result["panoptic"]["All"]["pq"] == result["instance"]["All"]["pq"] == 1
    assert result["panoptic"]["miou"] == result["semantic"]["miou"] == 1
    expected = {"abs_rel": 0, "rmse": 0, "delta1": 1, "n": 2}  # the scale and the shift are found
    assert result["depth"] == pytest.approx(expected, abs=1e-4)

def test_weights_list_the_tasks_they_know():
    assert task_config().task() == "panoptic" and small_config().task() == "instance"
    with pytest.raises(UserError, match="--task depth: these weights know panoptic, semantic"):
        task_config(tasks=("semantic", "instance")).task("depth")

# ---- the scripts, and training that starts from a run ----

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two steps on generated scenes: .ae of ids, .depth, .ldm of three tasks."""
    root = tmp_path_factory.mktemp("tasks")
    out = SimpleNamespace(**{name: root / name for name in ("ae", "depth", "ldm")})
    train_ae.main(ae_command("shapes", out.ae, "bits=4", "--limit", "2"))
    train_ae.main(ae_command("shapes", out.depth, "--limit", "2", "--target", "depth"))
    train_ldm.main(tasks_command(out, out.ldm, *TASKS))
    return out

def tasks_command(runs, out, *tasks):
    """Arguments of train_ldm.py for these tasks on top of both autoencoders, where needed."""
    command = ldm_command("shapes", runs.ae, out, "--limit", "2", "--tasks", *tasks)
    return [*command[:2], *[str(runs.depth)] * ("depth" in tasks), *command[2:]]

def test_weights_of_several_tasks_hold_both_autoencoders_their_scales_and_the_classes(runs):
    model, config = load_model(runs.ldm), load_model(runs.ldm).config
    for name, run, scale in (("autoencoder", runs.ae, config.mask_scale),
                             ("depth_autoencoder", runs.depth, config.depth_scale)):
        own, expected = getattr(model, name).state_dict(), load_model(run).state_dict()
        assert all(torch.equal(own[k], v) for k, v in expected.items())
        assert scale == pytest.approx(0.7 / logged(run)[-1]["latent_std"])
    assert json.loads(config.categories) == ShapeScenes.categories and config.tasks == TASKS

@pytest.mark.parametrize("tasks, names", [
    (("depth", "instance"), "depth_abs_rel depth_rmse depth_delta1 pq sq rq"),
    (("semantic", "instance"), " ".join(
        f"{task}{name}" for task in ("panoptic_", "semantic_") for name in
        ("pq", "sq", "rq", "miou", "pixel_accuracy")) + " pq sq rq")])  # fmt: skip
def test_any_tasks_are_trained_in_their_order_and_scored(runs, tmp_path, tasks, names):
    train_ldm.main(tasks_command(runs, tmp_path, *tasks))
    expected = {"step", "sampling_steps", "autoencoder_pq", *names.split()}
    assert load_model(tmp_path).config.tasks == tasks and set(logged(tmp_path)[-1]) == expected

@pytest.mark.parametrize("task, categories", [
    ("panoptic", range(1, 12)), ("semantic", range(1, 12)), ("instance", [1])])
def test_the_weights_draw_the_masks_that_sample_wrote(
        runs, data, tmp_path, evaluated, task, categories):
    samples = "2" if task == "semantic" else "1"  # weights that know nothing agree on nothing
    command = ["--weights", str(runs.ldm), "--steps", "2", "--samples", samples, "--size", "48",
               "--task", task, "--data"]  # fmt: skip
    sample.main([*command, str(data), "--out", str(tmp_path), *ON_CPU])
    written = json.loads((tmp_path / "panoptic.json").read_text())
    assert [c["id"] for c in written["categories"]] == [*categories]
    result = evaluated(*command, tmp_path / "panoptic.json", "--images", data / "val")
    assert (result["miou"] if task == "semantic" else result["All"]["pq"]) == 1

def test_sampled_depth_is_written_in_16_bits(runs, data, tmp_path):
    sample.main(run_of(runs, tmp_path, "--task", "depth", "--data", data))
    for i, (height, width, _) in enumerate(SCENES["val"]):
        written = Image.open(tmp_path / "depth" / f"val{i}.png")
        assert written.mode == "I;16" and (tmp_path / "overlay" / f"val{i}.png").exists()
        image = ldmseg.image_tensor(read_image(data / "val" / f"val{i}.png"), 32)[None]
        depth = load_model(runs.ldm).sample(image, [(0, 10 + i)], 2, task="depth")
        depth = F.interpolate(depth, (height, width), mode="bilinear")[0, 0].clamp(-1, 1)
        np.testing.assert_allclose((np.asarray(written) - 1.0) / 65534, (depth + 1) / 2, atol=1e-3)

def test_a_depth_autoencoder_is_scored_by_depth(runs, evaluated):
    result, last = evaluated("--weights", runs.depth, "--limit", 2), logged(runs.depth)[-1]
    assert set(result) == {"depth", "autoencoder"} and 0 < last["abs_rel"] < 1
    assert result["depth"] == pytest.approx({k: last[k] for k in result["depth"]})

def test_data_with_other_classes_than_the_weights_is_an_error(complaint, runs, data):
    flags = ["--weights", runs.ldm, "--data", data, "--task", "semantic", *ON_CPU]
    line = complaint(evaluate.main, *flags)
    assert line.startswith(f"--data {data}: 2 classes") and "those of the weights" in line

@pytest.mark.parametrize("tasks, flags, message", [
    ("semantic", "--ae {1.ae}", "bits is 3, expected 4"),
    ("semantic", "--data {2} shapes", "--data {2} shapes: different categories"),
    ("depth semantic depth", "", "('depth', 'semantic', 'depth'), expected different ones"),
    ("depth", "--ae {0.ae} {0.ldm}", "--ae {0.ldm}: of ids at 32 pixels, expected depth"),
    ("depth", "--ae {0.ae}", "runs/ae_depth: no such weights"),
    ("depth", "--data {2}", "{2}/train_depth/"),
    ("depth", "--sd {0.ldm} --set unet_widths=32,64",
     "unet_widths of this run is (32, 32), expected ("),
    ("semantic", "--sd {0.ae}", "MaskAutoencoder, expected a LDMSeg")])
def test_mistakes_in_tasks_and_starts_are_named(
        complaint, monkeypatch, runs, tiny_run, data, tmp_path, tasks, flags, message):
    monkeypatch.chdir(tmp_path)  # where there is no runs/ae_depth
    command = [*tasks_command(runs, tmp_path / "run", *tasks.split()), *flags.split()]
    line = complaint(train_ldm.main, *(a.format(runs, tiny_run, data) for a in command))
    assert message.format(runs, tiny_run, data) in line

def test_several_tasks_that_start_from_a_run_without_any_give_its_output_at_first():
    config = small_config()
    run = LDMSeg(config).eval()
    torch.nn.init.normal_(run.unet.conv_out.weight, std=0.3)  # of zero in a new one
    tasks = replace(config, tasks=("depth", "instance"), depth_scale=1.0)
    depth = MaskAutoencoder(replace(config, target="depth"))
    model = train_ldm.build_model(tasks, [run.autoencoder, depth], "run", run).eval()
    z, t, z_image = gaussian(2, 4, 4, 4), torch.tensor([3, 700]), gaussian(2, 16, 4, 4, seed=1)
    expected, _, _ = run.predict(z, z_image, z, t)
    output, _, _ = model.predict(z, z_image, z, t, torch.tensor([0, 1]))
    torch.testing.assert_close(output, expected)
    assert expected.abs().max() > 0.1

def test_training_starts_from_all_but_the_autoencoder_of_a_run(runs, tmp_path):
    config, file = load_model(runs.ae).config, tmp_path / "ae.safetensors"
    ae = MaskAutoencoder(replace(config, ae_widths=(8, 16, 32, 64)))  # of another shape
    ldmseg.save_weights(file, ae, ae.config)
    train_ldm.main([*tasks_command(runs, tmp_path / "run", "semantic"), "--ae", str(file), "--sd",
                    str(runs.ldm), "--seed", "9", "--set", "ldm_lr=0"])  # fmt: skip
    model, start = load_model(tmp_path / "run"), load_model(runs.ldm)
    for part, source in (("autoencoder", ae), ("unet", start.unet),
                         ("image_encoder", start.image_encoder)):
        ours, theirs = getattr(model, part).state_dict(), source.state_dict()
        assert [k for k in theirs if not torch.equal(ours[k], theirs[k])] == []
    assert torch.equal(model.task_embedding.weight[0], start.task_embedding.weight[1])
