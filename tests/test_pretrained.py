"""Stable Diffusion, DINOv2, the authors' files, and the options of the paper's tables."""

import contextlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import ldmseg
import numpy as np
import pytest
import sample
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import train_ae
import train_ldm
import transformers
from conftest import (
    ae_command, fill_by_rule, ldm_command, on_two_ranks, relative_error, small_config,
)  # fmt: skip
from ldmseg import PRESETS, Config, LDMSeg, MaskAutoencoder, load_model, load_official
from safetensors.torch import load_file, save_file
from test_distributed import ConvUNet

VAE = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
           block_out_channels=[32, 32, 64, 32], layers_per_block=2, scaling_factor=0.3)
UNET = dict(sample_size=4, block_out_channels=(32, 64), layers_per_block=2, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
LIKE_UNET = ["unet_widths=32,64", "unet_attention=1,0", "unet_layers=2", "unet_heads=2"]
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def without_cross_attention(unet):
    for module in unet.modules():
        if isinstance(module, diffusers.models.attention.BasicTransformerBlock):
            module.attn2 = module.norm2 = None
    return unet


def official_vae(state, old_names):
    """What the authors' `vae_image` holds of an AutoencoderKL: all but the decoder."""
    kept = {k: v for k, v in state.items() if not k.startswith("decoder.")}
    for new, old in OLD_NAMES.items() if old_names else ():
        kept = {k.replace(f".{new}.", f".{old}."): v for k, v in kept.items()}
    return kept


def save_sd(folder, vae=None, half=False, **changes):
    """A folder of a small random Stable Diffusion."""
    torch.manual_seed(2)
    for name, part in ("vae", vae), ("unet", diffusers.UNet2DConditionModel(**UNET | changes)):
        if part:
            (part.half() if half else part).save_pretrained(folder / name)
    return folder


def assert_same(one, other, tolerance=0):
    """Two state dicts are equal."""
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=tolerance, atol=tolerance, msg=key)


def sample_with(weights, data, out, *more):
    """Run sample.py on the two validation images; returns how many segments each got."""
    sample.main(["--weights", str(weights), "--data", str(data), "--out", str(out), "--steps", "2",
                 "--device", "cpu", "--workers", "0", *more])
    listed = json.loads((out / "panoptic.json").read_text())["annotations"]
    return [len(a["segments_info"]) for a in listed]


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(**VAE).eval()


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory, vae):
    return save_sd(tmp_path_factory.mktemp("sd"), vae)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A small random DINOv2: .model, .folder, and .encoder made from the folder."""
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                       image_size=56, patch_size=14)
    model, folder = transformers.Dinov2Model(config).eval(), tmp_path_factory.mktemp("dinov2")
    model.embeddings.position_embeddings.data = gaussian(1, 17, 32)
    model.save_pretrained(folder)
    ours = small_config(image_encoder="dinov2", dinov2=str(folder))
    weights, ours = train_ldm.pretrained_encoder(ours, "none")
    encoder = ldmseg.ImageEncoder(ours).eval()
    encoder.layers.load_state_dict(weights)
    return SimpleNamespace(model=model, folder=folder, encoder=encoder)


@pytest.fixture(scope="module")
def golden(shared):
    return shared / "golden" / "official"


@pytest.fixture(scope="module")
def names(golden):
    return json.loads((golden / "keys.json").read_text())


@pytest.fixture(scope="module")
def official(tmp_path_factory, names, vae):
    """Files in the authors' format, filled like the reference values: .ae, .ldmseg, .parts."""
    folder = tmp_path_factory.mktemp("official")
    masks, unet = ({f"module.{key}": fill_by_rule(key, shape) for key, shape in names[part]}
                   for part in ("ae_keys", "unet_keys"))
    parts = {"vae_semseg": masks, "unet": unet, "vae_image": official_vae(vae.state_dict(), True)}
    torch.save({"vae": masks}, folder / "ae.pt")
    torch.save(parts, folder / "ldmseg.pt")
    return SimpleNamespace(ae=folder / "ae.pt", ldmseg=folder / "ldmseg.pt", parts=parts)


