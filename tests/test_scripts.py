"""The scripts, run from their command lines with tiny settings."""

import json
import shutil
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import sample
import torch
import train_ae
import train_ldm
from conftest import REPO, SCENES, TINY, ae_command, ldm_command, write_split
from ldmseg import MaskAutoencoder, load_model, read_image, rgb2id, save_weights
from PIL import Image

ON_CPU = ["--device", "cpu", "--workers", "0"]


def weights_of(run):
    return load_model(run).state_dict()


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# ---- training ----


@pytest.mark.parametrize("stage", ["ae", "ldm"])
def test_a_run_folder_holds_weights_config_log_and_a_picture(tiny_run, stage):
    run = getattr(tiny_run, stage)
    names = {"checkpoint.pt", "model.safetensors", "config.json", "log.jsonl", "step000002.png"}
    assert {path.name for path in run.iterdir()} == names
    assert json.loads((run / "config.json").read_text())["bits"] == 3
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {2} and lines[0]["loss"] > 0


@pytest.mark.parametrize("stage", ["ae", "ldm"])
def test_a_resumed_run_equals_one_without_a_break(tmp_path, data, tiny_run, stage):
    main = {"ae": train_ae.main, "ldm": train_ldm.main}[stage]
    resumed, straight = tmp_path / "resumed", tmp_path / "straight"
    shutil.copytree(getattr(tiny_run, stage), resumed)
    for out in (resumed, straight):
        command = ae_command(data, out)
        if stage == "ldm":
            command = ldm_command(data, tiny_run.ae, out)
        main([*command, "--steps", "4"])
    assert_same_tensors(weights_of(resumed), weights_of(straight))
    first = weights_of(getattr(tiny_run, stage))
    assert any(not torch.equal(first[k], v) for k, v in weights_of(straight).items())


def test_a_run_resumes_on_another_machine_with_less_memory(tmp_path, data, tiny_run):
    """More micro-batches, recomputed activations: the same images in the same order."""
    run = shutil.copytree(tiny_run.ldm, tmp_path / "run")
    command = ldm_command(data, tiny_run.ae, run, "checkpointing=1", "zero=1")
    train_ldm.main([*command, "--steps", "3", "--accumulate", "2"])
    straight = ldm_command(data, tiny_run.ae, tmp_path / "straight")
    train_ldm.main([*straight, "--steps", "3"])
    for name, value in weights_of(tmp_path / "straight").items():
        torch.testing.assert_close(weights_of(run)[name], value, atol=2e-3, rtol=0)


def test_stage_2_does_not_resume_with_another_autoencoder(complaint, tmp_path, data, tiny_run):
    other = shutil.copytree(tiny_run.ae, tmp_path / "ae")
    autoencoder = load_model(other)
    autoencoder.encoder[0].bias.data += 1
    save_weights(other / "model.safetensors", autoencoder, autoencoder.config, 2)
    line = complaint(train_ldm.main, *ldm_command(data, other, tiny_run.ldm), "--steps", "4")
    assert "its run has --ae with checksum" in line


@pytest.mark.parametrize("stage", ["ae", "ldm"])
def test_the_gradient_is_clipped(data, tiny_run, tmp_path, stage):
    """Clipped to a norm of 0 and without weight decay, two steps leave the weights as after one."""
    runs = []
    for steps in ("1", "2"):
        out = tmp_path / steps
        command = ae_command(data, out, f"{stage}_clip=0", "weight_decay=0")
        if stage == "ldm":
            command = [*command, "--ae", str(tiny_run.ae)]
        {"ae": train_ae.main, "ldm": train_ldm.main}[stage]([*command, "--steps", steps])
        runs.append(weights_of(out))
    assert_same_tensors(*runs)


def test_weights_that_are_not_finite_are_not_saved(complaint, data, tmp_path):
    command = ae_command(data, tmp_path / "run", "ae_lr=inf")
    complaint(train_ae.main, *command, "--steps", "1")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("stage", ["ae", "ldm"])
def test_a_finished_run_says_so_and_stays(capsys, data, tiny_run, stage):
    run = getattr(tiny_run, stage)
    before = (run / "checkpoint.pt").stat().st_mtime_ns
    if stage == "ae":
        train_ae.main(ae_command(data, run))
    else:
        train_ldm.main(ldm_command(data, tiny_run.ae, run))
    assert "finished at step 2; --fresh starts over" in capsys.readouterr().out
    assert (run / "checkpoint.pt").stat().st_mtime_ns == before


