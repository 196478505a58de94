"""The authors' files, `ae.pt` and `ldmseg.pt`, whole as their trainers save them, read as ours.

The oracle is what the modules of the released code return on the same weights (Sec. 3.1, 3.2 and
Alg. 2; see golden/README.md); for the image encoder it is diffusers.
"""

import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import ldmseg
import numpy as np
import pytest
import sample
import torch
import train_ldm
from conftest import GOLDEN, ON_CPU, VAE, fill_by_rule, gaussian, relative_error
from ldmseg import PRESETS, LDMSeg, UserError, load_model, load_official

NAMES = json.loads((GOLDEN / "official" / "keys.json").read_text())
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

class EasyDict(dict):
    """Pickled as the class of the package easydict: items are attributes too, dicts EasyDicts."""

    __module__, __qualname__ = "easydict", "EasyDict"

    def __init__(self, items):
        super().__init__({k: EasyDict(v) if isinstance(v, dict) else v for k, v in items.items()})
        self.__dict__.update(self)

def save(path, parts, prefix="module.", settings=dict, **more):
    """Write parts {name: state dict} and what the authors' trainers save beside them."""
    weight = torch.nn.Parameter(torch.ones(2, 3))
    weight.grad, optimizer = torch.ones(2, 3), torch.optim.AdamW([weight])
    optimizer.step()
    p = {"name": "coco", "train_kwargs": {"num_epochs": 50, "losses": ["ce", 1.0]}}
    content = {name: {prefix + key: value for key, value in part.items()}
               for name, part in parts.items()}
    content |= {"opt": optimizer.state_dict(), "step": 3, "epoch": None, "p": settings(p),
                "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3}} | more
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "easydict", SimpleNamespace(EasyDict=EasyDict))
        torch.save(content, path)

def official_vae(state, old_names):
    """What the authors' `vae_image` holds of an AutoencoderKL: all but the decoder."""
    kept = {k: v for k, v in state.items() if not k.startswith("decoder.")}
    for new, old in OLD_NAMES.items() if old_names else ():
        kept = {k.replace(f".{new}.", f".{old}."): v for k, v in kept.items()}
    return kept

