"""Damaged and odd inputs, run by hand: python tests/fuzz.py [COUNT] [--seed N] [--only NUMBER]

Each case damages one small valid file, or draws one FIELD=VALUE of --set, and runs a script on it
in a copy of this process. Expected is one of
    refused   exit code 2 with one line on stderr
    accepted  and the result is that of an independent computation: pixels as Pillow reads them, of
              a PNG whose checksums fail those of the undamaged file; a plain Panoptic Quality;
              weights as they were before the damage; a resumed run as if nothing had happened
Everything else is a fault: WRONG (accepted, another result), TRACEBACK (a bug, a crash, a refusal
that is not one line), HANG (over 60 s). Prints kind x outcome; exit code 1 where there is a fault,
which --only NUMBER repeats with the same --seed. Warnings of libraries do not count as lines.
"""

import argparse
import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
from conftest import ON_CPU, SCENES, ae_command, flat, ldm_command, paint, write_split
from PIL import Image, ImageDraw, ImageOps
from pycocotools.mask import decode, encode
from safetensors.torch import load_file
from test_sec41_metrics import by_masks, near

import evaluate
import inpaint
import ldmseg
import sample
import train_ae
import train_ldm

OUTCOMES = ("refused", "accepted", "WRONG", "TRACEBACK", "HANG")
STEADY = ["--eval-every", "1", "--seed", "3"]  # two checkpoints; the same resumed from either
ODD = [None, "", "17", "x", "\ud800", "a\0b", "../../x", 0.5, 1e300, 10**30, -1, 0, 1, 2, 7.0, True,
       float("nan"), float("inf"), [], {}, [[]], [1, 2], [[1, 2, 3]], {"a": 1}, "DEEP"]

COCO = "data/annotations/panoptic_val.json"
IMAGES = "colour.png exif.png exif.jpg colour.tif deep.png float.tif".split()
ROOT = Path((TEMPORARY := tempfile.TemporaryDirectory()).name)
VALID, CASE, RECORDS = ROOT / "valid", ROOT / "case", []  # what the last script has read
SAMPLING = ["--weights", VALID / "ldm", "--steps", "1", *ON_CPU]
STAGES = {
    "ae": (train_ae.main, lambda out, steps, *more: ae_command(
        VALID / "data", out, "lr_schedule=constant", f"ae_steps={steps}", *more) + STEADY),
    "ldm": (train_ldm.main, lambda out, steps, *more: ldm_command(
        VALID / "data", VALID / "ae", out, "lr_schedule=constant", f"ldm_steps={steps}", *more)
        + STEADY)}


# ---- damage: (generator, bytes) -> bytes ----


def damage_bytes(rng, data):
    """Bits flipped, the end cut off, or a few bytes replaced."""
    data, at = bytearray(data), int(rng.integers(len(data)))
    if (way := rng.integers(4)) == 0:
        return bytes(data[:at])
    if way == 1:
        data[at : at + 8] = rng.choice([b"\0" * 8, b"\xff" * 8, rng.bytes(8), b""])
    for place in rng.integers(0, len(data), rng.integers(1, 4)) if way > 1 else ():
        data[place] ^= 1 << rng.integers(8)
    return bytes(data)


def damage_json(rng, data):
    """A value replaced by one of ODD, a key or element removed or twice; or its bytes damaged."""
    if rng.random() < 0.25:
        return damage_bytes(rng, data)
    places, tree = [], json.loads(data)

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(tree)
    node, key = places[rng.integers(len(places))]
    if (way := rng.random()) < 0.2:
        del node[key]
    elif way < 0.3 and isinstance(node, list):
        node.append(node[key])
    else:
        node[key] = ODD[rng.integers(len(ODD))]
    return json.dumps(tree).replace('"DEEP"', "[" * 100_000 + "]" * 100_000).encode()


