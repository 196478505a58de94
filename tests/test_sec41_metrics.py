"""Sec. 4.1, the metric: Panoptic Quality, evaluate.py on files, from logits to segments."""

import json
import shutil
from collections import Counter
from fnmatch import fnmatchcase
from functools import partial

import evaluate
import numpy as np
import pytest
import sample
import torch
import torch.nn.functional as F
from conftest import GOLDEN, ON_CPU, flat
from ldmseg import (
    PanopticQuality, id2rgb, align_ids, most_probable, panoptic_quality, postprocess, read_image,
    segments_of, write_json, write_png,
)  # fmt: skip

CATEGORIES = [{"id": id, "name": f"class {id}", "isthing": thing}
              for id, thing in ((3, 1), (50, 1), (7, 0), (200, 0), (90, 1))]  # 90 is never used

def random_image(rng):
    """(truth ids, its segments, predicted ids, their segments) of overlapping rectangles. Some of
    the truth's ids are not in its list; some of its segments have no pixel."""
    truth = np.zeros(rng.integers(8, 20, 2), int)
    for place in range(1, rng.integers(2, 9)):
        rows, columns = (slice(*np.sort(rng.choice(n + 1, 2, replace=False))) for n in truth.shape)
        truth[rows, columns] = place

    # in the prediction, a segment or the black or white fields of its chessboard become another
    places = np.arange(8)[:, None].repeat(2, 1)  # (8, 2)
    places = np.where(rng.random((8, 2)) < 0.2, rng.integers(0, 8, (8, 2)), places)
    prediction = places[truth, np.indices(truth.shape).sum(0) % 2]
    prediction = np.roll(prediction, rng.integers(0, 2), rng.integers(0, 2))
    ids = np.c_[[0, 0], 1 + rng.choice(2**24 - 1, (2, 7), replace=False)]  # (2, 8)
    classes = rng.choice([3, 3, 50, 7, 200], (2, 8))
    classes[1] = np.where(rng.random(8) < 0.8, classes[0], classes[1])
    lists = [[{"id": int(id), "category_id": int(c)} for id, c in zip(*rows)]
             for rows in zip(ids, classes)]  # fmt: skip
    listed = [s | {"iscrowd": int(rng.random() < 0.3)} for s in lists[0][1:] if rng.random() < 0.85]
    predicted = [lists[1][place] for place in np.unique(prediction) if place]
    return ids[0][truth], listed, ids[1][prediction], predicted

def share(mask, *parts):
    return sum((mask & part).sum() for part in parts) / mask.sum()