@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The files, filled like the reference values: .ae, .ldmseg, its .parts, the .vae in it."""
    folder = tmp_path_factory.mktemp("official")
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKL(**VAE).eval()
    masks, unet = ({key: fill_by_rule(key, shape) for key, shape in NAMES[kind]}
                   for kind in ("ae_keys", "unet_keys"))
    parts = {"vae_semseg": masks, "unet": unet, "vae_image": official_vae(vae.state_dict(), True)}
    save(folder / "ae.pt", {"vae": masks}, settings=EasyDict, epoch=7)
    save(folder / "ldmseg.pt", parts, settings=EasyDict, PQ=0.5, ema=None)
    return SimpleNamespace(ae=folder / "ae.pt", ldmseg=folder / "ldmseg.pt", parts=parts, vae=vae)

def reference(name):
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "official" / name).items()}

@torch.no_grad()
def test_ae_pt_gives_the_released_latents_and_logits(official):
    autoencoder, expected = load_model(official.ae), reference("ae.npz")
    z = autoencoder.encode(autoencoder.code(expected["ids"].long()))
    assert relative_error(z, expected["z"]) < 1e-4
    logits = autoencoder.decode(expected["z"])
    assert relative_error(logits[:, ::4, ::4, ::4], expected["logits"]) < 1e-4

@torch.no_grad()
def test_ldmseg_pt_gives_the_released_unet_output(official):
    model, expected = load_official(official.ldmseg, NAMES["unet_cfg"]), reference("unet.npz")
    output, *_ = model.predict(*expected["inp"].split(4, 1), expected["t"])
    assert relative_error(output, expected["eps"]) < 1e-4

@pytest.mark.parametrize("steps", [1, 10])
def test_ldmseg_pt_gives_the_released_samples(official, monkeypatch, steps):
    model, expected = load_official(official.ldmseg, NAMES["unet_cfg"]), reference("sched.npz")
    monkeypatch.setattr(ldmseg, "gaussian_latents", lambda *_: expected["z_T"])
    model.encode_image, model.decode = lambda image: image, lambda z, *_: z
    z = model.sample(expected["z_i"], [(0, i) for i in range(len(expected["z_i"]))], steps)
    assert relative_error(z, expected[f"S{steps}"]) < 1e-4

@pytest.mark.parametrize("old_names", [True, False])
@torch.no_grad()
def test_vae_image_encodes_like_diffusers_under_both_namings(official, tmp_path, old_names):
    part = official_vae(official.vae.state_dict(), old_names)
    assert any(".query." in key for key in part) == old_names and "post_quant_conv.bias" in part
    save(tmp_path / "ldmseg.pt", official.parts | {"vae_image": part})
    model, image = load_official(tmp_path / "ldmseg.pt", NAMES["unet_cfg"]), gaussian(2, 3, 32, 48)
    expected = 0.18215 * official.vae.encode(image).latent_dist.mean
    assert relative_error(model.encode_image(image), expected) < 1e-5

@pytest.mark.parametrize("old_names", [True, False])
def test_every_released_key_but_post_quant_conv_has_its_place_in_the_full_model(old_names):
    with torch.device("meta"):  # shapes without memory
        unet = diffusers.UNet2DConditionModel(in_channels=12, cross_attention_dim=768).state_dict()
        image = diffusers.AutoencoderKL(**VAE | {"block_out_channels": [128, 256, 512, 512]})
        without = ("attn2.", "transformer_blocks.0.norm2.")  # cross-attention
        unet = {k: v for k, v in unet.items() if not any(name in k for name in without)}
        parts = {"vae_semseg": {key: torch.empty(shape) for key, shape in NAMES["ae_keys"]},
                 "unet": unet, "vae_image": official_vae(image.state_dict(), old_names)}
        config, tensors = ldmseg.convert_official(parts)
        ours = LDMSeg(config).state_dict()
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in ours.items()}
    used = {id(tensor) for tensor in tensors.values()}
    unused = [k for part in parts.values() for k, v in part.items() if id(v) not in used]
    assert unused == ["post_quant_conv.weight", "post_quant_conv.bias"]
    assert sum(v.numel() for v in unet.values()) == 815_556_484

@pytest.mark.parametrize("settings", [dict, EasyDict])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_the_parts_are_read_from_what_a_trainer_saves_and_ema_is_the_unet(
        official, tmp_path, prefix, settings):
    unet = {key: value + 1 for key, value in official.parts["unet"].items()}
    ema = {prefix + key: value for key, value in unet.items()}
    save(tmp_path / "ldmseg.pt", official.parts, prefix, settings, PQ=0.5, ema=ema)
    pickled = b"easydict\nEasyDict" in (tmp_path / "ldmseg.pt").read_bytes()
    assert pickled == (settings is EasyDict) and "easydict" not in sys.modules
    tensors = load_official(tmp_path / "ldmseg.pt", NAMES["unet_cfg"]).state_dict()
    _, expected = ldmseg.convert_official(official.parts | {"unet": unet}, NAMES["unet_cfg"])
    assert all(torch.equal(expected[key], tensor) for key, tensor in tensors.items())

def test_stage_2_starts_from_ae_pt_and_says_that_the_rest_is_random(
        official, data, tmp_path, monkeypatch, capsys, unscored):
    monkeypatch.setitem(PRESETS, "paper", replace(PRESETS["paper"], size=64))
    train_ldm.main(["--preset", "paper", "--sd", "none", "--image-encoder", "patch", "--steps", "1",
                    "--ae", str(official.ae), "--data", str(data), "--batch-size", "2", *ON_CPU,
                    "--out", str(tmp_path), "--set", "unet_widths=32,64,64,64"])
    trained = load_model(tmp_path).autoencoder.state_dict()
    assert all(torch.equal(trained[k], v) for k, v in load_model(official.ae).state_dict().items())
    assert "RANDOM weights" in capsys.readouterr().out

@pytest.mark.parametrize("part, key, shape, named", [
    ("unet", "mistake.3.weight", (2,), "mistake.3.weight"),  # unknown
    ("vae_semseg", "encoder.15.weight", None, "encoder.14.weight"),  # missing; ours lacks one layer
    ("vae_image", "encoder.conv_in.weight", (2, 2, 3, 3), "conv_in.weight")])
def test_a_key_that_does_not_fit_is_named(official, tmp_path, part, key, shape, named):
    content = {k: v for k, v in official.parts[part].items() if k != key}
    content |= {key: torch.zeros(shape)} if shape else {}
    save(tmp_path / "ldmseg.pt", official.parts | {part: content})
    with pytest.raises(UserError, match=f"^{tmp_path}/ldmseg.pt: [^\\n]*{named}[^\\n]*$"):
        load_official(tmp_path / "ldmseg.pt", NAMES["unet_cfg"])

class Trap:
    def __reduce__(self):
        return os.system, ("mkdir ran",)

@pytest.mark.parametrize("inside", [dict, EasyDict])
def test_a_file_with_any_other_class_is_refused_and_runs_no_code(
        complaint, official, tmp_path, monkeypatch, inside):
    monkeypatch.chdir(tmp_path)
    save("ae.pt", {"vae": official.parts["vae_semseg"]}, p=inside({"lr": Trap()}))
    line = complaint(sample.main, "--weights", "ae.pt", "--device", "cpu")
    assert line.startswith("ae.pt: ") and "code" in line and "refused" in line
    assert not (tmp_path / "ran").exists()
