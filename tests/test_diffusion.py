"""Noise schedule, UNet, diffusion loss and sampler."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fill_by_rule, relative_error, small_config
from diffusers import DDIMScheduler
from ldmseg import (
    PRESETS, Config, NoiseSchedule, build_unet, int2bits, seeded_noise, stable_seed,
)  # fmt: skip
from train_ldm import timesteps_of


@pytest.fixture(scope="module")
def golden(shared):
    return shared / "golden" / "official"


def ddim_scheduler(**options):
    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                         clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing",
                         **options)  # fmt: skip


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- noise schedule (Eq. 3) ----


def test_alpha_bar_equals_diffusers():
    assert relative_error(NoiseSchedule().alpha_bar, ddim_scheduler().alphas_cumprod) < 1e-5


def test_alpha_bar_equals_the_released_code(golden):
    expected = np.load(golden / "sched.npz")["alphas_cumprod"]
    np.testing.assert_allclose(NoiseSchedule().alpha_bar, expected, rtol=1e-4)


def test_add_noise_mixes_signal_and_noise_by_alpha_bar():
    schedule = NoiseSchedule()
    schedule.alpha_bar[[10, 20]] = torch.tensor([0.64, 0.36])
    x0, eps = torch.full((2, 4, 1, 1), 10.0), torch.full((2, 4, 1, 1), 100.0)
    z_t = schedule.add_noise(x0, eps, torch.tensor([10, 20]))
    torch.testing.assert_close(z_t[:, 0, 0, 0], torch.tensor([8 + 60.0, 6 + 80.0]))


def test_predict_x0_with_the_true_noise_inverts_add_noise():
    schedule, t = NoiseSchedule(), torch.tensor([0, 1, 499, 999])
    x0, eps = gaussian(4, 4, 2, 2), gaussian(4, 4, 2, 2, seed=1)
    recovered = schedule.predict_x0(schedule.add_noise(x0, eps, t), eps, t)
    torch.testing.assert_close(recovered, x0, rtol=1e-4, atol=1e-4)


def test_paper_weights_rise_linearly_over_a_quarter_then_stay_1():
    weights = NoiseSchedule().weights("paper")[[0, 24, 124, 249, 250, 999]]
    torch.testing.assert_close(weights, torch.tensor([0.004, 0.1, 0.5, 1, 1, 1]))


def test_released_weights_clamp_the_signal_to_noise_ratio_at_2():
    schedule = NoiseSchedule()
    schedule.alpha_bar[[0, 1, 2, 3]] = torch.tensor([0.99, 0.8, 0.5, 0.01])  # SNR 99, 4, 1, 1/99
    weights = schedule.weights("released")[:4]
    torch.testing.assert_close(weights, torch.tensor([2 / 99, 0.5, 1, 1]))


def test_released_weights_equal_the_released_code(golden):
    expected = np.load(golden / "sched.npz")["w_max_clamp_snr"]
    np.testing.assert_allclose(NoiseSchedule().weights("released"), expected, rtol=1e-4)


def test_weights_none_are_1():
    assert NoiseSchedule().weights("none").unique().tolist() == [1]


@pytest.mark.parametrize("steps, expected", [
    (1, [999]), (3, [999, 666, 332]), (4, [999, 749, 499, 249]),
    (7, [999, 856, 713, 570, 428, 285, 142]), (50, list(range(999, 0, -20))),
    (1000, list(range(999, -1, -1))),
])  # fmt: skip
def test_timesteps_are_evenly_spaced_from_the_noisiest(steps, expected):
    assert NoiseSchedule().timesteps(steps) == expected


@pytest.mark.parametrize("steps", [0, 1001])
def test_an_impossible_number_of_steps_is_an_error(steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps, expected 1 to 1000"):
        NoiseSchedule().timesteps(steps)


# ---- UNet ----


@pytest.fixture(scope="module")
def official_unet(golden):
    """The UNet of the reference values, by build_unet, filled by their rule."""
    keys = json.loads((golden / "keys.json").read_text())
    about = keys["unet_cfg"]
    config = Config(size=64, prediction="eps", unet_widths=tuple(about["block_out_channels"]),
                    unet_attention=(1, 1, 1, 0), unet_layers=about["layers_per_block"],
                    unet_heads=about["attention_head_dim"])  # fmt: skip
    unet = build_unet(config, image_channels=4).eval()
    unet.load_state_dict({key: fill_by_rule(key, shape) for key, shape in keys["unet_keys"]})
    return unet


@torch.no_grad()
def test_unet_equals_the_released_code(official_unet, golden):
    expected = np.load(golden / "unet.npz")
    inputs, t = torch.from_numpy(expected["inp"]), torch.from_numpy(expected["t"])
    output = official_unet(inputs, t, encoder_hidden_states=None).sample
    assert relative_error(output, expected["eps"]) < 1e-4


def test_the_papers_unet_has_815_556_484_parameters():
    with torch.device("meta"):
        unet = build_unet(PRESETS["paper"], image_channels=4)
    assert sum(p.numel() for p in unet.parameters()) == 815_556_484


def test_an_untrained_unet_predicts_a_constant():
    config = small_config()
    unet = build_unet(config, image_channels=16)
    output = unet(gaussian(2, 24, 4, 4), torch.tensor([3, 700]), encoder_hidden_states=None).sample
    assert output.shape == (2, 4, 4, 4)
    torch.testing.assert_close(output, unet.conv_out.bias.view(1, 4, 1, 1).expand_as(output))


# ---- prediction ----


def exact_output(model, x0, eps):
    """The output that a perfect UNet gives for these x0 and eps."""
    if model.config.prediction == "eps":
        return lambda inputs, t: eps
    alpha_bar = model.schedule.alpha_bar
    return lambda inputs, t: (alpha_bar[t].sqrt().view(-1, 1, 1, 1) * eps
                              - (1 - alpha_bar[t]).sqrt().view(-1, 1, 1, 1) * x0)  # fmt: skip


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_an_exact_output_gives_the_true_x0_and_eps(stub_model, prediction):
    model = stub_model(None, prediction=prediction)
    x0, eps, t = gaussian(3, 4, 4, 4), gaussian(3, 4, 4, 4, seed=1), torch.tensor([0, 500, 999])
    model.unet.function = exact_output(model, x0, eps)
    z_t, nothing = model.schedule.add_noise(x0, eps, t), torch.zeros(3, 0, 4, 4)
    _, x0_predicted, eps_predicted = model.predict(z_t, nothing, nothing, t)
    torch.testing.assert_close(x0_predicted, x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(eps_predicted, eps, rtol=1e-4, atol=1e-4)


def test_unet_input_is_z_t_then_image_then_previous_x0(stub_model):
    seen = []
    model = stub_model(lambda inputs, t: seen.append(inputs) or inputs[:, :4])
    z_t, z_image, x0_previous = (torch.full((1, c, 4, 4), float(c)) for c in (4, 16, 2))
    model.predict(z_t, z_image, x0_previous, torch.tensor([5]))
    assert seen[0][0, :, 0, 0].tolist() == [4.0] * 4 + [16.0] * 16 + [2.0] * 2


def test_latents_are_scaled_on_the_way_in_and_back_on_the_way_out(stub_model):
    model = stub_model(None, image_scale=3.0)
    ids, image = torch.full((1, 32, 32), 5), gaussian(1, 3, 32, 32)
    with torch.no_grad():
        z = model.autoencoder.encode(int2bits(ids, 3))
        torch.testing.assert_close(model.encode_mask(ids), 0.5 * z)
        torch.testing.assert_close(model.decode(0.5 * z), model.autoencoder.decode(z))
        torch.testing.assert_close(model.encode_image(image), 3 * model.image_encoder(image))


# ---- loss (Eq. 4) ----


def loss_inputs(batch=2):
    """image, ids without VOID, eps and t for stub_model's size."""
    ids = torch.ones(batch, 32, 32, dtype=torch.long)
    ids[:, 10:], ids[:, :, 20:] = 4, 6
    return gaussian(batch, 3, 32, 32), ids, gaussian(batch, 4, 4, 4, seed=1), torch.arange(batch)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_loss_of_a_perfect_prediction_is_0(stub_model, prediction):
    model = stub_model(None, prediction=prediction)
    image, ids, eps, _ = loss_inputs()
    t = torch.tensor([30, 900])
    perfect = exact_output(model, model.encode_mask(ids), eps)
    model.unet.function = perfect
    assert model.diffusion_loss(image, ids, eps, t, False) < 1e-10
    model.unet.function = lambda *inputs: perfect(*inputs) + 0.1
    torch.testing.assert_close(model.diffusion_loss(image, ids, eps, t, False).item(),
                               (31 / 250 + 1) / 2 * 0.01, rtol=1e-4, atol=0)  # fmt: skip


