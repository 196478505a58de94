"""Pix2Seq-D (--set space=pixels), and both methods on videos."""

import math

import evaluate
import inpaint
import numpy as np
import pytest
import sample
import torch
import torch.nn.functional as F
import train_ldm
from conftest import ON_CPU, TINY_LDM, gaussian, run_of, small_config
from ldmseg import (
    PRESETS, LDMSeg, Pix2SeqD, ShapeScenes, TrainingStream, UserError, int2bits, load_model,
    most_probable, override, read_image, resize_nearest, rgb2id, write_png,
)  # fmt: skip

PIXELS = ["space=pixels", "bits=3", *TINY_LDM, "self_condition=0"]
DATA = ["--data", "shapes", "--steps", "1", "--batch-size", "4", "--limit", "2", *ON_CPU]

def blocks(seed=0, images=2):
    """ids (images, 32, 32) in [0, 7], the same in squares of 4, and at 1/4, (images, 8, 8)."""
    small = torch.randint(0, 8, (images, 8, 8), generator=torch.Generator().manual_seed(seed))
    return small.repeat_interleave(4, 1).repeat_interleave(4, 2), small

@pytest.fixture
def make(stub_model):
    """A function (output function, Config fields) -> Pix2SeqD whose UNet is a StubUNet."""
    pixels = dict(space="pixels", self_condition=0.0, mask_threshold=0.0, mask_scale=1.0)
    return lambda function, **changes: stub_model(function, Pix2SeqD, **pixels | changes)

def perfect(small):
    return 100 * F.one_hot(small, 8).permute(0, 3, 1, 2).float()  # logits (B, 8, 8, 8)

# ---- the schedule and the sampler ----