def test_a_resumed_run_forgets_what_was_logged_after_its_checkpoint(tmp_path, data, tiny_run):
    run = shutil.copytree(tiny_run.ae, tmp_path / "run")
    before = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(before + '{"step": 3, "loss": 1.0}\n{"step": 1, "lo')
    train_ae.main(ae_command(data, run))
    assert (run / "log.jsonl").read_text() == before


def test_fresh_starts_over(tmp_path, data, tiny_run):
    again = tmp_path / "again"
    shutil.copytree(tiny_run.ae, again)
    train_ae.main([*ae_command(data, again), "--fresh", "--seed", "5"])
    assert isinstance(load_model(again), MaskAutoencoder)
    first = weights_of(tiny_run.ae)
    assert any(not torch.equal(first[k], v) for k, v in weights_of(again).items())
    assert len((again / "log.jsonl").read_text().splitlines()) == 2


def test_loader_processes_do_not_change_the_training(tmp_path, data, tiny_run):
    train_ae.main([*ae_command(data, tmp_path / "run"), "--workers", "2"])
    assert_same_tensors(weights_of(tmp_path / "run"), weights_of(tiny_run.ae))


def test_an_accumulated_batch_gives_the_same_update(tmp_path):
    for split in ("train", "val"):  # one image without VOID: all micro-batches weigh the same
        write_split(tmp_path / "data", split, SCENES["train"][:1])
    runs = []
    for accumulate in ("1", "2"):
        command = ae_command(tmp_path / "data", tmp_path / accumulate)
        train_ae.main([*command, "--steps", "1", "--accumulate", accumulate])
        runs.append(weights_of(tmp_path / accumulate))
    one, two = (torch.cat([w.flatten() for w in run.values() if w.ndim > 1]) for run in runs)
    assert ((one - two).abs() > 1e-5).float().mean() < 0.001  # of an update by 0.002


# ---- sampling and evaluation ----


def sample_command(run, out, *more):
    return ["--weights", str(run), "--out", str(out), "--steps", "3", *ON_CPU, *more]


@pytest.fixture(scope="module")
def samples(tmp_path_factory, data, tiny_run):
    """The output folder of sample.py over the validation split."""
    out = tmp_path_factory.mktemp("samples")
    sample.main(sample_command(tiny_run.ldm, out, "--data", str(data)))
    return out


def test_sample_leaves_masks_overlays_json_and_pictures(samples):
    expected = {f"{folder}/val{i}.png" for i in (0, 1) for folder in ("panoptic", "overlay")}
    expected |= {"panoptic.json", "grid.png", "denoising.png", "noises.png"}
    assert {str(p.relative_to(samples)) for p in samples.rglob("*") if p.is_file()} == expected


def test_panoptic_json_agrees_with_the_masks(samples, data):
    result = json.loads((samples / "panoptic.json").read_text())
    assert [i["file_name"] for i in result["images"]] == ["val0.png", "val1.png"]
    for info, annotation in zip(result["images"], result["annotations"], strict=True):
        ids = rgb2id(read_image(samples / "panoptic" / annotation["file_name"]))
        assert annotation["image_id"] == info["id"]
        assert ids.shape == (info["height"], info["width"])
        assert ids.shape == read_image(data / "val" / info["file_name"]).shape[:2]
        areas = {id: int((ids == id).sum()) for id in np.unique(ids).tolist() if id}
        assert {s["id"]: s["area"] for s in annotation["segments_info"]} == areas
        assert len(areas) > 1


def test_two_noises_give_two_masks_of_an_image(samples):
    picture = read_image(samples / "noises.png")[20:]  # image | noise 1 | noise 2, below titles
    _, one, two = np.split(picture, 3, axis=1)
    assert (one != two).any(-1).mean() > 0.05


@pytest.mark.parametrize("seed, perfect", [("0", True), ("1", False)])
def test_evaluate_draws_what_sample_wrote(samples, data, tiny_run, tmp_path, seed, perfect):
    evaluate.main(["--weights", str(tiny_run.ldm), "--data", str(samples / "panoptic.json"),
                   "--images", str(data / "val"), "--steps", "3", "--seed", seed,
                   "--json", str(tmp_path / "pq.json"), *ON_CPU])  # fmt: skip
    result = json.loads((tmp_path / "pq.json").read_text())
    assert result["steps"] == 3 and (result["All"]["pq"] == 1) == perfect


