"""Generated scenes, COCO, Cityscapes and ADE20k files, depth maps and training samples."""

import json
import shutil
from dataclasses import replace
from fnmatch import fnmatchcase

import evaluate
import ldmseg
import numpy as np
import pytest
import torch
import train_ae
from conftest import SCENES, TINY, paint, small_config
from ldmseg import (
    PanopticDataset, ShapeScenes, TrainingStream, id2rgb, open_dataset, prepare, rgb2id,
    training_loader, write_json, write_png,
)  # fmt: skip

# ---- generated scenes ----


@pytest.fixture(scope="module")
def scenes():
    dataset = ShapeScenes("val", 64)
    return [dataset[i] for i in range(200)]


def test_a_scene_is_a_function_of_split_index_and_size(scenes):
    again = ShapeScenes("val", 64)[7]
    for name in ("image", "ids", "depth"):
        assert np.array_equal(again[name], scenes[7][name])
    assert again["segments"] == scenes[7]["segments"]


def test_scenes_of_other_indices_and_splits_differ(scenes):
    images = [s["image"] for s in scenes] + [ShapeScenes("train", 64)[i]["image"] for i in range(9)]
    assert len({image.tobytes() for image in images}) == 209


def test_there_is_no_scene_after_the_last():
    with pytest.raises(IndexError, match="scene 200, expected 0 to 199"):
        ShapeScenes("val", 64)[200]


def test_scene_items_have_the_documented_types(scenes):
    for scene in scenes[:9]:
        assert scene["image"].shape == (64, 64, 3) and scene["image"].dtype == np.uint8
        assert scene["ids"].shape == (64, 64) and scene["ids"].dtype == np.int64
        assert scene["depth"].shape == (64, 64) and scene["depth"].dtype == np.float32


def test_a_scenes_segments_are_the_ids_of_its_map(scenes):
    for scene in scenes:
        listed = [s["id"] for s in scene["segments"]]
        assert len(set(listed)) == len(listed)
        assert set(listed) == set(np.unique(scene["ids"]).tolist()) - {0}


def test_scenes_have_at_most_6_things_on_1_to_3_regions(scenes):
    names = {c["id"]: c["isthing"] for c in ShapeScenes.categories}
    things = [sum(names[s["category_id"]] for s in scene["segments"]) for scene in scenes]
    regions = [len(scene["segments"]) - n for scene, n in zip(scenes, things)]
    assert max(things) == 6 and min(things) <= 2
    assert set(regions) <= {0, 1, 2, 3} and {1, 2, 3} <= set(regions)


def test_a_quarter_of_the_scenes_has_an_unlabelled_blob(scenes):
    with_void = np.mean([(scene["ids"] == 0).mean() > 0.005 for scene in scenes])
    assert 0.15 < with_void < 0.35


def test_depth_is_between_0_and_1_and_things_stand_before_the_background(scenes):
    for scene in scenes:
        assert 0 <= scene["depth"].min() < scene["depth"].max() <= 1
        regions = max(s["id"] for s in scene["segments"] if s["category_id"] <= 5)
        for segment in scene["segments"]:
            if segment["category_id"] > 5:
                assert segment["id"] > regions
                assert np.unique(scene["depth"][scene["ids"] == segment["id"]]).size == 1


def test_later_things_are_nearer(scenes):
    for scene in scenes:
        depths = [scene["depth"][scene["ids"] == s["id"]][0]
                  for s in scene["segments"] if s["category_id"] > 5]  # fmt: skip
        assert depths == sorted(depths, reverse=True)


# ---- panoptic files ----


def test_rgb_and_ids_are_inverse_up_to_24_bits():
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 70000, 2**24 - 1]])
    assert np.array_equal(rgb2id(id2rgb(ids)), ids)
    assert id2rgb(np.array([[1 + 2 * 256 + 3 * 65536]])).tolist() == [[[1, 2, 3]]]


def test_an_annotation_is_read_untouched(data):
    dataset = open_dataset(str(data), None, None, 32, "val")
    assert len(dataset) == 2
    for record, (height, width, segments) in zip(dataset, SCENES["val"]):
        assert np.array_equal(record["ids"], paint(height, width, segments))
        assert record["image"].shape == (height, width, 3)
        assert [(s["id"], s["category_id"], s["iscrowd"]) for s in record["segments"]] == [
            segment[:3] for segment in segments]  # fmt: skip


@pytest.mark.parametrize("kind, images", [("train", 3), ("val", 2)])
def test_the_only_split_of_the_kind_is_opened(data, kind, images):
    assert len(open_dataset(str(data), None, None, 32, kind)) == images


def test_a_split_can_be_named(data):
    assert len(open_dataset(str(data), "train", None, 32, "val")) == 3


def test_a_json_is_opened_with_its_images_folder(data):
    dataset = open_dataset(str(data / "annotations" / "panoptic_val.json"), None,
                           str(data / "val"), 32, "val")  # fmt: skip
    assert isinstance(dataset, PanopticDataset) and len(dataset) == 2


