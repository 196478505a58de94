"""Inpainting: Alg. 3, training with given parts, and inpaint.py from its command line."""

import json
from types import SimpleNamespace

import inpaint
import ldmseg
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_ldm
from conftest import ldm_command, relative_error, small_config, write_split
from ldmseg import (
    MaskAutoencoder, continue_given, int2bits, keep_blocks, keep_some, keep_strokes, load_model,
    read_image, rgb2id, save_weights, seeded_noise,
)  # fmt: skip
from PIL import Image

ON_CPU = ["--device", "cpu", "--workers", "0"]
SEEDS = [5, 6, 7]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def enlarge(small, times):
    """Each entry of (B, H, W) becomes a square of `times` pixels."""
    return small.repeat_interleave(times, 1).repeat_interleave(times, 2)


@pytest.fixture
def conv_model(stub_model):
    """A function (Config fields) -> LDMSeg whose UNet is one fixed convolution, so that a cell
    depends on its neighbours, the image, the previous x0 and t."""
    kernel = gaussian(4, 24, 3, 3, seed=3) / 8

    def unet(inputs, t):
        return F.conv2d(inputs, kernel, padding=1).tanh() + t.view(-1, 1, 1, 1) / 1000

    return lambda **changes: stub_model(unet, **changes)


def situation(batch=3):
    """image (B, 3, 32, 32), ids (B, 32, 32) with VOID, and known: cells from 0 to all known."""
    generator = torch.Generator().manual_seed(1)
    ids = enlarge(torch.randint(0, 8, (batch, 8, 8), generator=generator), 4)
    known = torch.rand(batch, 8, 8, generator=generator) < 0.6
    known[:, :2, :4], ids[:, :8, :16] = True, 3  # the first two cells are wholly known
    known[:, 2:4, :4] = False  # the two below not at all
    return gaussian(batch, 3, 32, 32), ids, enlarge(known, 4)


def share_of_cells(mask):
    """The share of a cell's pixels that are true: bool (B, 32, 32) -> (B, 1, 4, 4)."""
    return mask.view(-1, 4, 8, 4, 8).float().mean((2, 4))[:, None]


def encoded(model, ids, known):
    """Scaled latents of the partial mask: what is not known is zero in the bits."""
    return 0.5 * model.autoencoder.encode(int2bits(ids, 3) * known[:, None])


# ---- Alg. 3 ----