@pytest.fixture(scope="module")
def official_model(official, names):
    return load_official(official.ldmseg, names["unet_cfg"]).eval()


@pytest.fixture
def small_paper(monkeypatch, names):
    """--preset paper with the UNet of the reference values, on images of 64 x 64 pixels."""
    about = names["unet_cfg"]
    small = dict(unet_widths=tuple(about["block_out_channels"]), size=64, eval_steps=1,
                 unet_heads=about["attention_head_dim"], mask_threshold=0, min_area=1)
    monkeypatch.setitem(PRESETS, "paper", replace(PRESETS["paper"], **small))


# ---- the authors' files ----


@torch.no_grad()
def test_ae_pt_gives_the_released_latents_and_logits(official, golden):
    autoencoder, expected = load_model(official.ae), np.load(golden / "ae.npz")
    z = autoencoder.encode(autoencoder.code(torch.from_numpy(expected["ids"]).long()))
    assert relative_error(z, expected["z"]) < 1e-4
    logits = autoencoder.decode(torch.from_numpy(expected["z"]))
    assert relative_error(logits[:, ::4, ::4, ::4], expected["logits"]) < 1e-4


def test_the_released_autoencoder_has_2_023_208_parameters(official):
    assert sum(p.numel() for p in load_model(official.ae).parameters()) == 2_023_208


@torch.no_grad()
def test_ldmseg_pt_gives_the_released_unet_output(official_model, golden):
    expected = {k: torch.from_numpy(v) for k, v in np.load(golden / "unet.npz").items()}
    z_t, z_image, x0_previous = expected["inp"].split(4, 1)
    output, *_ = official_model.predict(z_t, z_image, x0_previous, expected["t"])
    assert relative_error(output, expected["eps"]) < 1e-4


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
@torch.no_grad()
def test_ldmseg_pt_gives_the_released_samples(official_model, golden, steps):
    expected = np.load(golden / "sched.npz")
    z_image, noise = torch.from_numpy(expected["z_i"]), torch.from_numpy(expected["z_T"])
    *_, result = official_model.denoise(z_image, noise, steps)
    assert relative_error(result, expected[f"S{steps}"]) < 1e-4


@pytest.mark.parametrize("old_names", [True, False])
@torch.no_grad()
def test_vae_image_encodes_like_diffusers_under_both_namings(
        official, names, vae, tmp_path, old_names):
    part = official_vae(vae.state_dict(), old_names)
    assert any(".query." in k for k in part) == old_names and "post_quant_conv.bias" in part
    torch.save(official.parts | {"vae_image": part}, tmp_path / "ldmseg.pt")
    model, image = load_official(tmp_path / "ldmseg.pt", names["unet_cfg"]), gaussian(2, 3, 32, 48)
    expected = 0.18215 * vae.encode(image).latent_dist.mean
    assert relative_error(model.encode_image(image), expected) < 1e-5


def test_sample_takes_ldmseg_pt(official, small_paper, data, tmp_path):
    assert min(sample_with(official.ldmseg, data, tmp_path)) > 1


def test_stage_2_starts_from_ae_pt_and_says_that_the_rest_is_random(
        official, small_paper, data, tmp_path, capsys):
    train_ldm.main(["--preset", "paper", "--sd", "none", "--image-encoder", "patch", "--steps", "1",
                    "--ae", str(official.ae), "--data", str(data), "--batch-size", "2",
                    "--out", str(tmp_path), "--device", "cpu", "--workers", "0"])
    trained = load_model(tmp_path).autoencoder
    assert_same(trained.state_dict(), load_model(official.ae).state_dict())
    assert "RANDOM weights" in capsys.readouterr().out