def damage_image(rng, data):
    """Its bytes, or its header's: a field of a PNG's, with the right checksum."""
    if rng.random() < 0.5:
        return damage_bytes(rng, data)
    if data.startswith(b"\x89PNG"):
        header, field = list(struct.unpack(">IIBBBBB", data[16:29])), rng.integers(7)
        header[field] = int(rng.choice((0, 1, 36, 50, 51, 30_000, 2**31 - 1, 2**32 - 1)
                                       if field < 2 else (0, 1, 2, 3, 4, 6, 8, 16)))
        header = b"IHDR" + struct.pack(">IIBBBBB", *header)
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    size = data.find(b"\xff\xc0") + 5  # of a JPEG
    start = size if size > 4 else int(rng.integers(min(len(data), 220)))
    return data[:start] + rng.choice([b"\xff\xff", b"\0\1", rng.bytes(2)]) + data[start + 2 :]


def damage_npy(rng, data):
    """Its bytes, or a field of its header."""
    if rng.random() < 0.3:
        return damage_bytes(rng, data)
    values = np.load(io.BytesIO(data))
    if rng.random() < 0.3:
        values = values.astype(rng.choice(["f8", "f4", "i2", "u1", "?", "c16", "O", "U4", ">u4"]))
        if values.dtype.kind == "f":
            values.flat[rng.integers(values.size)] = rng.choice([np.nan, np.inf, 1e30, 0.5, -1])
        np.save(changed := io.BytesIO(), values)
        return changed.getvalue()
    shape = [(36, 50), (50, 36), (10**6, 10**6), (-1, 50), (0, 0), (1800,), (18, 25, 4), (), (2, 3)]
    descr = ["<i8", "|O", "<f8", ">i8", "<c16", "<U2", "<M8[s]", "|V8", "<i99", "nonsense"]
    header = {"descr": str(rng.choice(descr[: rng.choice([1, 10])])),
              "fortran_order": bool(rng.integers(2)), "shape": shape[rng.integers(len(shape))]}
    text = repr(header).ljust(117).encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + values.tobytes()


# ---- what independent readers find ----


def intact(png):
    """Whether all chunks of a PNG, to the last, have their checksums."""
    start, kind = 8, b""
    while kind != b"IEND":
        end = start + 12 + int.from_bytes(png[start : start + 4])
        kind, checksum = png[start + 4 : start + 8], zlib.crc32(png[start + 4 : end - 4])
        if len(png) < end or png[end - 4 : end] != checksum.to_bytes(4):
            return False
        start = end
    return True


def pixels(path):
    """Picture or mask as Pillow reads it; the undamaged one where a PNG's checksums fail."""
    if path.read_bytes().startswith(b"\x89PNG") and not intact(path.read_bytes()):
        path = VALID / path.relative_to(CASE)
    image = ImageOps.exif_transpose(Image.open(path))
    return np.asarray(image if image.mode[0] in "IF" else image.convert("RGB")).astype(float)


def ids_of(path):
    return (pixels(path) @ (1, 256, 65536)).astype(int)


def base_name(entry):
    return Path(entry["file_name"].replace("\\", "/")).name


def segments_in(annotation):
    return [{k: s.get(k) or 0 for k in ("id", "category_id", "iscrowd")}
            for s in annotation["segments_info"]]


def scores_by_masks(*jsons):
    """The scores of two panoptic JSONs, PNGs in folders beside them, counted with masks."""
    both = [json.loads(path.read_text("utf-8-sig")) for path in jsons]
    truth, prediction = (
        {a["image_id"]: (ids_of(path.with_suffix("") / base_name(a)), segments_in(a))
         for a in data["annotations"]} for path, data in zip(jsons, both))
    categories = [{k: c[k] for k in ("id", "isthing")} for c in both[0]["categories"]]
    return by_masks([truth[id] + prediction[id] for id in truth], categories, Counter())