@pytest.mark.parametrize("prediction", ["eps", "v"])
@torch.no_grad()
def test_the_latents_equal_alg_3_written_out(conv_model, prediction):
    model, (image, ids, known) = conv_model(prediction=prediction), situation()
    z_given, z_image = encoded(model, ids, known), model.encode_image(image)
    share = share_of_cells(known & (ids > 0))
    assert {0, 0.25, 1} < set(share.flatten().tolist())
    z_t, x0 = seeded_noise(SEEDS, model.config, "cpu"), torch.zeros(3, 4, 4, 4)
    for j, j_prev in (999, 749), (749, 499), (499, 249), (249, None):
        hint = torch.where(share > 0, z_given, x0)
        eps = model.predict(z_t, z_image, hint, torch.full((3,), j))[2]
        alpha_bar = model.schedule.alpha_bar[j]
        x0 = (z_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()  # remove_noise
        x0 = torch.where(share == 1, z_given, x0)  # keep latents
        if j_prev is not None:
            alpha_bar = model.schedule.alpha_bar[j_prev]
            z_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps  # add_noise
    latents = model.inpaint(image, ids, known, SEEDS, 4)[1]
    assert relative_error(latents, x0) < 1e-4


@pytest.mark.parametrize("how", ["None", "no pixel", "void pixels"])
def test_where_nothing_is_known_inpainting_is_sampling(conv_model, how):
    model, (image, ids, known) = conv_model(), situation()
    ids, known = {"None": (ids, None), "no pixel": (ids, torch.zeros_like(known)),
                  "void pixels": (torch.zeros_like(ids), known)}[how]
    logits, _ = model.inpaint(image, ids, known, SEEDS, 4)
    assert torch.equal(logits, model.sample(image, SEEDS, 4))


@pytest.mark.parametrize("repeats", [1, 3])
def test_where_all_is_known_the_latents_are_the_encoded_mask(conv_model, repeats):
    model, (image, ids, _) = conv_model(), situation()
    ids = ids.clamp(min=1)
    known = torch.ones_like(ids, dtype=torch.bool)
    logits, latents = model.inpaint(image, ids, known, SEEDS, 4, repeats=repeats)
    torch.testing.assert_close(latents, 0.5 * model.autoencoder.encode(int2bits(ids, 3)))
    torch.testing.assert_close(logits, model.autoencoder.reconstruct(ids))


@pytest.mark.parametrize("known_share", [1, 0.5])
def test_cells_known_enough_keep_the_latents_of_the_partial_mask(conv_model, known_share):
    model, (image, ids, known) = conv_model(), situation()
    latents = model.inpaint(image, ids, known, SEEDS, 4, known_share, repeats=2)[1]
    kept = (latents - encoded(model, ids, known)).abs().amax(1, keepdim=True) < 1e-5
    share = share_of_cells(known & (ids > 0))
    assert torch.equal(kept, share >= known_share)
    assert kept.any() and not kept.all()
    exact = model.encode_mask(ids * known)  # the same convolutions, in the same order
    assert (latents - exact).abs()[kept.expand_as(latents)].max() <= 1e-6


def test_void_is_unknown(conv_model):
    model, (image, ids, known) = conv_model(), situation()
    latents = model.inpaint(image, ids, known, SEEDS, 4)[1]
    assert (known & (ids == 0)).any()
    without = model.inpaint(image, ids, known & (ids != 0), SEEDS, 4)[1]
    assert torch.equal(latents, without)


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_completion_depends_on_its_own_image_mask_and_seed_only(conv_model, repeats):
    model, (image, ids, known) = conv_model(), situation()

    def latents(order):
        seeds = [SEEDS[i] for i in order]
        return model.inpaint(image[order], ids[order], known[order], seeds, 4, 1.0, repeats)[1]

    together = latents([0, 1, 2])
    torch.testing.assert_close(latents([2, 1, 0]).flip(0), together, rtol=0, atol=1e-5)
    torch.testing.assert_close(latents([1]), together[1:2], rtol=0, atol=1e-5)
    other = model.inpaint(image, ids, known, [8, 9, 10], 4, 1.0, repeats)[1]
    assert relative_error(other, together) > 0.01


def test_a_further_pass_draws_fresh_noise_around_the_pasted_x0(stub_model):
    calls = []
    model = stub_model(lambda inputs, t: calls.append((inputs, t)) or inputs[:, :4].tanh())
    image, ids, known = situation()
    ids, known = ids.clamp(min=1), enlarge(known[:, ::8, ::8], 8)  # cells wholly known, or not
    model.inpaint(image, ids, known, SEEDS, 2, repeats=3)
    assert [t.unique().tolist() for _, t in calls] == 3 * [[999]] + 3 * [[499]]
    noises = []
    for inputs, t in (calls[i] for i in (1, 2, 4, 5)):
        z_t, x0 = inputs[:, :4], inputs[:, -4:]  # the pasted x0 of the pass before
        pasted = torch.where(share_of_cells(known) == 1, encoded(model, ids, known), x0)
        torch.testing.assert_close(x0, pasted)
        signal, noise = model.schedule.signal_and_noise(t)
        noises.append((z_t - signal * x0) / noise)
        assert abs(noises[-1].mean()) < 0.3 and 0.8 < noises[-1].std() < 1.2
    correlation = torch.corrcoef(torch.stack([calls[0][0][:, :4], *noises]).flatten(1))
    assert (correlation - torch.eye(5)).abs().max() < 0.3


# ---- training with given parts (Sec. 3.3) ----


def loss_inputs():
    """image, ids, eps and t of diffusion_loss, and known."""
    image, ids, known = situation()
    eps, t = gaussian(3, 4, 4, 4, seed=2), torch.tensor([30, 400, 900])
    return image, ids, eps, t, known


@pytest.mark.parametrize("self_condition", [False, True])
def test_the_loss_with_nothing_given_is_the_loss_without_a_mask(conv_model, self_condition):
    model = conv_model()
    *inputs, known = loss_inputs()
    loss = model.diffusion_loss(*inputs, self_condition, torch.zeros_like(known))
    assert loss == model.diffusion_loss(*inputs, self_condition)
    assert loss != model.diffusion_loss(*inputs, self_condition, known)


def test_training_hints_at_the_given_cells_in_both_passes(stub_model):
    calls = []
    model = stub_model(lambda inputs, t: calls.append(inputs) or inputs[:, :4].sin(),
                       prediction="eps")
    *inputs, known = loss_inputs()
    image, ids, eps, t = inputs
    model.diffusion_loss(*inputs, True, known)
    z_given, partly = encoded(model, ids, known), share_of_cells(known & (ids > 0)) > 0
    first, second = calls
    estimate = model.schedule.predict_x0(first[:, :4], first[:, :4].sin(), t)
    assert partly.any() and not partly.all()
    torch.testing.assert_close(first[:, -4:], z_given * partly)
    torch.testing.assert_close(second[:, -4:], torch.where(partly, z_given, estimate))


@pytest.mark.parametrize("given", [False, True])
def test_the_unet_learns_to_read_the_hint_where_parts_are_given(stub_model, given):
    kernel = (gaussian(4, 24, 1, 1) / 8).requires_grad_()
    model = stub_model(lambda inputs, t: F.conv2d(inputs, kernel))
    *inputs, known = loss_inputs()
    model.diffusion_loss(*inputs, False, known if given else None).backward()
    assert kernel.grad[:, :-4].abs().min() > 0
    assert (kernel.grad[:, -4:].abs().max() > 1e-4) == given


@pytest.mark.parametrize("given", [0, 1])
def test_stage_2_gives_parts_of_the_mask_to_the_share_asked_for(
        monkeypatch, data, tiny_run, tmp_path, given):
    seen = []

    def loss(model, image, ids, eps, t, self_condition, known=None):
        seen.append(known)
        return model.diffusion_loss(image, ids, eps, t, self_condition, known)

    monkeypatch.setattr(ldmseg.LDMSeg, "forward", loss)
    command = ldm_command(data, tiny_run.ae, tmp_path / "run", f"given={given}")
    train_ldm.main([*command, "--steps", "1"])
    if given:
        assert seen[0].dtype == torch.bool and seen[0].flatten(1).any(1).sum() >= 2  # of 4
    else:
        assert seen == [None]


# ---- what is dropped ----


@pytest.mark.parametrize("block", [8, 5])
def test_blocks_are_known_or_dropped_as_a_whole(block):
    known = keep_blocks(np.ones((64, 64), int), 3, block, 0.5)
    assert known.shape == (64, 64) and known.dtype == bool
    for y in range(0, 64, block):
        for x in range(0, 64, block):
            assert np.unique(known[y:y + block, x:x + block]).size == 1
    cells = known[::block, ::block]
    assert (cells[1:] != cells[:-1]).any() and (cells[:, 1:] != cells[:, :-1]).any()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_blocks_are_dropped_at_their_rate(rate):
    dropped = [1 - keep_blocks(np.ones((64, 64), int), seed, 8, rate).mean() for seed in range(80)]
    assert abs(np.mean(dropped) - rate) < 0.025  # 5120 blocks: a deviation of 0.007
    assert len(set(dropped)) > 4


def test_strokes_touch_every_segment():
    ids = np.random.default_rng(0).integers(0, 7, (8, 8)).repeat(4, 0).repeat(4, 1)
    ids[13, 17] = 9  # a segment of one pixel
    known = keep_strokes(ids, 4)
    assert known.shape == (32, 32) and known.dtype == bool
    assert set(ids[known].tolist()) == set(ids.ravel().tolist()) - {0}


def test_strokes_lift_where_they_leave_their_segment():
    ids = np.ones((32, 32), int)
    ids[4:28, 4:28] = 0  # a ring, whose strokes mostly cross the hole
    known = np.stack([keep_strokes(ids, seed) for seed in range(20)])
    assert known.any((1, 2)).all() and not known[:, ids == 0].any()


def test_a_stroke_is_a_straight_line_of_one_pixel():
    for seed in range(20):
        y, x = np.nonzero(keep_strokes(np.ones((64, 64), int), seed, count=1))
        assert len(y) > max(np.ptp(y), np.ptp(x))  # no gap
        points = np.stack([y, x], 1) - [y.mean(), x.mean()]
        normal = np.linalg.svd(points)[2][1]
        assert np.abs(points @ normal).max() < 1.1


@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_training_gives_something_to_a_share_of_the_samples(share):
    ids = np.arange(1, 5).repeat(16)[:, None].repeat(64, 1)
    known = [keep_some(ids, seed, share) for seed in range(500)]
    assert all(k.shape == ids.shape and k.dtype == bool for k in known)
    given = np.mean([k.any() for k in known])  # of large blocks at a high rate, none may be left
    assert given == 0 if share == 0 else 0.9 * share - 0.05 < given < share + 0.05


# ---- inpaint.py --image ----


@pytest.fixture
def picture(tmp_path):
    """A function (height, width) -> path of an image of noise."""
    def write(height, width):
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "photo.png")
        return tmp_path / "photo.png"

    return write