def test_evaluate_makes_a_table_of_several_step_counts(data, tiny_run, tmp_path, capsys):
    evaluate.main(["--weights", str(tiny_run.ldm), "--data", str(data), "--steps", "1", "2",
                   "--json", str(tmp_path / "pq.json"), *ON_CPU])  # fmt: skip
    result = json.loads((tmp_path / "pq.json").read_text())
    assert [row["steps"] for row in result["sweep"]] == [1, 2]
    for row in result["sweep"]:
        assert row["seconds_per_image"] > 0 and set(row["All"]) == {"pq", "sq", "rq", "n"}
    printed = capsys.readouterr().out
    assert "1 steps" in printed and "2 steps" in printed and "autoencoder" in printed


def test_evaluate_scores_the_reconstruction_of_a_stage_1_run(data, tiny_run, tmp_path):
    evaluate.main(["--weights", str(tiny_run.ae), "--data", str(data),
                   "--json", str(tmp_path / "pq.json"), *ON_CPU])  # fmt: skip
    result = json.loads((tmp_path / "pq.json").read_text())
    logged = json.loads((tiny_run.ae / "log.jsonl").read_text().splitlines()[-1])
    assert result["All"]["pq"] == logged["reconstruction_pq"]
    assert result["All"] == result["autoencoder"]


def test_a_result_never_overwrites_an_image(complaint, data, tiny_run, tmp_path):
    folder = tmp_path / "runs"
    path = folder / "panoptic" / "train0.png"
    path.parent.mkdir(parents=True)
    shutil.copy(data / "train" / "train0.png", path)
    before = path.read_bytes()
    line = complaint(sample.main, *sample_command(tiny_run.ldm, folder, str(path)))
    assert "train0.png would overwrite" in line and path.read_bytes() == before


def test_a_sample_depends_on_the_images_name_and_the_seed_only(data, tiny_run, tmp_path):
    paths = [str(data / "train" / f"train{i}.png") for i in range(3)]

    def masks(folder, *arguments):
        sample.main(sample_command(tiny_run.ldm, tmp_path / folder, *arguments))
        return {i: read_image(path) for i in range(3)
                if (path := tmp_path / folder / "panoptic" / f"train{i}.png").exists()}  # fmt: skip

    together, fewer = masks("all", *paths), masks("fewer", paths[2], paths[1])
    assert together.keys() == {0, 1, 2} and fewer.keys() == {1, 2}
    for i in fewer:  # another batch size may round a logit to the other side
        assert (together[i] != fewer[i]).any(-1).mean() < 0.01
    other = masks("other", paths[1], "--seed", "1")
    assert (together[1] != other[1]).any(-1).mean() > 0.1


# ---- command lines ----