def drawn_ids(annotations, shape):
    """RLE and polygons of one image -> ids 1, 2, ..., the smaller on top, and
    which pixels are beside a polygon's outline, where to round is the library's choice."""
    masks, unsure = [], Image.new("1", shape[::-1])
    for annotation in annotations:
        outline = annotation["segmentation"]
        mask, polygons = np.zeros(shape, bool), [] if isinstance(outline, dict) else outline
        if not polygons and isinstance(outline["counts"], str):
            mask = decode(outline) > 0
        elif not polygons:
            runs = np.arange(len(outline["counts"])) % 2
            mask = np.repeat(runs, outline["counts"]).reshape(shape[::-1]).T > 0
        for xy in polygons:
            ImageDraw.Draw(one := Image.new("1", shape[::-1])).polygon(xy, fill=1)
            ImageDraw.Draw(unsure).line([*xy, *xy[:2]], fill=1, width=5)
            mask |= np.asarray(one)
        masks.append(mask)
    ids = np.zeros(shape, int)
    for place in sorted(range(len(masks)), key=lambda place: -masks[place].sum()):
        ids[masks[place]] = place + 1
    return ids, np.asarray(unsure)


# ---- kinds of cases: generator -> main, its arguments, whether its result is right ----


def damage(rng, name, how):
    """A copy in CASE of the file or folder `name` begins with, the file damaged; the file."""
    copy = shutil.copytree if (VALID / Path(name).parts[0]).is_dir() else shutil.copy
    copy(VALID / Path(name).parts[0], CASE / Path(name).parts[0])
    (CASE / name).write_bytes(how(rng, (VALID / name).read_bytes()))
    return CASE / name


def pair(rng, pngs):
    """evaluate.py --gt --pred; damaged: one of the JSONs or of the PNGs."""
    for name in ("truth", "guess"):
        shutil.copytree(VALID / name, CASE / name)
        shutil.copy(VALID / f"{name}.json", CASE)
    side = CASE / str(rng.choice(["truth", "guess"]))
    path, how = (side / "val0.png", damage_image) if pngs else (f"{side}.json", damage_json)
    Path(path).write_bytes(how(rng, Path(path).read_bytes()))
    truth, guess, result = CASE / "truth.json", CASE / "guess.json", CASE / "result"

    def holds():
        return flat(json.loads(result.read_text())) == near(flat(scores_by_masks(truth, guess)))

    return evaluate.main, ["--gt", truth, "--pred", guess, "--json", result, "--per-class",
                           "--workers", "0"], holds


def panoptic(rng):
    """evaluate.py --data; damaged: the JSON, a mask or an image of the COCO layout."""
    name = rng.choice([COCO, f"{COCO[:-5]}/val0.png", "data/val/val0.png"])
    damage(rng, name, damage_json if name == COCO else damage_image)

    def holds():
        data = json.loads((CASE / COCO).read_text("utf-8-sig"))
        images = {i["id"]: base_name(i) for i in data["images"]}
        truths = {a["image_id"]: a for a in data["annotations"]}
        good = truths.keys() == {record["image_id"] for record in RECORDS}
        for id, record in ((record["image_id"], record) for record in RECORDS):
            mask = CASE / COCO[:-5] / base_name(truths[id])
            good &= np.array_equal(record["ids"], ids_of(mask))
            good &= np.array_equal(record["image"], pixels(CASE / "data/val" / images[id]))
            good &= segments_in({"segments_info": record["segments"]}) == segments_in(truths[id])
        return good

    return evaluate.main, ["--data", CASE / "data", "--weights", VALID / "ae", *ON_CPU], holds