def save_mask(path, ids, kind="npy"):
    """Write ids (H, W) as an .npy or as one kind of PNG; returns the path."""
    path = path.with_suffix(".npy" if kind == "npy" else ".png")
    if kind == "npy":
        np.save(path, ids)
    elif kind == "rgb":
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        Image.fromarray(colours).save(path)
    elif kind == "palette":
        image = Image.fromarray(ids.astype(np.uint8)).convert("P")
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768).tolist())
        image.save(path)
    else:
        Image.fromarray(ids.astype({"8 bit": np.uint8, "16 bit": np.uint16}[kind])).save(path)
    return path


def command_of(run, out, *more):
    return [str(a) for a in ("--weights", run, "--out", out, "--steps", 2, *ON_CPU, *more)]


@pytest.fixture
def complete(tmp_path, tiny_run, picture):
    """A function (mask, its kind, image size, flags, name) -> completed ids of inpaint.py."""
    def run(ids, kind="npy", size=None, flags=(), name="photo"):
        mask, image = save_mask(tmp_path / "mask", ids, kind), picture(*(size or ids.shape))
        inpaint.main(command_of(tiny_run.ldm, tmp_path / "out", "--image", image, "--mask", mask,
                                *flags))
        return rgb2id(read_image(tmp_path / "out" / "panoptic" / f"{name}.png"))

    return run