def test_an_unknown_split_is_an_error_that_lists_what_exists(data):
    with pytest.raises(ValueError, match=r"--split test, expected one of \['train', 'val'\]"):
        open_dataset(str(data), "test", None, 32, "val")


# ---- COCO instances ----


def square(left, top, right, bottom):
    """A polygon around the pixels [left, right) x [top, bottom)."""
    return [left, top, right, top, right, bottom, left, bottom]


def write_instances(root, segmentations, split="train", **fields):
    """One 6 x 9 image of grey, its COCO instances JSON in annotations/; annotation ids count from
    0. `fields` of the annotations: a list of values each. Returns root."""
    write_png(root / split / "grey.png", np.full((6, 9, 3), 99, np.uint8))
    annotations = [{"id": i, "image_id": 4, "category_id": 3, "iscrowd": 0, "area": 1.0,
                    "bbox": [0, 0, 1, 1], "segmentation": shape}
                   | {key: values[i] for key, values in fields.items()}
                   for i, shape in enumerate(segmentations)]  # fmt: skip
    write_json(root / "annotations" / f"instances_{split}.json", {
        "images": [{"id": 4, "file_name": "grey.png", "height": 6, "width": 9}],
        "annotations": annotations, "categories": [{"id": 3, "name": "cell"}]})  # fmt: skip
    return root


def instances(root, *arguments, **fields):
    return open_dataset(str(write_instances(root, *arguments, **fields)), None, None, 32, "train")


def map_of(*boxes):
    """The 6 x 9 map with 1, 2, ... painted into [left, right) x [top, bottom), in this order."""
    ids = np.zeros((6, 9), int)
    for id, left, top, right, bottom in boxes:
        ids[top:bottom, left:right] = id
    return ids


COLUMN = [6 + 1, 3, 54 - 10]  # pixels go down the columns: rows 1 to 3 of the second column
SHAPES = {
    "polygon": ([square(2, 1, 6, 4)], (1, 2, 1, 6, 4)),
    "polygon across the border": ([square(-5, 4, 3, 90)], (1, 0, 4, 3, 6)),
    "list of counts": ({"size": [6, 9], "counts": COLUMN}, (1, 1, 1, 2, 4)),
    # 5 bits a letter from "0" on, + 32 where more follow: 7 = "7", 3 = "3", 44 = 12 + 32, 1
    "compressed counts": ({"size": [6, 9], "counts": "73\\1"}, (1, 1, 1, 2, 4)),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_polygons_and_run_lengths_cover_their_pixels(tmp_path, case):
    shape, box = SHAPES[case]
    record = instances(tmp_path, [shape])[0]
    assert np.array_equal(record["ids"], map_of(box))


def test_several_polygons_of_an_annotation_are_one_segment(tmp_path):
    record = instances(tmp_path, [[square(0, 0, 2, 2), square(5, 3, 9, 6)]])[0]
    assert np.array_equal(record["ids"], map_of((1, 0, 0, 2, 2), (1, 5, 3, 9, 6)))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_where_instances_overlap_the_smaller_is_on_top(tmp_path, order):
    boxes = [(0, 0, 9, 6), (1, 1, 6, 5), (3, 2, 8, 4)]  # of 54, 20 and 10 pixels
    record = instances(tmp_path, [[square(*boxes[i])] for i in order])[0]
    expected = map_of(*[(1 + order.index(i), *boxes[i]) for i in range(3)])
    assert np.array_equal(record["ids"], expected)


def test_an_instance_that_others_cover_is_left_out(tmp_path):
    left, right = [square(0, 0, 4, 2)], [square(4, 0, 9, 2)]
    record = instances(tmp_path, [[square(2, 0, 9, 2)], left, right])[0]
    assert [s["id"] for s in record["segments"]] == [2, 3]
    assert np.array_equal(record["ids"], map_of((2, 0, 0, 4, 2), (3, 4, 0, 9, 2)))


def test_segment_ids_are_the_places_in_the_image_whatever_the_annotation_ids(tmp_path):
    shapes = [[square(0, 0, 2, 2)], [square(3, 0, 5, 2)], [square(6, 0, 8, 2)]]
    record = instances(tmp_path, shapes, id=[2**24 + 5, 0, 2**40])[0]
    assert [s["id"] for s in record["segments"]] == [1, 2, 3]
    assert record["ids"][0, ::3].tolist() == [1, 2, 3]


def test_crowds_and_categories_of_instances_are_kept(tmp_path):
    shapes = [[square(0, 0, 2, 2)], {"size": [6, 9], "counts": [30, 24]}]
    record = instances(tmp_path, shapes, iscrowd=[0, 1])[0]
    assert [(s["category_id"], s["iscrowd"]) for s in record["segments"]] == [(3, 0), (3, 1)]


def test_categories_without_isthing_are_things(tmp_path):
    write_instances(tmp_path, [[square(0, 0, 2, 2)]])
    change_json(tmp_path, lambda c: c["categories"].append({"id": 8, "isthing": 0}))
    categories = open_dataset(str(tmp_path), None, None, 32, "train").categories
    assert [(c["id"], c["isthing"]) for c in categories] == [(3, 1), (8, 0)]


def test_images_without_annotations_are_left_out(tmp_path):
    write_instances(tmp_path, [[square(0, 0, 2, 2)]])
    bare = {"id": 1, "file_name": "bare.png", "height": 6, "width": 9}
    change_json(tmp_path, lambda c: c["images"].insert(0, bare))
    dataset = open_dataset(str(tmp_path), None, None, 32, "train")
    assert [record["image_id"] for record in dataset] == [4]


def test_items_of_instances_are_like_those_of_panoptic_files(tmp_path, data):
    record = instances(tmp_path, [[square(0, 0, 2, 2)]])[0]
    other = open_dataset(str(data), None, None, 32, "train")[0]
    assert record.keys() == other.keys() and record["ids"].dtype == other["ids"].dtype
    assert record["segments"][0].keys() >= other["segments"][0].keys()
    assert record["image_id"] == 4 and record["file_name"] == "grey.png"
    assert record["image"].shape == (6, 9, 3) and (record["image"] == 99).all()


def test_panoptic_files_come_before_instances_of_the_same_folder(tmp_path, data):
    root = write_instances(shutil.copytree(data, tmp_path / "data"), [[square(0, 0, 2, 2)]])
    assert len(open_dataset(str(root), None, None, 32, "train")) == 3


@pytest.mark.parametrize("counts", [[7, 3], "73"])
def test_too_few_counts_never_make_up_pixels(tmp_path, counts):
    dataset = instances(tmp_path, [{"size": [6, 9], "counts": counts}])
    for _ in range(50):
        try:
            assert np.array_equal(dataset[0]["ids"], map_of((1, 1, 1, 2, 4)))
        except ValueError as error:
            assert "number of pixels" in str(error)


def change_json(root, change):
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)


