"""Several tasks in one model (Supp. A): embeddings, merging, depth, scores, the scripts."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import sample
import torch
import torch.nn.functional as F
import train_ae
import train_ldm
from conftest import CATEGORIES, SCENES, ae_command, small_config
from ldmseg import (
    PRESETS, TASKS, Config, DepthQuality, LDMSeg, MaskAutoencoder, ShapeScenes, TrainingStream,
    align_depth, build_unet, colorize_depth, depth_loss, draw_task, evaluate_tasks, load_model,
    merge_panoptic, prepare, read_image, relative_depth, rgb2id, save_weights, seeded_noise,
)  # fmt: skip
from PIL import Image

ON_CPU = ["--device", "cpu", "--workers", "0"]
CLASSES = [{"id": 7, "name": "cell", "isthing": 1}, {"id": 9, "name": "ground", "isthing": 0},
           {"id": 40, "name": "box", "isthing": 1}]  # fmt: skip


def task_config(tasks=TASKS, **changes):
    """A tiny Config of several tasks; changes come after conftest's fields."""
    config = small_config(tasks=tasks, task_width=16, depth_scale=0.25,
                          categories=json.dumps(CLASSES))  # fmt: skip
    return replace(config, **changes)


def random_model(config):
    """LDMSeg whose random weights do not start with an output of zero."""
    torch.manual_seed(0)
    model = LDMSeg(config).eval()
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.3)
    return model


@pytest.fixture
def model():
    return random_model(task_config())


def images(count):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def latents(model, task, count=2):
    """What denoising in two steps makes of the same images and the same noise."""
    noise = seeded_noise(range(count), model.config, "cpu")
    *_, x0 = model.denoise(model.encode_image(images(count)), noise, 2,
                           task=model.task_of(task, count))  # fmt: skip
    return x0


# ---- the task embedding ----


@pytest.mark.parametrize("one, other", [(0, 1), (0, 2), (1, 2)])
def test_swapping_two_embeddings_swaps_what_the_tasks_sample(model, one, other):
    before = [latents(model, task) for task in TASKS]
    rows = model.task_embedding.weight.data
    rows[[one, other]] = rows[[other, one]]
    after = [latents(model, task) for task in TASKS]
    assert torch.equal(after[one], before[other]) and torch.equal(after[other], before[one])
    assert not torch.allclose(before[one], before[other], atol=1e-3)


def test_an_embedding_does_not_reach_the_samples_of_the_other_tasks(model):
    before = [latents(model, task) for task in TASKS]
    model.task_embedding.weight.data[1] += 1
    after = [latents(model, task) for task in TASKS]
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [True, False, True]


