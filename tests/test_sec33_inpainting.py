"""Mask inpainting (Sec. 3.3): Alg. 3, training with given parts, `complete`, inpaint.py, Fig. 9."""

import json
from dataclasses import replace
from unittest.mock import Mock

import inpaint
import ldmseg
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_ldm
from conftest import (
    ConvUNet, areas_of, gaussian, ldm_command, relative_error, run_of, small_config, write_split,
)  # fmt: skip
from ldmseg import (
    LDMSeg, ShapeScenes, TrainingStream, UserError, gaussian_latents, int2bits, keep_blocks,
    match_ids, random_generator, read_image, rgb2id,
)  # fmt: skip
from PIL import Image, ImageDraw

NOISE = [(5, 0), (5, 1), (6, "cat.jpg")]
LARGE = 2**24 - 1
GRID = np.arange(30 * 44).reshape(30, 44)

def cells_of(known):
    """Of which cells any pixel is known, of which all are: bool (1, 1, 4, 4), of (1, 32, 32)."""
    touched, complete = torch.zeros(2, 1, 1, 4, 4, dtype=torch.bool)
    for y, x in np.ndindex(4, 4):
        cell = known[0, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        touched[0, 0, y, x], complete[0, 0, y, x] = cell.any(), cell.all()
    return touched, complete

def encoded(model, ids, known):
    """Scaled latents (B, 4, 4, 4) of the partial mask: what is not known is zero in the bits."""
    return 0.5 * model.autoencoder.encode(int2bits(ids, 3) * known[:, None])

@torch.no_grad()
def alg_3(model, image, ids, known, noise, repeats):
    """Alg. 3 of one image in four steps, each `repeats` times with the next noise (RePaint)."""
    generator = random_generator(noise[0], "noise", noise[1])
    noises = (torch.from_numpy(generator.standard_normal((1, 4, 4, 4), np.float32))
              for _ in range(4 * repeats))  # fmt: skip
    known = known & (ids != 0)
    touched, complete = cells_of(known)
    z_t_masked, z_i = encoded(model, ids, known), model.encode_image(image)
    z_t, x0 = next(noises), torch.zeros(1, 4, 4, 4)
    for j, j_prev in (999, 749), (749, 499), (499, 249), (249, None):
        alpha_bar = model.schedule.alpha_bar[j]
        for repeat in range(repeats):
            if repeat > 0:
                z_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * next(noises)
            eps = model.predict(z_t, z_i, torch.where(touched, z_t_masked, x0), j)[2]
            x0 = (z_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()  # remove_noise
            x0 = torch.where(complete, z_t_masked, x0)  # keep latents
        if j_prev is not None:
            alpha_bar = model.schedule.alpha_bar[j_prev]
            z_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps  # add_noise
    return x0

@pytest.fixture
def model(monkeypatch):
    """LDMSeg around one convolution: a cell depends on its neighbours, the image, x0 and t."""
    monkeypatch.setattr(ldmseg, "build_unet", ConvUNet)
    torch.manual_seed(0)
    return LDMSeg(small_config())

def situation():
    """image (3, 3, 32, 32), ids (3, 32, 32) with VOID, and known: cells from 0 to all known."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 8, (3, 8, 8), generator=generator)
    known = torch.rand(3, 8, 8, generator=generator) < 0.6
    known[:, :2, :4], ids[:, :2, :4], known[:, 2:4, :4] = True, 3, False  # two cells each
    ids, known = (small.repeat_interleave(4, 1).repeat_interleave(4, 2) for small in (ids, known))
    known[:, 7, 15], known[:, 12, 5] = False, True  # one pixel less, one pixel more
    return gaussian(3, 3, 32, 32), ids, known

# ---- Alg. 3 ----

@pytest.mark.parametrize("repeats", [1, 3])
def test_each_image_of_a_batch_is_inpainted_as_alg_3_written_out(model, repeats):
    (image, ids, known), model.decode = situation(), lambda z, **_: torch.cat([z, z], 1)
    assert (known & (ids == 0)).any()
    expected = [alg_3(model, image[[i]], ids[[i]], known[[i]], NOISE[i], repeats) for i in range(3)]
    latents = model.inpaint(image, ids, known, NOISE, 4, repeats)[:, :4]
    assert relative_error(latents, torch.cat(expected)) < 1e-4

def test_samples_of_a_completion_have_noises_of_their_own_and_merge_around_what_is_given(model):
    image, ids, known = situation()
    merged = model.inpaint_samples(image, ids, known, NOISE, 2, samples=3)
    for i, (seed, name) in enumerate(NOISE):
        single = torch.cat([model.inpaint(image[[i]], ids[[i]], known[[i]], [(seed, position)], 2)
                            for position in (name, f"{name} 1", f"{name} 2")])
        expected = ldmseg.merge_samples(single, np.setdiff1d(ids[i][known[i]], 0))
        torch.testing.assert_close(merged[i], expected, rtol=1e-4, atol=1e-4)

def test_where_all_is_known_the_mask_is_encoded_and_decoded(model):
    image, ids, known = situation()
    ids = ids.clamp(min=1)
    logits = model.inpaint(image, ids, torch.ones_like(known), NOISE, 4, 3)
    torch.testing.assert_close(logits, model.autoencoder.reconstruct(ids))

@pytest.mark.parametrize("self_condition, passes", [(0.5, 3), (0.0, 1)])
def test_given_segments_take_the_ids_of_an_estimate_and_the_callers_come_back(
        model, self_condition, passes):
    """A decoder that copies what was pasted: each id's own logit is the highest where given."""
    model.config = replace(model.config, ids="matched", self_condition=self_condition)
    model.id_latents, (image, _, _), inside = gaussian(8, 4), situation(), []
    ids = torch.randint(1, 8, (3, 4, 4), generator=torch.Generator().manual_seed(2))
    model.encode_mask = lambda ids: inside.append(ids) or model.id_latents[
        ids[:, ::8, ::8]].permute(0, 3, 1, 2)
    model.decode = lambda z, **_: F.one_hot(inside[0], 8).permute(0, 3, 1, 2).float()
    ids = ids.repeat_interleave(8, 1).repeat_interleave(8, 2)
    logits = model.inpaint(image, ids, torch.ones_like(ids, dtype=torch.bool), NOISE, 2)
    generators = [random_generator(seed, "noise", position) for seed, position in NOISE]
    eps = gaussian_latents(generators, model.config, "cpu")
    estimate = 0 * eps
    with torch.no_grad():
        for _ in range(passes):
            _, estimate, _ = model.predict(eps, model.encode_image(image), estimate, 999)
    new_ids = match_ids(ids, estimate, model.id_latents)
    assert torch.equal(inside[0], new_ids.gather(1, ids.flatten(1)).view_as(ids))
    assert not torch.equal(inside[0], ids) and torch.equal(logits.argmax(1), ids)

# ---- training with given parts ----

def test_training_feeds_what_is_given_and_a_first_estimate_without_gradient(stub_model):
    calls, (image, ids, known), t = [], situation(), torch.tensor([30, 400, 900])
    weight, eps = torch.ones((), requires_grad=True), gaussian(3, 4, 4, 4, seed=2)
    model = stub_model(lambda inputs, t: calls.append((inputs, weight * inputs[:, :4].sin()))
                       or calls[-1][1], prediction="eps")  # fmt: skip
    for self_condition in (True, False):
        model.diffusion_loss(image, ids, eps, t, self_condition, known)
    (first, first_output), (second, second_output), (alone, _) = calls
    assert not first_output.requires_grad and second_output.requires_grad
    known = known & (ids != 0)
    z_given, touched = encoded(model, ids, known), torch.cat([cells_of(k[None])[0] for k in known])
    estimate = model.schedule.predict_x0(first[:, :4], first_output, t)
    torch.testing.assert_close(first[:, -4:], z_given * touched)
    torch.testing.assert_close(second[:, -4:], torch.where(touched, z_given, estimate))
    assert torch.equal(alone, first)

def test_stage_2_learns_from_what_is_given(monkeypatch, data, tiny_run, tmp_path):
    seen, loss = [], LDMSeg.diffusion_loss
    monkeypatch.setattr(LDMSeg, "forward", lambda model, **inputs: (
        seen.append(inputs["known"]) or loss(model, **inputs)))
    train_ldm.main(ldm_command(data, tiny_run.ae, tmp_path / "run", "given_share=1"))
    assert len(seen) == 2 and all(k.dtype == torch.bool and k.any() for k in seen)

def test_blocks_are_given_in_a_share_of_the_samples():
    scenes = [ShapeScenes("train", 32)]
    stream = TrainingStream(scenes, small_config(given_share=0.4), seed=0)
    known = [stream[position]["known"] for position in range(400)]
    assert 0.3 < np.mean([k.any().item() for k in known]) < 0.45  # all blocks may be dropped
    assert len({k.float().mean().item() for k in known}) > 20
    assert "known" not in TrainingStream(scenes, small_config(), seed=0)[0]

@pytest.mark.parametrize("block, rate", [(8, 0.1), (5, 0.5), (8, 0.9)])
def test_whole_blocks_are_dropped_at_their_rate(block, rate):
    generator, shares = np.random.default_rng(3), []
    for _ in range(40):
        known = keep_blocks(np.ones((64, 64), int), generator, block, rate)
        corners = known[::block, ::block]
        shares.append(1 - corners.mean())
        y, x = np.indices((64, 64)) // block
        assert np.array_equal(known, corners[y, x])
    assert abs(np.mean(shares) - rate) < 0.035  # 2560 blocks or more: a deviation of 0.01

def test_strokes_touch_every_segment_and_nothing_else():
    ids = np.random.default_rng(0).integers(0, 7, (8, 8)).repeat(4, 0).repeat(4, 1)
    ids[13, 17] = 9  # a segment of one pixel
    known = inpaint.keep_strokes(ids, np.random.default_rng(4))
    assert known.shape == (32, 32) and set(ids[known]) == set(ids.ravel()) - {0}

def test_a_stroke_is_a_straight_line_without_a_gap():
    for seed in range(20):
        known = inpaint.keep_strokes(np.ones((64, 64), int), np.random.default_rng(seed), count=1)
        y, x = np.nonzero(known)
        points = np.stack([y, x], 1) - [y.mean(), x.mean()]
        assert np.abs(points @ np.linalg.svd(points)[2][1]).max() < 1.1
        assert len(y) > max(np.ptp(y), np.ptp(x))

# ---- a person's image and mask ----

def photo(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)

def logits_of(ids):
    """Logits (B, 8, 16, 16) that are drawn as ids (B, 32, 32), whose edges are at even pixels."""
    return 20 * F.one_hot(ids[:, ::2, ::2], 8).permute(0, 3, 1, 2).float()

def paint(model, function):
    """Let the model inpaint function(ids); its `inpaint` is then a Mock."""
    model.inpaint = Mock(side_effect=lambda image, ids, *_: logits_of(function(ids)))

@pytest.mark.parametrize("scale", [1, 1 / 3, 2])
def test_given_pixels_come_back_unchanged_from_a_mask_of_any_size(model, scale):
    small = np.random.default_rng(2).choice([0, 0, 0, 1, 7, 65536, LARGE - 1, LARGE], (5, 8))
    given, mask = (small.repeat(n, 0).repeat(n, 1) for n in (6, int(6 * scale)))
    completed, segments = model.complete(photo(30, 48), mask, steps=2)
    assert (completed == given)[given > 0].all() and (completed[given == 0] > 0).mean() > 0.5
    assert {s["id"]: s["area"] for s in segments} == areas_of(completed)

@pytest.mark.parametrize("image_side", [640, 64])
def test_a_thin_stroke_reaches_the_model(model, image_side):
    given = np.zeros((640, 640), int)
    given[32:608, 301] = 8  # in no column that nearest neighbours at 32 pixels would come from
    paint(model, torch.ones_like)
    model.complete(photo(image_side, image_side), given)
    ids, known = (mask[0] for mask in model.inpaint.call_args.args[1:3])
    assert known.nonzero()[:, 1].unique().tolist() == [15]  # 301 / 20
    assert known[2:30].any(1).all() and torch.equal(known, ids > 0)

def test_new_segments_get_ids_that_were_not_given(model):
    codes, given = torch.arange(8).repeat_interleave(4)[:, None], np.zeros((32, 32), int)
    paint(model, lambda ids: codes.expand_as(ids))
    given[:3, 0] = 1, 2, 4
    stripes = model.complete(photo(32, 32), given)[0][::4, 8]  # the id of each code
    assert stripes[model.inpaint.call_args.args[1][0, :3, 0]].tolist() == [1, 2, 4]
    assert stripes[0] == 0 and len(set(stripes)) == 8

def test_the_confidence_is_the_highest_probability(model):
    share = torch.tensor([1, 5, 2, 2, 2, 2, 1, 1]) / 16
    model.inpaint = lambda *_: share.log().view(1, 8, 1, 1).expand(1, 8, 16, 16)
    confidence = model.complete(photo(20, 20), np.full((4, 4), 9), return_confidence=True)[2]
    np.testing.assert_allclose(confidence, np.full((20, 20), 5 / 16), rtol=1e-5)

@pytest.mark.parametrize("mask", [
    GRID % 1, GRID % 9, GRID % 3 * 1.5, -(GRID % 3), GRID % 3 * 2**24, GRID[:, :40] % 3, GRID[0]])
def test_a_mask_that_cannot_be_completed_is_the_users_error(model, mask):
    count = len(np.unique(mask[mask != 0]))
    with pytest.raises(UserError, match=f"mask: .* {count} given segments, expected ints.* 1 to 7"):
        model.complete(photo(30, 44), mask, steps=1)

# ---- inpaint.py --image ----

def save_mask(path, ids, kind):
    """Write ids (H, W) as an .npy or as one kind of PNG; returns the path."""
    if kind == "npy":
        np.save(path.with_suffix(".npy"), ids)
        return path.with_suffix(".npy")
    channels = [ids % 256, ids // 256 % 256, ids // 65536]
    values = np.stack(channels, -1) if kind == "rgb" else ids
    image = Image.fromarray(values.astype(np.uint16 if kind == "16 bit" else np.uint8))
    if kind == "palette":
        image = image.convert("P")
        image.putpalette([*reversed(range(256))] * 3)
    image.save(path.with_suffix(".png"))
    return path.with_suffix(".png")

@pytest.mark.parametrize("kind, ids", [
    ("rgb", [0, 255, 256, LARGE]), ("npy", [0, 2, LARGE]), ("16 bit", [0, 300, 65535]),
    ("8 bit", [0, 7, 255]), ("palette", [0, 3, 255])])
def test_each_kind_of_mask_is_read(tmp_path, kind, ids):
    ids = np.random.default_rng(2).choice(ids, (5, 8)).repeat(3, 0).repeat(3, 1)
    assert np.array_equal(inpaint.read_mask(save_mask(tmp_path / "mask", ids, kind)), ids)

HALF = np.repeat([[0, 1]], 30, 0).repeat(22, 1)

@pytest.mark.parametrize("values, kind, message", [
    (photo(60, 88) @ [1, 256, 65536], "rgb", "is it a picture?"),
    (HALF / 2, "npy", "expected 0 .unknown. and ids"), (HALF[0], "npy", r"\(44,\), 2 values"),
    (np.array([["a", "b"]]), "npy", "not a readable mask")])
def test_a_bad_mask_is_named(tmp_path, values, kind, message):
    mask = save_mask(tmp_path / "mask", values, kind)
    with pytest.raises(UserError, match=f"^{mask}: .*{message}"):
        inpaint.read_mask(mask)

def test_variations_are_written_listed_and_differ(tiny_run, tmp_path):
    given, out = np.zeros((40, 40), int), tmp_path / "out"
    given[:, 10:20] = 600
    image, mask = tmp_path / "photo.jpg", save_mask(tmp_path / "mask", given, "npy")
    Image.fromarray(photo(40, 40)).save(image)
    inpaint.main(run_of(tiny_run, out, "--image", image, "--mask", mask, "--variations", 3))
    names = [f"photo_{k}.png" for k in (1, 2, 3)]
    files = {f"{folder}/{name}" for name in names for folder in ("panoptic", "overlay")}
    files |= {"panoptic.json", "picture.png"}
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == files
    listed = json.loads((out / "panoptic.json").read_text())["annotations"]
    masks = [rgb2id(read_image(out / "panoptic" / name)) for name in names]
    assert [a["file_name"] for a in listed] == names
    for ids, annotation in zip(masks, listed):
        assert {s["id"] for s in annotation["segments_info"]} == set(np.unique(ids)) - {0}
        assert (ids[:, 10:20] == 600).all()
    assert (masks[0] != masks[1]).mean() > 0.05 and (masks[1] != masks[2]).mean() > 0.05

@pytest.mark.parametrize("fill", [5, 130, (200, 30, 90)])
def test_an_antialiased_mask_is_refused_and_the_same_without_is_read(tmp_path, fill):
    mode = "L" if isinstance(fill, int) else "RGB"
    large = Image.new(mode, (160, 160))
    ImageDraw.Draw(large).ellipse((20, 30, 130, 140), fill)
    ImageDraw.Draw(large).line((0, 0, 159, 20), fill, width=5)
    large.resize((40, 40), Image.NEAREST).save(tmp_path / "sharp.png")
    large.resize((40, 40), Image.BICUBIC).save(tmp_path / "soft.png")
    assert len(np.unique(inpaint.read_mask(tmp_path / "sharp.png"))) == 2
    with pytest.raises(UserError, match="soft.png: .*antialiased"):
        inpaint.read_mask(tmp_path / "soft.png")

def test_a_transparent_pixel_is_unknown_and_a_jpeg_is_no_mask(tmp_path):
    ids = np.zeros((12, 12), np.uint8)
    ids[2:6, 2:6], ids[7:11, 3:9] = 5, 9
    Image.fromarray(np.dstack([ids, np.where(ids == 9, 0, 255).astype(np.uint8)]), "LA").save(
        tmp_path / "a.png")
    assert np.array_equal(inpaint.read_mask(tmp_path / "a.png"), np.where(ids == 9, 0, ids))
    Image.fromarray(ids).save(tmp_path / "a.jpg", quality=100)
    with pytest.raises(UserError, match="a.jpg: JPEG changes ids"):
        inpaint.read_mask(tmp_path / "a.jpg")

@pytest.mark.parametrize("width, out, message", [
    (44, ".", "--out {1}: results would replace inputs in {1}/panoptic"),
    (46, "out", "{0}: int64 (30, 44), 1 given segments, expected ints in the aspect of the image "
                "of (30, 46)")])
def test_a_mask_that_a_result_would_replace_or_of_another_aspect_is_named(
        complaint, tiny_run, tmp_path, width, out, message):
    (tmp_path / "panoptic").mkdir()
    mask, image = save_mask(tmp_path / "panoptic/a", HALF, "8 bit"), tmp_path / "panoptic/b.jpg"
    Image.fromarray(photo(30, width)).save(image)
    before = mask.read_bytes()
    line = complaint(inpaint.main, *run_of(
        tiny_run, tmp_path / out, "--image", image, "--mask", mask))
    assert line.startswith(message.format(mask, tmp_path)) and mask.read_bytes() == before

# ---- inpaint.py --data: the sparsity experiment (Fig. 9) ----

# The nearest known column of 6..12 is 5, of 13..19 it is 20. So the left half, columns 0..15, is
# drawn as 0..12, the right one as 13..31; of the dropped columns 7 of 10 and 4 of 4 are right.
RIGHT = {"pq": 1, "dropped": 1, "ids": 1}
NEAREST = {"pq": (13 / 16 + 16 / 19) / 2, "dropped": (7 / 10 + 4 / 7) / 2, "ids": 11 / 14}
TABLE = [  # block, drop rate, and the nearest label's scores
    (8, 0.5, NEAREST), (8, 0.25, RIGHT), ("strokes", "", NEAREST),
    (8, "mean", {name: (score + 1) / 2 for name, score in NEAREST.items()})]

def test_the_table_of_two_halves_is_the_one_on_paper(tmp_path, tiny_run, monkeypatch):
    """Columns 6 to 19 are dropped, at another rate than 0.5 all the others. With a mask the model
    draws the truth, without one the truth under other ids."""
    halves = [(5, 9, 0, (0, 32), (0, 16)), (600, 7, 0, (0, 32), (16, 32))]
    write_split(tmp_path, "val", [(32, 32, halves)])
    known = np.repeat([True, False, True], [6, 14, 12])[None].repeat(32, 0)

    for name in ("keep_blocks", "keep_strokes"):
        monkeypatch.setattr(inpaint, name, lambda ids, generator, block=8, rate=0.5: (
            known if rate == 0.5 else ~known))
    monkeypatch.setattr(LDMSeg, "inpaint", lambda model, image, ids, known, *_: (
        logits_of(ids if known.any() else ids % 7 + 1)))
    inpaint.main(run_of(tiny_run, tmp_path / "out", "--data", tmp_path, "--strokes",
                        "--block", 8, "--drop-rate", 0.5, 0.25))  # fmt: skip
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [(row["block"], row["drop_rate"]) for row in rows] == [row[:2] for row in TABLE]
    for row, (_, _, nearest) in zip(rows, TABLE):
        assert row["completion"] == RIGHT and row["without the mask"] == RIGHT | {"ids": 0}
        assert row["nearest label"] == pytest.approx(nearest)
    assert (tmp_path / "out" / "picture.png").exists()

def test_ids_count_the_dropped_pixels_of_partly_given_segments():
    truth = {"ids": np.array([5, 600]).repeat(16)[None].repeat(32, 0),
             "segments": [{"id": 5, "category_id": 9}, {"id": 600, "category_id": 7}]}
    ids, known = np.where(truth["ids"] == 5, 3, 6), np.zeros((32, 32), bool)
    known[:24, :16] = True  # of the left half; nothing of the right one
    drawn = np.where(ids == 6, 2, ids)
    drawn[:26] = 1
    scores = inpaint.Scores(8)
    scores.add(truth, drawn, ids, known)
    assert scores.result("cpu")["ids"] == 6 / 8

def test_nearest_label_equals_a_search_over_all_pixels():
    rng = np.random.default_rng(0)
    ids, known = rng.integers(0, 6, (9, 7)), rng.random((9, 7)) < 0.2
    filled = inpaint.nearest_label(ids, known)
    places = np.argwhere(known & (ids > 0))
    for y, x in np.ndindex(9, 7):
        distance = ((places - [y, x]) ** 2).sum(1)
        assert filled[y, x] in ids[tuple(places[distance == distance.min()].T)]
    assert not inpaint.nearest_label(ids, np.zeros((9, 7), bool)).any()
