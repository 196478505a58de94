"""What trains (Sec. 4.1): Config, optimizer, run folders, stopping and going on, two processes.

The oracle of a run that stops, and of one on two ranks, is one process without a break.
"""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from unittest.mock import Mock

import inpaint
import ldmseg
import numpy as np
import pytest
import sample
import torch
import torch.distributed as dist
import torch.nn as nn
import train_ae
import train_ldm
from conftest import (
    ON_CPU, ConvUNet, ae_command, flat, ldm_command, logged, on_two_ranks, small_config,
)  # fmt: skip
from ldmseg import (
    Config, MaskAutoencoder, UserError, learning_rate, load_model, override, run_script,
    save_weights, write_json,
)  # fmt: skip

# ---- configuration ----

@pytest.mark.parametrize("stage, assignment, message", [
    ("ldm", "ldm_rl=1", "no field of stage ldm.*ldm_lr"), ("ae", "bits", "not a readable int"),
    ("ae", "ae_widths=8,x", "tuple .*'x'"), ("ae", "unet_widths=8,8", "no field of stage ae")])
def test_set_names_what_it_cannot_use(stage, assignment, message):
    with pytest.raises(UserError, match=f"^--set {assignment.split('=')[0]}.*: .*{message}"):
        override(Config(), [assignment], stage)

@pytest.mark.parametrize("field, value, expected", [
    ("prediction", "x0", "one of"), ("tasks", ("depth", "edges"), "one of"),
    ("size", 40, "a multiple of 16"), ("ema", float("nan"), "0 to 1"), ("bits", 11, "1 to 10"),
    ("ae_widths", (8, 16, 32, 40), "4 numbers, the last a multiple of 32"),
    ("unet_widths", (32, 0), "1 to 8192"), ("unet_widths", (96, 104), "multiples of 32"),
    ("stem_widths", (8,), "3 multiples of 8"), ("unet_attention", (1,), "2 numbers"),
    ("kl_weight", 0.1, "latents=gaussian")])
def test_an_impossible_value_is_an_error_that_names_field_and_range(field, value, expected):
    with pytest.raises(UserError) as error:
        Config(**{field: value})
    assert str(error.value).startswith(f"{field} is {value!r}, expected {expected}")

def test_the_paper_preset_has_the_papers_numbers():
    numbers = dict(size=512, bits=7, points=12544, prediction="eps", mask_scale=0.18215,
                   image_scale=0.18215, ae_batch=16, ae_lr=1e-4, ae_clip=3, ldm_lr=1e-4, ldm_clip=1,
                   weight_decay=0.05, ema=0.999, min_area=512)
    assert ldmseg.PRESETS["paper"] == replace(ldmseg.PRESETS["paper"], **numbers)

# ---- optimizer, averages, files ----

@pytest.mark.parametrize("schedule, step, share", [
    ("constant", 0, 0.25), ("constant", 3, 1), ("constant", 99, 1), ("cosine", 1, 0.5),
    ("cosine", 4, 1), ("cosine", 28, 0.5 + 8**-0.5), ("cosine", 52, 0.5), ("cosine", 100, 0)])
def test_the_learning_rate_warms_up_then_stays_or_falls_to_1e_minus_6(schedule, step, share):
    got = learning_rate(step, 100, 0.1, Config(warmup=4, lr_schedule=schedule))
    end = 1e-6 * (schedule == "cosine" and step >= 4)
    assert got == pytest.approx(end + share * (0.1 - end), rel=1e-9)

def test_weight_decay_spares_norms_biases_and_frozen_weights():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2).requires_grad_(False))
    for p in model.parameters():
        nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    ldmseg.make_optimizer(model, 0.5, Config(weight_decay=0.1)).step()
    first, *others = model.parameters()
    torch.testing.assert_close(first, torch.full((2, 2), 0.95))
    assert all((p == 1).all() for p in others)

def test_the_moving_average_warms_up_to_its_decay_and_shares_frozen_weights():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1).requires_grad_(False))
    ema, averages = ldmseg.make_ema(model, 0.25), []
    for weight in (0.0, 11.0, 0.0, 0.0):
        nn.init.constant_(model[0].weight, weight)
        ema.update_parameters(model)
        averages.append(ema.module[0].weight.item())
    # the first weights, then decays 2/11, 3/12 and min(1/4, 4/13)
    assert averages == pytest.approx([0, 9, 9 / 4, 9 / 16])
    assert ema.module[1].weight.data_ptr() == model[1].weight.data_ptr()