def mixed_batch():
    """Images, ids and depth of four samples, with other cells VOID than invalid."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 8, (4, 4, 4), generator=generator)
    ids = ids.repeat_interleave(8, 1).repeat_interleave(8, 2)  # (4, 32, 32)
    depth = torch.rand(4, 32, 32, generator=generator) * 2 - 1
    ids[0, :8], ids[1, :16], depth[2, :24], depth[3, :, :8] = 0, 0, math.nan, math.nan
    return dict(image=images(4), ids=ids, depth=depth, t=torch.tensor([5, 300, 600, 999]),
                eps=torch.randn(4, 4, 4, 4, generator=generator), task=torch.tensor([0, 1, 2, 2]))


def test_each_sample_of_a_batch_has_its_own_task(model):
    """The loss is a mean over the cells that count: 12, 8, 4 and 12 of the four samples."""
    batch = mixed_batch()
    single = [model.diffusion_loss(**{k: v[i : i + 1] for k, v in batch.items()},
                                   self_condition=True) for i in range(4)]  # fmt: skip
    together = model.diffusion_loss(**batch, self_condition=True)
    expected = sum(n * loss for n, loss in zip((12, 8, 4, 12), single)) / 36
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=0)
    other = model.diffusion_loss(**batch | {"task": torch.tensor([1, 0, 2, 2])},
                                 self_condition=True)  # fmt: skip
    assert abs(other - together) > 1e-4 * together


def test_the_gradient_reaches_the_embeddings_of_the_drawn_tasks_only(model):
    batch = mixed_batch() | {"task": torch.tensor([0, 2, 0, 2])}
    model.diffusion_loss(**batch, self_condition=True).backward()
    norms = model.task_embedding.weight.grad.norm(dim=1)
    assert norms[0] > 0 and norms[1] == 0 and norms[2] > 0


def test_the_first_estimate_of_self_conditioning_sees_the_task(model):
    seen = []
    model.task_embedding.register_forward_hook(lambda _, task, __: seen.append(task[0].tolist()))
    model.diffusion_loss(**mixed_batch(), self_condition=True)
    assert seen == [[0, 1, 2, 2], [0, 1, 2, 2]]


def test_without_tasks_there_is_no_cross_attention_and_no_other_weight(model):
    own = ("attn2", "norm2.", "task_embedding", "depth_autoencoder")
    shapes, plain = ({name: value.shape for name, value in m.state_dict().items()}
                     for m in (model, LDMSeg(small_config())))  # fmt: skip
    # a residual block's norm2 is no part of cross-attention
    added = {name for name in shapes if any(word in name for word in own) and "resnets" not in name}
    assert {next(w for w in own if w in name) for name in added} == set(own)
    assert plain == {name: shape for name, shape in shapes.items() if name not in added}


def test_the_papers_unet_with_cross_attention_has_859_544_004_parameters():
    with torch.device("meta"):
        unet = build_unet(PRESETS["paper"], 4, PRESETS["paper"].task_width)
    assert sum(p.numel() for p in unet.parameters()) == 859_544_004


@pytest.mark.parametrize("tasks, expected", [
    ((0, 2), 0.64 * (1 + 4) / 2), ((0, 1), 0.64), ((2, 2), 0.64 * 4), ((2, 1), 0.64 * 2.5),
])  # fmt: skip
def test_depth_latents_are_learned_exactly_where_the_task_is_depth(stub_model, tasks, expected):
    """Without noise, v is -0.8 x0; mask latents are 1, depth latents 2, the prediction is 0."""
    model = stub_model(lambda inputs, t: torch.zeros(len(inputs), 4, 4, 4), tasks=TASKS,
                       depth_scale=1.0, loss_weights="none")  # fmt: skip
    model.schedule.alpha_bar[0] = 0.36
    model.encode_mask = lambda ids: torch.ones(2, 4, 4, 4)
    model.encode_depth = lambda depth: torch.full((2, 4, 4, 4), 2.0)
    ids = torch.ones(2, 32, 32, dtype=torch.long)
    loss = model.diffusion_loss(images(2), ids, torch.zeros(2, 4, 4, 4), torch.zeros(2).long(),
                                False, task=torch.tensor(tasks), depth=torch.zeros(2, 32, 32))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_void_counts_where_the_task_has_ids_and_invalid_depth_where_it_is_depth(stub_model):
    """v is 0.6 eps - 0.8 x0. Of the instance sample 4 cells count, with v = 0.6 - 0.8; of the depth
    sample 8, with v = 1.2 - 1.6; what does not count has a noise of 100."""
    model = stub_model(lambda inputs, t: torch.zeros(len(inputs), 4, 4, 4), tasks=TASKS,
                       depth_scale=1.0, loss_weights="none")  # fmt: skip
    model.schedule.alpha_bar[0] = 0.36
    model.encode_mask = lambda ids: torch.ones(2, 4, 4, 4)
    model.encode_depth = lambda depth: torch.full((2, 4, 4, 4), 2.0)
    ids, depth = torch.ones(2, 32, 32, dtype=torch.long), torch.zeros(2, 32, 32)
    ids[0, :24], ids[1], depth[0], depth[1, :, 16:] = 0, 0, math.nan, math.nan
    eps = torch.full((2, 4, 4, 4), 100.0)
    eps[0, :, 3:], eps[1, :, :, :2] = 1, 2
    loss = model.diffusion_loss(images(2), ids, eps, torch.zeros(2).long(), False,
                                task=torch.tensor([0, 2]), depth=depth)  # fmt: skip
    assert loss.item() == pytest.approx((4 * 0.2**2 + 8 * 0.4**2) / 12, rel=1e-5)


def test_task_of_is_the_place_in_the_weights_own_order():
    model = random_model(task_config(("depth", "instance")))
    assert model.task_of("instance", 3).tolist() == [1, 1, 1]
    assert model.task_of("depth", 2).tolist() == [0, 0]


# ---- depth: its autoencoder, loss and scale ----


def test_the_depth_autoencoder_differs_in_its_first_and_last_layer_only():
    ids, depth = (MaskAutoencoder(small_config(target=t)).state_dict() for t in ("ids", "depth"))
    assert ids.keys() == depth.keys()
    other = {name: tuple(v.shape) for name, v in depth.items() if v.shape != ids[name].shape}
    assert list(other) == ["encoder.0.weight", "decoder.9.weight", "decoder.9.bias"]
    assert other["encoder.0.weight"][1] == 1 and other["decoder.9.bias"] == (1,)


def test_invalid_depth_is_zero_for_the_autoencoder():
    code = MaskAutoencoder(small_config(target="depth")).code(torch.tensor([[[0.5, math.nan, -1]]]))
    assert code.tolist() == [[[[0.5, 0, -1]]]]


def test_depth_latents_have_a_scale_of_their_own(model):
    depth = torch.rand(2, 32, 32) * 2 - 1
    own = model.depth_autoencoder.encoder(depth[:, None])
    torch.testing.assert_close(model.encode_depth(depth), 0.25 * own)  # the masks' is 0.5
    z = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(model.decode(z, "depth"), model.depth_autoencoder.decoder(4 * z))


def test_sampled_depth_is_what_its_autoencoder_decodes(model):
    got = model.sample(images(2), range(2), 2, task="depth")
    expected = model.depth_autoencoder.decoder(latents(model, "depth") / 0.25)
    assert got.shape == (2, 1, 16, 16)
    torch.testing.assert_close(got, expected)


def test_depth_loss_is_the_mean_absolute_error_over_valid_pixels():
    depth = torch.full((2, 4, 4), math.nan)
    depth[0, 0, :2], depth[1, 3, 3] = 1.0, -0.5
    loss = depth_loss(torch.full((2, 1, 2, 2), 0.5), depth)
    assert loss.item() == pytest.approx((0.5 + 0.5 + 1.0) / 3)


def test_depth_loss_upsamples_bilinearly_by_2():
    """0, 1 becomes 0, 1/4, 3/4, 1, of which the second and the last are valid."""
    depth = torch.tensor([math.nan, 0, math.nan, 0]).expand(1, 2, 4)
    assert depth_loss(torch.tensor([[[[0.0, 1.0]]]]), depth).item() == pytest.approx(5 / 8)


def test_invalid_depth_gives_no_gradient():
    output = torch.zeros(1, 1, 2, 2, requires_grad=True)
    depth_loss(output, torch.full((1, 4, 4), math.nan)).backward()
    assert output.grad.tolist() == [[[[0, 0], [0, 0]]]]


def test_relative_depth_runs_from_the_2nd_to_the_98th_percentile():
    depth = relative_depth(np.arange(101.0).reshape(1, 101))[0]
    places = [0, 2, 26, 50, 98, 100]
    np.testing.assert_allclose(depth[places], [-1, -1, -0.5, 0, 1, 1], atol=1e-12)


def test_relative_depth_leaves_invalid_pixels_out():
    depth = relative_depth(np.append(np.arange(101.0), [np.nan, np.nan])[None])[0]
    np.testing.assert_allclose(depth[[50, 98]], [0, 1], atol=1e-12)
    assert np.isnan(depth).nonzero()[0].tolist() == [101, 102]


def test_relative_depth_of_almost_constant_depth_uses_its_extremes():
    depth = np.ones((10, 20))
    depth[4, 5] = 3  # less than 2 percent of the pixels
    result = relative_depth(depth)
    assert result[4, 5] == 1 and np.unique(result).tolist() == [-1, 1]


@pytest.mark.parametrize("depth, message", [
    ([[3.0, 3.0], [3.0, np.nan]], "depth is 3.0 at all of its 3 valid pixels"),
    ([[np.nan, np.nan]], "at all of its 0 valid pixels"),
])  # fmt: skip
def test_relative_depth_of_one_value_or_none_is_an_error(depth, message):
    with pytest.raises(ValueError, match=message):
        relative_depth(np.array(depth))


def test_depth_is_coloured_from_bright_to_dark_and_invalid_black():
    colours = colorize_depth(np.array([[0.1, 0.3, 0.5, 0.9, np.nan]])).astype(int)[0].sum(1)
    assert (np.diff(colours) < 0).all() and colours[3] > 100 and colours[4] == 0
    assert colours[0] > 600  # of 765


# ---- depth scores ----


def test_align_depth_recovers_scale_and_shift():
    predicted = np.random.default_rng(0).uniform(-1, 1, (6, 7)).astype(np.float32)
    truth = 3.5 * predicted + 20
    truth[2], predicted[2] = np.nan, 1000  # invalid pixels have no say
    aligned = align_depth(predicted, truth)
    np.testing.assert_allclose(aligned[[0, 1, 3, 4, 5]], truth[[0, 1, 3, 4, 5]], rtol=1e-5)
    np.testing.assert_allclose(aligned[2], 3520, rtol=1e-5)


def test_align_depth_turns_a_constant_into_the_mean():
    truth = np.array([[1.0, 2.0], [6.0, np.nan]])
    np.testing.assert_allclose(align_depth(np.full((2, 2), 0.3, np.float32), truth), 3)


def depth_scores(*pairs):
    metric = DepthQuality()
    for truth, predicted in pairs:
        metric.update(np.array([truth], float), np.array([predicted], np.float32))
    return metric.compute()


# aligned to 5 5 10 10
FOUR = (3, 7, 9, 11), (0, 0, 1, 1)
OF_FOUR = {"abs_rel": (2 / 3 + 2 / 7 + 1 / 9 + 1 / 11) / 4, "rmse": 2.5**0.5, "delta1": 0.5}
# aligned to 2 2 2
THREE = (1, 2, 3), (8, 8, 8)
OF_THREE = {"abs_rel": 4 / 9, "rmse": (2 / 3) ** 0.5, "delta1": 1 / 3}


@pytest.mark.parametrize("pair, expected", [(FOUR, OF_FOUR), (THREE, OF_THREE)])
def test_depth_scores_are_those_counted_by_hand(pair, expected):
    assert depth_scores(pair) == pytest.approx(expected | {"n": 1})


def test_depth_scores_are_means_over_images_not_pixels():
    expected = {k: (v + OF_THREE[k]) / 2 for k, v in OF_FOUR.items()}
    assert depth_scores(FOUR, THREE) == pytest.approx(expected | {"n": 2})


def test_images_without_valid_depth_do_not_count():
    empty = ([np.nan] * 3, (1, 2, 3))
    assert depth_scores(empty, THREE, empty) == pytest.approx(OF_THREE | {"n": 1})
    assert depth_scores(empty)["n"] == 0


def test_invalid_pixels_do_not_count_in_depth_scores():
    pair = (*FOUR[0], np.nan, np.nan), (*FOUR[1], -50, 50)
    assert depth_scores(pair) == pytest.approx(OF_FOUR | {"n": 1})


def test_negative_aligned_depth_is_wrong():
    """Aligned to -0.8, 3.7, 8.2, of which only the last is within a ratio of 1.25."""
    result = depth_scores(((1, 0.1, 10), (0, 1, 2)))
    assert result["delta1"] == pytest.approx(1 / 3)
    assert result["abs_rel"] == pytest.approx((1.8 + 36 + 0.18) / 3)


# ---- instances with the classes of a semantic map ----


def logits_of(cells, N=16, height=200.0):
    """Logits (N, h, w) of a map of ids; where an entry is a tuple, its ids share the pixel."""
    logits = torch.zeros(N, len(cells), len(cells[0]))
    for y, row in enumerate(cells):
        for x, ids in enumerate(row):
            logits[list(ids) if isinstance(ids, tuple) else ids, y, x] = height
    return logits


# The case, its instances, their semantic map, the merged ids: a cell is 4 pixels, the smallest
# segment 12, classes 2 and 4 of 4 are stuff.
CASES = [
    ("a tie goes to the lowest class", [1] * 4, [3, 3, 1, 1], [1] * 4),
    ("two things of a class stay two", [2] * 4, [1, 1, 1, 1], [2] * 4),
    ("stuff", [3] * 4, [2, 2, 2, 3], [3] * 4),
    ("stuff of the same class is one, VOID does not vote", [4] * 4, [0, 0, 0, 2], [3] * 4),
    ("without a vote it is VOID", [5] * 4, [0, 0, 0, 0], [0] * 4),
    ("stuff of another class is another", [13] * 4, [4, 4, 4, 4], [13] * 4),
    ("ids above K do not vote", [6] * 4, [15, 15, 5, 3], [6] * 4),
    ("a small segment is VOID", [7, 7, 8, 8], [1, 1, 3, 3], [0, 0, 8, 8]),
    ("and another is not", [8] * 4, [1, 1, 3, 3], [8] * 4),
    ("an unconfident segment is VOID", [(9, 10)] * 4, [1, 1, 1, 1], [0] * 4),
    ("only ids above K: VOID", [11] * 4, [5, 6, 7, 5], [0] * 4),
    ("VOID stays VOID", [0] * 4, [2, 2, 2, 2], [0] * 4),
    ("the class of most pixels, not the lowest", [12] * 4, [1, 3, 3, 3], [12] * 4),
]
CLASS_OF = {1: 1, 2: 1, 3: 2, 6: 3, 8: 3, 12: 3, 13: 4}


def merge(instance_logits, semantic_logits):
    size = (2 * len(CASES), 8)
    return merge_panoptic(instance_logits, semantic_logits, size, [1, 0, 1, 0], 0.6, 12)


@pytest.fixture(scope="module")
def merged():
    return merge(logits_of([case[1] for case in CASES]), logits_of([case[2] for case in CASES]))


@pytest.mark.parametrize("row", range(len(CASES)), ids=[case[0] for case in CASES])
def test_merging(merged, row):
    ids, class_of = merged
    expected = torch.tensor(CASES[row][3]).repeat_interleave(2).expand(2, 8)
    assert torch.equal(ids[2 * row : 2 * row + 2], expected)
    for id in set(CASES[row][3]) - {0}:
        assert class_of[id] == CLASS_OF[id]


def test_merged_segments_are_those_with_a_class(merged):
    ids, class_of = merged
    assert class_of == CLASS_OF and set(ids.unique().tolist()) == {0, *class_of}


def test_merging_does_not_depend_on_the_instances_ids(merged):
    instance = logits_of([case[1] for case in CASES])
    semantic = logits_of([case[2] for case in CASES])
    for seed in range(5):
        order = 1 + torch.randperm(15, generator=torch.Generator().manual_seed(seed))
        ids, class_of = merge(instance[torch.cat([torch.zeros(1).long(), order])], semantic)
        pairs = set(zip(merged[0].flatten().tolist(), ids.flatten().tolist()))
        assert len(pairs) == 1 + len(CLASS_OF)  # one to one, VOID included
        assert all(CLASS_OF.get(old) == class_of.get(new) for old, new in pairs)


# ---- what the model sees of each task ----


def stripes(*ids, size=32):
    """A square map whose columns have these ids, in stripes of equal width."""
    return np.repeat(ids, size // len(ids))[None].repeat(size, 0)


def record_of(ids, categories, crowds=(), depth=None):
    """An item of a data set; categories: of its segments, {id: category}."""
    segments = [{"id": id, "category_id": category, "iscrowd": int(id in crowds)}
                for id, category in categories.items()]  # fmt: skip
    image = np.zeros((*ids.shape, 3), np.uint8)
    image[:, : ids.shape[1] // 4] = 255
    record = {"image": image, "ids": ids, "segments": segments, "image_id": 3, "file_name": "a.png"}
    return record if depth is None else record | {"depth": depth}


def prepared(record, seed=0, augment=False, task="semantic", config=None):
    generator = torch.Generator().manual_seed(seed)
    return prepare(record, config or task_config(), generator, augment, task)


def test_semantic_ids_are_the_places_of_the_classes():
    record = record_of(stripes(500, 2, 70000, 3), {500: 40, 2: 7, 70000: 9, 3: 40})
    assert prepared(record)["ids"][:, ::8].unique(dim=0).tolist() == [[3, 1, 2, 3]]


def test_semantic_ids_are_never_relabelled():
    record = record_of(stripes(500, 2), {500: 40, 2: 7})
    drawn = {tuple(prepared(record, seed)["ids"][0, ::16].tolist()) for seed in range(20)}
    assert drawn == {(3, 1)}


def test_the_semantic_map_flips_with_the_image():
    record, flips = record_of(stripes(1, 2, 2, 2), {1: 40, 2: 7}), set()
    for seed in range(20):
        drawn = prepared(record, seed, augment=True)
        assert torch.equal(drawn["image"][0] > 0, drawn["ids"] == 3)
        flips.add(int(drawn["ids"][0, 0]))
    assert flips == {1, 3}


def test_crowds_and_what_is_not_listed_have_no_class():
    record = record_of(stripes(1, 2, 3, 0), {1: 7, 2: 40}, crowds=[1])
    assert prepared(record)["ids"][0, ::8].tolist() == [0, 3, 0, 0]


def test_more_segments_than_ids_keep_their_classes():
    record = record_of(stripes(*range(1, 17)), {id: 7 + 2 * (id % 2) for id in range(1, 17)})
    assert prepared(record)["ids"][0, ::2].tolist() == [2, 1] * 8


@pytest.mark.parametrize("task", TASKS)
def test_depth_is_relative_and_flips_with_the_image(task):
    depth = stripes(*np.linspace(1, 2, 32)).astype(np.float32)
    depth[5, 7] = np.nan
    record = record_of(stripes(1, 2), {1: 7, 2: 9}, depth=depth)
    columns, flips = relative_depth(depth)[0], set()
    for seed in range(20):
        drawn = prepared(record, seed, augment=True, task=task)
        flip = drawn["image"][0, 0, 0] < 0
        got = drawn["depth"].flip(-1) if flip else drawn["depth"]
        np.testing.assert_allclose(got[0], columns, atol=1e-6)
        assert got.isnan().nonzero().tolist() == [[5, 7]]
        flips.add(bool(flip))
    assert flips == {True, False}


def test_depth_is_left_out_where_no_task_needs_it():
    record = record_of(stripes(1, 2), {1: 7, 2: 9}, depth=np.ones((32, 32)))  # constant: an error
    assert "depth" not in prepared(record, config=task_config(("instance", "semantic")))


def test_constant_depth_is_an_error_that_names_the_image():
    record = record_of(stripes(1, 2), {1: 7, 2: 9}, depth=np.full((32, 32), 4.0))
    with pytest.raises(ValueError, match="^a.png: depth is 4.0 at all of its 1024 valid pixels"):
        prepared(record)


class Records(list):
    """Records as a data set of these categories."""

    categories = CLASSES


RECORDS = Records([record_of(stripes(1, 2, 3, 4), {1: 7, 2: 9, 3: 7, 4: 40},
                             depth=stripes(1.0, 2, 3, 4)),
                   record_of(stripes(5, 6), {5: 40, 6: 9}, depth=stripes(1.0, 2, 2, 1))])


@pytest.fixture(scope="module")
def drawn():
    """The first 600 samples of a stream of three tasks."""
    stream = TrainingStream([RECORDS], task_config(), seed=4)
    return [stream[p] for p in range(600)]


def test_all_tasks_are_drawn_equally_often(drawn):
    counts = np.bincount([s["task"] for s in drawn], minlength=3)
    assert len(counts) == 3 and counts.min() > 170  # of 200, with a standard deviation of 12


def test_neighbours_in_the_order_draw_independent_tasks(drawn):
    """Neither does a batch of 20 have other numbers of a task than chance gives it, nor do those
    positions where two data sets take turns."""
    is_first = np.array([s["task"] == 0 for s in drawn])
    assert is_first.reshape(-1, 20).sum(1).std() < 1.5 * (20 * 2 / 9) ** 0.5
    assert 65 < is_first[::2].sum() < 135 and 65 < is_first[1::2].sum() < 135


def test_tasks_depend_on_seed_and_position_only(drawn):
    other = Records([RECORDS[0]])
    again = TrainingStream([other, other], task_config(("depth", "semantic", "instance")), seed=4)
    assert [again[p]["task"] for p in (50, 3, 20, 3)] == [drawn[p]["task"] for p in (50, 3, 20, 3)]
    assert [again[p]["task"] for p in range(30)] == [s["task"] for s in drawn[:30]]
    others = TrainingStream([RECORDS], task_config(), seed=5)
    assert [others[p]["task"] for p in range(30)] != [s["task"] for s in drawn[:30]]


def test_the_task_says_whether_ids_are_classes(drawn):
    """The second record's two classes are the places 3 and 2; as instances, ids are random."""
    seen = {task: set() for task in range(3)}
    for one in drawn:
        if one["ids"].unique().numel() == 2:
            seen[one["task"]].add(tuple(sorted(one["ids"].unique().tolist())))
    assert seen[1] == {(2, 3)} and len(seen[0]) > 10 and len(seen[2]) > 10


