"""The three-line API, the shipped weights, and the scripts from their command lines (Alg. 2).

The oracle is the truth of generated scenes; of what scripts write, COCO's panoptic format.
"""

import json
import re
import shutil
import sys

import evaluate
import inpaint
import ldmseg
import numpy as np
import pytest
import sample
import torch
import train_ae
import train_ldm
from conftest import IMPORTED, ON_CPU, areas_of, run_of
from ldmseg import SHIPPED, Config, ShapeScenes, load_model, override, panoptic_quality, read_image
from PIL import Image

SCENES = ShapeScenes("val", 64)
SCRIPTS = {script.__name__: script for script in (train_ae, train_ldm, sample, inpaint, evaluate)}

# ---- the API and the shipped weights ----

@pytest.fixture(scope="module")
def model():
    return load_model("tiny")

def enlarged(scene, height, width):
    """Image and truth of a scene at another size."""
    image = Image.fromarray(scene["image"]).resize((width, height), Image.BICUBIC)
    return np.asarray(image), ldmseg.resize_nearest(scene["ids"], (height, width))

@pytest.mark.parametrize("size, side", [((480, 640), None), ((97, 61), 80)])
def test_segment_finds_the_segments_of_an_image_of_any_size(size, side):
    model, scores = load_model("tiny", size=side), []
    for index in range(4):
        image, truth = enlarged(SCENES[index], *size)
        ids, segments = model.segment(image, steps=4)
        assert (ids.shape, ids.dtype) == (size, np.int32)
        assert {s["id"]: s["area"] for s in segments} == areas_of(ids)
        _, another = enlarged(SCENES[index + 4], *size)
        scores.append([panoptic_quality(other, ids)["pq"] for other in (truth, another)])
    ours, another_scenes = np.mean(scores, 0)
    assert ours > 0.4 > 2 * another_scenes

def test_a_segmentation_depends_on_its_seed_alone(model):
    one, again, other = (model.segment(SCENES[0]["image"], 2, seed=seed)[0] for seed in (5, 5, 6))
    assert (one == again).all() and (one != other).mean() > 0.1

def test_complete_keeps_what_is_given_and_its_ids_and_finds_the_rest(model):
    image, truth = enlarged(SCENES[0], 480, 640)
    ids = truth * 1000 + 7 * (truth > 0)  # the caller's
    partial = ids.copy()
    partial[:, 320:] = 0
    result, segments = model.complete(image, partial)
    assert (result == partial)[partial > 0].all()
    assert {s["id"]: s["area"] for s in segments} == areas_of(result)
    assert panoptic_quality(ids, result)["pq"] > 0.5

def test_the_shipped_autoencoder_alone_reconstructs_scenes(model, tmp_path, evaluated):
    autoencoder, path = model.autoencoder, tmp_path / "ae.safetensors"
    ldmseg.save_weights(path, autoencoder, autoencoder.config)
    result = evaluated("--weights", path, "--data", "shapes", "--limit", 16)
    assert result["All"]["pq"] > 0.8 and result["All"] == result["autoencoder"]

# ---- sample.py ----

def test_sample_leaves_overlays_pictures_and_masks_with_which_its_json_agrees(
        data, tiny_run, tmp_path):
    sample.main(run_of(tiny_run, tmp_path, "--data", data))
    expected = {f"{folder}/val{i}.png" for i in (0, 1) for folder in ("panoptic", "overlay")}
    expected |= {"panoptic.json", "grid.png", "denoising.png", "noises.png"}
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == expected
    result = json.loads((tmp_path / "panoptic.json").read_text())
    assert [i["file_name"] for i in result["images"]] == ["val0.png", "val1.png"]
    for info, annotation in zip(result["images"], result["annotations"], strict=True):
        ids = ldmseg.rgb2id(read_image(tmp_path / "panoptic" / annotation["file_name"]))
        assert annotation["image_id"] == info["id"]
        assert ids.shape == (info["height"], info["width"])
        assert ids.shape == read_image(data / "val" / info["file_name"]).shape[:2]
        assert {s["id"]: s["area"] for s in annotation["segments_info"]} == areas_of(ids)
        assert len(annotation["segments_info"]) > 1