# ---- run folders ----

SCRIPTS = {"ae": train_ae, "ldm": train_ldm}
stages = pytest.mark.parametrize("stage", ["ae", "ldm"])

@pytest.fixture(scope="module")
def command(data, tiny_run):
    """A function (stage, run folder, more flags) -> arguments of two steps of a tiny run."""
    return lambda stage, out, *more: [
        *(ae_command(data, out) if stage == "ae" else ldm_command(data, tiny_run.ae, out)), *more]

@pytest.fixture(scope="module")
def straight(tmp_path_factory, command):
    """Folders of runs of four steps without a break: {stage: folder}."""
    runs = {stage: tmp_path_factory.mktemp(stage) for stage in SCRIPTS}
    for stage, run in runs.items():
        SCRIPTS[stage].main(command(stage, run, "--steps", "4"))
    return runs

def equal_weights(one, other):
    """Whether the weights files of two runs, and what they would resume from, are equal."""
    checkpoints = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (one, other)]
    tensors = [[*c["model"].values(), *c["ema"].values(),
                *(v for moments in c["optimizer"]["state"].values() for v in moments.values())]
               for c in checkpoints]
    files = [(run / "model.safetensors").read_bytes() for run in (one, other)]
    return files[0] == files[1] and all(map(torch.equal, *tensors))

@stages
def test_a_run_folder_holds_weights_config_log_and_a_picture(tiny_run, stage):
    run = getattr(tiny_run, stage)
    names = {"checkpoint.pt", "checkpoint.previous.pt", "model.safetensors", "config.json",
             "log.jsonl", "step000002.png"}
    assert {path.name for path in run.iterdir()} == names
    first, last = logged(run)
    assert first["step"] == last["step"] == 2 and first["loss"] > 0 and 0 <= last["pq"] <= 1

def caught(number):
    """`learning_rate`, in whose first step the process gets a signal."""
    return lambda step, *rest: (
        step == 0 and signal.raise_signal(number) or learning_rate(step, *rest))

SAVED = "interrupted at step 1, saved in {}: same command goes on\n"

BUG = Mock(side_effect=RuntimeError("a bug"))

@pytest.mark.parametrize("stage, name, function, step, end, line", [
    ("ae", "learning_rate", caught(signal.SIGINT), 1, "130", SAVED),
    ("ldm", "learning_rate", caught(signal.SIGTERM), 1, "130", SAVED),
    ("ae", "score", BUG, 2, "a bug", ""), ("ldm", "score", BUG, 2, "a bug", "")],
    ids=["Ctrl-C", "SIGTERM", "evaluation of ae fails", "evaluation of ldm fails"])
def test_a_run_that_is_stopped_saves_and_the_same_command_ends_like_a_straight_one(
        command, straight, tmp_path, monkeypatch, capsys, stage, name, function, step, end, line):
    main, flags = SCRIPTS[stage].main, command(stage, tmp_path, "--steps", "4", "--eval-every", "2")
    with monkeypatch.context() as patch, pytest.raises((SystemExit, RuntimeError)) as stop:
        patch.setattr(SCRIPTS[stage], name, function)
        run_script(lambda: main(flags))
    assert (str(stop.value), capsys.readouterr().err) == (end, line.format(tmp_path))
    main(flags)
    assert f"{tmp_path}: resuming from step {step}\n" in capsys.readouterr().out
    assert equal_weights(tmp_path, straight[stage])

def test_a_run_killed_in_its_first_save_is_started_by_the_same_command(
        command, tmp_path, monkeypatch):
    flags = command("ae", tmp_path, "--limit", "1")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(torch, "save", Mock(side_effect=RuntimeError("killed")))
        train_ae.main(flags)
    train_ae.main(flags)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2