def test_instance_samples_are_the_same_with_and_without_other_tasks(drawn):
    alone, compared = TrainingStream([RECORDS], small_config(), seed=4), 0
    for p in range(60):
        if drawn[p]["task"] == 0:
            one, compared = alone[p], compared + 1
            assert "task" not in one and one["seed"] == drawn[p]["seed"]
            assert all(torch.equal(one[k], drawn[p][k]) for k in ("image", "ids"))
    assert compared > 10


def test_nothing_of_a_mask_is_given_where_the_task_is_depth():
    stream = TrainingStream([RECORDS], task_config(given=1.0), seed=4)
    given = [[], [], []]
    for p in range(60):
        given[stream[p]["task"]].append(bool(stream[p]["known"].any()))
    assert np.mean(given[0]) > 0.5 and np.mean(given[1]) > 0.5 and set(given[2]) == {False}


# ---- scores against oracles ----


@pytest.fixture(scope="module")
def truth():
    """Two images and the perfect output of each task, in the order of the images."""
    generator, records, outputs = torch.Generator().manual_seed(0), Records(), []
    stuff = stripes(9, 9, 9, 9)
    stuff[:16] = stripes(1, 2, 0, 5)[:16]
    for ids, classes in ((stuff, {1: 7, 2: 7, 5: 40, 9: 9}), (stripes(3, 4), {3: 40, 4: 9})):
        half = torch.rand(1, 16, 16, generator=generator) * 2 - 1
        depth = 3 * F.interpolate(half[None], scale_factor=2, mode="bilinear")[0, 0].numpy() + 7
        records.append(record_of(ids, classes, depth=depth))
        place = {c["id"]: i for i, c in enumerate(CLASSES, start=1)}
        classes = np.vectorize(lambda id: place.get(classes.get(id), 0))(ids)
        outputs.append({"instance": logits_of(ids[::2, ::2]), "depth": half,
                        "semantic": logits_of(classes[::2, ::2])})  # fmt: skip
    return records, outputs


