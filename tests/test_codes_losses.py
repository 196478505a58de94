"""Mask codes, the autoencoder and its losses."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fill_by_rule, relative_error, small_config
from ldmseg import (
    PRESETS, MaskAutoencoder, ae_loss, bits2int, candidate_coords, int2bits, postprocess,
    random_relabel, sample_uncertain_points,
)  # fmt: skip

# ---- mask codes ----


@pytest.mark.parametrize("bits", [3, 7])
def test_bits_round_trip_for_every_id_and_void(bits):
    ids = torch.arange(2**bits).view(1, 2, -1)
    assert torch.equal(bits2int(int2bits(ids, bits)), ids)


def test_bits_are_plus_minus_one_least_significant_first():
    codes = int2bits(torch.tensor([[[1, 2, 6]]]), 3)  # (1, 3, 1, 3)
    assert codes[0, :, 0].T.tolist() == [[1, -1, -1], [-1, 1, -1], [-1, 1, 1]]


def test_void_is_zero_in_every_plane():
    codes = int2bits(torch.tensor([[[0, 5], [7, 0]]]), 3)
    assert codes.abs().sum(1).tolist() == [[[0, 3], [3, 0]]]


@pytest.mark.parametrize("id", [8, -1])
def test_an_id_outside_the_bits_is_an_error(id):
    with pytest.raises(ValueError, match="expected 0 to 7 with 3 bits"):
        int2bits(torch.tensor([[[1, id]]]), 3)


def test_random_relabel_keeps_the_partition_and_void():
    ids = torch.arange(8).repeat(2, 3)
    new = random_relabel(ids, 8, torch.Generator().manual_seed(1))
    pairs = set(zip(ids.flatten().tolist(), new.flatten().tolist()))
    assert (0, 0) in pairs
    assert {old for old, _ in pairs} == {id for _, id in pairs} == set(range(8))
    assert len(pairs) == 8


def test_random_relabel_gives_a_segment_every_id():
    generator, one = torch.Generator().manual_seed(0), torch.ones(1, 1, dtype=torch.long)
    drawn = {random_relabel(one, 4, generator).item() for _ in range(100)}
    assert drawn == {1, 2, 3}


# ---- autoencoder ----


def test_autoencoder_compresses_by_8_and_decodes_at_half_resolution():
    autoencoder = MaskAutoencoder(small_config())
    z = autoencoder.encode(torch.zeros(2, 3, 32, 48))
    assert z.shape == (2, 4, 4, 6)
    assert autoencoder.decode(z).shape == (2, 8, 16, 24)


def test_the_papers_autoencoder_has_the_released_parameters_but_the_log_variance():
    with torch.device("meta"):
        autoencoder = MaskAutoencoder(PRESETS["paper"])
    released, log_variance = 2_023_208, 4 * 256 * 3 * 3 + 4
    assert sum(p.numel() for p in autoencoder.parameters()) == released - log_variance


@pytest.fixture(scope="module")
def official_autoencoder(shared):
    """The paper's autoencoder filled like the released one, and the latter's values."""
    folder = shared / "golden" / "official"
    autoencoder = MaskAutoencoder(PRESETS["paper"])
    state = autoencoder.state_dict()
    names = json.loads((folder / "keys.json").read_text())["ae_keys"]
    assert len(state) == len(names)
    for ours, (key, shape) in zip(state, names):
        tensor = fill_by_rule(key, shape)
        if key.startswith("encoder.15"):
            tensor = tensor[:4]  # the other four channels are the log-variance
        assert state[ours].shape == tensor.shape, (ours, key)
        state[ours] = tensor
    autoencoder.load_state_dict(state)
    return autoencoder, np.load(folder / "ae.npz")


@torch.no_grad()
def test_latents_equal_the_released_code(official_autoencoder):
    autoencoder, expected = official_autoencoder
    z = autoencoder.encode(int2bits(torch.from_numpy(expected["ids"]).long(), 7))
    assert relative_error(z, expected["z"]) < 1e-4


@torch.no_grad()
def test_logits_equal_the_released_code(official_autoencoder):
    autoencoder, expected = official_autoencoder
    logits = autoencoder.decode(torch.from_numpy(expected["z"]))
    assert relative_error(logits[:, ::4, ::4, ::4], expected["logits"]) < 1e-4


@torch.no_grad()
def test_upsampling_by_2_equals_the_released_code(official_autoencoder):
    autoencoder, expected = official_autoencoder
    logits = autoencoder.decode(torch.from_numpy(expected["z"]))[:, ::8]
    for half, up in zip(logits, torch.from_numpy(expected["logits_up"])):
        ids = postprocess(half, (128, 192), mask_threshold=0, min_area=0)
        assert torch.equal(ids[::8, ::8], up.argmax(0))


def test_a_tiny_autoencoder_overfits_one_mask():
    torch.manual_seed(0)
    autoencoder = MaskAutoencoder(small_config())
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=3e-3)
    ids = torch.ones(1, 32, 32, dtype=torch.long)
    ids[:, 16:], ids[:, 4:20, 6:18], ids[:, 24:, 20:] = 2, 5, 7
    for step in range(150):
        coords = candidate_coords([step], 200, "cpu")
        loss, _ = ae_loss(autoencoder.reconstruct(ids), ids, coords, 200)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        logits = autoencoder.reconstruct(ids)[0]
    result = postprocess(logits, (32, 32), mask_threshold=0, min_area=0)
    assert (result == ids[0]).float().mean() > 0.99


# ---- losses ----


def test_the_most_uncertain_points_are_chosen_and_the_rest_as_they_come():
    uncertainty = torch.tensor([[0.1, 0.9, 0.3, 0.8, 0.2, 0.7, 0.4, 0.0, 0.6, 0.5, 0.3, 0.2, 1.0]])
    chosen = sample_uncertain_points(uncertainty, 4)  # 3 uncertain of 12 candidates, 1 at random
    assert sorted(chosen[0, :3].tolist()) == [1, 3, 5]
    assert chosen[0, 3:].tolist() == [12]


def random_case(size=32, points=30, seed=0):
    """logits (2, 8, H/2, W/2), ids (2, H, W) with VOID and 2 + 3 segments, coords (2, M, 2)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 8, size // 2, size // 2, generator=generator)
    ids = torch.full((2, size, size), 3)
    ids[0, : size // 2] = 0
    ids[0, size // 4 : 3 * size // 4, 5:20] = 6
    ids[1, 3:17, :11], ids[1, 20:, 9:], ids[1, 24:, 24:] = 1, 7, 0
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = 0
    return logits, ids, candidate_coords([seed + 1, seed + 2], points, "cpu")


def plain_ae_loss(logits, ids, coords, points):
    """ae_loss written as loops over images, segments and points."""
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


def test_ae_loss_equals_a_plain_implementation():
    logits, ids, coords = random_case()
    loss, parts = ae_loss(logits, ids, coords, 30)
    ce, bce, dice = plain_ae_loss(logits, ids, coords, 30)
    torch.testing.assert_close(parts, {"ce": ce, "bce": bce, "dice": dice})
    torch.testing.assert_close(loss, ce + bce + dice)


def test_gradient_of_ae_loss_equals_a_plain_implementation():
    logits, ids, coords = random_case(seed=5)
    logits.requires_grad_()
    ours = torch.autograd.grad(ae_loss(logits, ids, coords, 30)[0], logits)[0]
    plain = torch.autograd.grad(sum(plain_ae_loss(logits, ids, coords, 30)), logits)[0]
    torch.testing.assert_close(ours, plain)


def test_points_on_the_image_border_have_the_border_pixels_label():
    coords = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]]).repeat(4, 1)[None]  # (1, 16, 2)
    ids = torch.zeros(1, 32, 32, dtype=torch.long)
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        ids[0, row, column] = 3
    logits = torch.full((1, 8, 16, 16), -20.0)
    logits[:, 3] = 20
    assert ae_loss(logits, ids, coords, 4)[0] < 1e-4