@pytest.mark.parametrize("kind", [RuntimeError, ValueError, OSError])
def test_a_bug_shows_its_traceback(command, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(train_ae, "ae_loss", Mock(side_effect=kind("a bug")))
    with pytest.raises(kind, match="a bug"):
        run_script(lambda: train_ae.main(command("ae", tmp_path)))

@pytest.mark.parametrize("stage, flags, field", [
    ("ae", ["--set", "ae_lr=1"], "ae_lr 0.002, this command 1.0"),
    ("ae", ["--seed", "1"], "seed 0, this command 1"), ("ae", ["--data", "shapes"], "data ["),
    ("ldm", ["--ae", "another.safetensors"], "ae [")])
def test_resuming_with_other_settings_names_the_difference(
        complaint, command, tiny_run, tmp_path, monkeypatch, stage, flags, field):
    monkeypatch.chdir(tmp_path)
    another = load_model(tiny_run.ae)
    another.encoder[0].bias.data += 1
    save_weights("another.safetensors", another, another.config)
    line = complaint(SCRIPTS[stage].main, *command(stage, getattr(tiny_run, stage), *flags))
    assert f"its run has {field}" in line and "--fresh" in line

@pytest.mark.parametrize("stage, flags", [("ae", ["--accumulate", "2"]),
    ("ldm", ["--workers", "1", "--set", "checkpointing=1", "zero=1", "eval_steps=9"])])
def test_a_finished_run_says_so_and_stays_also_on_another_machine(
        capsys, command, tiny_run, stage, flags):
    run = getattr(tiny_run, stage)
    before = (run / "checkpoint.pt").stat().st_mtime_ns
    SCRIPTS[stage].main(command(stage, run, *flags))
    assert f"{run}: finished at step 2; --fresh starts over\n" in capsys.readouterr().out
    assert (run / "checkpoint.pt").stat().st_mtime_ns == before

@pytest.mark.parametrize("name", ["model.safetensors", "log.jsonl"])
def test_a_run_without_a_checkpoint_is_replaced_only_by_fresh(
        complaint, command, tiny_run, tmp_path, name):
    shutil.copy(tiny_run.ae / name, tmp_path)
    before = (tmp_path / name).read_bytes()
    line = complaint(train_ae.main, *command("ae", tmp_path))
    assert line.startswith(f"{tmp_path}: ") and "--fresh" in line
    assert (tmp_path / name).read_bytes() == before
    train_ae.main(command("ae", tmp_path, "--fresh"))
    assert len(logged(tmp_path)) == 2

def test_a_second_training_in_a_folder_stops_while_the_first_one_lives_then_fresh_starts_over(
        complaint, command, tiny_run, tmp_path):
    """Both a new and a resumed one, also with --fresh; a killed process blocks none."""
    run = shutil.copytree(tiny_run.ae, tmp_path / "run")
    first = ("import fcntl, sys, time\nlog = open(sys.argv[1], 'a')\n"
             "fcntl.lockf(log, fcntl.LOCK_EX)\nprint('locked', flush=True)\ntime.sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", first, str(run / "log.jsonl")],
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"locked\n"
    for flags in (["--steps", "3"], ["--fresh"]):
        line = complaint(train_ae.main, *command("ae", run, *flags))
        assert line == f"{run}: another process trains in this folder"
    assert equal_weights(run, tiny_run.ae)
    process.kill()
    process.communicate()
    train_ae.main(command("ae", run, "--fresh", "--seed", "5"))
    assert not equal_weights(run, tiny_run.ae) and len(logged(run)) == 2

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tiny_run, tmp_path, value):
    model = load_model(tiny_run.ae)
    model.encoder[0].bias.data[3] = value
    save_weights(tmp_path / "model.safetensors", model, model.config)
    with pytest.raises(UserError, match=f"^{tmp_path}: encoder.0.bias has"):
        load_model(tmp_path)

def test_a_broken_checkpoint_is_named(complaint, command, tmp_path):
    (tmp_path / "checkpoint.pt").write_text("hello")
    line = complaint(train_ae.main, *command("ae", tmp_path))
    assert line.startswith(f"{tmp_path}/checkpoint.pt: ") and "--fresh starts over" in line

@pytest.mark.parametrize("steps", ["3", "4"])
def test_a_diverging_run_stops_and_leaves_the_last_checkpoint(
        complaint, command, tiny_run, tmp_path, monkeypatch, steps):
    run = shutil.copytree(tiny_run.ae, tmp_path / "run")
    monkeypatch.setattr(train_ae, "learning_rate", lambda *_: float("inf"))
    line = complaint(train_ae.main, *command("ae", run, "--steps", steps))
    assert "are not finite" in line
    assert equal_weights(run, tiny_run.ae)