@pytest.mark.parametrize("ids", ["matched", "random"])
@pytest.mark.parametrize("td", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_ddim_with_a_perfect_network_finds_the_ids_through_asymmetric_steps(make, steps, td, ids):
    full, small = blocks()
    seen = []
    model = make(lambda inputs, t: seen.append((inputs[:, :3], t)) or perfect(small),
                 td=td, ids=ids)  # fmt: skip
    logits = model.sample(gaussian(2, 3, 32, 32), [(0, 0), (0, 1)], steps)
    assert torch.equal(logits.argmax(1), small)

    # their Alg. 2: z_t is further on than its time says; DDIM's noise, or the first one
    def angle(t):
        return (t + 0.0002) / 1.00025 * math.pi / 2

    x0, first = 0.1 * int2bits(small, 3), seen[0][0]
    expected = first
    for k, (z_t, t) in enumerate(seen):
        now, after = 1 - k / steps, max(1 - (k + 1 + td) / steps, 0)
        assert t.tolist() == pytest.approx([1000 * now] * 2)
        torch.testing.assert_close(z_t, expected, atol=2e-4, rtol=0)  # float32 near 1
        implied = (z_t - math.cos(angle(now)) * x0) / math.sin(angle(now))
        eps = first if ids == "matched" else implied
        expected = math.cos(angle(after)) * x0 + math.sin(angle(after)) * eps

@pytest.mark.parametrize("td", [0.0, 1.0, 2.0])
def test_fresh_noise_keeps_every_number_of_steps_finite(make, td):
    model = make(lambda inputs, t: torch.zeros(1, 8, 8, 8), td=td, ids="random")
    for steps in range(1, 12):
        z = torch.ones(1, 3, 8, 8)
        for t, t_next in model.timesteps(steps):
            z = model.schedule.step(torch.zeros_like(z), z, t, t_next, 1.0, torch.ones_like(z))
            assert z.isfinite().all()

def test_x0_is_the_mean_of_the_bits_and_autocast_changes_neither_it_nor_what_runs(make):
    full, small = blocks()
    image, known = gaussian(2, 3, 32, 32), torch.ones_like(full, dtype=torch.bool)
    model = make(lambda inputs, t: perfect(small).to(inputs.dtype), given_share=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        x0, _ = model.x0_and_eps(perfect(small) / 50, gaussian(2, 3, 8, 8), torch.ones(2))
        other = 1 / (math.exp(2) + 7)  # the probability of each id but the pixel's own
        expected = 0.1 * other * (1 + (math.exp(2) - 1) * int2bits(small, 3))
        torch.testing.assert_close(x0, expected)
        loss, _ = model(image, full, gaussian(2, 3, 8, 8), torch.tensor([9.0, 500.0]), False)
        noise = [(0, 0), (0, 1)]
        assert torch.equal(model.sample(image, noise, 2).argmax(1), small)
        completed = model.inpaint(image, full, known, noise, 2)
    assert loss.isfinite() and completed.shape == (2, 8, 8, 8)

def test_an_estimate_is_fed_back_only_where_training_did(make, stub_model):
    for build in (make, stub_model):
        for share in (0.0, 0.5):
            fed = []
            model = build(lambda inputs, t: fed.append(inputs[:, -3:]) or 1 + torch.zeros(
                1, 8 if build is make else 4, *inputs.shape[2:]), self_condition=share)
            model.sample(gaussian(1, 3, 32, 32), [(0, 0)], 3)
            assert not fed[0].any() and all(bool(x.any()) == (share > 0) for x in fed[1:])

# ---- the loss ----

@pytest.mark.parametrize("kind", ["ce", "l2"])
def test_the_loss_of_a_perfect_network_is_zero_and_of_a_blind_one_is_known(make, kind):
    full, small = blocks()
    right = perfect(small) if kind == "ce" else int2bits(small, 3)
    for output, expected in ((right, 0.0), (0 * right, math.log(8) if kind == "ce" else 1.0)):
        model = make(lambda inputs, t: output, pixel_loss=kind, ids="random")
        loss, error = model.diffusion_loss(gaussian(2, 3, 32, 32), full, gaussian(2, 3, 8, 8),
                                           torch.tensor([500.0, 3.5]), False)  # fmt: skip
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert error.item() == pytest.approx(expected, abs=1e-6)

@pytest.mark.parametrize("power", [0.0, 0.2, 0.5])
def test_weights_of_pixels_fall_with_the_area_and_sum_to_the_number_of_pixels(make, power):
    full, small = blocks()
    model = make(None, loss_power=power)
    _, weights = model.errors(torch.zeros(2, 8, 8, 8), None, None, None, full)
    assert not weights[small == 0].any()  # of VOID
    torch.testing.assert_close(weights.sum((1, 2)), (small != 0).sum((1, 2)).float())
    for ids, ours in zip(small, weights):
        area = torch.bincount(ids.flatten(), minlength=8)[ids]
        same = (ours * area**power)[ids != 0]
        torch.testing.assert_close(same, same[:1].expand_as(same))

def test_void_counts_nowhere(make):
    full, small = blocks()
    full[0, :, :16], small[0, :, :4] = 0, 0
    results = []
    for wrong in (0.0, 50.0):
        output = perfect(small)
        output += wrong * gaussian(2, 8, 8, 8) * (small == 0)[:, None]  # any at VOID
        output[:, 5] += 1.0 * (small != 0)
        model = make(lambda inputs, t: output, ids="random")
        results.append(model.diffusion_loss(gaussian(2, 3, 32, 32), full, gaussian(2, 3, 8, 8),
                                            torch.tensor([500.0, 3.5]), False))  # fmt: skip
    assert results[0] == results[1]

def test_ids_matched_to_the_noise_are_those_of_the_nearest_bits(make):
    """With noise that is the bits of other ids, these are the ids that are learned."""
    full = torch.ones(1, 32, 32, dtype=torch.long)
    full[:, 16:], full[:, :, 16:] = 2, 3
    wanted = full * 2 % 7  # 2, 4, 6
    target = []
    model = make(lambda inputs, t: torch.zeros(1, 8, 8, 8), ids="matched")
    model.errors = lambda output, x0, eps, t, ids: target.append(ids) or (eps[:, 0], eps[:, 0])
    model.diffusion_loss(gaussian(1, 3, 32, 32), full, model.encode_mask(wanted),
                         torch.tensor([999.0]), False)  # fmt: skip
    assert torch.equal(target[0], wanted)

# ---- results, inpainting, scripts ----

def test_the_bits_at_a_quarter_are_the_pixels_there_and_decode_to_their_ids(make):
    full, small = blocks()
    model = make(None)
    torch.testing.assert_close(model.encode_mask(full), 0.1 * int2bits(small, 3))
    logits = model.autoencoder.reconstruct(full)
    assert torch.equal(logits.argmax(1), small) and logits.softmax(1).amax(1).min() > 0.99

def test_ids_are_upsampled_by_nearest_neighbour():
    _, small = blocks()
    ids = most_probable(perfect(small)[0], (40, 24), nearest=True)
    assert np.array_equal(ids, resize_nearest(small[0].numpy(), (40, 24)))
    unsure = torch.zeros(8, 8, 8)
    unsure[3] = 0.5  # probability 0.19
    assert (most_probable(unsure, (9, 9), 0.1, nearest=True) == 3).all()
    assert not most_probable(unsure, (9, 9), 0.3, nearest=True).any()

def test_inpainting_pastes_the_bits_of_known_pixels(make):
    full, small = blocks()
    known = torch.zeros_like(full, dtype=torch.bool)
    known[:, :16] = True
    known[0, 20, 21] = True  # a stroke of one pixel
    seen = []
    model = make(lambda inputs, t: seen.append(inputs) or torch.zeros(2, 8, 8, 8),
                 ids="random", given_share=0.5, td=0.0)  # fmt: skip
    model.inpaint(gaussian(2, 3, 32, 32), full, known, [(0, 0), (0, 1)], 2)
    given = small.clone()
    given[:, 4:] = 0
    given[0, 5, 5] = full[0, 20, 21]
    hint = 0.1 * int2bits(given, 3)
    torch.testing.assert_close(seen[1][:, -3:], hint)

    # z at half of the time: the known bits under the noise, elsewhere the mean of all codes
    mean = 0.1 * int2bits(torch.arange(8).view(1, 8, 1), 3).mean((0, 2, 3)).view(3, 1, 1)
    x0 = torch.where((given != 0)[:, None], hint, mean)
    half = math.pi / 4  # angle of the time, nearly
    expected = math.cos(half) * x0 + math.sin(half) * seen[0][:, :3]
    torch.testing.assert_close(seen[1][:, :3], expected, atol=2e-3, rtol=0)

def test_the_scripts_train_resume_and_use_it(tmp_path, capsys):
    command = [*DATA, "--out", str(tmp_path / "run"), "--set", *PIXELS]
    train_ldm.main(command)
    train_ldm.main([*command, "--steps", "2"])
    assert "resuming from step 1" in capsys.readouterr().out
    model = load_model(tmp_path / "run")
    assert isinstance(model, Pix2SeqD) and model.unet.config.out_channels == 8
    weights = ["--weights", str(tmp_path / "run"), *ON_CPU]
    sample.main([*weights, "--limit", "2", "--out", str(tmp_path / "sampled")])
    assert read_image(tmp_path / "sampled/panoptic/val000000.png").shape == (32, 32, 3)
    evaluate.main([*weights, "--limit", "2", "--steps", "1", "2"])
    with pytest.raises(UserError, match="never saw a mask before"):
        model.sample(gaussian(1, 3, 32, 32), [(0, 0)], 1, previous=torch.ones(1, 32, 32).long())
    inpaint.main([*weights, "--data", "shapes", "--limit", "1", "--block", "8", "--out",
                  str(tmp_path / "in")])  # fmt: skip
    train_ldm.main([*DATA, "--sd", str(tmp_path / "run"), "--out", str(tmp_path / "more")])
    assert isinstance(load_model(tmp_path / "more"), Pix2SeqD)

def test_space_pixels_has_the_defaults_of_the_paper_unless_given():
    config = override(PRESETS["tiny"], ["space=pixels"], "ldm")
    assert (config.self_condition, config.mask_threshold, config.bits_scale) == (0, 0, 0.1)
    config = override(PRESETS["tiny"], ["self_condition=0.5", "space=pixels"], "ldm")
    assert config.self_condition == 0.5

@pytest.mark.parametrize("flags, message", [
    ("--ae tiny --set space=pixels", "expected no --ae"), ("--set bits=3", "train_ae.py"),
    ("--tasks depth --set space=pixels", "expected latents"),
    ("--sd x --set space=pixels", "--sd none or a run"),
    ("--sd tiny --set space=pixels", "space of this run is latents")])
def test_what_does_not_go_with_pixels_is_said(tmp_path, complaint, flags, message):
    assert message in complaint(train_ldm.main, *DATA, "--out", tmp_path, *flags.split())

# ---- videos ----

def test_things_move_and_keep_their_ids():
    scenes = ShapeScenes("val", 64)
    for number in range(3):
        still, later = scenes[number], scenes.frame(number, 4)
        assert np.array_equal(scenes.frame(number, 0)["image"], still["image"])
        assert not np.array_equal(later["image"], still["image"])
        kinds = [{s["id"]: s["category_id"] for s in r["segments"]} for r in (still, later)]
        both = kinds[0].keys() & kinds[1].keys()
        assert len(both) > 2 and all(kinds[0][id] == kinds[1][id] for id in both)
        moved = [np.hypot(*np.subtract(*[np.argwhere(r["ids"] == id).mean(0)
                                         for r in (still, later)])) for id in both]
        assert 0.5 < np.median(moved) < 64 * 4 * 0.05

def test_a_sample_has_the_frame_before_with_the_same_ids():
    config = small_config(previous=1.0, size=64, bits=4, min_segment=1)
    scenes = ShapeScenes("train", 64)
    stream = TrainingStream([scenes], config, 0)
    for position in range(4):
        one, index = stream[position], int(stream.order(0, 0)[position])
        now, before = scenes.frame(index, 0), scenes.frame(index, -1)
        listed, pairs = [s["id"] for s in now["segments"]], set()
        for ours, record in (one["ids"], now), (one["previous"], before):
            theirs = np.where(np.isin(record["ids"], listed), record["ids"], 0)
            fits = [set(zip(flip.flatten().tolist(), ours.flatten().tolist()))
                    for flip in (theirs, theirs[:, ::-1])]
            pairs |= min(fits, key=len)
        assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
        assert (one["ids"] != one["previous"]).any()

def test_half_of_the_samples_have_no_frame_before():
    stream = TrainingStream([ShapeScenes("train", 32)], small_config(previous=0.5), 0)
    share = np.mean([bool(stream[i]["previous"].any()) for i in range(30)])
    assert 0.3 < share < 0.7
    assert "previous" not in TrainingStream([ShapeScenes("train", 32)], small_config(), 0)[0]

def test_the_frame_before_is_fed_in_training_and_sampling_and_keeps_its_ids(stub_model):
    ids, _ = blocks()
    previous = ids.roll(4, 2)
    previous[1] = 0  # the second sample has none
    fed = []
    model = stub_model(lambda inputs, t: fed.append(inputs) or 0 * inputs[:, :4], ids="matched")
    eps, t = gaussian(2, 4, 4, 4), torch.tensor([999, 0])
    model.diffusion_loss(gaussian(2, 3, 32, 32), ids, eps, t, False, previous=previous)
    torch.testing.assert_close(fed[0][:1, -4:], model.encode_mask(previous[:1]))
    assert not fed[0][1:, -4:].any()
    matched, _ = model.match_to(ids, eps)
    x0 = model.encode_mask(torch.stack([ids[0], matched[1]]))  # only the second one is matched
    torch.testing.assert_close(fed[0][:, :4], model.schedule.add_noise(x0, eps, t))
    assert (ids[0] != matched[0]).any()

    # sampling starts from it
    model.sample(gaussian(2, 3, 32, 32), [(0, 0), (0, 1)], 2, previous=ids)
    torch.testing.assert_close(fed[1][:, -4:], model.encode_mask(ids))
    assert not torch.equal(fed[2][:, -4:], fed[1][:, -4:])

def test_a_folder_of_frames_is_segmented_in_order(tmp_path, monkeypatch, tiny_run):
    scenes, frames = ShapeScenes("val", 32), tmp_path / "frames"
    for time in (0, 1, 10):
        write_png(frames / f"f{time}.png", scenes.frame(0, time)["image"])
    given = []
    original = LDMSeg.sample
    def spy(self, image, noise, steps, eta=0.0, task="instance", previous=None, **options):
        given.append((noise, previous))
        return original(self, image, noise, steps, eta, task, previous, **options)
    monkeypatch.setattr(LDMSeg, "sample", spy)
    (frames / "._f0.png").write_bytes(b"no image")
    out = tmp_path / "out"
    sample.main(run_of(tiny_run, out, "--video", frames))
    assert [noise for noise, _ in given] == [[(0, 0)]] * 3
    drawn = [rgb2id(read_image(out / f"panoptic/f{time}.png")) for time in (0, 1, 10)]
    assert not given[0][1].any()
    for (_, previous), ids in zip(given[1:3], drawn):
        assert np.array_equal(previous[0], ids)

def test_frames_before_need_generated_scenes(tmp_path, data, tiny_run, complaint):
    line = complaint(train_ldm.main, "--data", data, "--ae", tiny_run.ae, "--out", tmp_path,
                     *ON_CPU, "--set", "size=32", "previous=0.5")  # fmt: skip
    assert "only --data shapes" in line
    assert "no such folder" in complaint(sample.main, "--video", tmp_path / "none")