def instances(rng):
    """evaluate.py --data; damaged: an instances JSON with polygons and RLE."""
    path = damage(rng, "instances.json", damage_json)

    def holds():
        data, good = json.loads(path.read_text("utf-8-sig")), bool(RECORDS)
        for record in RECORDS:
            own = [a for a in data["annotations"] if a["image_id"] == record["image_id"]]
            ids, unsure = drawn_ids(own, record["ids"].shape)
            good &= np.array_equal(record["ids"][~unsure], ids[~unsure])
            good &= all(own[s["id"] - 1]["category_id"] == s["category_id"]
                        for s in record["segments"])
        return good

    return evaluate.main, ["--data", path, "--images", VALID / "data/val",
                           "--weights", VALID / "ae", *ON_CPU], holds


def picture(rng):
    """sample.py IMAGE; damaged: a PNG, also of 16 bits or with EXIF, a JPEG or a TIFF."""
    path = damage(rng, rng.choice(IMAGES), damage_image)

    def holds():
        ours, theirs = RECORDS[0]["image"], pixels(path)
        if theirs.ndim == 2:  # grey of many bits
            theirs = np.nan_to_num(theirs, posinf=0, neginf=0)
            high, low = theirs.max(), min(theirs.min(), 0)
            high = min([white for white in (1, 255, 4095, 65535) if white >= high], default=high)
            theirs = np.repeat(255 * ((theirs - low) / (high - low))[..., None], 3, 2)
        return ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1

    return sample.main, [path, *SAMPLING, "--out", CASE / "out"], holds


def partial_mask(rng):
    """inpaint.py --mask; damaged: .npy or PNG, of a palette, grey or in colours."""
    name = rng.choice(["mask.npy", "mask.npy", "grey.png", "palette.png", "colours.png"])
    path = damage(rng, name, damage_npy if name == "mask.npy" else damage_image)

    def holds():
        drawn = ids_of(CASE / "out/panoptic/colour.png")
        if name == "mask.npy":
            mask = np.load(path)
        else:
            image = Image.open(path if intact(path.read_bytes()) else VALID / name)
            plain = image.mode in ("1", "L", "P", "I;16")
            mask = np.asarray(image if plain else image.convert("RGB")).astype(int)
            mask = mask if plain else mask @ (1, 256, 65536)
        rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int)
                         for new, old in zip(drawn.shape, mask.shape))
        mask = mask[rows][:, columns]
        return np.array_equal(drawn[mask != 0], mask[mask != 0])

    return inpaint.main, ["--image", VALID / "colour.png", "--mask", path, *SAMPLING, "--out",
                          CASE / "out"], holds


def weights(rng):
    """evaluate.py --weights; damaged: the header or the tensors of safetensors."""
    def how(rng, data):
        size = 8 + int.from_bytes(data[:8], "little")
        header, tensors = data[:size], data[size:]
        ways = damage_bytes(rng, header) + tensors, header + damage_bytes(rng, tensors)
        return ways[rng.integers(2)]

    path = damage(rng, "ae/model.safetensors", how)

    def holds():
        ours, theirs = ldmseg.load_model(path), ldmseg.load_model(VALID / "ae")
        return ours.config == theirs.config and all(map(
            torch.equal, ours.state_dict().values(), theirs.state_dict().values()))

    return evaluate.main, ["--data", VALID / "data", "--weights", path, *ON_CPU], holds


def checkpoint(rng, stages=("ae", "ae", "ae", "ldm")):
    """The third step of a run of either stage; damaged: its checkpoint."""
    stage = str(rng.choice(stages))
    damage(rng, f"{stage}/checkpoint.pt", damage_bytes)
    (CASE / stage / "model.safetensors").unlink()

    def holds():
        ours, theirs = (load_file(root / stage / "model.safetensors")
                        for root in (CASE, VALID / "more"))
        return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)

    main, command = STAGES[stage]
    return main, command(CASE / stage, 3), holds