@stages
def test_the_gradient_is_clipped(command, tmp_path, unscored, stage):
    """Clipped to next to nothing and without weight decay, two steps leave the weights as one."""
    for steps in ("1", "2"):
        SCRIPTS[stage].main(command(stage, tmp_path / steps, "--steps", steps, "--set",
                                    f"{stage}_clip=1e-9", "weight_decay=0", "warmup=0"))
    one, two = (load_model(tmp_path / steps).parameters() for steps in ("1", "2"))
    assert max((a - b).abs().max() for a, b in zip(one, two)) < 1e-5  # a step is 0.0005 or more

def test_steps_that_are_not_finite_are_left_out_and_counted_and_ten_in_a_row_stop_the_run(
        complaint, command, tmp_path, monkeypatch, unscored):
    calls = itertools.count(1)

    def loss(*rest):  # NaN in the second call and from the fourth on
        value, parts = ldmseg.ae_loss(*rest)
        return value * (1 if next(calls) in (1, 3) else float("nan")), parts

    monkeypatch.setattr(train_ae, "ae_loss", loss)
    flags = command("ae", tmp_path, "--steps", "40", "--eval-every", "6")
    assert complaint(train_ae.main, *flags).startswith("10 steps in a row without a finite loss")
    line, checkpoint = logged(tmp_path)[0], torch.load(tmp_path / "checkpoint.pt")
    assert line["step"] == 6 and line["skipped"] == 4 and line["loss"] > 0
    moments = checkpoint["optimizer"]["state"].values()
    assert checkpoint["step"] == 12 and {int(m["step"]) for m in moments} == {2}

def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(
        command, straight, tiny_run, tmp_path, capsys):
    run = shutil.copytree(straight["ae"], tmp_path / "run")
    content = bytearray((run / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "checkpoint.pt").write_bytes(content)
    train_ae.main(command("ae", run, "--steps", "4"))
    captured = capsys.readouterr()
    assert "damaged" in captured.err and f"{run}: resuming from step 0\n" in captured.out
    assert equal_weights(run, straight["ae"])

def test_weights_with_a_flipped_bit_are_refused(tiny_run, tmp_path):
    content = bytearray((tiny_run.ae / "model.safetensors").read_bytes())
    content[-1000] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_model(tmp_path)

def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path):
    (tmp_path / "file.json").write_text("old")
    (tmp_path / ".file.json.0.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="file.json: not written .*No space left"):
        write_json(tmp_path / "file.json", 1)
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("file.json", 3)]

def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_made():
    with pytest.raises(UserError, match="needs .* GiB"):
        MaskAutoencoder(small_config(ae_widths=(8192,) * 4, size=8192))

def test_loader_processes_get_no_signal_of_the_group_and_give_the_batches_of_one_process():
    stream = ldmseg.TrainingStream([ldmseg.ShapeScenes("train", 32)], small_config(), 0)
    alone, loader = (iter(ldmseg.training_loader(stream, 4, 2, 0, 5, count)) for count in (0, 1))
    first = next(loader)
    for process in multiprocessing.active_children():  # a terminal and torchrun signal a group
        assert os.getpgid(process.pid) != os.getpgrp()
    for batch, expected in zip([first, *loader], alone, strict=True):
        assert all(torch.equal(batch[name], expected[name]) for name in expected)

# ---- two ranks do what one process does ----

RUNS = ("ids", "depth", "ldm", "tasks")

def scores():
    """Of all tasks over 15 scenes, of which this process counts its share."""
    scenes = ldmseg.ShapeScenes("val", 32)
    config = small_config(bits=4, tasks=ldmseg.TASKS, categories=json.dumps(scenes.categories))

    def predict(batch):  # the true instances, moved; their random ids as classes and as depth
        ids = batch["ids"][:, ::2, ::2].roll(1, 2)
        logits = 50 * nn.functional.one_hot(ids, 16).permute(0, 3, 1, 2)
        return {"instance": logits, "semantic": logits, "depth": ids[:, None]}

    return ldmseg.evaluate(predict, config.known_tasks, scenes, config, "cpu", limit=15)[0]

