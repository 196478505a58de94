"""evaluate.py on saved predictions: its scores against independent counts, its complaints."""

import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatchcase

import evaluate
import numpy as np
import pytest
import sample
from ldmseg import (
    PanopticQuality, id2rgb, load_model, read_image, save_weights, write_json, write_png,
)  # fmt: skip
from PIL import Image

CATEGORIES = [{"id": id, "name": f"class {id}", "isthing": thing}
              for id, thing in ((3, 1), (50, 1), (7, 0), (200, 0), (90, 1))]  # 90 is never used

# ---- the rules of the score, counted with a mask for every segment, on random images ----


def random_image(rng):
    """(truth ids, its segments, predicted ids, their segments): rectangles that overlap.

    Some of the truth's ids are not in its list; some of its segments have no pixel left.
    """
    height, width = rng.randint(8, 20), rng.randint(9, 24)
    truth, prediction = np.zeros((2, height, width), int)
    truth_segments, predicted, unused = [], [], iter(rng.sample(range(1, 2**24), 40))

    def category():
        return rng.choice((3, 3, 50, 7, 200))

    def rectangle():
        top, left = rng.randrange(height), rng.randrange(width)
        return slice(top, top + rng.randint(2, height)), slice(left, left + rng.randint(2, width))

    for _ in range(rng.randint(0, 7)):
        truth[rectangle()] = id = next(unused)
        if rng.random() < 0.85:
            crowd = int(rng.random() < 0.35)
            truth_segments.append({"id": id, "category_id": category(), "iscrowd": crowd})
    category_of = {0: None} | {s["id"]: s["category_id"] for s in truth_segments}
    for id in rng.sample([*category_of], len(category_of)):
        mask, fate = truth == id, rng.choice(("copy", "shift", "grow", "merge", "split", "miss"))
        moved = np.roll(mask, rng.choice((1, 2, 4)), rng.randrange(2))
        merged = mask | (truth == rng.choice([*category_of]))
        half = mask & (2 * mask.cumsum().reshape(mask.shape) <= mask.sum())
        for part in {"copy": [mask], "shift": [moved], "grow": [mask | moved], "merge": [merged],
                     "split": [half, mask & ~half], "miss": []}[fate]:  # fmt: skip
            prediction[part] = new = next(unused)
            same = category_of[id] if rng.random() < 0.8 else None
            predicted.append({"id": new, "category_id": same or category()})
    if rng.random() < 0.5:
        prediction[rectangle()] = id = next(unused)
        predicted.append({"id": id, "category_id": category()})
    predicted = [p for p in predicted if (prediction == p["id"]).any()]
    return truth, truth_segments, prediction, predicted


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
        for p in predicted:
            if ("p", p["id"]) in matched:
                continue
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

    rows = {}
    for category, c in count.items():
        if weight := c["tp"] + c["fp"] / 2 + c["fn"] / 2:
            rows[str(category)] = {
                "pq": c["iou"] / weight, "sq": c["iou"] / max(c["tp"], 1), "rq": c["tp"] / weight,
                "tp": c["tp"], "fp": c["fp"], "fn": c["fn"]}  # fmt: skip
    things, result = {str(c["id"]) for c in categories if c["isthing"]}, {"per_class": rows}
    groups = {"All": rows, "Things": rows.keys() & things, "Stuff": rows.keys() - things}
    for name, group in groups.items():
        result[name] = {k: sum(rows[i][k] for i in group) / max(len(group), 1)
                        for k in ("pq", "sq", "rq")} | {"n": len(group)}
    ious = [c["both"] / c["any"] for c in count.values() if c["any"]]
    correct, pixels = (sum(c[k] for c in count.values()) for k in ("both", "truth"))
    return result | {"miou": sum(ious) / max(len(ious), 1),
                     "pixel_accuracy": correct / max(pixels, 1)}


def flat(result, prefix=""):
    """A nested result as {"All/pq": 0.5, ...}."""
    parts = [flat(v, f"{prefix}{k}/") if isinstance(v, dict) else {prefix + k: v}
             for k, v in result.items()]
    return {k: v for part in parts for k, v in part.items()}