def score(tasks, outputs, dataset, config=None):
    """evaluate_tasks of outputs that are known beforehand."""
    later = iter(outputs)
    return evaluate_tasks(tasks, lambda batch: [next(later) for _ in batch["seed"]], dataset,
                          config or task_config(), "cpu", pictures=1)  # fmt: skip


ALL = ["panoptic", "instance", "semantic", "depth"]


def test_perfect_outputs_have_perfect_scores(truth):
    result, _ = score(ALL, truth[1], truth[0])
    assert list(result) == ALL
    for task in ("panoptic", "instance"):
        assert result[task]["All"]["pq"] == 1
    assert result["panoptic"]["All"]["n"] == 3 and result["instance"]["All"]["n"] == 1
    assert result["panoptic"]["miou"] == result["semantic"]["miou"] == 1
    assert result["depth"]["n"] == 2 and result["depth"]["delta1"] == 1
    assert result["depth"]["abs_rel"] < 1e-5 and result["depth"]["rmse"] < 1e-4


def test_the_smallest_segment_of_the_weights_counts_as_missed(truth):
    """Of 7 segments, the three things of 128 pixels are dropped: 7, 7 and one of the two 40."""
    result, _ = score(["panoptic"], truth[1], truth[0], task_config(min_area=129))
    rows = result["panoptic"]["per_class"]
    assert {k: (row["tp"], row["fn"]) for k, row in rows.items()} == {
        "7": (0, 2), "9": (2, 0), "40": (1, 1)}  # fmt: skip