def one_hot(ids):
    """Logits (B, 8, 16, 16) that are drawn as ids (B, 32, 32), whose edges are at even pixels."""
    return 20 * F.one_hot(ids[:, ::2, ::2], 8).permute(0, 3, 1, 2).float()


@pytest.fixture
def oracle(monkeypatch):
    """A function (function) -> calls; LDMSeg.inpaint then draws function(ids, known)."""
    def install(function):
        calls = []

        def draw(model, image, ids, known, *options):
            calls.append(SimpleNamespace(ids=ids, known=known))
            return one_hot(function(ids, known)), None

        monkeypatch.setattr(ldmseg.LDMSeg, "inpaint", draw)
        return calls

    return install


LARGE = 2**24 - 1


@pytest.mark.parametrize("kind, ids", [
    ("rgb", [1, 255, 256, 70000, LARGE]), ("npy", [2, 65536, LARGE - 1, LARGE]),
    ("16 bit", [1, 300, 65535]), ("8 bit", [1, 7, 200, 255]), ("palette", [3, 100, 255]),
])  # fmt: skip
def test_given_pixels_come_back_unchanged(complete, kind, ids):
    blocks = np.random.default_rng(2).choice([0, 0, 0, 0, *ids], (5, 8))
    blocks[0, : len(ids)] = ids
    given = blocks.repeat(6, 0).repeat(5, 1)  # (30, 40)
    completed = complete(given, kind)
    assert (completed == given)[given > 0].all()
    assert set(np.unique(given)) - {0} == set(ids) and (completed[given == 0] > 0).mean() > 0.5


@pytest.mark.parametrize("times", [0.5, 2, 3])
def test_a_mask_of_another_size_is_scaled_to_its_image(complete, times):
    small = np.zeros((10, 14), int)
    small[1:7, 2:3], small[4:9, 8:] = 9, 70000
    at_image = small.repeat(6, 0).repeat(6, 1)  # (60, 84)
    side = int(6 / times)
    completed = complete(small.repeat(side, 0).repeat(side, 1), "rgb", at_image.shape)
    assert (completed == at_image)[at_image > 0].all()
    assert (completed == 9).sum() < at_image.size / 2


def test_a_thin_stroke_in_a_large_image_reaches_the_model(complete, oracle):
    calls = oracle(lambda ids, known: torch.ones_like(ids))
    given = np.zeros((320, 400), int)
    given[40:300, 203], given[160, :150] = 8, 4
    completed = complete(given)
    assert (completed == given)[given > 0].all()
    ids, known = calls[0].ids[0], calls[0].known[0]
    assert ids[4:30].gt(0).any(1).all() and ids[:, :12].gt(0).any(0).all()  # rows, columns
    assert len(ids.unique()) == 3 and torch.equal(known, ids > 0) and known.float().mean() < 0.06