def near(expected, tolerance=1e-12):
    return pytest.approx(flat(expected), abs=tolerance, rel=0)


def quality(images, **options):
    metric = PanopticQuality(CATEGORIES, **options)
    for image in images:
        metric.update(*image)
    return metric.compute()


@pytest.fixture(scope="module")
def cases():
    """300 cases of one to three random images."""
    rng = random.Random(0)
    return [[random_image(rng) for _ in range(rng.randint(1, 3))] for _ in range(300)]


RULES = ["truth without pixels", "a crowd is never matched", "a crowd is never missed",
         "VOID out of the union", "unlisted ids in the union", "IoU of exactly 0.5",
         "ignored for VOID", "ignored for a crowd", "the last crowd, not the first",
         "the last crowd, not all", "unlisted ids are not VOID", "exactly half over VOID"]
CLASS_RULES = ["another category", "a class only in the prediction"]


def test_scores_equal_a_count_with_masks(cases):
    hits = Counter()
    for images in cases:
        assert flat(quality(images)) == near(by_masks(images, CATEGORIES, hits))
    assert [rule for rule in RULES + CLASS_RULES if hits[rule] < 10] == [], "rules hardly tried"


def test_class_agnostic_scores_equal_a_count_with_masks(cases):
    hits = Counter()
    for images in cases:
        relabelled = [[[s | {"category_id": 1} for s in part] if isinstance(part, list) else part
                       for part in image] for image in images]
        expected = by_masks(relabelled, [{"id": 1, "isthing": 1}], hits)
        del expected["miou"], expected["pixel_accuracy"]
        assert flat(quality(images, class_agnostic=True)) == near(expected)
    assert [rule for rule in RULES if hits[rule] < 10] == [], "rules hardly tried"


def test_coco_colours_score_like_ids(cases):
    for images in cases:
        colours = [(id2rgb(truth), truth_segments, id2rgb(prediction), predicted)
                   for truth, truth_segments, prediction, predicted in images]
        assert quality(colours) == quality(images)


# ---- files ----


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
    return ["--gt", f"{root}/gt.json", "--pred", f"{root}/pred.json", "--workers", "0", *more]


@pytest.fixture
def score(tmp_path):
    """A function (arguments) -> the JSON that evaluate.py leaves."""
    def run(arguments):
        evaluate.main([*arguments, "--json", str(tmp_path / "out.json")])
        return json.loads((tmp_path / "out.json").read_text())

    return run


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """240 random images as files."""
    rng = random.Random(1)
    return write_pair(tmp_path_factory.mktemp("scenes"), [random_image(rng) for _ in range(240)])


def test_scores_equal_hotcoco(scenes, score):
    panoptic = pytest.importorskip("hotcoco").panoptic
    oracle = panoptic.PanopticEval(str(scenes / "gt.json"), str(scenes / "pred.json"))
    oracle.evaluate()
    results, metrics = oracle.results(), oracle.report()["metrics"]
    rows = {str(i): {k: row[k] for k in ("pq", "sq", "rq", "tp", "fp", "fn")}
            for i, row in results["per_class"].items() if row["pq"] != -1}
    groups = {group: results[group] for group in ("All", "Things", "Stuff")}
    assert all(0.1 < row["pq"] < 0.9 for row in (*groups.values(), *rows.values()))
    assert flat(score(files(scenes))) == near(groups | {
        "per_class": rows, "miou": metrics["mIoU"], "pixel_accuracy": metrics["aAcc"]}, 1e-9)


def test_the_number_of_workers_changes_no_digit(scenes, tmp_path):
    results = []
    for workers in ("0", "1", "2"):
        evaluate.main(files(scenes, "--workers", workers, "--json", str(tmp_path / workers)))
        results.append((tmp_path / workers).read_bytes())
    assert len(results[0]) > 500 and results == results[:1] * 3


@pytest.fixture(scope="module")
def golden(shared):
    """The folder of reference files, and the results of the reference implementation."""
    folder = shared / "golden" / "pq_small"
    return folder, json.loads((folder / "expected.json").read_text())