def field_value(rng):
    """--set FIELD=VALUE, one step: usual, odd and extreme values of all fields, but none whose
    work or memory is just too much."""
    stage = str(rng.choice(["ae", "ldm"]))
    names = ldmseg.stage_fields(stage)
    field = names[str(rng.choice([*names]))]
    allowed, default = field.metadata["allowed"] or ("",), field.default
    texts = ["", " ", "nan", "-inf", "1e400", "1e-320", "-1", "-0", "0", "1.5", "0x10", "1_0", "٣",
             "None", "True", str(10**30), ",", "1,", "1,2", "8,16,32", "a=b", "\ud800", "\0",
             *map(str, (default, allowed[0])), *map(str, allowed if field.type is str else ())]
    if field.type in (int, float) and default:
        texts += [str(field.type(default * scale)) for scale in (0.5, 1, 1.5)]
        texts += [str(allowed[1] + 1), *([] if allowed[1] > 64 else [str(allowed[1])])]
    if field.type is tuple:
        texts += [",".join(str(v) for v in (*default[:-1], last)) for last in (0, 1, 8, 32, -32)]
    text = str(rng.choice(texts))
    text = "0" if field.name == "compile" and text == "1" else text  # takes minutes

    def holds():
        stored = json.loads((CASE / "run/config.json").read_text())[field.name]
        kind = (lambda t: [int(v) for v in t.split(",")]) if field.type is tuple else field.type
        measured = field.name.endswith("_scale") and kind(text) == 0
        tensors = load_file(CASE / "run/model.safetensors").values()
        log = (CASE / "run/log.jsonl").read_text()
        return ((stored == kind(text) or measured) and all(t.isfinite().all() for t in tensors)
                and "NaN" not in log and "Infinity" not in log)

    main, command = STAGES[stage]
    return main, command(CASE / "run", 1, f"{field.name}={text}"), holds


KINDS = {"pair: JSON": partial(pair, pngs=False), "pair: PNG": partial(pair, pngs=True),
         "data: panoptic": panoptic, "data: instances": instances, "image": picture,
         "partial mask": partial_mask, "weights": weights, "checkpoint": checkpoint,
         "--set": field_value}  # fmt: skip


def make_valid(stages):
    """The undamaged files, in VALID, and run folders."""
    write_split(VALID / "data", "train", SCENES["train"])
    write_split(VALID / "data", "val", SCENES["val"])
    for name in ("truth", "guess"):
        shutil.copytree(VALID / "data/annotations/panoptic_val", VALID / name)
        shutil.copy(VALID / "data/annotations/panoptic_val.json", VALID / f"{name}.json")
    guess = json.loads((VALID / "guess.json").read_text())
    guess["annotations"][1]["segments_info"].pop()  # its crowd is not predicted
    ldmseg.write_json(VALID / "guess.json", guess)
    ids = paint(*SCENES["val"][1][:2], SCENES["val"][1][2][:2])
    ids[20:30] = 11  # reaches into the other
    ldmseg.write_png(VALID / "guess/val1.png", ldmseg.id2rgb(ids))

    # instances: of the first image polygons, of the second RLE
    annotations = []
    for i, (height, width, segments) in enumerate(SCENES["val"]):
        for _, category, crowd, (y, y1), (x, x1) in segments:
            mask = np.zeros((height, width), bool)
            mask[y:y1, x:x1] = True
            counts = encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
            if category == 9:
                change = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False))
                counts = np.diff(change, prepend=0, append=mask.size).tolist()
            rle = {"size": [height, width], "counts": counts}
            polygon = [[x, y, x1, y, x1, y1, x, y1]]
            annotations.append({"id": len(annotations), "image_id": 10 + i, "iscrowd": crowd,
                                "category_id": category, "segmentation": rle if i else polygon})
    ldmseg.write_json(VALID / "instances.json", guess | {"annotations": annotations})

    # images and partial masks
    colours = Image.open(VALID / "data/val/val0.png")
    grey = np.asarray(colours.convert("L"))
    exif = colours.getexif()
    exif[0x0112] = 6  # turned
    colours.save(VALID / "colour.png")
    colours.save(VALID / "exif.png", exif=exif)
    colours.save(VALID / "exif.jpg", exif=exif)
    colours.save(VALID / "colour.tif", compression="tiff_lzw")
    Image.fromarray(grey.astype(np.uint16) * 200).save(VALID / "deep.png")
    Image.fromarray(grey.astype(np.float32) / 255).save(VALID / "float.tif")
    ids = np.kron([[0, 1, 0], [2, 0, 3]], np.ones((18, 17), np.uint8))[:, :50].astype(np.uint8)
    np.save(VALID / "mask.npy", ids.astype(np.int64))
    Image.fromarray(ids).save(VALID / "grey.png")
    ldmseg.write_png(VALID / "colours.png", ldmseg.id2rgb(1000 * ids.astype(int)))
    palette = Image.fromarray(ids)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(VALID / "palette.png")

    # runs of two steps, and the same after the third
    for stage in stages:
        main, command = STAGES[stage]
        main(command(VALID / stage, 2))
        shutil.copytree(VALID / stage, VALID / "more" / stage)
        main(command(VALID / "more" / stage, 3))