def test_predictions_are_kept_for_the_first_pictures_only(truth):
    _, kept = score(ALL, truth[1], truth[0])
    (record, drawn), = kept
    assert record is truth[0][0] and list(drawn) == ALL
    assert all(drawn[task].shape == (32, 32) for task in ALL)


def test_semantic_segments_have_the_datas_categories(truth):
    ids, segments = draw_task(truth[1][0], "semantic", (32, 32), task_config())
    assert {s["id"]: s["category_id"] for s in segments} == {1: 7, 2: 9, 3: 40}
    assert [s["area"] for s in segments] == [(ids == i).sum() for i in (1, 2, 3)] == [256, 512, 128]


@pytest.mark.parametrize("wrong", [0, 7], ids=["VOID", "an id above K"])
def test_a_void_semantic_prediction_is_wrong(wrong):
    """Of class 7 half is found, of class 9 everything: IoU 1/2 and 1."""
    dataset = Records([record_of(stripes(1, 2), {1: 7, 2: 9})])
    outputs = [{"semantic": logits_of([[1] * 4 + [wrong] * 4 + [2] * 8] * 16, N=8)}]
    result, _ = score(["semantic"], outputs, dataset, task_config(("semantic",)))
    assert result["semantic"]["miou"] == pytest.approx(0.75)
    assert result["semantic"]["pixel_accuracy"] == pytest.approx(0.75)


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
@pytest.mark.parametrize("field, value", [("id", 8), ("isthing", 0)])
def test_data_with_other_classes_than_the_weights_is_an_error(truth, task, field, value):
    other = Records(truth[0])
    other.categories = [CLASSES[0] | {field: value}, *CLASSES[1:]]
    with pytest.raises(ValueError, match="the data has 3 classes.*expected those of the weights"):
        score([task], truth[1], other)


def test_instances_are_scored_on_data_with_other_classes(truth):
    other = Records(truth[0])
    other.categories = [c | {"isthing": 0} for c in CLASSES]
    assert score(["instance"], truth[1], other)[0]["instance"]["All"]["pq"] == 1


# ---- bits ----


@pytest.mark.parametrize("classes, bits, needed", [
    (7, 3, None), (8, 3, 4), (127, 7, None), (128, 7, 8), (133, 7, 8), (1, 1, None), (2, 1, 2),
])  # fmt: skip
def test_classes_that_do_not_fit_the_codes_say_which_bits_would(classes, bits, needed):
    categories = json.dumps([{"id": i, "isthing": 1} for i in range(classes)])
    if needed is None:
        assert Config(tasks=("semantic",), categories=categories, bits=bits).num_ids > classes
    else:
        with pytest.raises(ValueError, match=f"^{classes} classes do not fit.*bits={needed}$"):
            Config(tasks=("semantic",), categories=categories, bits=bits)
        Config(tasks=("semantic",), categories=categories, bits=needed)