def test_scores_equal_the_reference(golden, score):
    folder, expected = golden
    expected = {k: v for k, v in expected.items() if k != "class_agnostic"}
    got = flat(score(files(folder)))
    assert {k: got[k] for k in flat(expected)} == near(expected)


def test_class_agnostic_scores_equal_the_reference(golden, score):
    folder, expected = golden
    got = score(files(folder, "--class-agnostic"))
    assert flat(got["All"]) == near(expected["class_agnostic"])


def test_png_folders_may_have_other_names(golden, score, tmp_path):
    folder, expected = golden
    flags = []
    for name in ("gt", "pred"):
        shutil.copy(folder / f"{name}.json", tmp_path)
        flags += [f"--{name}-dir", str(shutil.copytree(folder / name, tmp_path / f"{name} PNGs"))]
    assert flat(score(files(tmp_path, *flags))["All"]) == near(expected["All"])


@pytest.mark.parametrize("flags, named", [([], False), (["--per-class"], True)])
def test_the_table_has_the_groups_and_on_demand_the_categories(golden, capsys, flags, named):
    folder, expected = golden
    evaluate.main(files(folder, *flags))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]

    def row(name, values):
        return "  ".join([name, *(f"{values[k]:.4f}" for k in ("pq", "sq", "rq"))]) + "  "

    for group in ("All", "Things", "Stuff"):
        assert row(group, expected[group]) + str(expected[group]["n"]) in lines
    for category in json.loads((folder / "gt.json").read_text())["categories"]:
        start = row(category["name"], expected["per_class"][str(category["id"])])
        assert any(line.startswith(start) for line in lines) == named


# ---- where there is little to count; warnings ----

IDS = np.array([[5, 5, 5, 70000, 70000, 0]] * 4)
SMALL = (IDS, [{"id": 5, "category_id": 3}, {"id": 70000, "category_id": 7}],
         np.where(IDS == 5, 8, IDS), [{"id": 8, "category_id": 3}, {"id": 70000, "category_id": 7}])
NOTHING = {group: {"pq": 0, "sq": 0, "rq": 0, "n": 0} for group in ("All", "Things", "Stuff")}


@pytest.fixture
def small(tmp_path):
    """The folder of three images with a perfect prediction."""
    return write_pair(tmp_path / "small", [SMALL] * 3)


def edit(name, change):
    """A function of the folder that changes the content of one of its JSONs."""
    def apply(root):
        content = json.loads((root / f"{name}.json").read_text())
        change(content)
        (root / f"{name}.json").write_text(json.dumps(content))

    return apply


def edit_image(name, change):
    return edit(name, lambda content: change(content["annotations"][1]))


def edit_segment(name, **values):
    return edit_image(name, lambda annotation: annotation["segments_info"][0].update(values))


def test_categories_that_never_occur_are_left_out(small, score):
    result = score(files(small))
    assert result["All"] == {"pq": 1, "sq": 1, "rq": 1, "n": 2} and result["miou"] == 1
    assert result["per_class"].keys() == {"3", "7"}


@pytest.mark.parametrize("images", [[], [(0 * IDS, [], *SMALL[2:])]], ids=["none", "all VOID"])
def test_without_truth_every_score_is_0_over_no_category(tmp_path, score, images):
    result = score(files(write_pair(tmp_path / "pair", images)))
    assert result == NOTHING | {"per_class": {}, "miou": 0, "pixel_accuracy": 0}


def test_allow_missing_counts_the_segments_as_missed(small, score):
    edit("pred", lambda c: c["annotations"].pop(1))(small)
    row = score(files(small, "--allow-missing"))["per_class"]["3"]
    assert (row["tp"], row["fp"], row["fn"]) == (2, 0, 1)