@pytest.mark.parametrize("old_names", [True, False])
def test_every_released_key_but_post_quant_conv_has_its_place_in_the_full_model(names, old_names):
    with torch.device("meta"):  # shapes without memory
        unet = diffusers.UNet2DConditionModel(in_channels=12, cross_attention_dim=768)
        image = diffusers.AutoencoderKL(**VAE | {"block_out_channels": [128, 256, 512, 512]})
        parts = {"vae_semseg": {key: torch.empty(shape) for key, shape in names["ae_keys"]},
                 "unet": without_cross_attention(unet).state_dict(),
                 "vae_image": official_vae(image.state_dict(), old_names)}
        config, tensors = ldmseg.convert_official(parts)
        ours = LDMSeg(config).state_dict()
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in ours.items()}
    used = {id(tensor) for tensor in tensors.values()}
    unused = [k for part in parts.values() for k, v in part.items() if id(v) not in used]
    assert unused == ["post_quant_conv.weight", "post_quant_conv.bias"]
    assert sum(v.numel() for v in parts["unet"].values()) == 815_556_484


def test_the_unet_with_cross_attention_has_859_544_004_parameters():
    with torch.device("meta"):
        unet = ldmseg.build_unet(PRESETS["paper"], 4, cross_attention=768)
    assert sum(p.numel() for p in unet.parameters()) == 859_544_004
    assert unet.conv_in.weight.shape == (320, 12, 3, 3)


@pytest.mark.parametrize("damage", ["unknown", "missing", "shape"])
@pytest.mark.parametrize("part, key, ours", [
    ("unet", "conv_in.weight", "conv_in.weight"),
    ("vae_semseg", "encoder.15.weight", "encoder.14.weight"),
    ("vae_image", "encoder.conv_in.weight", "conv_in.weight")])
def test_a_key_that_does_not_fit_is_named(
        official, small_paper, complaint, tmp_path, part, key, ours, damage):
    content = {k.removeprefix("module."): v for k, v in official.parts[part].items()}
    if damage == "unknown":
        key = ours = "mistake.3.weight"
    content[key] = torch.zeros(2, 2, 3, 3)
    if damage == "missing":
        del content[key]
    torch.save(official.parts | {part: content}, tmp_path / "ldmseg.pt")
    line = complaint(sample.main, "--weights", tmp_path / "ldmseg.pt", "--device", "cpu")
    assert line.startswith(f"{tmp_path}/ldmseg.pt: ")
    assert key in line or ours in line


# ---- Stable Diffusion ----


def sd_command(data, ae, out, sd, *options):
    return [*ldm_command(data, ae, out, *LIKE_UNET, *options), "--sd", str(sd),
            "--image-encoder", "sd"]


def sd_model(folder):
    config = ldmseg.override(small_config(image_encoder="sd"), LIKE_UNET)
    return train_ldm.build_model(config, [MaskAutoencoder(config)], str(folder))


@pytest.fixture(scope="module")
def sd_runs(tmp_path_factory, data, tiny_run, sd_folder):
    """Runs of five steps with a frozen time embedding: after a break, and straight."""
    out = tmp_path_factory.mktemp("sd_runs")
    for name, steps in ("resumed", "3"), ("resumed", "5"), ("straight", "5"):
        command = sd_command(data, tiny_run.ae, out / name, sd_folder, "freeze_time=1")
        train_ldm.main([*command, "--steps", steps])
    return out


@torch.no_grad()
def test_at_first_the_output_is_stable_diffusions_whatever_the_image(sd_folder):
    model, z_t, t = sd_model(sd_folder), gaussian(2, 4, 4, 4), torch.tensor([7, 800])
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    expected = without_cross_attention(unet)(z_t, t, encoder_hidden_states=None).sample
    for seed in (1, 2):
        z_image = model.encode_image(gaussian(2, 3, 32, 32, seed=seed))
        x0_previous = gaussian(2, 4, 4, 4, seed=10 * seed)
        output, *_ = model.predict(z_t, z_image, x0_previous, t)
        assert relative_error(output, expected) < 1e-6