def run_scripts(folder):
    """The scripts, from their command lines; one starts when the one before is through."""
    ids, depth, ldm, tasks = (folder / name for name in RUNS)
    one_step = ["--steps", "1", "--limit", "5"]
    draw = ["--weights", ldm, "--steps", "2", *ON_CPU, "--data", "shapes", "--limit", "5", "--out"]
    for main, flags in [(train_ae.main, [*ae_command("shapes", ids, "bits=4"), *one_step]),
        # no pixel of their depth is invalid: accumulated micro-batches weigh the same
        (train_ae.main, [*ae_command("shapes", depth), *one_step, "--target", "depth",
                         "--accumulate", ldmseg.rank_and_world()[1]]),
        (train_ldm.main, [*ldm_command("shapes", ids, ldm), *one_step]),
        (train_ldm.main, [*ldm_command("shapes", ids, tasks, "task_width=8"), *one_step,
                          "--ae", ids, depth, "--tasks", *ldmseg.TASKS]),
        (sample.main, [*draw, folder / "samples"]),
        (inpaint.main, [*draw, folder, "--block", "8", "--drop-rate", "0.3", "--strokes"])]:
        main([str(flag) for flag in flags])
        if dist.is_initialized():
            dist.barrier()

def work(rank, world, folder):
    """What each process does; the results go to `folder`."""
    if world > 1:
        ldmseg.setup_distributed("cpu")
    stopped = ldmseg.any_rank([signal.SIGINT] * (rank == 0), "cpu")
    torch.save({"scores": scores(), "stopped": stopped}, folder / f"rank{rank}.pt")
    run_script(lambda: run_scripts(folder))

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the results of one process and of two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ldmseg, "build_unet", ConvUNet)
        work(0, 1, one)
        on_two_ranks(work, 2, two)
    return one, two

@pytest.mark.parametrize("run", RUNS)
def test_gradients_and_logs_of_two_ranks_are_those_of_one_process(folders, run):
    """Of gradients the first moment of Adam, a tenth of them after one step."""
    one, two = (torch.load(folder / run / "checkpoint.pt")["optimizer"]["state"].values()
                for folder in folders)
    largest = max(moments["exp_avg"].abs().max() for moments in one)
    assert largest > 1e-4
    for ours, theirs in zip(two, one, strict=True):
        assert (ours["exp_avg"] - theirs["exp_avg"]).abs().max() < 1e-4 * largest
    one, two = (logged(folder / run) for folder in folders)
    assert len(one) == len(two) == 2
    for ours, theirs in zip(two, one):
        assert ours == pytest.approx(theirs, rel=1e-3)

def test_scores_and_the_wish_to_stop_are_shared(folders):
    one, two = folders
    files = one / "rank0.pt", two / "rank0.pt", two / "rank1.pt"
    expected, *ranks = (torch.load(path)["scores"] for path in files)
    assert expected["depth"]["n"] == 15 and 0 < expected["semantic"]["miou"] < 1
    assert 0 < expected["panoptic"]["All"]["pq"] < expected["instance"]["All"]["pq"] < 1
    assert [flat(rank) for rank in ranks] == [pytest.approx(flat(expected), rel=1e-9)] * 2
    assert [torch.load(path)["stopped"] for path in files] == [True] * 3

def test_two_ranks_write_the_samples_of_one_process(folders):
    one, two = (folder / "samples" for folder in folders)
    names = [sorted(path.relative_to(out) for path in out.rglob("*.*")) for out in (one, two)]
    listed = [json.loads((out / "panoptic.json").read_text())["images"] for out in (one, two)]
    assert names[0] == names[1] and listed[0] == listed[1] and len(listed[0]) == 5
    for image in listed[0]:
        paths = [out / "panoptic" / image["file_name"] for out in (one, two)]
        theirs, ours = map(ldmseg.read_image, paths)
        assert (ours != theirs).any(-1).mean() < 0.05 and np.unique(theirs).size > 1

def test_the_inpainting_table_of_two_ranks_is_that_of_one_process(folders):
    one, two = (json.loads((folder / "table.json").read_text()) for folder in folders)
    assert [row["block"] for row in one] == [row["block"] for row in two] == [8, "strokes", 8]
    for ours, theirs in zip(two, one):
        assert ours["nearest label"] == pytest.approx(theirs["nearest label"], rel=1e-12)
        for method in ("completion", "without the mask"):  # a pixel may round to another id
            assert ours[method] == pytest.approx(theirs[method], abs=0.002)
        assert 0.1 < theirs["nearest label"]["pq"] < 1 and theirs["completion"]["ids"] > 0.01