def test_help_exits_0_without_importing_diffusers():
    code = """
import sys
for name in ("train_ae", "train_ldm", "sample", "inpaint", "evaluate"):
    try:
        __import__(name).main(["-h"])
    except SystemExit as stop:
        assert stop.code == 0
    else:
        raise AssertionError(name)
assert not {"diffusers", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == 5


@pytest.fixture
def damaged(data, tmp_path):
    """A copy of the data set to damage."""
    return shutil.copytree(data, tmp_path / "data")


def edit_json(root, change):
    path = root / "annotations" / "panoptic_train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def repaint(root, old, new):
    """Change an id in the second training mask."""
    path = root / "annotations" / "panoptic_train" / "train1.png"
    mask = read_image(path).copy()
    mask[mask[..., 0] == old, 0] = new
    Image.fromarray(mask).save(path)


def crop(path):
    with Image.open(path) as image:
        smaller = image.crop((0, 0, 20, 20))
    smaller.save(path)


MASKS = "annotations/panoptic_train"
DAMAGE = {
    "no image": (lambda root: (root / "train/train1.png").unlink(), "train/train1.png: no such"),
    "truncated image": (lambda root: truncate(root / "train/train1.png"),
                        "train/train1.png: not a readable image"),
    "text as image": (lambda root: (root / "train/train1.png").write_text("hello"),
                      "train/train1.png: not a readable image"),
    "no mask": (lambda root: (root / MASKS / "train1.png").unlink(),
                f"{MASKS}/train1.png: no such"),
    "truncated mask": (lambda root: truncate(root / MASKS / "train1.png"),
                       f"{MASKS}/train1.png: not a readable image"),
    "mask of another size": (lambda root: crop(root / MASKS / "train1.png"),
                             f"{MASKS}/train1.png: (20, 20) pixels, expected (48, 33)"),
    "id unknown to the JSON": (lambda root: repaint(root, 5, 77),
                               f"{MASKS}/train1.png: 2 segment ids do not agree with the JSON"),
    "id not in the mask": (lambda root: repaint(root, 6, 5), "the first, 6, is not in the PNG"),
    "no annotations folder": (lambda root: shutil.rmtree(root / "annotations"),
                              "expected 'shapes', a panoptic JSON or a folder with annotations/"),
    "no masks folder": (lambda root: shutil.rmtree(root / MASKS), f"{MASKS}: no such folder"),
    "no images folder": (lambda root: shutil.rmtree(root / "train"), "train: no such folder"),
    "nothing annotated": (lambda root: edit_json(root, lambda c: c["annotations"].clear()),
                          "panoptic_train.json: no annotated image"),
    "annotation of no image": (lambda root: edit_json(root, lambda c: c["images"].clear()),
                               "panoptic_train.json: expected images with id and file_name"),
    "detection JSON": (lambda root: edit_json(root, lambda c: c["annotations"][0].pop(
        "segments_info")), "expected image_id, file_name, segments_info; is this COCO panoptic"),
    "truncated JSON": (lambda root: truncate(root / f"{MASKS}.json"),
                       "panoptic_train.json: expected COCO panoptic JSON"),
    "two splits": (lambda root: shutil.copy(root / f"{MASKS}.json", root / f"{MASKS}2.json"),
                   "--train-split not given, expected one of ['train', 'train2', 'val']"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_data_is_named_in_one_line(complaint, damaged, tmp_path, case):
    damage, message = DAMAGE[case]
    damage(damaged)
    assert message in complaint(train_ae.main, *ae_command(damaged, tmp_path / "run"))


def test_a_mistake_met_by_a_loader_process_is_one_line_and_exit_code_2(damaged, tmp_path):
    truncate(damaged / "train" / "train1.png")
    command = [sys.executable, REPO / "train_ae.py", *ae_command(damaged, tmp_path / "run")]
    done = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.startswith("4 images per step")
    assert done.stderr.startswith(f"{damaged}/train/train1.png: not a readable image")
    assert done.stderr.count("\n") == 1


BAD_FLAGS = {
    "no data": (["--data", "nowhere"], "--data nowhere: no such data, expected"),
    "no JSON": (["--data", "nowhere.json", "--images", "."], "nowhere.json: no such annotation"),
    "JSON without images": (["--data", "some.json"], "add --images DIR"),
    "no such split": (["--train-split", "test"], "--train-split test, expected one of"),
    "unknown field": (["--set", "nope=1"], "--set nope=1"),
    "field of another type": (["--set", "bits=few"], "--set bits: got 'few', expected int"),
    "size": (["--set", "size=36"], "size is 36, expected"),
    "no steps": (["--steps", "0"], "ae_steps is 0"),
    "batch": (["--accumulate", "3"], "batch size 4, expected a multiple of --accumulate"),
    "device": (["--device", "abacus"], "--device abacus"),
    "fp16 on cpu": (["--amp", "fp16"], "--amp fp16 needs cuda"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_flag_of_train_ae_is_named_in_one_line(complaint, data, tmp_path, case):
    flags, message = BAD_FLAGS[case]
    assert message in complaint(train_ae.main, *ae_command(data, tmp_path / "run"), *flags)


@pytest.mark.parametrize("flags, field", [
    (["--set", "ae_lr=1"], "ae_lr 0.002, this command 1.0"),
    (["--set", "bits=4"], "bits 3, this command 4"),
    (["--preset", "paper", "--set", "unet_attention=1,1"], "preset tiny, this command paper"),
    (["--batch-size", "8"], "ae_batch 4, this command 8"),
    (["--seed", "1"], "seed 0, this command 1"),
    (["--data", "shapes"], "data"),
])  # fmt: skip
def test_resuming_with_other_settings_names_the_difference(complaint, data, tiny_run, flags, field):
    line = complaint(train_ae.main, *ae_command(data, tiny_run.ae), *flags)
    assert f"its run has {field}" in line and "--fresh" in line


def test_a_broken_checkpoint_is_named(complaint, data, tmp_path):
    (tmp_path / "checkpoint.pt").write_text("hello")
    line = complaint(train_ae.main, *ae_command(data, tmp_path))
    assert "checkpoint.pt: not a checkpoint" in line


def test_a_diverging_run_stops_and_leaves_the_last_checkpoint(complaint, data, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run.ae, tmp_path / "run")
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    checkpoint["model"]["encoder.0.weight"].fill_(float("inf"))
    torch.save(checkpoint, run / "checkpoint.pt")
    before = (run / "checkpoint.pt").read_bytes()
    line = complaint(train_ae.main, *ae_command(data, run), "--steps", "4")
    assert "loss is nan" in line or "loss is inf" in line
    assert (run / "checkpoint.pt").read_bytes() == before
    assert_same_tensors(weights_of(run), weights_of(tiny_run.ae))
    load_model(run)


@pytest.mark.parametrize("run, flags, message", [
    ("nowhere", [], "nowhere: no weights"),
    ("ae", ["--set", "size=64"], "its size is 32, expected 64"),
    ("ae", ["--set", "bits=4"], "its bits is 3, expected 4"),
    ("ae", ["--set", "ae_widths=32,32,32,32"], "its ae_widths is (8, 16, 32, 32)"),
])  # fmt: skip
def test_an_autoencoder_that_does_not_fit_is_named(
        complaint, data, tiny_run, tmp_path, run, flags, message):
    ae = tiny_run.ae if run == "ae" else run
    line = complaint(train_ldm.main, *ldm_command(data, ae, tmp_path / "run"), *flags)
    assert message in line


def test_stage_2_takes_the_autoencoders_shape_from_its_weights(data, tiny_run, tmp_path):
    own = [s for s in TINY if not s.startswith(("bits", "ae_widths"))]
    command = ldm_command(data, tiny_run.ae, tmp_path / "run")
    kept = [a for a in command if a not in TINY] + own
    train_ldm.main([*kept, "--steps", "1"])
    assert load_model(tmp_path / "run").config.ae_widths == (8, 16, 32, 32)


@pytest.mark.parametrize("flags, message", [
    (["nowhere.jpg"], "nowhere.jpg: no such image file"),
    (["nowhere.jpg", "--data", "shapes"], "both image files and --data"),
    (["--steps", "0"], "0 sampling steps, expected 1 to 1000"),
    (["--steps", "1001"], "1001 sampling steps"), (["--limit", "-1"], "--limit -1, expected at"),
])  # fmt: skip
def test_a_bad_flag_of_sample_is_named_in_one_line(complaint, tiny_run, tmp_path, flags, message):
    command = sample_command(tiny_run.ldm, tmp_path / "out", *flags)
    assert message in complaint(sample.main, *command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["train_ae", "train_ldm", "sample"])
def test_an_output_folder_that_is_a_file_is_named(complaint, data, tiny_run, tmp_path, script):
    out = tmp_path / "notes.txt"
    out.write_text("kept")
    main, command = {
        "train_ae": (train_ae.main, ae_command(data, out)),
        "train_ldm": (train_ldm.main, ldm_command(data, tiny_run.ae, out)),
        "sample": (sample.main, sample_command(tiny_run.ldm, out, "--limit", "1")),
    }[script]
    line = complaint(main, *command)
    assert str(out) in line and "Not a directory" in line and out.read_text() == "kept"


def test_a_result_file_that_is_a_folder_is_named(complaint, data, tiny_run, tmp_path):
    flags = ["--data", data, "--json", tmp_path, *ON_CPU]
    line = complaint(evaluate.main, "--weights", tiny_run.ae, *flags)
    assert f"'{tmp_path}'" in line and "Is a directory" in line


def test_sampling_from_an_autoencoder_is_an_error(complaint, tiny_run, tmp_path):
    line = complaint(sample.main, *sample_command(tiny_run.ae, tmp_path / "out"))
    assert f"{tiny_run.ae}: holds a MaskAutoencoder, expected a LDMSeg" in line


def test_a_file_that_holds_no_weights_is_named(complaint, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_text("hello")
    line = complaint(evaluate.main, "--weights", path, *ON_CPU)
    assert "broken.safetensors: not weights that these scripts wrote" in line