def test_the_pretrained_kernel_reads_z_t_and_all_else_starts_at_zero(sd_folder):
    kernel = sd_model(sd_folder).unet.conv_in.weight
    theirs = diffusers.UNet2DConditionModel.from_pretrained(sd_folder / "unet").conv_in.weight
    assert torch.equal(kernel[:, :4], theirs) and kernel[:, 4:].shape[1] == 8
    assert kernel[:, 4:].abs().max() == 0


@torch.no_grad()
def test_the_sd_encoder_gives_mean_latents_times_the_vaes_scaling_factor(sd_folder, vae):
    image = gaussian(2, 3, 32, 32)
    expected = 0.3 * vae.encode(image).latent_dist.mean
    assert relative_error(sd_model(sd_folder).encode_image(image), expected) < 1e-5


def test_a_resumed_run_from_stable_diffusion_equals_one_without_a_break(sd_runs):
    assert_same(*(load_model(sd_runs / n).state_dict() for n in ("resumed", "straight")))
    assert {json.loads(x)["step"] for x in (sd_runs / "resumed/log.jsonl").open()} == {3, 5}


def test_the_image_encoder_is_kept_without_decoder_and_does_not_change(sd_runs, vae):
    trained = load_model(sd_runs / "straight").image_encoder.layers.state_dict()
    assert_same(trained, nn.Sequential(vae.encoder, vae.quant_conv).state_dict())


def test_only_the_unet_gets_gradients(sd_folder):
    model = sd_model(sd_folder)
    ids, t = torch.ones(1, 32, 32, dtype=torch.long), torch.tensor([500])
    model(gaussian(1, 3, 32, 32), ids, gaussian(1, 4, 4, 4), t, True).backward()
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {"unet"}
    assert not any(p.requires_grad for p in model.image_encoder.parameters())
    assert model.unet.conv_in.weight.grad[:, 4:8].abs().max() > 0


@pytest.mark.parametrize("frozen", [True, False])
def test_freeze_time_keeps_the_time_embedding(
        sd_runs, sd_folder, data, tiny_run, tmp_path, frozen):
    run = sd_runs / "straight" if frozen else tmp_path
    if not frozen:
        train_ldm.main(sd_command(data, tiny_run.ae, run, sd_folder))
    unet, first = load_model(run).unet, sd_model(sd_folder).unet
    pairs = zip(unet.time_embedding.parameters(), first.time_embedding.parameters(), strict=True)
    assert [torch.equal(a, b) for a, b in pairs] == [frozen] * 4
    assert not torch.equal(unet.conv_out.weight, first.conv_out.weight)


def test_a_run_samples_without_stable_diffusions_folder(sd_runs, data, tmp_path, monkeypatch):
    monkeypatch.setattr(ldmseg, "from_pretrained", None)
    assert min(sample_with(sd_runs / "straight", data, tmp_path)) > 1