def test_loss_weights_multiply_each_images_error(stub_model):
    model = stub_model(lambda inputs, t: torch.zeros(2, 4, 4, 4), prediction="eps")
    image, ids, _, _ = loss_inputs()
    model.loss_weights[[7, 8]] = torch.tensor([10.0, 100.0])
    eps = torch.ones(2, 4, 4, 4)
    eps[1] = 3
    loss = model.diffusion_loss(image, ids, eps, torch.tensor([7, 8]), False)
    torch.testing.assert_close(loss.item(), (10 * 1 + 100 * 9) / 2)


def test_a_cell_counts_if_its_centre_pixel_is_not_void(stub_model):
    output = torch.zeros(1, 4, 4, 4, requires_grad=True)
    model = stub_model(lambda inputs, t: output)
    image, ids, eps, t = loss_inputs(batch=1)
    ids[0, :8, 8:] = 0  # all cells of the first row but one
    ids[0, 20, 12] = 0  # the centre of cell (2, 1)
    ids[0, 24:, :] = 0
    ids[0, 28, 4::8] = 5  # but not the centres of the last row
    model.diffusion_loss(image, ids, eps, t, False).backward()
    counted = output.grad.abs().sum((0, 1)) > 0
    assert counted.int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]]


def test_the_loss_is_a_mean_over_cells_that_count(stub_model):
    model = stub_model(lambda inputs, t: torch.zeros(2, 4, 4, 4), prediction="eps",
                       loss_weights="none")
    image, ids, _, t = loss_inputs()
    ids[0, :, 8:] = 0  # 4 cells of the first image and 16 of the second count
    eps = torch.ones(2, 4, 4, 4)
    eps[0] = 3
    loss = model.diffusion_loss(image, ids, eps, t, False)
    torch.testing.assert_close(loss.item(), (4 * 9 + 16 * 1) / 20)