def by_masks(images, categories, hits):
    """PanopticQuality.compute() written out rule by rule; `hits` counts where a rule decides."""
    count = {c["id"]: Counter() for c in categories}
    for truth, truth_segments, prediction, predicted in images:
        void, listed = truth == 0, np.isin(truth, [t["id"] for t in truth_segments])
        unlisted, matched = ~void & ~listed, set()
        for t in truth_segments:
            row, a = count[t["category_id"]], truth == t["id"]
            hits["truth without pixels"] += not a.any()
            for p in predicted:
                b = prediction == p["id"]
                both, union = (a & b).sum(), (a | b & ~void).sum()
                if t["category_id"] != p["category_id"]:
                    hits["another category"] += 2 * both > union
                elif t["iscrowd"]:
                    hits["a crowd is never matched"] += 2 * both > union
                elif 2 * both > union:
                    matched |= {("t", t["id"]), ("p", p["id"])}
                    row += Counter(tp=1, iou=both / union)
                    hits["VOID out of the union"] += 2 * both <= (a | b).sum()
                    hits["unlisted ids in the union"] += (b & unlisted).any()
                else:
                    hits["IoU of exactly 0.5"] += both > 0 and 2 * both == union
            row["fn"] += ("t", t["id"]) not in matched and not t["iscrowd"]
            hits["a crowd is never missed"] += t["iscrowd"]
        for p in (p for p in predicted if ("p", p["id"]) not in matched):
            b = prediction == p["id"]
            crowds = [truth == t["id"] for t in truth_segments
                      if t["iscrowd"] and t["category_id"] == p["category_id"]]
            last = crowds[-1:]
            ignored = share(b, void, *last) > 0.5
            count[p["category_id"]]["fp"] += not ignored
            hits["ignored for VOID"] += share(b, void) > 0.5
            hits["ignored for a crowd"] += ignored and share(b, void) <= 0.5
            hits["the last crowd, not the first"] += ignored != (share(b, void, *crowds[:1]) > 0.5)
            hits["the last crowd, not all"] += ignored != (share(b, void, *crowds) > 0.5)
            hits["unlisted ids are not VOID"] += ignored != (share(b, void, *last, unlisted) > 0.5)
            hits["exactly half over VOID"] += share(b, void, *last) == 0.5
        for id, row in count.items():
            a, b = (np.isin(ids, [s["id"] for s in segments if s["category_id"] == id])
                    for ids, segments in ((truth, truth_segments), (prediction, predicted)))
            row += Counter(both=(a & b).sum(), any=((a | b) & listed).sum(), truth=a.sum())
            hits["a class only in the prediction"] += not a.any() and (b & listed).any()

    rows = {str(id): {"pq": c["iou"] / weight, "sq": c["iou"] / max(c["tp"], 1),
                      "rq": c["tp"] / weight, "tp": c["tp"], "fp": c["fp"], "fn": c["fn"]}
            for id, c in count.items() if (weight := c["tp"] + c["fp"] / 2 + c["fn"] / 2)}
    things, result = {str(c["id"]) for c in categories if c["isthing"]}, {"per_class": rows}
    groups = {"All": rows, "Things": rows.keys() & things, "Stuff": rows.keys() - things}
    for name, group in groups.items():
        result[name] = {k: sum(rows[i][k] for i in group) / max(len(group), 1)
                        for k in ("pq", "sq", "rq")} | {"n": len(group)}
    ious = [c["both"] / c["any"] for c in count.values() if c["any"]]
    correct, pixels = (sum(c[k] for c in count.values()) for k in ("both", "truth"))
    classes = {"miou": sum(ious) / max(len(ious), 1), "pixel_accuracy": correct / max(pixels, 1)}
    return result | (classes if len(categories) > 1 else {})

def near(expected, tolerance=1e-12):
    return pytest.approx(flat(expected), abs=tolerance, rel=0)

def quality(images, **options):
    metric = PanopticQuality(CATEGORIES, **options)
    for image in images:
        metric.update(*image)
    return metric.compute()

ONE, rng = [{"id": 1, "isthing": 1}], np.random.default_rng(0)
CASES = [[random_image(rng) for _ in range(rng.integers(1, 4))] for _ in range(300)]

@pytest.mark.parametrize("class_agnostic, rules", [(False, 14), (True, 12)])
def test_scores_equal_a_count_with_masks_and_every_rule_decides(class_agnostic, rules):
    hits = Counter()
    for images in CASES:
        expected = by_masks(images, CATEGORIES, hits) if not class_agnostic else by_masks(
            [[part if isinstance(part, np.ndarray) else [s | {"category_id": 1} for s in part]
              for part in image] for image in images], ONE, hits)
        assert flat(quality(images, class_agnostic=class_agnostic)) == near(expected)
    decided = [rule for rule, count in hits.items() if count >= 10]
    assert len(decided) == rules, set(hits) - set(decided)

def test_panoptic_quality_of_two_maps_is_the_class_agnostic_metric():
    for truth, _, prediction, _ in [images[0] for images in CASES]:
        lists = [segments_of(ids) for ids in (truth, prediction)]
        expected = by_masks([(truth, lists[0], prediction, lists[1])], ONE, Counter())["All"]
        assert flat(panoptic_quality(truth, prediction)) == near(expected)

# ---- evaluate.py on files ----