def test_a_folder_in_half_precision_trains_in_float32(data, tiny_run, tmp_path):
    folder = save_sd(tmp_path / "sd", diffusers.AutoencoderKL(**VAE), half=True)
    train_ldm.main([*sd_command(data, tiny_run.ae, tmp_path / "run", folder), "--steps", "1"])
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["model"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["sd", "dinov2"])
def test_frozen_encoders_never_run_in_float16(sd_folder, dinov2, kind):
    encoder = dinov2.encoder if kind == "dinov2" else sd_model(sd_folder).image_encoder
    seen, image = [], gaussian(1, 3, 32, 32)
    hook = encoder.layers.register_forward_pre_hook(lambda *_: seen.append(
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")))
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert encoder(image).dtype == torch.float32
    encoder(image)
    hook.remove()
    assert seen == [False, torch.bfloat16, False]


# ---- DINOv2 ----


def test_a_folder_that_lacks_weights_is_refused(data, tiny_run, dinov2, tmp_path):
    dinov2.model.save_pretrained(tmp_path / "dinov2")
    tensors = load_file(tmp_path / "dinov2" / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, tmp_path / "dinov2" / "model.safetensors", {"format": "pt"})
    command = ldm_command(data, tiny_run.ae, tmp_path / "run", f"dinov2={tmp_path / 'dinov2'}")
    with pytest.raises(ValueError, match="it lacks 1 weights, the first layernorm.weight"):
        train_ldm.main([*command, "--image-encoder", "dinov2"])


@torch.no_grad()
def test_dinov2_latents_are_the_patch_tokens_of_the_normalised_image(dinov2):
    image = gaussian(2, 3, 32, 48).clamp(-1, 1)
    pixels = F.interpolate(image, (56, 84), mode="bilinear", antialias=True) / 2 + 0.5
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    tokens = dinov2.model((pixels - mean) / std).last_hidden_state  # (B, 1 + h w, C), CLS first
    latents = dinov2.encoder(image)
    assert latents.shape == (2, 32, 4, 6)
    for i, j in np.ndindex(4, 6):
        torch.testing.assert_close(latents[:, :, i, j], tokens[:, 1 + 6 * i + j])


@torch.no_grad()
def test_a_latent_cell_answers_most_to_its_own_pixels(dinov2):
    image = torch.zeros(1, 3, 32, 48)
    image[:, :, 16:24, 8:16] = 1  # cell (2, 1)
    change = (dinov2.encoder(image) - dinov2.encoder(0 * image)).square().sum(1)[0]  # (h, w)
    assert divmod(change.argmax().item(), 6) == (2, 1)


def test_stage_2_trains_resumes_and_samples_with_dinov2(data, tiny_run, dinov2, tmp_path):
    command = ldm_command(data, tiny_run.ae, tmp_path / "run", f"dinov2={dinov2.folder}")
    for steps in ("2", "3"):
        train_ldm.main([*command, "--image-encoder", "dinov2", "--steps", steps])
    model = load_model(tmp_path / "run")
    assert model.unet.conv_in.weight.shape[1] == 4 + 32 + 4
    assert_same(model.image_encoder.layers.state_dict(), dinov2.model.state_dict())
    assert min(sample_with(tmp_path / "run", data, tmp_path / "samples")) > 1


# ---- the DDPM sampler ----


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("prediction, kind", [("eps", "epsilon"), ("v", "v_prediction")])
def test_ddpm_equals_diffusers_given_the_same_noise(
        stub_model, monkeypatch, prediction, kind, steps):
    def unet(inputs, t):
        mixed = torch.einsum("oc,bchw->bohw", gaussian(4, 24) / 30, inputs)
        return (mixed + t.view(-1, 1, 1, 1) / 1000).tanh()

    ours, theirs = (iter(gaussian(steps, 2, 4, 4, 4, seed=3)) for _ in range(2))
    monkeypatch.setattr(ldmseg, "seeded_noise", lambda *_: next(ours))
    monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor",
                        lambda *_, **__: next(theirs))
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        timestep_spacing="trailing", variance_type="fixed_small", prediction_type=kind)
    scheduler.set_timesteps(steps)
    z_image, noise = gaussian(2, 16, 4, 4, seed=1), gaussian(2, 4, 4, 4, seed=2)
    z_t, x0, expected = noise, torch.zeros_like(noise), []
    for t in scheduler.timesteps:
        step = scheduler.step(unet(torch.cat([z_t, z_image, x0], 1), t.expand(2)), t, z_t)
        z_t, x0 = step.prev_sample, step.pred_original_sample
        expected.append(x0)
    model = stub_model(unet, prediction=prediction)
    result = torch.stack(list(model.denoise(z_image, noise, steps, 1.0, [0, 1])))
    assert relative_error(result, torch.stack(expected)) < 1e-4