@pytest.mark.parametrize("tasks", [("depth", "depth"), ("panoptic",)])
def test_tasks_are_different_known_ones(tasks):
    with pytest.raises(ValueError, match="expected different ones of"):
        Config(tasks=tasks)


# ---- the scripts ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """Data with depth, and runs of two steps: .ae of ids, .depth, .ldm of three tasks."""
    root = tmp_path_factory.mktemp("tasks")
    shutil.copytree(data, root / "data")
    for split, scenes in SCENES.items():
        (root / "data" / f"{split}_depth").mkdir()
        for i, (height, width, _) in enumerate(scenes):
            y, x = np.mgrid[:height, :width]
            depth = 100.0 + 3 * x + 5 * (y % 20)
            depth[:3, :4] = 0  # invalid
            path = root / "data" / f"{split}_depth" / f"{split}{i}"
            if i:
                np.save(path, depth.astype(np.float32))
            else:
                Image.fromarray(depth.astype(np.uint16)).save(path.with_suffix(".png"))
    out = SimpleNamespace(data=root / "data", ae=root / "ae", depth=root / "depth",
                          ldm=root / "ldm")  # fmt: skip
    train_ae.main(ae_command(out.data, out.ae))
    train_ae.main([*ae_command(out.data, out.depth), "--target", "depth"])
    train_ldm.main(tasks_command(out, out.ldm, *TASKS))
    return out


def tasks_command(runs, out, *tasks):
    """Arguments of train_ldm.py for these tasks on top of both autoencoders, where needed."""
    command = ["--ae", str(runs.ae), *[str(runs.depth)] * ("depth" in tasks), "--tasks", *tasks]
    return [*command, *ae_command(runs.data, out)]


def assert_same_weights(one, other):
    one, other = (load_model(run).state_dict() for run in (one, other))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_depth_run_holds_what_a_run_of_ids_does(runs):
    assert {p.name for p in runs.depth.iterdir()} == {p.name for p in runs.ae.iterdir()}
    assert load_model(runs.depth).config.target == "depth"
    training, scores = log_of(runs.depth)
    assert training["loss"] > 0 and 0 < scores["abs_rel"] < 1 and scores["n"] == 2


def test_the_depth_scale_gives_latents_the_chosen_deviation(runs):
    scale = load_model(runs.ldm).config.depth_scale
    assert scale == pytest.approx(0.7 / log_of(runs.depth)[-1]["latent_std"])


PQ = {"pq", "sq", "rq"}
PANOPTIC = {f"panoptic_{name}" for name in ("pq", "sq", "rq", "pq_th", "pq_st")}
DEPTH = {"depth_absrel", "depth_rmse", "depth_delta1"}


def test_a_run_of_all_tasks_logs_the_score_of_each(runs):
    scores = {"autoencoder_pq", "semantic_miou"} | PQ | PANOPTIC | DEPTH
    training, evaluation = log_of(runs.ldm)
    assert set(evaluation) == scores | {"step", "sampling_steps"} and training["loss"] > 0
    assert 0 < evaluation["depth_absrel"] < 1 and 0 < evaluation["semantic_miou"] < 1
    width, _ = Image.open(runs.ldm / "step000002.png").size
    assert width == 7 * 164  # image, truth, autoencoder alone, panoptic and the three tasks


def test_the_weights_hold_both_autoencoders_and_the_classes(runs):
    model = load_model(runs.ldm)
    for name, run in (("autoencoder", runs.ae), ("depth_autoencoder", runs.depth)):
        own, expected = getattr(model, name).state_dict(), load_model(run).state_dict()
        assert all(torch.equal(own[k], v) for k, v in expected.items())
    assert json.loads(model.config.categories) == CATEGORIES and model.config.tasks == TASKS


@pytest.mark.parametrize("stage", ["depth", "ldm"])
def test_a_resumed_run_equals_one_without_a_break(runs, tmp_path, stage):
    for out in (tmp_path / "resumed", tmp_path / "straight"):
        if out.name == "resumed":
            shutil.copytree(getattr(runs, stage), out)
        if stage == "depth":
            train_ae.main([*ae_command(runs.data, out), "--target", "depth", "--steps", "3"])
        else:
            train_ldm.main([*tasks_command(runs, out, *TASKS), "--steps", "3"])
    assert_same_weights(tmp_path / "resumed", tmp_path / "straight")


@pytest.mark.parametrize("tasks, scores", [
    (("semantic",), {"semantic_miou"}), (("depth", "instance"), DEPTH | PQ),
    (("semantic", "instance"), {"semantic_miou"} | PQ | PANOPTIC),
])
def test_any_of_the_tasks_are_trained_in_their_order(runs, tmp_path, tasks, scores):
    train_ldm.main([*tasks_command(runs, tmp_path, *tasks), "--steps", "1"])
    assert load_model(tmp_path).config.tasks == tasks
    logged = set(log_of(tmp_path)[-1]) - {"step", "sampling_steps", "autoencoder_pq"}
    assert logged == scores


def sample_task(runs, out, task, *more):
    sample.main(["--weights", str(runs.ldm), "--data", str(runs.data), "--task", task,
                 "--steps", "2", "--out", str(out), *ON_CPU, *more])  # fmt: skip
    return out


def scores_of(tmp_path, *arguments):
    """What evaluate.py writes as JSON, without its durations."""
    evaluate.main([*map(str, arguments), "--json", str(tmp_path / "out.json"), *ON_CPU])
    result = json.loads((tmp_path / "out.json").read_text())
    result.pop("seconds_per_image", None)
    return result


@pytest.fixture(scope="module")
def samples(runs, tmp_path_factory):
    """Folders of sample.py for each task over the validation split, and another seed's panoptic."""
    root = tmp_path_factory.mktemp("samples")
    for task in ("panoptic", *TASKS):
        sample_task(runs, root / task, task)
    sample_task(runs, root / "other", "panoptic", "--seed", "1")
    return root


def segments_in(folder):
    """(ids, segments_info) of each image of a panoptic.json, and its categories."""
    listed = json.loads((folder / "panoptic.json").read_text())
    return [(rgb2id(read_image(folder / "panoptic" / a["file_name"])), a["segments_info"])
            for a in listed["annotations"]], listed["categories"]  # fmt: skip


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_samples_with_classes_have_the_datas_categories(samples, task):
    pairs, categories = segments_in(samples / task)
    assert categories == CATEGORIES and len(pairs) == 2
    for ids, segments in pairs:
        found = {int(id): int((ids == id).sum()) for id in np.unique(ids) if id}
        assert {s["id"]: s["area"] for s in segments} == found
        assert {s["category_id"] for s in segments} <= {7, 9} and segments
        if task == "semantic":  # at most one segment for each class, its id the class's place
            assert all(s["category_id"] == CATEGORIES[s["id"] - 1]["id"] for s in segments)