def set_shape(value):
    return lambda root: change_json(root, lambda c: c["annotations"][1].update(segmentation=value))


def take(key, list_name):
    return lambda root: change_json(root, lambda c: c[list_name][0].pop(key))


SHAPE = "image 4: segmentation *, expected RLE of size (6, 9) or polygons"
FIELDS = "expected COCO instances JSON (categories; images of id, height, width; annotations of"
BAD_INSTANCES = {  # the damage; what the line says after the JSON's path, * is anything
    "no polygon": (set_shape([]), SHAPE),
    "two points": (set_shape([square(3, 0, 5, 2), [1, 1, 5, 5]]), SHAPE),
    "half a point": (set_shape([[1, 1, 5, 5, 1, 5, 3]]), SHAPE),
    "flat list": (set_shape([1, 1, 5, 5, 1, 5]), SHAPE),
    "infinity": (set_shape([[1, 1, 5, float("inf"), 1, 5]]), SHAPE),
    "not a number": (set_shape([[1, 1, 5, float("nan"), 1, 5]]), SHAPE),
    "text": (set_shape([["1", "1", "5", "5", "1", "5"]]), SHAPE),
    "none": (set_shape(None), SHAPE),
    "RLE of another size": (set_shape({"size": [9, 6], "counts": [54]}), SHAPE),
    "RLE without size": (set_shape({"counts": [54]}), SHAPE),
    "too many counts": (set_shape({"size": [6, 9], "counts": [50, 5]}), SHAPE),
    "negative count": (set_shape({"size": [6, 9], "counts": [-1, 55]}), SHAPE),
    "compressed nonsense": (set_shape({"size": [6, 9], "counts": "oo1"}), SHAPE),
    "no segmentation": (take("segmentation", "annotations"), "image 4: segmentation None*"),
    "no image id": (take("image_id", "annotations"), f"{FIELDS}*got KeyError: 'image_id'"),
    "no category": (take("category_id", "annotations"), f"{FIELDS}*got KeyError: 'category_id'"),
    "no height": (take("height", "images"), f"{FIELDS}*got KeyError: 'height'"),
    "no file name": (take("file_name", "images"), "expected images with id and file_name"),
    "no such image": (lambda root: change_json(root, lambda c: c["images"][0].update(id=5)),
                      f"{FIELDS}*got KeyError: 4"),
    "unknown category": (lambda root: change_json(root, lambda c: c["annotations"][1].update(
        category_id=77)), "image 4, segment 2 has category 77, expected one of [[]3]"),
    "another image size": (lambda root: change_json(root, lambda c: c["images"][0].update(
        height=60)), "image 4: (60, 9) pixels, expected (6, 9) like its image grey.png"),
    "nothing annotated": (lambda root: change_json(root, lambda c: c["annotations"].clear()),
                          "no annotated image, expected at least one"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INSTANCES)
def test_bad_instances_are_named(tmp_path, case):
    damage, message = BAD_INSTANCES[case]
    damage(write_instances(tmp_path, [[square(0, 0, 2, 2)], [square(3, 0, 5, 2)]]))
    with pytest.raises(ValueError) as error:
        open_dataset(str(tmp_path), None, None, 32, "train")[0]
    line = str(error.value)
    assert fnmatchcase(line, f"{tmp_path}/annotations/instances_train.json: {message}*"), line


# ---- what the converters of Cityscapes and ADE20k leave ----


IDS = np.repeat([[0, 7, 26001]], 4, 0)  # void, road, a car


def write_converted(root, json_name, image_name, mask_name, image_id, picture, categories):
    """An image of 4 x 3 pixels, where it is and how the converter's JSON calls it."""
    write_png(root / picture, np.full((4, 3, 3), 7 * len(picture) % 256, np.uint8))
    write_png((root / json_name).with_suffix("") / mask_name, id2rgb(IDS))
    write_json(root / json_name, {
        "images": [{"id": image_id, "width": 3, "height": 4, "file_name": image_name}],
        "annotations": [{"image_id": image_id, "file_name": mask_name, "segments_info": [
            {"id": id, "category_id": category["id"], "area": 4, "bbox": [x, 0, 1, 4],
             "iscrowd": 0} for x, (id, category) in enumerate(zip((7, 26001), categories), 1)]}],
        "categories": categories})  # fmt: skip


CITIES = {"train": "aachen", "val": "frankfurt"}
ROAD = [{"id": 7, "name": "road", "color": [128, 64, 128], "supercategory": "flat", "isthing": 0},
        {"id": 26, "name": "car", "color": [0, 0, 142], "supercategory": "vehicle", "isthing": 1}]
WALL = [{"id": 0, "name": "wall", "isthing": 0}, {"id": 7, "name": "bed", "isthing": 1}]


@pytest.fixture
def cityscapes(tmp_path):
    for split, city in CITIES.items():
        name = f"{city}_000000_000294"
        write_converted(
            tmp_path, f"gtFine/cityscapes_panoptic_{split}.json", f"{name}_gtFine_leftImg8bit.png",
            f"{name}_gtFine_panoptic.png", name,
            f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", ROAD)  # fmt: skip
    return tmp_path


@pytest.fixture
def ade20k(tmp_path):
    for split, folder in (("train", "training"), ("val", "validation")):
        name = f"ADE_{split}_00000001"
        write_converted(tmp_path, f"ade20k_panoptic_{split}.json", f"{name}.jpg", f"{name}.png",
                        name, f"images/{folder}/{name}.jpg", WALL)  # fmt: skip
    return tmp_path


def assert_converted(dataset, root, picture, image_id):
    (record,) = dataset
    assert record["image_id"] == image_id
    assert record["image"].shape == (4, 3, 3) and (record["image"] == 7 * len(picture) % 256).all()
    assert np.array_equal(record["ids"], IDS)
    assert [s["id"] for s in record["segments"]] == [7, 26001]


@pytest.mark.parametrize("kind", CITIES)
@pytest.mark.parametrize("images", ["leftImg8bit/{split}", "leftImg8bit"])
def test_cityscapes_is_read_as_its_converter_leaves_it(cityscapes, kind, images):
    dataset = open_dataset(str(cityscapes / "gtFine/cityscapes_panoptic_{split}.json"), None,
                           str(cityscapes / images), 32, kind)  # fmt: skip
    name = f"{CITIES[kind]}_000000_000294"
    picture = f"leftImg8bit/{kind}/{CITIES[kind]}/{name}_leftImg8bit.png"
    assert_converted(dataset, cityscapes, picture, name)


@pytest.mark.parametrize("kind, folder", [("train", "training"), ("val", "validation")])
@pytest.mark.parametrize("below", ["", "/{}"])
def test_ade20k_is_read_as_its_converter_leaves_it(ade20k, kind, folder, below):
    dataset = open_dataset(str(ade20k / "ade20k_panoptic_{split}.json"), None,
                           f"{ade20k}/images{below.format(folder)}", 32, kind)  # fmt: skip
    name = f"ADE_{kind}_00000001"
    assert_converted(dataset, ade20k, f"images/{folder}/{name}.jpg", name)


def cityscapes_val(root):
    return open_dataset(str(root / "gtFine/cityscapes_panoptic_val.json"), None,
                        str(root / "leftImg8bit"), 32, "val")  # fmt: skip


NAME = "frankfurt_000000_000294_leftImg8bit.png"


def test_an_image_found_twice_is_an_error_that_names_both(cityscapes):
    other = cityscapes / "leftImg8bit" / "copy"
    shutil.copytree(cityscapes / "leftImg8bit" / "val", other)
    with pytest.raises(FileNotFoundError) as error:
        cityscapes_val(cityscapes)[0]
    line = str(error.value)
    assert f"{NAME} is 2 times below {cityscapes}/leftImg8bit, expected once" in line
    assert f"copy/frankfurt/{NAME}" in line and f"val/frankfurt/{NAME}" in line


def test_an_image_found_nowhere_is_an_error_that_names_the_folder(cityscapes):
    shutil.rmtree(cityscapes / "leftImg8bit" / "val")
    with pytest.raises(FileNotFoundError) as error:
        cityscapes_val(cityscapes)[0]
    assert str(error.value).startswith(
        f"{cityscapes}/leftImg8bit/frankfurt_000000_000294_gtFine_leftImg8bit.png: no such image, "
        f"and {NAME} is 0 times below {cityscapes}/leftImg8bit, expected once")


def test_the_file_name_itself_comes_before_others_of_its_base_name(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "data")
    other = root / "val" / "old" / "val0.png"
    write_png(other, np.zeros((36, 50, 3), np.uint8))
    assert open_dataset(str(root), None, None, 32, "val")[0]["image"].any()


def test_sub_folders_are_indexed_once(cityscapes, monkeypatch):
    calls, search = [], ldmseg.iglob
    monkeypatch.setattr(ldmseg, "iglob", lambda *a, **k: calls.append(a) or search(*a, **k))
    dataset = cityscapes_val(cityscapes)
    for _ in range(3):
        dataset[0]
    assert len(calls) == 1


def test_linked_sub_folders_are_searched(cityscapes):
    images = cityscapes / "leftImg8bit"
    (images / "val").rename(cityscapes / "elsewhere")
    (images / "val").symlink_to(cityscapes / "elsewhere")
    assert cityscapes_val(cityscapes)[0]["image_id"] == "frankfurt_000000_000294"


# ---- one JSON a split ----


def jsons(data):
    return str(data / "annotations" / "panoptic_{split}.json"), str(data / "{split}")


@pytest.mark.parametrize("kind, split, images", [
    ("train", None, 3), ("val", None, 2), ("val", "train", 3), ("train", "val", 2)])  # fmt: skip
def test_a_placeholder_stands_for_the_split(data, kind, split, images):
    annotations, folder = jsons(data)
    dataset = open_dataset(annotations, split, folder, 32, kind)
    assert len(dataset) == len(list(dataset)) == images


def test_a_json_without_placeholder_is_used_for_both(data):
    annotations, folder = (name.replace("{split}", "val") for name in jsons(data))
    assert [len(open_dataset(annotations, None, folder, 32, kind)) for kind in CITIES] == [2, 2]


@pytest.mark.parametrize("kind, flag", [("train", "--train-split"), ("val", "--split")])
def test_a_split_of_a_json_without_placeholder_is_an_error(data, kind, flag):
    annotations, folder = (name.replace("{split}", "val") for name in jsons(data))
    with pytest.raises(ValueError, match=f"expected no {flag} test, or {{split}} in the JSON's"):
        open_dataset(annotations, "test", folder, 32, kind)


def test_a_split_without_its_json_is_an_error_that_names_it(data):
    with pytest.raises(FileNotFoundError, match="panoptic_test.json: no such annotation file"):
        open_dataset(jsons(data)[0], "test", jsons(data)[1], 32, "val")


def test_instances_are_trained_on_and_evaluated_with_a_placeholder(tmp_path):
    for split in ("train", "val"):
        write_instances(tmp_path, [[square(0, 0, 9, 3)], [square(3, 2, 9, 6)]], split)
    flags = ["--data", str(tmp_path / "annotations" / "instances_{split}.json"), "--images",
             str(tmp_path / "{split}"), "--workers", "0", "--device", "cpu"]  # fmt: skip
    run = tmp_path / "run"
    train_ae.main([*flags, "--out", str(run), "--steps", "1", "--batch-size", "1", "--set", *TINY])
    evaluate.main([*flags, "--weights", str(run), "--json", str(tmp_path / "pq.json")])
    counts = json.loads((tmp_path / "pq.json").read_text())["per_class"]["1"]
    assert counts["tp"] + counts["fn"] == 2


# ---- depth ----


DEPTH = np.arange(4 * 3).reshape(4, 3) * 1000.0  # the first is unknown
KNOWN = np.where(DEPTH > 0, DEPTH, np.nan)


@pytest.fixture
def depth_file(ade20k):
    """Where the depth of ADE20k's validation image belongs, without suffix."""
    path = ade20k / "images" / "validation_depth" / "ADE_val_00000001"
    path.parent.mkdir()
    return path


def with_depth(root, depth=True):
    return open_dataset(str(root / "ade20k_panoptic_val.json"), None,
                        str(root / "images" / "validation"), 32, "val", depth)[0]  # fmt: skip


def write_depth_png(path, depth):
    ldmseg.Image.fromarray(depth).save(path.with_suffix(".png"))


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f4", "float64"])
def test_depth_is_read_from_npy(ade20k, depth_file, dtype):
    np.save(depth_file, DEPTH.astype(dtype))
    depth = with_depth(ade20k)["depth"]
    assert depth.dtype == np.float32 and depth.dtype.isnative
    assert np.array_equal(depth, KNOWN, equal_nan=True)


def test_depth_is_read_from_16_bit_png(ade20k, depth_file):
    write_depth_png(depth_file, (DEPTH * 5.9).astype(np.uint16))  # up to 64900
    depth = with_depth(ade20k)["depth"]
    assert depth.dtype == np.float32
    assert np.array_equal(depth, np.where(DEPTH > 0, np.floor(DEPTH * 5.9), np.nan), equal_nan=True)


def test_depth_that_is_not_finite_or_not_positive_is_unknown(ade20k, depth_file):
    np.save(depth_file, [[np.nan, np.inf, -np.inf], [0, -1, 1.0], [2, 3, 4], [5, 6, 7]])
    expected = [[np.nan] * 3, [np.nan, np.nan, 1], [2, 3, 4], [5, 6, 7]]
    assert np.array_equal(with_depth(ade20k)["depth"], expected, equal_nan=True)


def test_depth_of_a_folder_is_beside_the_split(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "data")
    (root / "val_depth").mkdir()
    for i, (height, width, _) in enumerate(SCENES["val"]):
        np.save(root / "val_depth" / f"val{i}.npy", np.full((height, width), 0.5 + i))
    records = list(open_dataset(str(root), None, None, 32, "val", depth=True))
    assert [np.unique(record["depth"]).tolist() for record in records] == [[0.5], [1.5]]


def test_depth_lies_as_the_images_do_in_sub_folders(cityscapes):
    path = cityscapes / "leftImg8bit/val_depth/frankfurt" / NAME
    path.parent.mkdir(parents=True)
    write_depth_png(path, DEPTH.astype(np.uint16))
    dataset = open_dataset(str(cityscapes / "gtFine/cityscapes_panoptic_{split}.json"), None,
                           str(cityscapes / "leftImg8bit/{split}"), 32, "val", True)  # fmt: skip
    assert np.array_equal(dataset[0]["depth"], KNOWN, equal_nan=True)


def test_depth_is_left_alone_unless_asked_for(ade20k, depth_file):
    depth_file.with_suffix(".npy").write_text("hello")
    assert "depth" not in with_depth(ade20k, depth=False)


def test_scenes_have_depth_with_and_without_asking():
    for depth in (True, False):
        assert "depth" in open_dataset("shapes", None, None, 32, "val", depth)[0]


UNREADABLE = "not a readable depth map"
BAD_DEPTH = {
    "none": (lambda path: None, ".png: no such depth map, .npy or .png"),
    "no folder": (lambda path: path.parent.rmdir(), ": no such folder"),
    "shape": (lambda path: np.save(path, DEPTH.T), ".npy: float64 (3, 4), expected *(4, 3)"),
    "three channels": (lambda path: np.save(path, DEPTH[..., None].repeat(3, -1)),
                       ".npy: float64 (4, 3, 3), expected *(4, 3)"),
    "integers": (lambda path: np.save(path, DEPTH.astype(int)), ".npy: int64 (4, 3), expected"),
    "8 bits": (lambda path: write_depth_png(path, DEPTH.astype(np.uint8)),
               ".png: uint8 (4, 3), expected 16-bit"),
    "colours": (lambda path: write_depth_png(path, id2rgb(IDS)), ".png: uint8 (4, 3, 3), expected"),
    "PNG of another shape": (lambda path: write_depth_png(path, DEPTH.T.astype(np.uint16)),
                             ".png: uint16 (3, 4), expected *(4, 3)"),
    "text as npy": (lambda path: path.with_suffix(".npy").write_text("hello"),
                    f".npy: {UNREADABLE}"),
    "text as png": (lambda path: path.with_suffix(".png").write_text("hello"),
                    f".png: {UNREADABLE}"),
    "truncated npy": (lambda path: truncated(path.with_suffix(".npy"), np.save), UNREADABLE),
    "truncated png": (lambda path: truncated(path, write_depth_png), f".png: {UNREADABLE}"),
    "objects": (lambda path: np.save(path, np.array([{}]), allow_pickle=True), UNREADABLE),
}  # fmt: skip


def truncated(path, write):
    write(path, np.arange(12, dtype=np.uint16).reshape(4, 3))
    (path,) = path.parent.iterdir()
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("case", BAD_DEPTH)
def test_bad_depth_is_named(ade20k, depth_file, case):
    damage, message = BAD_DEPTH[case]
    damage(depth_file)
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        with_depth(ade20k)
    line = str(error.value)
    assert fnmatchcase(line, f"{depth_file.parent}*{message}*") and "\n" not in line, line


SNIPPET = """
from pathlib import Path
import numpy as np
from transformers import pipeline

estimate = pipeline("depth-estimation", model="Intel/dpt-large")
for path in Path("coco/val2017").rglob("*.jpg"):
    depth = Path("coco/val2017_depth", path.relative_to("coco/val2017")).with_suffix(".npy")
    depth.parent.mkdir(parents=True, exist_ok=True)
    np.save(depth, estimate(str(path))["predicted_depth"].numpy())
"""


def test_the_readmes_lines_make_depth_that_is_read(ade20k, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
        image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3], fusion_hidden_size=8,
        neck_hidden_sizes=[8] * 4)  # fmt: skip
    model = transformers.DPTForDepthEstimation(config)
    torch.nn.init.constant_(model.head.head[-2].bias, 3.0)  # a positive depth
    model.save_pretrained(tmp_path / "dpt")
    size = {"height": 32, "width": 32}
    transformers.DPTImageProcessor(size=size).save_pretrained(tmp_path / "dpt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code = SNIPPET.replace("Intel/dpt-large", "dpt").replace("coco/val2017", "images/validation")
    exec(code, {})
    depth = with_depth(ade20k)["depth"]
    assert depth.shape == (4, 3) and np.allclose(depth, 3, atol=0.1)


# ---- what the model sees ----


def record_of(ids, image=None, crowds=()):
    """An item of a data set, all ids of the map being segments."""
    ids = np.asarray(ids)
    if image is None:
        image = np.zeros((*ids.shape, 3), np.uint8)
    segments = [{"id": int(id), "category_id": 1, "iscrowd": int(id in crowds)}
                for id in np.unique(ids) if id]  # fmt: skip
    return {"image": image, "ids": ids, "segments": segments}


def prepared(record, seed=0, augment=False, **changes):
    generator = torch.Generator().manual_seed(seed)
    return prepare(record, replace(small_config(), **changes), generator, augment)


def columns(*ids, size=32):
    """A square map whose columns have these ids, in stripes of equal width."""
    return np.repeat(ids, size // len(ids))[None].repeat(size, 0)


def test_images_are_resized_to_a_square_between_minus_1_and_1():
    image = np.zeros((20, 50, 3), np.uint8)
    image[:, 25:] = 255
    result = prepared(record_of(np.ones((20, 50), int), image))["image"]
    assert result.shape == (3, 32, 32)
    assert result[:, :, :8].unique().tolist() == [-1] and result[:, :, -8:].unique().tolist() == [1]


def test_ids_are_resized_without_new_ones_in_between():
    ids = prepared(record_of(columns(1, 3, 2, 0, size=8)))["ids"]
    assert all(row.unique_consecutive().numel() == 4 for row in ids)
    assert ids[:, 24:].unique().tolist() == [0]


def test_ids_are_resized_about_the_centre_as_the_image_is():
    """A border in the middle of an odd number of columns goes to the side that has more of it."""
    ids = np.repeat([1, 2], [5 * 16 + 2, 5 * 16 - 2])[None].repeat(160, 0)  # 5 pixels to 1
    row = prepared(record_of(ids))["ids"][0]
    assert (row == row[0]).sum() == 16
    ids = np.repeat([1, 2], [5 * 16 + 3, 5 * 16 - 3])[None].repeat(160, 0)
    row = prepared(record_of(ids))["ids"][0]
    assert (row == row[0]).sum() == 17


def test_large_sparse_ids_fit_the_bits():
    ids = prepared(record_of(columns(5, 70000, 2**24 - 1, 0)))["ids"]
    assert ids.unique().numel() == 4 and ids.max() < 8 and ids[:, 24:].unique().tolist() == [0]


def test_crowds_are_void():
    ids = prepared(record_of(columns(1, 2, 3, 4), crowds=[2]))["ids"]
    assert [bool(id) for id in ids[0, ::8]] == [True, False, True, True]


def test_what_the_json_does_not_list_is_void():
    record = record_of(columns(1, 2))
    del record["segments"][0]
    assert [bool(id) for id in prepared(record)["ids"][0, ::16]] == [False, True]


@pytest.mark.parametrize("augment", [True, False])
def test_small_segments_are_void_in_training_only(augment):
    ids = columns(1, 2)
    ids[10:13, 4:7], ids[20:22, 4:9] = 3, 4  # 9 and 10 pixels
    result = prepared(record_of(ids), augment=augment, min_segment=10)["ids"]
    void = (result == 0).sum()
    assert void == (9 if augment else 0)
    assert result.unique().numel() == 4


def test_void_stays_void_without_a_smallest_segment():
    ids = prepared(record_of(columns(1, 0)), augment=True, min_segment=0)["ids"]
    assert (ids == 0).sum() == 512


def test_the_largest_segments_stay_when_the_ids_do_not_suffice():
    ids = np.repeat([1, 2, 3, 4, 5], [13, 3, 9, 6, 1])[None].repeat(32, 0)
    result = prepared(record_of(ids), bits=2)["ids"].numpy()
    assert np.array_equal(result > 0, np.isin(ids, [1, 3, 4]))
    assert np.unique(result).tolist() == [0, 1, 2, 3]


def test_ids_are_random():
    record = record_of(columns(1, 2))
    drawn = {tuple(prepared(record, seed)["ids"][0, ::16].tolist()) for seed in range(200)}
    assert drawn == {(a, b) for a in range(1, 8) for b in range(1, 8) if a != b}


def test_a_flip_moves_image_and_ids_together():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :12] = 255
    ids = np.where(image[..., 0] > 0, 1, 0)
    flips = set()
    for seed in range(20):
        sample = prepared(record_of(ids, image), seed, augment=True)
        assert torch.equal(sample["image"][0] > 0, sample["ids"] > 0)
        flips.add(bool(sample["ids"][0, 0] == 0))
    assert flips == {True, False}


def test_nothing_is_flipped_without_augment():
    record = record_of(columns(1, 0))
    assert all(prepared(record, seed)["ids"][0, 0] > 0 for seed in range(20))


# ---- the order of training ----


@pytest.fixture(scope="module")
def datasets(data):
    return [open_dataset(str(data), None, None, 32, "train"), ShapeScenes("train", 32)]


def same(a, b):
    return a["seed"] == b["seed"] and all(torch.equal(a[k], b[k]) for k in ("image", "ids"))


def test_a_position_gives_the_same_sample_whatever_was_read_before(datasets):
    one, other = (TrainingStream(datasets, small_config(), seed=3) for _ in range(2))
    in_order = [one[p] for p in range(6)]
    assert all(same(other[p], in_order[p]) for p in (5, 0, 3, 5))


def test_another_seed_gives_other_samples(datasets):
    one, other = (TrainingStream(datasets, small_config(), seed=s) for s in (0, 1))
    assert not any(same(one[p], other[p]) for p in range(4))


class Numbered(list):
    """A data set of its numbers: grey images of that brightness, one segment each."""

    def __getitem__(self, index):
        number = list.__getitem__(self, index)
        return record_of(np.ones((32, 32), int), np.full((32, 32, 3), number, np.uint8))


def numbers(stream, count):
    return [round((stream[p]["image"][0, 0, 0].item() + 1) * 127.5) for p in range(count)]


def test_an_epoch_visits_each_image_once_in_an_order_of_its_own():
    visited = numbers(TrainingStream([Numbered(range(20))], small_config(), seed=0), 60)
    epochs = [visited[first : first + 20] for first in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_data_sets_take_turns_whatever_their_sizes():
    few, many = Numbered(range(3)), Numbered(range(100, 130))
    visited = numbers(TrainingStream([few, many], small_config(), seed=0), 60)
    assert [sorted(visited[first : first + 6 : 2]) for first in range(0, 60, 6)] == [[0, 1, 2]] * 10
    assert sorted(visited[1::2]) == list(range(100, 130))


def test_the_same_image_gets_other_noise_and_ids_in_the_next_epoch(datasets):
    stream = TrainingStream(datasets[:1], small_config(), seed=0)
    samples = [stream[p] for p in range(30)]
    assert len({s["seed"] for s in samples}) == 30
    assert len({s["ids"].numpy().tobytes() for s in samples}) > 10


def test_images_with_too_many_segments_are_announced(datasets, capsys):
    TrainingStream(datasets, replace(small_config(), bits=1), seed=0)
    assert "2 of 3 images have more than 1 segments" in capsys.readouterr().out


def positions(monkeypatch, rank, world, batch_size=8, accumulate=1, start=0, stop=3):
    """The positions in the micro-batches of one rank."""
    monkeypatch.setattr("ldmseg.rank_and_world", lambda: (rank, world))
    loader = training_loader(range(1000), batch_size, accumulate, start, stop, workers=0)
    return [batch.tolist() for batch in loader]


def test_batches_follow_the_stream_from_the_step_of_a_resumed_run(monkeypatch):
    assert positions(monkeypatch, 0, 1, start=2, stop=4) == [
        list(range(16, 24)), list(range(24, 32))]  # fmt: skip


@pytest.mark.parametrize("world, accumulate", [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_a_step_sees_the_same_samples_for_any_number_of_ranks(monkeypatch, world, accumulate):
    ranks = [positions(monkeypatch, rank, world, accumulate=accumulate) for rank in range(world)]
    assert [len(batches) for batches in ranks] == [3 * accumulate] * world
    for step in range(3):
        seen = [p for batches in ranks
                for batch in batches[step * accumulate : (step + 1) * accumulate]
                for p in batch]  # fmt: skip
        assert sorted(seen) == list(range(8 * step, 8 * step + 8))


def test_a_batch_that_the_ranks_cannot_share_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="batch size 9, expected a multiple of .* = 2 x 2"):
        positions(monkeypatch, 0, 2, batch_size=9, accumulate=2)