def test_a_thin_stroke_in_a_mask_larger_than_its_image_reaches_the_model(complete, oracle):
    calls = oracle(lambda ids, known: torch.ones_like(ids))
    given = np.zeros((640, 640), int)
    given[32:608, 301] = 8  # not in any column that the nearest neighbours at 64 pixels come from
    complete(given, size=(64, 64))
    assert calls[0].known[0, 2:30].any(1).all()


def regions(rows):
    return np.array([[int(letter) for letter in row] for row in rows])


def test_a_new_region_takes_the_id_that_most_of_its_given_neighbours_have():
    drawn = regions(["1133", "1133", "1155", "1155"])
    ids, known = regions(["1122"] + 3 * ["1100"]), regions(["1111"] + 3 * ["1100"]) > 0
    # 3 borders on two pixels of 2 and one of 1; 5 on two pixels of 1
    completed = continue_given(drawn, ids, known)
    assert completed.tolist() == regions(["1133", "1122", "1111", "1111"]).tolist()


def test_a_region_that_borders_on_its_own_id_or_on_nothing_given_stays():
    drawn = regions(["1222", "1222", "0000", "4040"])
    ids, known = regions(["1112"] + 3 * ["0000"]), regions(["1111", "0000", "0000", "1000"]) > 0
    # 2 borders on three pixels of 1 and on one of 2; of row 3, a VOID pixel is "known"
    assert (continue_given(drawn, ids, known) == drawn).all()


def test_each_part_of_a_region_is_continued_on_its_own():
    drawn, ids = regions(["33033"]), regions(["10002"])
    assert continue_given(drawn, ids, ids > 0).tolist() == [[3, 1, 0, 2, 3]]


def test_what_continues_a_given_segment_has_its_id(complete, oracle):
    oracle(lambda ids, known: ids[:, :, :1].expand_as(ids))
    whole = np.array([300, 5, LARGE, 65536]).repeat(8)[:, None].repeat(32, 1)
    given = whole.copy()
    given[:, 8:] = 0
    assert (complete(given) == whole).all()


def test_new_segments_get_ids_that_were_not_given(complete, oracle):
    calls = oracle(lambda ids, known: torch.arange(8).repeat_interleave(4)[:, None].expand_as(ids))
    given = np.zeros((32, 32), int)
    given[:3, 0] = 1, 2, 4
    stripes = complete(given)[::4, 8]  # the id of each code
    assert stripes[calls[0].ids[0, :3, 0]].tolist() == [1, 2, 4]
    assert stripes[0] == 0 and len(set(stripes.tolist())) == 8


def test_a_completion_never_replaces_the_mask_it_came_from(complaint, tiny_run, tmp_path, picture):
    mask = tmp_path / "out" / "panoptic" / "photo.png"
    mask.parent.mkdir(parents=True)
    given = np.zeros((32, 32), int)
    given[:9] = 5
    mask = save_mask(tmp_path / "out" / "panoptic" / "photo", given, "8 bit").rename(mask)
    before = mask.read_bytes()
    command = command_of(tiny_run.ldm, tmp_path / "out", "--image", picture(32, 32), "--mask", mask)
    assert "would overwrite" in complaint(inpaint.main, *command)
    assert mask.read_bytes() == before


def test_one_given_segment_is_enough(complete):
    given = np.zeros((32, 32), int)
    given[:, :4] = 70000
    assert (complete(given)[:, :4] == 70000).all()


def test_variations_are_written_listed_and_differ(complete, tmp_path):
    given = np.zeros((40, 40), int)
    given[:, :10] = 6
    complete(given, flags=["--variations", "3"], name="photo_1")
    out = tmp_path / "out"
    files = {f"{folder}/photo_{k}.png" for k in (1, 2, 3) for folder in ("panoptic", "overlay")}
    files |= {"panoptic.json", "picture.png"}
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == files
    result = json.loads((out / "panoptic.json").read_text())
    names = [a["file_name"] for a in result["annotations"]]
    assert names == ["photo_1.png", "photo_2.png", "photo_3.png"]
    assert [i["id"] for i in result["images"]] == [a["image_id"] for a in result["annotations"]]
    masks = [rgb2id(read_image(out / "panoptic" / name)) for name in names]
    for mask, annotation in zip(masks, result["annotations"]):
        assert {s["id"] for s in annotation["segments_info"]} == set(np.unique(mask)) - {0}
        assert (mask[:, :10] == 6).all()
    assert (masks[0] != masks[1]).mean() > 0.05 and (masks[1] != masks[2]).mean() > 0.05