def test_instance_samples_have_one_category(samples):
    pairs, categories = segments_in(samples / "instance")
    assert [c["id"] for c in categories] == [1]
    assert {s["category_id"] for _, segments in pairs for s in segments} == {1}


def test_panoptic_is_drawn_where_no_task_is_named(runs, samples, tmp_path):
    command = ["--weights", str(runs.ldm), "--data", str(runs.data), "--steps", "2"]
    sample.main([*command, "--out", str(tmp_path), *ON_CPU])
    ours, theirs = (json.loads((folder / "panoptic.json").read_text())
                    for folder in (tmp_path, samples / "panoptic"))  # fmt: skip
    assert ours == theirs


def test_panoptic_samples_score_as_files_what_the_weights_score(runs, samples, tmp_path):
    """The truth is another seed's samples, because two steps of training find nothing else."""
    truth = samples / "other" / "panoptic.json"
    by_files = scores_of(tmp_path, "--gt", truth, "--pred", samples / "panoptic" / "panoptic.json")
    by_weights = scores_of(tmp_path, "--weights", runs.ldm, "--task", "panoptic", "--steps", "2",
                           "--data", truth, "--images", runs.data / "val")  # fmt: skip
    assert {k: by_weights[k] for k in by_files} == by_files
    assert 0 < by_files["miou"] < 1


def test_the_weights_draw_what_sample_wrote(runs, samples, tmp_path):
    result = scores_of(tmp_path, "--weights", runs.ldm, "--task", "panoptic", "--steps", "2",
                       "--data", samples / "panoptic" / "panoptic.json",
                       "--images", runs.data / "val")  # fmt: skip
    assert result["All"]["pq"] == result["miou"] == 1


def test_sampled_depth_is_written_in_16_bits(runs, samples):
    folder, model = samples / "depth", load_model(runs.ldm)
    expected = {f"{name}/val{i}.png" for i in (0, 1) for name in ("depth", "overlay")}
    expected |= {"grid.png", "denoising.png", "noises.png"}
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == expected
    for i, (height, width, _) in enumerate(SCENES["val"]):
        written = Image.open(folder / "depth" / f"val{i}.png")
        assert written.mode == "I;16" and written.size == (width, height)
        written = np.asarray(written).astype(float)
        assert 1 <= written.min() < written.max() <= 65535
        record = {"image": read_image(runs.data / "val" / f"val{i}.png"), "segments": [],
                  "ids": np.zeros((height, width), int)}  # fmt: skip
        image = prepared(record, config=model.config)["image"][None]
        seed = train_ldm.stable_seed(0, 10 + i)
        depth = F.interpolate(model.sample(image, [seed], 2, task="depth"), (height, width),
                              mode="bilinear")[0, 0].clamp(-1, 1)  # fmt: skip
        np.testing.assert_allclose((written - 1) / 65534, (depth + 1) / 2, atol=1e-3)


@pytest.fixture(scope="module")
def scored(runs, tmp_path_factory):
    """The JSON of evaluate.py for all tasks, then for one at a time."""
    command = ["--weights", runs.ldm, "--data", runs.data, "--steps", "2"]
    folder = tmp_path_factory.mktemp("scores")
    return {task: scores_of(folder, *command, *(["--task", task] if task else []))
            for task in (None, "panoptic", *TASKS)}


def test_the_json_of_all_tasks_has_each_ones_scores(scored):
    names = {"All", "Things", "Stuff", "per_class", "miou", "pixel_accuracy", "instance", "depth",
             "steps", "autoencoder"}  # fmt: skip
    assert set(scored[None]) == names
    assert set(scored[None]["depth"]) == {"abs_rel", "rmse", "delta1", "n"}
    assert scored[None]["depth"]["n"] == 2 and set(scored[None]["per_class"]) <= {"7", "9"}


def test_a_task_alone_scores_what_it_does_among_others(scored):
    together = scored[None]
    for name in ("All", "Things", "Stuff", "per_class"):
        assert together[name] == scored["panoptic"][name]
        if name in together["instance"]:
            assert together["instance"][name] == scored["instance"][name]
    for name in ("miou", "pixel_accuracy"):
        assert together[name] == scored["semantic"][name]
    assert together["depth"] == scored["depth"]["depth"]
    assert together["miou"] != scored["panoptic"]["miou"]  # which is not the semantic map's


def test_a_depth_autoencoder_is_scored_by_depth(runs, tmp_path):
    result = scores_of(tmp_path, "--weights", runs.depth, "--data", runs.data)
    assert set(result) == {"depth", "autoencoder"}
    logged = log_of(runs.depth)[-1]
    assert result["depth"] == pytest.approx({k: logged[k] for k in result["depth"]})


# ---- mistakes ----


def test_semantic_needs_codes_for_all_classes(complaint, runs, tmp_path):
    command = tasks_command(runs, tmp_path / "run", "instance", "semantic")
    line = complaint(train_ldm.main, *command, "--data", "shapes")
    assert "11 classes do not fit into 7 ids" in line and "bits=4" in line


def edited(runs, tmp_path, split, edit):
    """A copy of the data, of which `edit` changes the split's JSON."""
    root = shutil.copytree(runs.data, tmp_path / "data")
    path = root / "annotations" / f"panoptic_{split}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return root


def one_category(content):
    content["categories"] = content["categories"][:1]
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["category_id"] = 7


def another_name(content):
    content["categories"][1]["name"] = "floor"


@pytest.mark.parametrize("split, edit, count", [
    ("train", one_category, 1), ("val", another_name, 2)], ids=["one", "another"])
def test_semantic_needs_several_categories_the_same_in_all_data(
        complaint, runs, tmp_path, split, edit, count):
    root = edited(runs, tmp_path, split, edit)
    command = tasks_command(runs, tmp_path / "run", "semantic")
    line = complaint(train_ldm.main, *command, "--data", root)
    assert f"--data {root}: {count} categories, expected several for --tasks semantic, the" in line


