"""Configuration, optimizer, run folders and the loop over a data set."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import SCENES, small_config
from ldmseg import (
    PRESETS, Config, Meter, colorize, evaluate_tasks, learning_rate, load_model, make_ema,
    make_optimizer, open_dataset, overlay, override, predict_dataset, replacing,
    save_weights, stable_seed,
)  # fmt: skip

# ---- configuration ----


def test_set_converts_to_the_fields_type():
    config = override(Config(), ["bits=7", "ae_lr=1e-3", "ae_widths=8,16,32,32", "prediction=eps"])
    changed = config.bits, config.ae_lr, config.ae_widths, config.prediction
    assert changed == (7, 1e-3, (8, 16, 32, 32), "eps")


@pytest.mark.parametrize("assignment, message", [
    ("nope=1", "--set nope=1: expected FIELD=VALUE"), ("bits", "--set bits: expected FIELD=VALUE"),
    ("preset=paper", "--set preset=paper"), ("bits=few", "--set bits: got 'few', expected int"),
    ("ae_widths=8,x", "--set ae_widths: got '8,x', expected tuple"),
])  # fmt: skip
def test_set_names_what_it_cannot_use(assignment, message):
    with pytest.raises(ValueError, match=message):
        override(Config(), [assignment])


@pytest.mark.parametrize("field, value", [
    ("prediction", "x0"), ("loss_weights", "snr"), ("lr_schedule", "step"),
    ("image_encoder", "vgg"), ("size", 40), ("size", 0), ("bits", 0),
    ("bits", 11), ("ae_steps", 0), ("ldm_batch", -1), ("points", 0),
])  # fmt: skip
def test_an_impossible_value_is_an_error_that_names_the_field(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}, expected"):
        Config(**{field: value})


def test_the_paper_preset_has_the_papers_numbers():
    paper = PRESETS["paper"]
    assert (paper.size, paper.num_ids, paper.points) == (512, 128, 12544)
    assert (paper.prediction, paper.mask_scale, paper.image_scale) == ("eps", 0.18215, 0.18215)
    assert (paper.ae_batch, paper.ae_lr, paper.ldm_lr) == (16, 1e-4, 1e-4)
    assert (paper.weight_decay, paper.ae_clip, paper.ldm_clip) == (0.05, 3, 1)


# ---- optimizer ----


@pytest.mark.parametrize("step, expected", [(0, 0.25), (3, 1), (4, 1), (99, 1)])
def test_the_learning_rate_warms_up_and_stays(step, expected):
    assert learning_rate(step, 100, 1.0, Config(warmup=4)) == expected


@pytest.mark.parametrize("step, share", [(4, 1), (28, 0.5 + 8**-0.5), (52, 0.5), (100, 0)])
def test_the_cosine_schedule_falls_from_the_peak_to_1e_minus_6(step, share):
    expected = 1e-6 + share * (0.1 - 1e-6)
    got = learning_rate(step, 100, 0.1, Config(warmup=4, lr_schedule="cosine"))
    assert got == pytest.approx(expected, rel=1e-9)


def test_weight_decay_spares_norms_and_biases():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    for p in model.parameters():
        nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    make_optimizer(model, 0.5, Config(weight_decay=0.1)).step()
    assert torch.allclose(model[0].weight, torch.tensor(0.95))
    for p in (model[0].bias, model[1].weight, model[1].bias):
        assert torch.equal(p, torch.ones(2))


def test_frozen_parameters_are_not_optimized():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    groups = make_optimizer(model, 0.1, Config()).param_groups
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model[0].parameters()}


def test_the_moving_average_warms_up_to_its_decay():
    model = nn.Linear(1, 1, bias=False)
    ema, averages = make_ema(model, 0.25), []
    for weight in (0.0, 11.0, 0.0, 0.0):
        nn.init.constant_(model.weight, weight)
        ema.update_parameters(model)
        averages.append(ema.module.weight.item())
    # the first weights, then decays 2/11, 3/12 and min(1/4, 4/13)
    assert averages == pytest.approx([0, 9, 9 / 4, 9 / 16])


def test_the_moving_average_keeps_one_copy_of_frozen_weights_and_of_all_where_it_is_off():
    for decay, shared in ((0.9, [False, True]), (0, [True, True])):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
        ema = make_ema(model, decay)
        nn.init.constant_(model[0].weight, 5.0)
        for _ in range(2):
            ema.update_parameters(model)
        pairs = zip(ema.module, model)
        assert [a.weight.data_ptr() == w.weight.data_ptr() for a, w in pairs] == shared
        torch.testing.assert_close(ema.module[0].weight, model[0].weight)


@pytest.mark.parametrize("fields, message", [
    ({"ae_widths": (8, 16, 32)}, r"ae_widths is \(8, 16, 32\), expected 4 numbers"),
    ({"ae_widths": (8, 16, 32, 40)}, "ae_widths end in 40, expected a multiple of 32"),
    ({"stem_widths": (8,)}, "expected 3 numbers"),
    ({"unet_attention": (1,)}, "expected 2 numbers"),
])  # fmt: skip
def test_widths_that_do_not_fit_are_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_a_kl_weight_without_gaussian_latents_is_an_error():
    with pytest.raises(ValueError, match="kl_weight is 0.1, which needs latents=gaussian"):
        Config(kl_weight=0.1)


# ---- numbers and files ----


def test_the_meter_gives_means_over_batches():
    meter = Meter()
    for value in (1.0, 3.0):
        meter.add(4, loss=torch.tensor(value), ce=torch.tensor(2 * value))
    result = meter.means()
    assert (result["loss"], result["ce"]) == (2, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error(value):
    meter = Meter()
    meter.add(4, loss=torch.tensor(1.0))
    meter.add(4, loss=torch.tensor(value))
    with pytest.raises(ValueError, match=f"loss is {value}"):
        meter.means()


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_weights_in_half_precision_load_within_its_rounding(tmp_path, stub_model):
    model = stub_model(None)
    save_weights(tmp_path / "half.safetensors", model, model.config, 7, torch.float16)
    loaded = load_model(tmp_path / "half.safetensors")
    for ours, theirs in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)
    assert loaded.config == model.config


def test_the_autoencoder_of_a_full_model_is_its_stage_1(tiny_run):
    first, second = load_model(tiny_run.ae), load_model(tiny_run.ldm).autoencoder
    for ours, theirs in zip(second.state_dict().values(), first.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_stage_2_scales_latents_to_the_chosen_deviation(tiny_run):
    last = json.loads((tiny_run.ae / "log.jsonl").read_text().splitlines()[-1])
    config = load_model(tiny_run.ldm).config
    assert config.mask_scale == pytest.approx(config.mask_std / last["latent_std"])


# ---- a model over a data set ----


def batches_of(dataset, monkeypatch, rank=0, world=1, seed=0, limit=None):
    """(index, noise seed, ids) of each image that predict_dataset shows the model."""
    monkeypatch.setattr("ldmseg.rank_and_world", lambda: (rank, world))
    seen = []

    def logits_of(batch):
        seen.extend(zip(batch["seed"], batch["ids"].tolist()))
        return torch.zeros(len(batch["seed"]), 8, 16, 16)

    results = predict_dataset(logits_of, dataset, small_config(), "cpu", seed=seed, limit=limit)
    return [(index, *pair) for (index, *_), pair in zip(list(results), seen, strict=True)]


def test_noise_and_ids_of_an_image_depend_on_its_id_and_the_seed_only(data, monkeypatch):
    dataset = open_dataset(str(data), "train", None, 32, "val")
    forward = batches_of(dataset, monkeypatch)
    dataset.records = dataset.records[2:0:-1]
    backward = batches_of(dataset, monkeypatch)
    assert [b[1:] for b in backward] == [forward[2][1:], forward[1][1:]]
    assert len({seed for _, seed, _ in forward}) == 3
    assert batches_of(dataset, monkeypatch, seed=1)[0][1] != backward[0][1]
    assert backward[0][1] == stable_seed(0, 12)


def test_ranks_share_the_images_and_see_them_as_one_process_does(monkeypatch, data):
    dataset = open_dataset(str(data), "train", None, 32, "val")
    alone = batches_of(dataset, monkeypatch)
    shared = [batches_of(dataset, monkeypatch, rank, 2) for rank in (0, 1)]
    assert [len(part) for part in shared] == [2, 1]
    assert sorted(shared[0] + shared[1]) == alone


def test_limit_takes_the_first_images(monkeypatch, data):
    dataset = open_dataset(str(data), "train", None, 32, "val")
    assert [index for index, *_ in batches_of(dataset, monkeypatch, limit=2)] == [0, 1]


def test_a_perfect_model_misses_only_the_filtered_truth(data):
    def perfect(batch):
        half = nn.functional.one_hot(batch["ids"][:, ::2, ::2], 8).float()
        return [{"instance": 50 * one} for one in half.permute(0, 3, 1, 2)]

    dataset = open_dataset(str(data), None, None, 32, "val")
    config = replace(small_config(), min_area=0)
    result, kept = evaluate_tasks(["instance"], perfect, dataset, config, "cpu", pictures=1)
    row = result["instance"]["per_class"]["1"]
    assert (row["tp"], row["fp"], row["fn"]) == (4, 0, 0) and row["sq"] > 0.9
    assert kept[0][1]["instance"].shape == SCENES["val"][0][:2] and len(kept) == 1
    config = replace(small_config(), min_area=800)
    result, _ = evaluate_tasks(["instance"], perfect, dataset, config, "cpu")
    row = result["instance"]["per_class"]["1"]
    assert (row["tp"], row["fp"], row["fn"]) == (3, 0, 1)


def test_void_is_black_and_ids_have_colours_of_their_own():
    colours = colorize(np.arange(20)[None])[0]
    assert colours[0].tolist() == [0, 0, 0]
    assert len({tuple(colour) for colour in colours.tolist()}) == 20


def test_an_overlay_shows_the_image_where_it_is_void():
    image = np.full((1, 2, 3), 200, np.uint8)
    mixed = overlay(image, np.array([[0, 1]]))
    assert mixed[0, 0].tolist() == [200] * 3 and mixed[0, 1].tolist() != [200] * 3