def test_a_sample_depends_on_the_images_name_and_the_seed_only(data, tiny_run, tmp_path):
    paths = [data / "train" / f"train{i}.png" for i in range(3)]

    def masks(folder, *arguments):
        sample.main(run_of(tiny_run, tmp_path / folder, *arguments))
        return {path.name: read_image(path) for path in (tmp_path / folder / "panoptic").iterdir()}

    together, fewer = masks("all", *paths), masks("fewer", paths[2], paths[1])
    assert fewer.keys() == {"train1.png", "train2.png"}
    for name in fewer:  # another batch size may round a logit to the other side
        assert (together[name] != fewer[name]).any(-1).mean() < 0.01
    other = masks("other", paths[1], "--seed", "1")
    assert (together["train1.png"] != other["train1.png"]).any(-1).mean() > 0.1

@pytest.mark.parametrize("name, expected", [
    ("{data}/val", ["val0.png", "val1.png"]), ("{data}/*/*[02].png", ["train0.png", "train2.png",
     "val0.png"]), ("{data}/val/val1.png", ["val1.png"])])
def test_sample_takes_files_folders_and_patterns(data, tmp_path, name, expected):
    args = sample.parse([name.format(data=data), "--out", str(tmp_path)])
    assert [path.name for path in sample.image_paths(args)] == expected

def test_a_result_never_overwrites_an_image(complaint, data, tiny_run, tmp_path):
    path = tmp_path / "panoptic" / "train0.png"
    path.parent.mkdir()
    shutil.copy(data / "train" / "train0.png", path)
    before = path.read_bytes()
    for out in tmp_path, path.parent:
        line = complaint(sample.main, *run_of(tiny_run, out, path))
        assert "would replace inputs" in line and path.read_bytes() == before

# ---- evaluate.py ----

def test_evaluate_makes_a_table_of_several_step_counts(data, tiny_run, evaluated, capsys):
    result = evaluated("--weights", tiny_run.ldm, "--data", data, "--steps", 1, 2)
    assert [row["steps"] for row in result["sweep"]] == [1, 2]
    assert all(row["All"].keys() == {"pq", "sq", "rq", "n"} for row in result["sweep"])
    names = [line[:12].strip() for line in capsys.readouterr().out.splitlines()]
    assert names[-3:] == ["autoencoder", "1 steps", "2 steps"]

# ---- command lines ----

@pytest.mark.parametrize("script, stage, listed, other", [
    ("train_ae", "ae", "ae_widths=16,32,64,128", "unet_widths"),
    ("train_ldm", "ldm", "unet_widths=96,128", "ae_widths")])
def test_help_lists_the_fields_of_its_stage_as_they_are_typed(capsys, script, stage, listed, other):
    with pytest.raises(SystemExit):
        SCRIPTS[script].main(["-h"])
    listing = capsys.readouterr().out.split("fields of --set")[1]
    fields = re.findall(r"^  (\w+=\S*)", listing, re.MULTILINE)
    assert listed in fields and other not in {field.split("=")[0] for field in fields}
    assert override(Config(), fields, stage) == Config()

FEW = ["--limit", "1", "--steps", "1", *ON_CPU]

@pytest.mark.parametrize("name, script, flags", [("tiny", "sample", ""), ("tiny", "evaluate", ""),
    ("tiny", "inpaint", "--data shapes --block 8 --drop-rate 0.5"),
    ("photos", "sample", "--data {0}"), ("photos", "evaluate", "--data {0}"), ("photos", "inpaint",
     "--image {0}/val/val0.png --mask {0}/annotations/panoptic_val/val0.png")])
def test_the_shipped_weights_for_the_data_are_used_and_named_whatever_lies_in_runs(
        data, tiny_run, tmp_path, monkeypatch, capsys, name, script, flags):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run.ldm, "runs/ldm")
    SCRIPTS[script].main([*flags.format(data).split(), *FEW])
    weights, *_ = capsys.readouterr().out.splitlines()
    facts = r"generated scenes\b" if name == "tiny" else r"photographs\b.*\b160 pixels, 31 ids\b"
    facts = rf"[\d,]+ steps on {facts}.*\bPQ 0\.\d+.*"
    assert re.fullmatch(f"weights: {SHIPPED[name]}: {facts}", weights)

def test_the_weights_of_photographs_part_sky_from_ground():
    noise = np.random.default_rng(0).normal(size=(240, 640, 3))
    sky = np.linspace((90, 140, 220), (190, 210, 240), 240)[:, None] + 3 * noise
    ground = (95, 92, 88) + 18 * noise[..., :1]
    image = np.concatenate([sky, ground]).clip(0, 255).astype(np.uint8)
    truth = np.repeat([[1], [2]], 240, 0).repeat(640, 1)
    assert panoptic_quality(truth, load_model().segment(image)[0])["pq"] > 0.5