@pytest.mark.parametrize("steps", [3, 7, 20])
def test_ddpm_keeps_the_noise_of_every_timestep(stub_model, steps):
    """With a perfect UNet, z_t is Gaussian around sqrt(alpha_bar) x0 for any number of steps."""
    model, path = stub_model(None, prediction="eps"), []
    model.config = replace(model.config, size=1024)
    x0, noise = gaussian(1, 4, 128, 128), gaussian(1, 4, 128, 128, seed=1)

    def perfect(inputs, t):
        signal, deviation = model.schedule.signal_and_noise(t)
        path.append((inputs[:, :4] - signal * x0) / deviation)
        return path[-1]

    model.unet.function = perfect
    *_, result = model.denoise(torch.zeros(1, 16, 128, 128), noise, steps, 1.0, [5])
    torch.testing.assert_close(result, x0, rtol=1e-3, atol=1e-3)
    assert len(path) == steps
    for eps in path[1:]:
        assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02


def test_a_ddpm_sample_depends_on_its_own_seed_only(stub_model):
    model = stub_model(lambda inputs, t: (inputs[:, :4] + inputs[:, -4:]).sin())
    image = gaussian(3, 3, 32, 32)
    together, alone = model.sample(image, [6, 7, 8], 4, 1.0), model.sample(image[1:2], [7], 4, 1.0)
    torch.testing.assert_close(together[1:2], alone)
    noise = gaussian(1, 4, 4, 4).expand(2, 4, 4, 4)  # the same start for both
    *_, x0 = model.denoise(torch.zeros(2, 16, 4, 4), noise, 4, 1.0, [6, 7])
    assert relative_error(x0[0], x0[1]) > 0.01


@pytest.mark.parametrize("sampler, eta", [("ddim", 0), ("ddpm", 1)])
def test_the_sampler_flag_sets_eta(tiny_run, data, tmp_path, monkeypatch, sampler, eta):
    used, denoise = set(), LDMSeg.denoise
    monkeypatch.setattr(LDMSeg, "denoise", lambda self, z_image, noise, steps, eta, *rest: (
        used.add(eta) or denoise(self, z_image, noise, steps, eta, *rest)))
    sample_with(tiny_run.ldm, data, tmp_path, "--sampler", sampler)
    assert used == {eta}


# ---- codes and Gaussian latents ----


def test_bit_codes_are_the_bits_of_every_id():
    bits = ldmseg.int2bits(torch.arange(128).view(1, 1, -1), 7)[0, :, 0].T
    assert torch.equal(ldmseg.code_table(Config(bits=7)), bits)


@pytest.mark.parametrize("bits", [4, 7, 8])
@pytest.mark.parametrize("codes, columns", [("colour", 3), ("positional", 8)])
def test_every_id_has_its_own_code_and_void_is_zero(codes, columns, bits):
    table = ldmseg.code_table(Config(codes=codes, bits=bits))
    assert table.shape == (2**bits, columns) and table.abs().max() <= 1
    assert table[0].abs().max() == 0
    assert len(table.unique(dim=0)) == 2**bits