def set_up(stages=("ae", "ldm")):
    """What all cases share: the valid files, a note of each record that a script reads."""
    def noted(record, *arguments):
        RECORDS.append(record)
        return prepare(record, *arguments)

    prepare, ldmseg.prepare = ldmseg.prepare, noted
    warnings.simplefilter("ignore")
    with redirect_stdout(io.StringIO()):
        make_valid(stages)


def outcome_of(main, arguments, holds):
    """Runs a script -> an outcome and what there is to say."""
    lines, command = io.StringIO(), " ".join(map(str, arguments))
    RECORDS.clear()
    try:
        with redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")), redirect_stderr(lines):
            ldmseg.run_script(lambda: main([str(a) for a in arguments]))
        return ("accepted" if holds() else "WRONG"), command
    except SystemExit as stop:
        text = lines.getvalue().strip()
        one_line = len(text.splitlines()) == 1
        return ("refused" if stop.code == 2 and one_line else "TRACEBACK"), text
    except Exception:  # of the script, or of what checks a file that should have been refused
        text = traceback.format_exc()
        return ("WRONG" if "in holds" in text else "TRACEBACK"), f"{command}\n{text}"


def run_case(seed, number, kinds=KINDS):
    """One case, in a child, which may crash -> its kind, the outcome, what there is to say."""
    kind, rng = [*kinds][number % len(kinds)], np.random.default_rng([seed, number])
    shutil.rmtree(CASE, ignore_errors=True)
    CASE.mkdir()
    (report := ROOT / "report").unlink(missing_ok=True)
    if not (child := os.fork()):
        signal.alarm(60)
        torch.set_num_threads(1)  # others do not live on in a child
        resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, resource.RLIM_INFINITY))
        with open(os.devnull, "w") as null:  # libpng's own lines
            os.dup2(null.fileno(), 2)
        try:
            report.write_text(json.dumps(outcome_of(*kinds[kind](rng))))
        finally:
            os._exit(not report.exists())
    if status := os.waitpid(child, 0)[1]:
        hung = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
        return kind, "HANG" if hung else "TRACEBACK", f"the process ended with status {status}"
    return kind, *json.loads(report.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER")
    args = parser.parse_args()
    torch.set_num_threads(1)
    set_up()
    table = Counter()
    for number in range(args.count) if args.only is None else [args.only]:
        kind, outcome, about = run_case(args.seed, number)
        table[kind, outcome] += 1
        if outcome.isupper() or args.only is not None:
            print(f"case {number}: {kind}: {outcome}: {about}", flush=True)
    print(f"{'':16}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES))
    for kind in KINDS:
        print(f"{kind:16}" + "".join(f"{table[kind, outcome]:11}" for outcome in OUTCOMES))
    sys.exit(any(outcome.isupper() for _, outcome in table))


if __name__ == "__main__":
    main()