@pytest.mark.parametrize("stage", ["ae", "ldm"])
@pytest.mark.parametrize("damage, message", [
    (lambda path: path.unlink(), "train1.png: no such depth map"),
    (lambda path: np.save(path, np.full((48, 33), 4.0)), "train1.png: depth is 4.0 at all of its"),
], ids=["missing", "constant"])  # fmt: skip
def test_depth_that_is_missing_or_constant_is_named(
        complaint, runs, tmp_path, stage, damage, message):
    root = shutil.copytree(runs.data, tmp_path / "data")
    damage(root / "train_depth" / "train1.npy")
    main, command = {
        "ae": (train_ae.main, [*ae_command(root, tmp_path / "run"), "--target", "depth"]),
        "ldm": (train_ldm.main, [*tasks_command(runs, tmp_path / "run", *TASKS), "--data", root]),
    }[stage]
    line = complaint(main, *command)
    assert message in line and not (tmp_path / "run").exists()


def test_data_without_a_folder_of_depth_is_an_error(complaint, runs, data, tmp_path):
    line = complaint(train_ae.main, *ae_command(data, tmp_path / "run"), "--target", "depth")
    assert f"{data}/train_depth: no such folder" in line


@pytest.mark.parametrize("script", [sample, evaluate])
@pytest.mark.parametrize("task", ["depth", "semantic"])
def test_a_task_that_the_weights_do_not_know_lists_theirs(
        complaint, tiny_run, tmp_path, script, task):
    out = ["--out" if script is sample else "--json", tmp_path / "out"]
    line = complaint(script.main, "--weights", tiny_run.ldm, "--task", task, *out, *ON_CPU)
    assert f"--task {task}:" in line and line.endswith("instance")


def test_panoptic_needs_instance_and_semantic(complaint, tiny_run, tmp_path):
    for script in (sample, evaluate):
        flags = ["--weights", tiny_run.ldm, "--task", "panoptic", *ON_CPU]
        line = complaint(script.main, *flags)
        assert "--task" in line and line.endswith("instance")


def test_swapped_autoencoders_are_an_error(complaint, runs, tmp_path):
    command = ["--ae", runs.depth, runs.ae, *tasks_command(runs, tmp_path / "run", *TASKS)[3:]]
    line = complaint(train_ldm.main, *command)
    assert f"--ae {runs.depth}: its target is depth, expected ids" in line


@pytest.mark.parametrize("order", [("ae", "ae"), ("ae", "ldm")])
def test_the_second_autoencoder_is_one_of_depth(complaint, runs, tmp_path, order):
    first, second = (getattr(runs, name) for name in order)
    command = ["--ae", first, second, *tasks_command(runs, tmp_path / "run", *TASKS)[3:]]
    line = complaint(train_ldm.main, *command)
    assert f"--ae {second}: its target is ids, expected depth" in line


def test_a_missing_depth_autoencoder_is_named(complaint, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no runs/ae_depth
    command = ["--ae", runs.ae, *tasks_command(runs, tmp_path / "run", *TASKS)[3:]]
    assert "runs/ae_depth: no weights" in complaint(train_ldm.main, *command)


def test_a_depth_autoencoder_that_no_task_needs_is_an_error(complaint, runs, tmp_path):
    command = ["--ae", runs.ae, runs.depth, *tasks_command(runs, tmp_path / "run", "semantic")[2:]]
    line = complaint(train_ldm.main, *command)
    assert f"--ae {runs.ae} {runs.depth}: expected 1 of them with --tasks semantic" in line


def test_a_task_named_twice_is_an_error(complaint, runs, tmp_path):
    command = tasks_command(runs, tmp_path / "run", "instance", "semantic", "instance")
    assert "expected different ones of" in complaint(train_ldm.main, *command)


@pytest.mark.parametrize("assignment", ["target=depth", "tasks=depth", "categories=[]"])
def test_what_flags_and_data_say_cannot_be_set(complaint, runs, tmp_path, assignment):
    for command in (ae_command(runs.data, tmp_path / "run", assignment),
                    [*tasks_command(runs, tmp_path / "run", *TASKS), assignment]):
        main = train_ldm.main if "--ae" in command else train_ae.main
        assert f"--set {assignment}: expected FIELD=VALUE with" in complaint(main, *command)


def test_resuming_with_other_tasks_names_the_difference(complaint, runs, tmp_path):
    run = shutil.copytree(runs.ldm, tmp_path / "run")
    line = complaint(train_ldm.main, *tasks_command(runs, run, "depth", "semantic", "instance"))
    assert "its run has tasks ('instance', 'semantic', 'depth'), this command" in line


def test_evaluating_on_other_classes_is_an_error(complaint, runs):
    line = complaint(evaluate.main, "--weights", runs.ldm, "--task", "semantic", "--steps", "1",
                     *ON_CPU)  # fmt: skip
    assert "the data has 11 classes" in line and "those of the weights, [(7, 1), (9, 0)]" in line


def test_scenes_have_depth_for_a_run_without_files(tmp_path):
    command = [*ae_command("shapes", tmp_path / "run"), "--target", "depth", "--limit", "2"]
    train_ae.main(command)
    assert log_of(tmp_path / "run")[-1]["n"] == 2 and "depth" in ShapeScenes("val", 32)[0]


def test_several_tasks_that_start_from_a_run_without_any_give_its_output_at_first(tmp_path):
    config = small_config(unet_attention=(1, 1))
    run = random_model(config)
    save_weights(tmp_path / "model.safetensors", run, config, 1)
    tasks = replace(config, tasks=("depth", "instance"), depth_scale=1.0)
    depth = MaskAutoencoder(replace(config, target="depth"))
    model = train_ldm.build_model(tasks, [run.autoencoder, depth], str(tmp_path)).eval()
    z, t = torch.randn(2, 4, 4, 4), torch.tensor([3, 700])
    z_image = model.encode_image(torch.randn(2, 3, 32, 32))
    expected = run.predict(z, z_image, z, t)[0]
    for task in (0, 1):
        output = model.predict(z, z_image, z, t, torch.full((2,), task))[0]
        torch.testing.assert_close(output, expected)
    assert expected.abs().max() > 0.1


def test_a_task_of_another_run_brings_its_embedding(tmp_path):
    config = replace(small_config(), tasks=("semantic", "instance"))
    run = LDMSeg(config)
    save_weights(tmp_path / "model.safetensors", run, config, 1)
    alone = train_ldm.build_model(replace(config, tasks=("instance",)), [run.autoencoder],
                                  str(tmp_path))
    torch.testing.assert_close(alone.task_embedding.weight, run.task_embedding.weight[1:])
