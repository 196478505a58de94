"""Sec. 3.1: codes of masks, the shallow autoencoder and its loss (Eq. 2), the codes of Table S1,
Gaussian latents (Fig. 8), and the autoencoder of depth (Supp. A)."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ae_command, gaussian, logged, small_config
from ldmseg import (
    PRESETS, Config, MaskAutoencoder, Upsample, UserError, ae_loss, bits2int, code_table,
    int2bits, load_model,
)  # fmt: skip
from train_ae import candidate_coords, depth_loss, main

def plain_ae_loss(logits, ids, coords, points):
    """An oracle: the three parts of `ae_loss`, as loops over images, segments and points."""
    def at_points(maps, mode):
        grid = coords[image : image + 1, :, None]
        sampled = F.grid_sample(maps[None].float(), grid, mode, "border", align_corners=False)
        return sampled[0, :, :, 0]  # (C, M)

    def most_uncertain(uncertainty):
        rest = points - int(0.75 * points)
        order = sorted(range(M - rest), key=lambda m: uncertainty[m], reverse=True)
        return order[: points - rest] + list(range(M - rest, M))

    M = coords.shape[1]
    ce, bce, dice = [], [], []
    for image in range(len(ids)):
        values = at_points(logits[image], "bilinear")
        labels = at_points(ids[image][None], "nearest")[0].long().tolist()
        uncertainty = [-1e9] * M
        for m in range(M):
            if labels[m] != 0:
                first, second = sorted(values[:, m].tolist(), reverse=True)[:2]
                uncertainty[m] = second - first
        for m in most_uncertain(uncertainty):
            if labels[m] != 0:
                ce.append(values[:, m].logsumexp(0) - values[labels[m], m])
        for segment in set(ids[image].flatten().tolist()) - {0}:
            truth = at_points((ids[image] == segment)[None], "bilinear")[0]
            logit = values[segment]
            uncertainty = [-abs(logit[m].item()) if labels[m] else -1e9 for m in range(M)]
            chosen = [m for m in most_uncertain(uncertainty) if labels[m] != 0]
            p, y = logit[chosen].sigmoid(), truth[chosen]
            bce.append(-(y * p.log() + (1 - y) * (1 - p).log()).mean())
            dice.append(1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1))
    return [sum(part) / len(part) for part in (ce, bce, dice)]

def coords_of(*seeds, points=30):
    return candidate_coords([np.random.default_rng(seed) for seed in seeds], points, "cpu")

def random_case(seed=0, size=32):
    """logits (2, 8, H/2, W/2), ids (2, H, W) with VOID and 2 + 3 segments, coords (2, M, 2)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 8, size // 2, size // 2, generator=generator)
    ids = torch.full((2, size, size), 3)
    ids[0, : size // 2] = 0
    ids[0, size // 4 : 3 * size // 4, 5:20] = 6
    ids[1, 3:17, :11], ids[1, 20:, 9:], ids[1, 24:, 24:] = 1, 7, 0
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = 0
    return logits, ids, coords_of(seed + 1, seed + 2)

@pytest.mark.parametrize("seed", [0, 5])
def test_ae_loss_and_its_gradient_equal_a_plain_implementation(seed):
    logits, ids, coords = random_case(seed)
    logits.requires_grad_()
    loss, parts = ae_loss(logits, ids, coords, 30)
    expected = plain_ae_loss(logits, ids, coords, 30)
    torch.testing.assert_close([*parts.values()], [part.detach() for part in expected])
    torch.testing.assert_close(loss, sum(expected))
    ours, plain = (torch.autograd.grad(total, logits) for total in (loss, sum(expected)))
    torch.testing.assert_close(ours, plain)

def test_the_loss_of_masks_that_are_all_void_is_0_and_has_no_gradient():
    logits, ids, coords = random_case()
    loss, _ = ae_loss(logits.requires_grad_(), 0 * ids, coords, 30)
    loss.backward()
    assert loss == 0 and not logits.grad.any()

def test_candidates_are_an_images_own_and_cover_it():
    both = coords_of(3, 4, points=1000)
    assert both.shape == (2, 3 * 1000 + 250, 2)
    assert torch.equal(both[1:], coords_of(4, points=1000)) and not torch.equal(both[0], both[1])
    for coordinate in both.unbind(2):
        assert -1 <= coordinate.min() < -0.99 and 0.99 < coordinate.max() <= 1

# ---- codes ----

def test_bits_are_plus_minus_one_least_significant_first_and_void_is_zero():
    codes = int2bits(torch.tensor([[[1, 2, 6, 0]]]), 3)  # (1, 3, 1, 4)
    assert codes[0, :, 0].T.tolist() == [[1, -1, -1], [-1, 1, -1], [-1, 1, 1], [0, 0, 0]]
    assert bits2int(codes).tolist() == [[[1, 2, 6, 0]]]

@pytest.mark.parametrize("id", [8, -1])
def test_an_id_outside_the_bits_is_an_error(id):
    with pytest.raises(UserError, match="expected 0 to 7 with 3 bits"):
        int2bits(torch.tensor([[[1, id]]]), 3)

@pytest.mark.parametrize("bits", [4, 7])
@pytest.mark.parametrize("codes, columns", [("bit", None), ("colour", 3), ("positional", 8)])
def test_every_id_has_its_own_code_and_void_is_zero(codes, columns, bits):
    table = code_table(Config(codes=codes, bits=bits))
    assert table.shape == (2**bits, columns or bits) and table.abs().max() <= 1
    assert table[0].abs().max() == 0 and len(table.unique(dim=0)) == 2**bits

def test_colour_codes_are_points_of_a_regular_grid():
    table = code_table(Config(codes="colour", bits=4))[1:]  # 15 of the 4 x 4 x 4
    torch.testing.assert_close(table.unique(), torch.tensor([-1, -1 / 3, 1 / 3, 1]))

def test_a_positional_code_is_four_sines_then_four_cosines():
    table = code_table(Config(codes="positional", bits=4))
    angles = [math.pi * 2**k * (2 * 11 / 15 - 1) for k in range(4)]  # of id 11
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    torch.testing.assert_close(table[11], torch.tensor(expected), rtol=1e-5, atol=1e-5)

# ---- autoencoder ----

@pytest.mark.parametrize("latents, expected", [
    ("gaussian", 2_023_208), ("deterministic", 2_023_208 - 4 * 256 * 3 * 3 - 4)])
def test_the_papers_autoencoder_has_the_released_parameters(latents, expected):
    with torch.device("meta"):
        autoencoder = MaskAutoencoder(replace(PRESETS["paper"], latents=latents))
    assert sum(p.numel() for p in autoencoder.parameters()) == expected

def test_upsampling_is_a_transposed_convolution():
    up, x = Upsample(8), gaussian(2, 8, 3, 5)
    torch.testing.assert_close(up(x), F.conv_transpose2d(x, up.weight, up.bias, stride=2))

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
    main(ae_command(data, tmp_path, *options))
    first, last = logged(tmp_path)
    assert 0 < last["miou"] < 1 and load_model(tmp_path).encoder[0].weight.shape[1] == columns
    assert (first["kl"] > 0) == ("latents=gaussian" in options)
    parts = first["ce"] + first["bce"] + first["dice"] + 1e-3 * first["kl"]
    assert first["loss"] == pytest.approx(parts, rel=1e-5)

def test_depth_loss_upsamples_by_2_and_is_the_mean_absolute_error_over_valid_pixels():
    """0, 1 becomes 0, 1/4, 3/4, 1: in both rows errors of 3/4 and 1, in the second image of 1."""
    output = torch.tensor([0.0, 1.0]).expand(2, 1, 1, 2)
    depth = torch.tensor([math.nan, 1, math.nan, 0]).repeat(2, 2, 1)
    depth[1, :, 1] = math.nan
    assert depth_loss(output, depth).item() == pytest.approx((2 * 3 / 4 + 4 * 1) / 6)
    assert depth_loss(output, depth * math.nan) == 0