def test_same_segment_is_the_same_id_or_a_match():
    first = np.array([[1, 1, 1, 1], [2, 2, 2, 2], [0, 0, 0, 3], [4, 4, 5, 5]])
    other = np.array([[7, 7, 7, 9], [2, 8, 8, 8], [6, 6, 6, 3], [0, 0, 3, 3]])
    # 1 and 7: IoU 3/4; 2 and 8: 3/4, 2 and 2: 1/4 but the same id; 3 and 3: 1/3 but the same id;
    # VOID is no segment; 5 and 3: 2/3
    expected = [[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]
    assert inpaint.same_segment(first, other).astype(int).tolist() == expected


def test_an_iou_of_one_half_is_no_match():
    first, other = np.array([[1, 1, 2, 2, 2]]), np.array([[3, 4, 4, 4, 4]])  # IoU 1/2, and 3/5
    assert inpaint.same_segment(first, other).tolist() == [[False, False, True, True, True]]


# ---- inpaint.py --data (Fig. 9) ----

HALVES = [(32, 32, [(5, 9, 0, (0, 32), (0, 16)), (600, 7, 0, (0, 32), (16, 32))])]


@pytest.fixture
def table(tmp_path, tiny_run, oracle, monkeypatch):
    """A function (flags) -> the table where columns 6 to 19 of two halves are dropped; with blocks
    of 8 at another rate than 0.5, all the others.

    With a mask the model draws the truth, without one the truth under other ids.
    """
    for split in ("train", "val"):
        write_split(tmp_path / "data", split, HALVES)
    known = np.ones((32, 32), bool)
    known[:, 6:20] = False

    def keep(ids, seed, block=4, rate=0.5):
        return known if block == 4 or rate == 0.5 else ~known

    monkeypatch.setattr(inpaint, "keep_blocks", keep)
    monkeypatch.setattr(inpaint, "keep_strokes", keep)

    def run(*flags):
        oracle(lambda ids, known: ids if known is not None else ids % 7 + 1)
        inpaint.main(command_of(tiny_run.ldm, tmp_path / "out", "--data", tmp_path / "data",
                                *flags))
        return json.loads((tmp_path / "out" / "table.json").read_text())

    return run


# The nearest known column of 6..12 is 5, of 13..19 it is 20. So the left half, columns 0..15, is
# drawn as 0..12, the right one as 13..31; of the dropped columns 7 of 10 and 4 of 4 are right.
NEAREST = {"pq": (13 / 16 + 16 / 19) / 2, "dropped": (7 / 10 + 4 / 7) / 2, "ids": 11 / 14}
EXPECTED = {"completion": {"pq": 1, "dropped": 1, "ids": 1}, "nearest label": NEAREST,
            "without the mask": {"pq": 1, "dropped": 1, "ids": 0}}


@pytest.mark.parametrize("row, flags", [(0, []), (1, ["--strokes"])])
def test_the_table_of_two_halves_is_the_one_on_paper(table, row, flags):
    row = table("--block", "8", "--drop-rate", "0.5", *flags)[row]
    assert (row["block"], row["drop_rate"]) == (("strokes", "") if flags else (8, 0.5))
    for method, expected in EXPECTED.items():
        assert row[method] == pytest.approx(expected)


def test_the_table_ends_with_the_mean_over_drop_rates(table, tmp_path, capsys):
    rows = table("--block", "8", "4", "--drop-rate", "0.5", "0.25")
    assert [(row["block"], row["drop_rate"]) for row in rows] == [
        (8, 0.5), (8, 0.25), (4, 0.5), (4, 0.25), (8, "mean"), (4, "mean")]
    for one, other, mean in (rows[0], rows[1], rows[4]), (rows[2], rows[3], rows[5]):
        for method in EXPECTED:
            for key, value in mean[method].items():
                assert value == pytest.approx((one[method][key] + other[method][key]) / 2)
    assert rows[4]["nearest label"]["pq"] != rows[5]["nearest label"]["pq"]
    assert len(capsys.readouterr().out.splitlines()) == 2 + 6
    assert (tmp_path / "out" / "picture.png").exists()


def scores_of(drawn, ids, known):
    """Scores of one map against two halves, the model being given `ids` where known."""
    truth = np.array([5, 600]).repeat(16)[None].repeat(32, 0)
    segments = [{"id": 5, "category_id": 9}, {"id": 600, "category_id": 7}]
    scores = inpaint.Scores([], 8)
    scores.add({"ids": truth, "segments": segments}, drawn, ids, known)
    return scores.result("cpu")


def test_given_pixels_do_not_count_in_dropped():
    ids = np.array([3, 6]).repeat(16)[None].repeat(32, 0)
    known = np.zeros((32, 32), bool)
    known[:24] = True
    drawn = np.where(known, 1, ids)  # wrong wherever the truth was given
    result = scores_of(drawn, ids, known)
    assert result["dropped"] == 1 and result["pq"] == 0


def test_ids_count_the_dropped_pixels_of_partly_given_segments():
    ids = np.array([3, 6]).repeat(16)[None].repeat(32, 0)
    known = np.zeros((32, 32), bool)
    known[:24, :16] = True  # of the left half; nothing of the right one
    drawn = np.where(ids == 6, 2, ids)
    drawn[:24], drawn[24:26] = 1, 1
    assert scores_of(drawn, ids, known)["ids"] == 6 / 8


def test_nearest_label_equals_a_search_over_all_pixels():
    rng = np.random.default_rng(0)
    ids, known = rng.integers(0, 6, (9, 7)), rng.random((9, 7)) < 0.2
    filled = inpaint.nearest_label(ids, known)
    places = np.argwhere(known & (ids > 0))
    assert 3 < len(places) < 15
    for y, x in np.ndindex(9, 7):
        distance = ((places - [y, x]) ** 2).sum(1)
        closest = places[distance == distance.min()]
        assert filled[y, x] in ids[tuple(closest.T)]


def test_the_nearest_label_of_nothing_is_void():
    assert not inpaint.nearest_label(np.ones((4, 4), int), np.zeros((4, 4), bool)).any()


# ---- mistakes ----

HALF = np.repeat([[0, 1]], 30, 0).repeat(22, 1)  # (30, 44), the size of the image
NOISE = np.random.default_rng(0).integers(0, 2**24, (60, 88))
BAD_MASKS = {
    "another aspect": (HALF[:, 8:38], "npy",
                       "30 x 30 pixels, expected the aspect of its image, 44 x 30"),
    "nothing known": (0 * HALF, "8 bit", "0 segments given on 0% of the pixels, expected 1 to 7"),
    "all known": (0 * HALF + 1, "8 bit", "1 segments given on 100% of the pixels"),
    "a picture": (NOISE, "rgb", "5280 values from 0 to 167"),
    "too many segments": (HALF * (1 + np.arange(44) % 8), "8 bit", "8 segments given on 50%"),
    "fractions": (HALF / 2, "npy", "expected 0 (unknown) and ids of segments, below 2^24"),
    "fractions of colours": (NOISE[..., None] % [7, 1, 1] / 8, "npy", "is it a picture?"),
    "not a number": (HALF * np.nan, "npy", "expected 0 (unknown) and ids"),
    "negative": (-HALF, "npy", "2 values from -1 to 0, expected"),
    "too large": (HALF * 2**24, "npy", "2 values from 0 to 16777216, expected"),
    "64 bits": (HALF.astype(np.uint64) * (2**64 - 1), "npy", "expected 0 (unknown) and ids"),
    "one row of numbers": (HALF[0], "npy", "(44,), 2 values"),
    "no pixel": (HALF[:0, :0], "npy", "(0, 0), 0 values"),
    "words": (np.array([["a", "b"]]), "npy", "not a readable mask"),
}


@pytest.mark.filterwarnings("error")  # which would be further lines
@pytest.mark.parametrize("case", BAD_MASKS)
def test_a_bad_mask_is_named_in_one_line(complaint, tiny_run, tmp_path, picture, case):
    ids, kind, message = BAD_MASKS[case]
    mask = save_mask(tmp_path / "mask", ids, kind)
    command = command_of(tiny_run.ldm, tmp_path / "out", "--image", picture(30, 44), "--mask", mask)
    line = complaint(inpaint.main, *command)
    assert line.startswith(f"{mask}: ") and message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.unlink(), "no such mask"),
    (lambda path: path.write_bytes(path.read_bytes()[:-60]), "not a readable mask"),
    (lambda path: path.write_bytes(b""), "not a readable mask"),
    (lambda path: path.write_text("hello"), "not a readable mask"),
])
@pytest.mark.parametrize("kind", ["rgb", "npy"])
def test_a_mask_that_cannot_be_read_is_named(
        complaint, tiny_run, tmp_path, picture, kind, damage, message):
    mask = save_mask(tmp_path / "mask", HALF, kind)
    damage(mask)
    command = command_of(tiny_run.ldm, tmp_path / "out", "--image", picture(30, 44), "--mask", mask)
    assert complaint(inpaint.main, *command).startswith(f"{mask}: {message}")