@pytest.mark.parametrize("damage, message", [
    (lambda root: None, None),
    (edit("gt", lambda c: [a["segments_info"][0].update(area=9) for a in c["annotations"][:2]]),
     "gt.json: 2 segments have another area than their pixels"),
    (edit("gt", lambda c: [a["segments_info"].pop(0) for a in c["annotations"][:2]]),
     "gt.json: 24 pixels have an id that the JSON does not list"),
    (edit("pred", lambda c: c["categories"][0].update(name="other")),
     "pred.json and */gt.json have different categories"),
], ids=["nothing odd", "areas", "ids", "category names"])  # fmt: skip
def test_what_is_odd_is_warned_of_once(small, capfd, damage, message):
    damage(small)
    evaluate.main(files(small, "--workers", "2"))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == (message is not None)
    assert all(fnmatchcase(line, f"warning: {small}/{message}*") for line in lines), lines


def test_areas_come_from_pixels(scenes, score, tmp_path):
    for name in ("gt", "pred"):
        (tmp_path / name).symlink_to(scenes / name)
        shutil.copy(scenes / f"{name}.json", tmp_path)
        edit(name, lambda c: [s.update(area=s["area"] // 3)
                              for a in c["annotations"] for s in a["segments_info"]])(tmp_path)
    assert score(files(tmp_path)) == score(files(scenes))


# ---- bad input ----


@pytest.fixture
def complaint(complaint, tmp_path):
    """A function (arguments) -> the one line on stderr of evaluate.py, which must fail."""
    def run(arguments):
        out = tmp_path / "results" / "out.json"
        line = complaint(evaluate.main, *arguments, "--json", out)
        assert not out.parent.exists()
        return line

    return run


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def twice(items, index):
    items.append(items[index])


FORMAT = "expected COCO panoptic JSON (categories; annotations of image_id"
INSTANCE = {"id": 4, "image_id": 2, "category_id": 3, "iscrowd": 0, "area": 4.0,
            "bbox": [0, 0, 2, 2], "segmentation": [[0, 0, 0, 2, 2, 2]]}  # fmt: skip
BAD_JSON = {  # the damage; what the line says after the folder, * is anything
    "no prediction": (edit("pred", lambda c: c.update(annotations=c["annotations"][:1])),
                      "pred.json: no prediction for 2 of 3 images, the first is 2; --allow-"),
    "extra prediction": (edit("pred", lambda c: c["annotations"].append(
        {"image_id": 77, "file_name": "77.png", "segments_info": []})),
        "pred.json: predictions for 1 images that */gt.json does not have, the first is 77"),
    "category twice": (edit("gt", lambda c: twice(c["categories"], 2)),
                       "gt.json: categories *7*7*expected each id once"),
    "isthing 2": (edit("gt", lambda c: c["categories"][0].update(isthing=2)), "gt.json: *isthing"),
    "no categories": (edit("gt", lambda c: c["categories"].clear()), "gt.json: image 1, segment"),
    "no isthing": (edit("gt", lambda c: c["categories"][0].pop("isthing")), "gt.json: *isthing"),
}  # fmt: skip
for name, id in (("gt", 5), ("pred", 8)):
    BAD_JSON |= {f"{name}: {case}": (damage, f"{name}{message}") for case, damage, message in (
        ("category", edit_segment(name, category_id=99),
         f".json: image 2, segment {id} has category 99, expected*200"),
        ("segment twice", edit_image(name, lambda a: twice(a["segments_info"], 0)),
         f".json: image 2 *lists segment {id} 2 times, expected*once"),
        ("image twice", edit(name, lambda c: twice(c["annotations"], 1)),
         ".json: image 2 *is annotated 2 times, expected once"),
        ("id 0", edit_segment(name, id=0), ".json: image 2 has segment id 0, expected 1*2^24"),
        ("id 2^24", edit_segment(name, id=2**24),
         ".json: image 2 has segment id 16777216, expected 1"),
        ("text as id", edit_segment(name, id="8"),
         ".json: image 2 has segment id '8', expected 1*2^24"),
        ("instances", edit(name, lambda c: c.update(annotations=[INSTANCE])),
         ".json: image 2 has *segmentation*, expected*segments_info*COCO instances?"),
        ("a list", lambda root, name=name: write_json(root / f"{name}.json", [INSTANCE]),
         f".json: {FORMAT}*list"),
        ("truncated", lambda root, name=name: truncate(root / f"{name}.json"),
         f".json: {FORMAT}*got JSONDecodeError"),
        ("no file name", edit_image(name, lambda a: a.update(file_name=None)),
         ".json: image 2 has *expected*file_name"),
        ("no JSON", lambda root, name=name: (root / f"{name}.json").unlink(),
         ".json: no such annotation file"),
        ("no PNGs", lambda root, name=name: shutil.rmtree(root / name),
         ": no such folder of PNGs, expected"),
    )}  # fmt: skip


@pytest.mark.parametrize("case", BAD_JSON)
def test_a_bad_json_is_named_in_one_line(small, complaint, case):
    damage, message = BAD_JSON[case]
    damage(small)
    line = complaint(files(small))
    assert fnmatchcase(line, f"{small}/{message}*"), line


def repaint(name, ids):
    return lambda root: Image.fromarray(ids).save(root / name)


BAD_PNG = {
    "no truth": (lambda root: (root / "gt/2.png").unlink(), "gt/2.png: image 2: no such"),
    "no prediction": (lambda root: (root / "pred/2.png").unlink(),
                      "pred/2.png: image 2: no such"),
    "truncated": (lambda root: truncate(root / "pred/2.png"),
                  "pred/2.png: image 2: not a readable"),
    "another size": (repaint("pred/2.png", id2rgb(SMALL[2][1:])),
                     "pred/2.png: image 2: the prediction is (3, 6), expected (4, 6)"),
    "16 bits": (repaint("gt/2.png", IDS.astype(np.uint16)),
                "gt/2.png: image 2: *16 bits*expected 8"),
    "id not in the JSON": (repaint("pred/2.png", id2rgb(np.full_like(IDS, 77))),
                           "pred/2.png: image 2: the prediction has pixels of segment 77, which"),
    "id not in the PNG": (edit_image("pred", lambda a: a["segments_info"].append(
        {"id": 78, "category_id": 3})),
        "pred/2.png: image 2: the prediction lists segment 78, but no pixel has this id"),
}  # fmt: skip


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("case", BAD_PNG)
def test_a_bad_png_is_named_in_one_line(small, complaint, case, workers):
    damage, message = BAD_PNG[case]
    damage(small)
    line = complaint(files(small, "--workers", workers))
    assert fnmatchcase(line, f"{small}/{message}*"), line


@pytest.mark.parametrize("flags", [["--gt", "a.json"], ["--pred", "a.json"],
                                   ["--gt", "a.json", "--pred", "a.json", "--weights", "run"]])
def test_gt_needs_pred_and_no_weights(complaint, flags):
    assert complaint(flags) == "expected --gt and --pred together, without --weights"


def test_a_limit_below_1_is_named(small, complaint):
    assert complaint(files(small, "--limit", "-1")) == "--limit -1, expected at least 1"


# ---- what sample.py writes ----


def test_saved_samples_score_like_the_weights(data, tiny_run, tmp_path, score):
    model, weights = load_model(tiny_run.ldm), tmp_path / "model.safetensors"
    save_weights(weights, model, replace(model.config, min_area=100), step=2)
    common = ["--weights", str(weights), "--images", str(data / "val"), "--steps", "3",
              "--seed", "2", "--device", "cpu", "--workers", "0"]  # fmt: skip
    annotated = data / "annotations" / "panoptic_val.json"
    sample.main([*common, "--data", str(annotated), "--out", str(tmp_path)])
    samples, moved = tmp_path / "panoptic.json", tmp_path / "moved.json"
    shutil.copy(samples, moved)
    for path in (tmp_path / "panoptic").iterdir():
        write_png(tmp_path / "moved" / path.name, np.roll(read_image(path), 1, axis=1))

    def pq(truth):
        direct = score([*common, "--data", str(truth)])
        saved = score(["--gt", str(truth), "--pred", str(samples), "--class-agnostic"])
        assert flat(saved) == near({k: direct[k] for k in saved})
        return saved["per_class"]["1"]

    unfiltered = score([*common, "--data", str(annotated), "--min-area", "0"])["per_class"]["1"]
    assert 0 < pq(annotated)["fp"] < unfiltered["fp"]  # all wrong after two steps of training
    assert 0.1 < pq(moved)["pq"] < 0.9