def test_a_positional_code_is_four_sines_then_four_cosines():
    table = ldmseg.code_table(Config(codes="positional", bits=4))
    angles = [math.pi * 2**k * (2 * 11 / 15 - 1) for k in range(4)]  # of id 11
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    torch.testing.assert_close(table[11], torch.tensor(expected), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gaussian_latents_have_the_kl_and_the_noise_of_their_variance():
    autoencoder = MaskAutoencoder(small_config(latents="gaussian"))
    last = autoencoder.encoder[-1]
    last.weight[4:], last.bias[4:] = 0, 0.8  # the log-variance
    ids, eps = torch.randint(0, 8, (3, 32, 32)), gaussian(3, 4, 4, 4)
    mean = autoencoder.encode(autoencoder.code(ids))
    logits, kl = autoencoder(ids, eps)
    latents, standard = (torch.distributions.Normal(*p) for p in ((mean, math.exp(0.4)), (0., 1.)))
    expected = torch.distributions.kl_divergence(latents, standard).sum((1, 2, 3)).mean()
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(logits, autoencoder.decode(mean + math.exp(0.4) * eps))
    torch.testing.assert_close(autoencoder.reconstruct(ids), autoencoder.decode(mean))


@pytest.mark.parametrize("options, columns", [
    (["codes=colour"], 3), (["codes=positional"], 8), (["latents=gaussian", "kl_weight=1e-3"], 3)])
def test_stage_1_trains_and_reports_miou_with(data, tmp_path, options, columns):
    train_ae.main(ae_command(data, tmp_path, *options))
    first, last = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert 0 < last["miou"] < 1 and load_model(tmp_path).encoder[0].weight.shape[1] == columns
    assert (first["kl"] > 0) == ("latents=gaussian" in options)
    parts = first["ce"] + first["bce"] + first["dice"] + 1e-3 * first["kl"]
    assert first["loss"] == pytest.approx(parts, rel=1e-5)


# ---- training at scale ----


def weights_of(run):
    return load_model(run).state_dict()


def test_checkpointing_recomputes_and_changes_no_weight(data, tiny_run, tmp_path, monkeypatch):
    calls, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint",
                        lambda *a, **k: calls.append(a) or checkpoint(*a, **k))
    train_ldm.main(ldm_command(data, tiny_run.ae, tmp_path, "checkpointing=1"))
    assert calls
    assert_same(weights_of(tmp_path), weights_of(tiny_run.ldm), 1e-5)


def test_compile_compiles_the_unet_and_changes_no_weight(data, tiny_run, tmp_path, monkeypatch):
    compiled, original = [], nn.Module.compile
    monkeypatch.setattr(ldmseg, "build_unet", ConvUNet)
    monkeypatch.setattr(nn.Module, "compile", lambda self: (
        compiled.append(type(self)) or original(self, backend="eager")))
    runs = [tmp_path / "0", tmp_path / "1"]
    for run in runs:
        train_ldm.main(ldm_command(data, tiny_run.ae, run, f"compile={run.name}"))
    assert compiled == [ConvUNet]
    assert_same(*map(weights_of, runs), 1e-5)


def train_on_rank(rank, folder, data, ae):
    """Stage 2 on one of two processes: three steps; two and a third with a sharded optimizer."""
    ldmseg.build_unet = ConvUNet
    make, kinds = train_ldm.make_optimizer, []
    train_ldm.make_optimizer = lambda *arguments: kinds.append(make(*arguments)) or kinds[-1]

    def main():
        for zero, steps in (0, 3), (1, 2), (1, 3):
            command = ldm_command(data, ae, folder / f"zero{zero}", f"zero={zero}")
            train_ldm.main([*command, "--steps", str(steps)])
            dist.barrier()  # the next one starts when rank 0 has saved

    with open(folder / f"rank{rank}.txt", "w") as file, contextlib.redirect_stdout(file):
        ldmseg.run_script(main)
    (folder / f"kinds{rank}.txt").write_text(" ".join(type(kind).__name__ for kind in kinds))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, data, tiny_run):
    """The folder of `train_on_rank`: what it printed, and the checkpoints without and with zero."""
    folder = tmp_path_factory.mktemp("sharded")
    on_two_ranks(train_on_rank, folder, data, tiny_run.ae)
    runs = [torch.load(folder / run / "checkpoint.pt") for run in ("zero0", "zero1")]
    return SimpleNamespace(folder=folder, runs=runs)


def test_a_sharded_optimizer_trains_and_resumes_like_a_whole_one(sharded):
    assert_same(*(run["model"] for run in sharded.runs), 1e-5)


def test_a_sharded_optimizers_checkpoint_holds_all_of_its_state(sharded):
    kinds = (sharded.folder / "kinds0.txt").read_text()
    assert kinds == "AdamW ZeroRedundancyOptimizer ZeroRedundancyOptimizer"
    one, two = (run["optimizer"]["state"] for run in sharded.runs)
    assert one.keys() == two.keys()
    for i in one:
        assert_same(one[i], two[i], 1e-5)