def write_pair(root, images):
    """gt.json, pred.json and their PNGs in the COCO panoptic format; image ids count from 1."""
    for side, name in enumerate(("gt", "pred")):
        (root / name).mkdir(parents=True)
        annotations = []
        for i, image in enumerate(images, start=1):
            ids, segments = image[2 * side : 2 * side + 2]
            write_png(root / name / f"{i}.png", id2rgb(ids))
            annotations.append({"image_id": i, "file_name": f"{i}.png", "segments_info": [
                s | {"area": int((ids == s["id"]).sum())} for s in segments]})
        write_json(root / f"{name}.json", {"annotations": annotations, "categories": CATEGORIES})
    return root

def files(root, *more):
    return ["--gt", f"{root}/gt.json", "--pred", f"{root}/pred.json", *more]

def test_scores_of_files_equal_a_count_with_masks_for_any_workers(tmp_path, evaluated):
    images = [image for images in CASES[:30] for image in images]
    command = files(write_pair(tmp_path / "pair", images))
    results = [evaluated(*command, "--workers", workers) for workers in ("0", "1", "2")]
    assert results == results[:1] * 3  # to the last digit
    assert flat(results[0]) == near(by_masks(images, CATEGORIES, Counter()))

def test_scores_equal_hotcoco(tmp_path, evaluated):
    panoptic = pytest.importorskip("hotcoco").panoptic
    root = write_pair(tmp_path / "pair", [image for images in CASES for image in images])
    oracle = panoptic.PanopticEval(str(root / "gt.json"), str(root / "pred.json"))
    oracle.evaluate()
    results, classes, got = oracle.results(), oracle.report()["metrics"], evaluated(*files(root))
    expected = {group: results[group] for group in ("All", "Things", "Stuff")}
    expected |= {"miou": classes["mIoU"], "pixel_accuracy": classes["aAcc"]}
    assert flat({key: got[key] for key in expected}) == near(expected, 1e-9)

REFERENCE = GOLDEN / "pq_small"
EXPECTED = json.loads((REFERENCE / "expected.json").read_text())

def test_scores_and_printed_rows_equal_the_reference(evaluated, capsys):
    expected, got = dict(EXPECTED), evaluated(*files(REFERENCE, "--per-class"))
    del expected["class_agnostic"]
    assert {k: flat(got)[k] for k in flat(expected)} == near(expected)
    printed = " ".join(capsys.readouterr().out.split())
    for row in (*expected.pop("per_class").values(), *expected.values()):
        assert " ".join(f"{row[k]:.4f}" for k in ("pq", "sq", "rq")) in printed

def test_class_agnostic_scores_of_other_folders_equal_the_reference(evaluated, tmp_path):
    flags = ["--class-agnostic"]
    for name in ("gt", "pred"):
        shutil.copy(REFERENCE / f"{name}.json", tmp_path)
        flags += [f"--{name}-dir", str(REFERENCE / name)]
    assert flat(evaluated(*files(tmp_path, *flags))["All"]) == near(EXPECTED["class_agnostic"])

IDS = np.array([[5, 5, 5, 70000, 70000, 0]] * 4)
SEGMENTS = [{"id": 5, "category_id": 3}, {"id": 70000, "category_id": 7}]

@pytest.fixture
def small(tmp_path):
    """The folder of three images with a perfect prediction."""
    return write_pair(tmp_path / "small", [(IDS, SEGMENTS, IDS, SEGMENTS)] * 3)

def edit(name, change, root):
    content = json.loads((root / f"{name}.json").read_text())
    change(content["annotations"])
    write_json(root / f"{name}.json", content)

@pytest.mark.parametrize("images", [[], [(0 * IDS, [], IDS, SEGMENTS)]], ids=["none", "all VOID"])
def test_without_truth_every_score_is_0_over_no_category(tmp_path, evaluated, images):
    nothing = {group: {"pq": 0, "sq": 0, "rq": 0, "n": 0} for group in ("All", "Things", "Stuff")}
    result = evaluated(*files(write_pair(tmp_path / "pair", images)))
    assert result == nothing | {"per_class": {}, "miou": 0, "pixel_accuracy": 0}