def test_the_loss_of_an_all_void_batch_is_0(stub_model):
    output = torch.ones(2, 4, 4, 4, requires_grad=True)
    model = stub_model(lambda inputs, t: output)
    image, ids, eps, t = loss_inputs()
    loss = model.diffusion_loss(image, torch.zeros_like(ids), eps, t, False)
    loss.backward()
    assert loss == 0 and output.grad.abs().max() == 0


def test_self_conditioning_feeds_the_first_estimate_without_gradient(stub_model):
    weight, calls = torch.ones((), requires_grad=True), []

    def unet(inputs, t):
        calls.append((inputs, weight * (inputs[:, :4] + 1)))
        return calls[-1][1]

    model = stub_model(unet, prediction="eps")
    image, ids, eps, t = loss_inputs()
    model.diffusion_loss(image, ids, eps, t, True).backward()
    (first_input, first_output), (second_input, second_output) = calls
    assert first_input[:, -4:].abs().max() == 0
    estimate = model.schedule.predict_x0(first_input[:, :4], first_output, t)
    assert torch.equal(second_input[:, -4:], estimate)
    assert not first_output.requires_grad and second_output.requires_grad


def test_without_self_conditioning_the_previous_x0_is_zero(stub_model):
    calls = []
    model = stub_model(lambda inputs, t: calls.append(inputs) or inputs[:, :4])
    model.diffusion_loss(*loss_inputs(), False)
    assert len(calls) == 1 and calls[0][:, -4:].abs().max() == 0


def test_the_image_encoder_learns_and_the_autoencoder_is_frozen(stub_model):
    model = stub_model(lambda inputs, t: inputs[:, 4:8])
    model.diffusion_loss(*loss_inputs(), True).backward()
    assert all(p.grad is not None for p in model.image_encoder.parameters())
    assert not any(p.requires_grad for p in model.autoencoder.parameters())


# ---- sampler (Eq. 5, Alg. 2) ----