def test_rank_0_states_the_images_per_step(sharded):
    printed = [(sharded.folder / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert printed[0].startswith("4 images per step = 2 processes x 2 images x 1 accumulated\n")
    assert printed[1] == ""


# ---- bad input ----


@pytest.mark.parametrize("missing", ["unet/config.json", "vae/config.json"])
def test_a_folder_that_is_no_stable_diffusion_is_told_the_missing_file(
        complaint, data, tiny_run, sd_folder, tmp_path, missing):
    for part in {"unet", "vae"} - {missing.split("/")[0]}:
        (tmp_path / part).symlink_to(sd_folder / part)
    line = complaint(train_ldm.main, *sd_command(data, tiny_run.ae, tmp_path / "run", tmp_path))
    assert line.startswith(f"{tmp_path}: no {missing}")


XL = dict(block_out_channels=(32, 64, 64), up_block_types=("UpBlock2D",) * 3,
          down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"))


@pytest.mark.parametrize("changes, message", [
    (dict(use_linear_projection=True), "use_linear_projection True, expected False"),
    (dict(attention_head_dim=(2, 4)), "attention_head_dim [2, 4], expected 2"),
    (dict(norm_num_groups=16), "norm_num_groups 16, expected 32"),
    (dict(act_fn="gelu"), "act_fn gelu, expected silu"),
    (XL, "block_out_channels [32, 64, 64], expected (32, 64)")])
def test_another_version_of_stable_diffusion_is_told_what_differs(
        complaint, data, tiny_run, tmp_path, changes, message):
    folder = save_sd(tmp_path / "sd", **changes)
    command = ldm_command(data, tiny_run.ae, tmp_path / "run", *LIKE_UNET)
    line = complaint(train_ldm.main, *command, "--sd", folder)
    assert line.startswith(f"{folder}: ") and message in line


@pytest.mark.parametrize("kind, flags", [
    (diffusers.UNet2DConditionModel, ["--sd", "some/id"]),
    (diffusers.AutoencoderKL, ["--sd", "some/id", "--image-encoder", "sd"]),
    (transformers.Dinov2Model, ["--set", "dinov2=some/id", "--image-encoder", "dinov2"])])
def test_a_hub_id_that_cannot_be_reached_is_named(
        complaint, data, tiny_run, tmp_path, monkeypatch, kind, flags):
    def fail(*_, **__):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(kind, "from_pretrained", fail)
    line = complaint(train_ldm.main, *ldm_command(data, tiny_run.ae, tmp_path / "run"), *flags)
    assert line.startswith("some/id: ") and "We couldn't connect" in line


@pytest.mark.parametrize("main", [train_ldm.main, sample.main])
def test_fp16_on_cpu_is_refused(complaint, data, tiny_run, tmp_path, main):
    command = ["--weights", tiny_run.ldm, "--out", tmp_path, "--device", "cpu"]
    if main == train_ldm.main:
        command = ldm_command(data, tiny_run.ae, tmp_path)
    line = complaint(main, *command, "--amp", "fp16")
    assert "--amp fp16" in line and "bf16" in line


class Trap:
    """Unpickling it makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_file_that_needs_code_is_refused_and_not_run(complaint, data, tmp_path):
    torch.save({"vae": {"encoder.0.weight": Trap(str(tmp_path / "ran"))}}, tmp_path / "ae.pt")
    line = complaint(train_ldm.main, *ldm_command(data, tmp_path / "ae.pt", tmp_path / "run"))
    assert line.startswith(f"{tmp_path}/ae.pt: ") and "code" in line and "refused" in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4" + bytes(99)])
def test_a_file_that_is_no_checkpoint_is_named(complaint, data, tmp_path, content):
    (tmp_path / "ae.pt").write_bytes(content)
    line = complaint(train_ldm.main, *ldm_command(data, tmp_path / "ae.pt", tmp_path / "run"))
    assert line.startswith(f"{tmp_path}/ae.pt: ")