def test_allow_missing_counts_the_segments_as_missed(small, evaluated):
    edit("pred", lambda annotations: annotations.pop(1), small)
    row = evaluated(*files(small, "--allow-missing"))["per_class"]["3"]
    assert (row["tp"], row["fp"], row["fn"]) == (2, 0, 1)

@pytest.mark.parametrize("change, warning, counts", [(lambda a: None, None, (3, 0, 0)),
    (lambda a: [one["segments_info"][0].update(area=9) for one in a[:2]],
     "2 segments have another area than their pixels; pixels were counted", (3, 0, 0)),
    (lambda a: a[0]["segments_info"].pop(0),
     "12 pixels have an id that the JSON does not list; they belong to no segment and are not VOID",
     (2, 1, 0))], ids=["nothing odd", "areas", "ids"])  # fmt: skip
def test_what_is_odd_is_warned_of_once(small, evaluated, capfd, change, warning, counts):
    edit("gt", change, small)
    row = evaluated(*files(small, "--workers", "2"))["per_class"]["3"]
    assert (row["tp"], row["fp"], row["fn"]) == counts
    assert capfd.readouterr().err == (f"warning: {small}/gt.json: {warning}\n" if warning else "")

def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

BAD_FILES = {  # the damage; what the one line says after the folder, * is anything
    "no JSON": (lambda root: (root / "gt.json").unlink(), "gt.json: no such annotation file"),
    "no PNG": (lambda root: (root / "gt/2.png").unlink(), "gt/2.png: no such image"),
    "truncated JSON": (lambda root: truncate(root / "pred.json"), "pred.json: not a readable"),
    "truncated PNG": (lambda root: truncate(root / "pred/2.png"), "pred/2.png: not a readable"),
    "another size": (lambda root: write_png(root / "pred/2.png", id2rgb(IDS[1:])),
                     "pred/2.png: image 2: the prediction is (3, 6, 3), expected (4, 6)"),
    "id not in the JSON": (lambda root: write_png(root / "pred/2.png", id2rgb(0 * IDS + 77)),
                           "pred/2.png: image 2: the prediction has 24 pixels of ids not in"),
    "id not in the PNG": (lambda root: write_png(root / "pred/2.png", id2rgb(0 * IDS)),
                          "pred/2.png: image 2: the prediction *none of [[]5, 70000]"),
    "no prediction": (partial(edit, "pred", list.pop), "pred.json: no prediction for 1 of 3*is 3"),
    "no truth": (partial(edit, "pred", lambda a: a.append({**a[0], "image_id": 77})),
                 "pred.json: predictions for 1 images that *gt.json does not have*77")}  # fmt: skip

@pytest.mark.parametrize("workers, case", [
    *(("0", case) for case in BAD_FILES), ("1", "truncated PNG"), ("1", "id not in the PNG")])
def test_a_bad_file_is_named_in_one_line(small, complaint, case, workers):
    damage, message = BAD_FILES[case]
    damage(small)
    line = complaint(evaluate.main, *files(small, "--workers", workers))
    assert fnmatchcase(line, f"{small}/{message}*"), line

def test_instances_are_no_files_to_compare(complaint, tmp_path):
    write_json(tmp_path / "a.json", {
        "images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 3}], "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "segmentation": [[0, 0, 2, 0, 2, 2]]}]})
    line = complaint(evaluate.main, "--gt", tmp_path / "a.json", "--pred", tmp_path / "a.json")
    assert line.startswith(f"{tmp_path}/a.json: instances, without PNGs")