@pytest.mark.parametrize("steps", [1, 3, 7, 50])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ddim_with_a_perfect_unet_stays_on_one_path_and_ends_at_x0(stub_model, prediction, steps):
    model = stub_model(None, prediction=prediction)
    x0, noise, path = gaussian(2, 4, 4, 4), gaussian(2, 4, 4, 4, seed=1), []
    first = torch.tensor(999)
    eps = (noise - model.schedule.alpha_bar[999].sqrt() * x0) / (
        1 - model.schedule.alpha_bar[999]).sqrt()
    torch.testing.assert_close(model.schedule.add_noise(x0, eps, first), noise)

    def perfect(inputs, t):
        path.append((inputs[:, :4], t))
        return exact_output(model, x0, eps)(inputs, t)

    model.unet.function = perfect
    *_, result = model.denoise(torch.zeros(2, 16, 4, 4), noise, steps)
    torch.testing.assert_close(result, x0, rtol=1e-3, atol=1e-3)
    assert len(path) == steps
    for z_t, t in path:
        expected = model.schedule.add_noise(x0, eps, t)
        torch.testing.assert_close(z_t, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ddim_equals_diffusers(stub_model, prediction, steps):
    mix = gaussian(4, 24) / 30

    def unet(inputs, t):
        mixed = torch.einsum("oc,bchw->bohw", mix, inputs) + t.view(-1, 1, 1, 1) / 1000
        return mixed.tanh()

    model = stub_model(unet, prediction=prediction)
    z_image, noise = gaussian(2, 16, 4, 4, seed=1), gaussian(2, 4, 4, 4, seed=2)
    kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    scheduler = ddim_scheduler(prediction_type=kind)
    scheduler.set_timesteps(steps)
    z_t, x0, expected = noise, torch.zeros_like(noise), []
    for t in scheduler.timesteps:
        output = unet(torch.cat([z_t, z_image, x0], 1), t.expand(2))
        step = scheduler.step(output, t, z_t)
        z_t, x0 = step.prev_sample, step.pred_original_sample
        expected.append(x0)
    ours = list(model.denoise(z_image, noise, steps))
    assert relative_error(torch.stack(ours), torch.stack(expected)) < 1e-4
    assert relative_error(ours[-1], z_t) < 1e-4


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
@torch.no_grad()
def test_denoising_equals_the_released_code(official_unet, golden, stub_model, steps):
    expected = np.load(golden / "sched.npz")
    model = stub_model(None, prediction="eps")
    model.unet = official_unet
    z_image, noise = torch.from_numpy(expected["z_i"]), torch.from_numpy(expected["z_T"])
    *_, result = model.denoise(z_image, noise, steps)
    assert relative_error(result, expected[f"S{steps}"]) < 1e-4


def test_samples_depend_on_their_own_seed_and_image_only(stub_model):
    model = stub_model(lambda inputs, t: (inputs[:, :4] + inputs[:, 4:8] + inputs[:, -4:]).sin())
    image = gaussian(3, 3, 32, 32)
    together = model.sample(image, [5, 6, 7], 3)
    alone = model.sample(image[1:2], [6], 3)
    torch.testing.assert_close(together[1:2], alone)
    other = model.sample(image[1:2], [8], 3)
    assert relative_error(other, alone) > 0.01


# ---- seeds ----


def test_noise_is_standard_normal_and_each_elements_own():
    config = SimpleNamespace(latent_channels=4, size=256)
    noise = seeded_noise([1, 2, 3], config, "cpu")
    assert noise.shape == (3, 4, 32, 32)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert torch.equal(noise[1:], seeded_noise([2, 3], config, "cpu"))
    assert not torch.equal(noise[0], noise[1])


def test_timesteps_of_training_are_uniform_over_the_whole_range():
    t = timesteps_of([stable_seed(0, "noise", i) for i in range(5000)])
    counts = torch.histc(t.float(), 10, 0, 1000)
    assert t.min() < 5 and 994 < t.max() < 1000
    assert counts.min() > 400 and counts.max() < 600


def test_a_seed_is_the_same_in_every_process():
    assert stable_seed(0, "noise", 7) == 3490647739  # CRC-32 of the text (0, 'noise', 7)