@pytest.mark.parametrize("flags, message", [
    ([], "expected --image and --mask, or --data"),
    (["--image", "a.png", "--mask", "b.png", "--data", "shapes"], "expected --image and --mask, o"),
    (["--image", "a.png"], "expected --image and --mask"),
    (["--mask", "b.png"], "expected --image and --mask"),
    (["--data", "shapes", "--mask", "b.png"], "expected --image and --mask"),
    (["--image", "nowhere.png", "--mask", "b.png"], "nowhere.png: no such image"),
    (["--data", "nowhere"], "--data nowhere: no such data"),
    (["--data", "shapes", "--variations", "0"], "--variations 0 "),
    (["--data", "shapes", "--repeats", "0"], "--repeats 0 "),
    (["--data", "shapes", "--known-share", "0"], "--known-share 0.0, expected"),
    (["--data", "shapes", "--known-share", "1.5"], "--known-share 1.5, expected"),
    (["--data", "shapes", "--block", "8", "33"], "--block [8, 33] --drop-rate [0.1, 0.3, 0.5, 0.7, "
     "0.9]: expected blocks of 1 to 32 pixels"),
    (["--data", "shapes", "--block", "0"], "--block [0]"),
    (["--data", "shapes", "--drop-rate", "0.5", "1"], "--drop-rate [0.5, 1.0]: expected"),
    (["--data", "shapes", "--drop-rate", "0"], "rates between 0 and 1"),
    (["--data", "shapes", "--steps", "0"], "0 sampling steps, expected 1 to 1000"),
    (["--data", "shapes", "--limit", "0"], "--limit 0, expected at least 1"),
])
def test_a_bad_flag_of_inpaint_is_named_in_one_line(complaint, tiny_run, tmp_path, flags, message):
    command = command_of(tiny_run.ldm, tmp_path / "out", "--limit", 1, *flags)
    line = complaint(inpaint.main, *command)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_inpainting_with_an_autoencoder_is_an_error(complaint, tiny_run, tmp_path):
    line = complaint(inpaint.main, *command_of(tiny_run.ae, tmp_path / "out", "--data", "shapes"))
    assert f"{tiny_run.ae}: holds a MaskAutoencoder, expected a LDMSeg" in line