def test_saved_samples_score_like_the_weights(data, tiny_run, tmp_path, evaluated):
    annotated, images = str(data / "annotations" / "panoptic_val.json"), str(data / "val")
    command = ["--weights", str(tiny_run.ldm), "--images", images, "--steps", "3", *ON_CPU]
    sample.main([*command, "--data", annotated, "--out", str(tmp_path)])
    samples, truth = tmp_path / "panoptic.json", tmp_path / "moved.json"
    shutil.copy(samples, truth)
    for path in (tmp_path / "panoptic").iterdir():
        write_png(tmp_path / "moved" / path.name, np.roll(read_image(path), 1, axis=1))
    direct = evaluated(*command, "--data", truth)
    saved = evaluated("--gt", truth, "--pred", samples, "--class-agnostic")
    assert flat(saved) == near({k: direct[k] for k in saved}) and 0.1 < saved["All"]["pq"] < 0.9

# ---- logits -> segments, and their comparison ----

@pytest.mark.parametrize("probabilities, threshold, id", [
    ([0.3, 0.1, 0.6], 0.5, 2), ([0.3, 0.1, 0.6], 0.7, 0), ([0.6, 0.1, 0.3], 0, 0)])
def test_void_wins_as_channel_0_and_where_confidence_is_low(probabilities, threshold, id):
    logits = torch.tensor(probabilities).log().view(-1, 1, 1).expand(-1, 4, 4)
    assert postprocess(logits, (8, 8), threshold, min_area=0).unique().tolist() == [id]

@pytest.mark.parametrize("ids, size, min_area, row", [
    ([1, 1, 3, 3], (12, 20), 0, 10 * [1] + 10 * [3]), ([1, 1, 3, 3], (5, 6), 0, [1, 1, 1, 3, 3, 3]),
    ([1, 2, 2, 2], (8, 8), 16, 2 * [1] + 6 * [2]), ([1, 2, 2, 2], (8, 8), 17, 2 * [0] + 6 * [2])])
def test_ids_are_resized_to_the_image_then_small_segments_are_void(ids, size, min_area, row):
    logits = 20.0 * torch.eye(4)[:, None, ids].repeat(1, 4, 1)  # id ids[j] in column j
    assert postprocess(logits, size, 0, min_area).tolist() == [row] * size[0]

@pytest.mark.parametrize("size", [(7, 9), (64, 64), (61, 130), (300, 41)])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("scale", [1, 4, 20])  # most pixels are in doubt, or nearly none
def test_pixels_without_doubt_are_those_of_the_whole_map(size, threshold, scale):
    logits = scale * torch.randn(6, 16, 12, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(logits[None], (32, 24), mode="bilinear")
    whole = F.interpolate(whole, size, mode="bilinear")[0].softmax(0).max(0)
    expected = whole.indices.masked_fill(whole.values < threshold, 0)
    for values_at_once in (1, 10**9):  # row by row, or more
        assert torch.equal(most_probable(logits, size, threshold, values_at_once).long(), expected)

def test_segments_info_counts_areas_and_boxes():
    ids = np.zeros((5, 7), np.int64)
    ids[1:4, 2:6], ids[4, 0] = 9, 300
    ids[2, 3] = 0
    assert segments_of(ids, {300: 7}) == [
        {"id": 9, "category_id": 1, "area": 11, "iscrowd": 0, "bbox": [2, 1, 4, 3]},
        {"id": 300, "category_id": 7, "area": 1, "iscrowd": 0, "bbox": [0, 4, 1, 1]}]

def test_segments_that_match_take_the_truths_ids_and_others_unused_ones():
    halves = [[np.array([[1, 1, 0, 0]]), None, np.array([[2, 0, 0, 0]])]]  # IoU of exactly 0.5
    for truth, _, prediction, *_ in halves + [images[0] for images in CASES]:
        renamed, unmatched = align_ids(prediction, truth), []
        for id in np.unique(prediction):
            mask = prediction == id
            ious = {t: share(mask | (truth == t), mask & (truth == t)) for t in np.unique(truth)}
            match = [t for t, iou in ious.items() if t and iou > 0.5] if id else [0]
            (got,) = np.unique(renamed[mask])  # a segment stays one
            unmatched += [] if match else [got]
            assert [got] == match or not match
        assert len(set(unmatched)) == len(unmatched) and all(n > truth.max() for n in unmatched)