@pytest.mark.parametrize("image", [
    np.zeros((9, 9, 3)), "cat.jpg", *(np.zeros(s, "u1") for s in ((9, 9), (9, 9, 4), (0, 9, 3)))])
def test_what_is_no_image_is_the_users_error(image):
    with pytest.raises(ldmseg.UserError, match=r"expected uint8 \(H, W, 3\)"):
        load_model("tiny").segment(image)

def test_ids_of_pure_colours_differ_in_pictures():
    ids = ldmseg.rgb2id(np.uint8([[*np.ndindex(2, 2, 2)][1:]]) * 255)
    assert len({*map(tuple, ldmseg.colorize(ids)[0])}) == 7

def test_a_run_folder_goes_before_shipped_weights_of_its_name(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [load_model(name).config.size for name in SHIPPED] == [64, 160]
    shutil.copytree(tiny_run.ldm, "photos")
    assert [load_model(name).config.size for name in SHIPPED] == [64, 32]

def test_photographs_are_learned_from_the_shipped_weights_also_at_another_size(
        data, tmp_path, unscored):
    train_ldm.main(["--sd", "photos", "--data", str(data), "--out", str(tmp_path), "--steps", "1",
                    "--batch-size", "2", *ON_CPU, "--set", "size=64"])  # fmt: skip
    start, model = load_model("photos"), load_model(tmp_path)
    other = {f for f, v in vars(start.config).items() if getattr(model.config, f) != v}
    assert other == {"ldm_steps", "ldm_batch", "size"}
    learned = {name.split(".")[0] if ".layers." not in name else "layers" for name, tensor in
               model.state_dict().items() if not torch.equal(tensor, start.state_dict()[name])}
    assert learned == {"unet", "image_encoder"}

@pytest.mark.parametrize("script, flags, message", [
    ("sample", "nowhere.jpg", "nowhere.jpg: no such image file"),
    ("sample", "nowhere.jpg --data shapes", "expected image files, --video, or --data"),
    ("sample", "--steps 1001 --limit 1", "1001 sampling steps, expected 1 to 1000"),
    ("sample", "--weights {ae}", "{ae}: a MaskAutoencoder, expected a LDMSeg"),
    ("sample", "--steps 1 --limit 1 --out {file}", "{file}"),
    ("inpaint", "--data shapes --mask b.png", "expected --image and --mask, or --data"),
    ("inpaint", "--data shapes --block 8 65", "--block [8, 65], expected up to 64"),
    ("evaluate", "--weights {file}", "{file}: not a readable weights file"),
    ("evaluate", "--class-agnostic", "--class-agnostic goes with --gt"),
    ("evaluate", "--per-class", "--per-class: for task panoptic, not ['instance']"),
    ("evaluate", "--weights {ae} --limit 1 --json {folder}", "'{folder}'"),
    ("train_ae", "--accumulate 3", "batch size 16, expected a multiple of --accumulate"),
    ("train_ae", "--limit 0", "--limit: 0, expected at least 1"),
    ("train_ae", "--amp fp16", "--amp fp16 needs cuda"), ("train_ae", "--device abacus", "abacus"),
    ("train_ldm", "--set codes=bit", "no field of stage ldm, expected it in train_ae.py"),
    ("train_ldm", "--ae nowhere", "nowhere: no such weights file or run folder"),
    ("train_ldm", "--ae {ae}", "of ids at 32 pixels, expected ids at 64")])
def test_a_mistake_is_named_in_one_line(complaint, tiny_run, tmp_path, script, flags, message):
    (tmp_path / "notes.txt").write_text("kept")
    names = dict(ae=tiny_run.ae, file=tmp_path / "notes.txt", folder=tmp_path)
    out = [] if script == "evaluate" else ["--out", tmp_path / "out"]
    line = complaint(SCRIPTS[script].main, *out, *ON_CPU, *flags.format(**names).split())
    assert message.format(**names) in line
    assert (tmp_path / "notes.txt").read_text() == "kept" and not (tmp_path / "out").exists()

def test_help_of_a_script_imports_neither_diffusers_nor_transformers(monkeypatch):
    assert not IMPORTED
    for name in ("diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # an import fails
    for script in SCRIPTS.values():
        with pytest.raises(SystemExit):
            script.main(["-h"])