# ---- training goes on from a run ----


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_sd_names_a_run_whose_unet_and_image_encoder_are_where_training_starts(
        data, tiny_run, tmp_path, file):
    ae = MaskAutoencoder(small_config())
    save_weights(tmp_path / "ae.safetensors", ae, ae.config, 0)
    command = ldm_command(data, tmp_path / "ae.safetensors", tmp_path / "run", "ldm_lr=0")
    train_ldm.main([*command, "--steps", "1", "--sd", str(tiny_run.ldm / file), "--seed", "9"])
    model, start = load_model(tmp_path / "run"), load_model(tiny_run.ldm)
    for part, weights in (("autoencoder", ae), ("unet", start.unet),
                          ("image_encoder", start.image_encoder)):
        ours, theirs = getattr(model, part).state_dict(), weights.state_dict()
        assert [k for k in theirs if not torch.equal(ours[k], theirs[k])] == []


@pytest.mark.parametrize("change, theirs, ours", [
    ("prediction=eps", "v", "eps"), ("stem_widths=8,16,16", "(8, 8, 16)", "(8, 16, 16)"),
    ("unet_widths=32,64", "(32, 32)", "(32, 64)"), ("unet_attention=0,1", "(1, 1)", "(0, 1)"),
    ("unet_layers=2", "1", "2"), ("unet_heads=4", "2", "4"), ("image_encoder=sd", "patch", "sd"),
])
def test_a_run_of_another_network_is_named_with_the_field(
        complaint, data, tiny_run, tmp_path, change, theirs, ours):
    command = ldm_command(data, tiny_run.ae, tmp_path / "run", change)
    line = complaint(train_ldm.main, *command, "--sd", tiny_run.ldm)
    field = change.partition("=")[0]
    assert f"--sd {tiny_run.ldm}: its {field} is {theirs}, expected {ours}" in line


def test_a_run_of_stage_1_is_no_start_for_stage_2(complaint, data, tiny_run, tmp_path):
    command = ldm_command(data, tiny_run.ae, tmp_path / "run")
    line = complaint(train_ldm.main, *command, "--sd", tiny_run.ae)
    assert f"{tiny_run.ae}: holds a MaskAutoencoder, expected a LDMSeg" in line