def test_void_pixels_give_the_logits_no_gradient():
    logits, ids, coords = random_case()
    ids[:, :, :16] = 0
    logits.requires_grad_()
    ae_loss(logits, ids, coords, 30)[0].backward()
    gradient = logits.grad.abs().sum((0, 1, 2))  # per column at half resolution
    assert gradient[:7].max() == 0
    assert gradient[9:].min() > 0


def test_ae_loss_of_an_all_void_batch_is_zero():
    logits, ids, coords = random_case()
    logits.requires_grad_()
    loss, _ = ae_loss(logits, torch.zeros_like(ids), coords, 30)
    loss.backward()
    assert loss == 0 and logits.grad.abs().max() == 0


def test_ae_loss_saves_for_backward_no_full_map_per_segment():
    def saved_elements(segments, size=512, points=64):
        ids = torch.arange(size).mul(segments).div(size, rounding_mode="floor")
        ids = 1 + ids.expand(1, size, size)
        logits = torch.zeros(1, 16, size // 2, size // 2, requires_grad=True)
        counts = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: counts.append(tensor.numel()) or tensor, lambda tensor: tensor)
        with hooks:
            ae_loss(logits, ids, candidate_coords([0], points, "cpu"), points)
        return sum(counts)

    one_map = 256 * 256
    assert saved_elements(12) - saved_elements(2) < one_map


def test_candidates_depend_on_their_images_seed_only():
    both = candidate_coords([3, 4], 20, "cpu")
    assert torch.equal(both[1:], candidate_coords([4], 20, "cpu"))
    assert not torch.equal(both[0], both[1])


def test_candidates_cover_the_image():
    x, y = candidate_coords([0], 1000, "cpu")[0].T
    for coordinate in (x, y):
        assert -1 <= coordinate.min() < -0.99 and 0.99 < coordinate.max() <= 1
