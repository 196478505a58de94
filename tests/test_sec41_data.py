"""Sec. 4.1, the data: generated scenes, COCO, Cityscapes and ADE20k files, depth maps, and what
training sees of them. The oracle of `prepare` is a loop over pixels."""

import json
import shutil
from contextlib import suppress
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
import train_ae
from conftest import SCENES, ae_command, paint, small_config
from ldmseg import (
    PanopticDataset, ShapeScenes, TrainingStream, UserError, id2rgb, open_dataset, prepare,
    read_image, training_loader, write_json, write_png,
)  # fmt: skip
from PIL import Image

# ---- what training sees ----

BLACK = np.zeros((32, 32, 3), np.uint8)

def record_of(ids, image=BLACK, crowds=()):
    """An item of a data set, all ids of the map being segments."""
    segments = [{"id": int(id), "category_id": 1, "iscrowd": int(id in crowds)}
                for id in np.unique(ids) if id]  # fmt: skip
    return {"image": image, "ids": ids, "segments": segments}

def prepared(record, seed=0, augment=False, **changes):
    return prepare(record, small_config(**changes), np.random.default_rng(seed), augment)

def shrunk(ids, size, void, count):
    """A map as `prepare` must leave it before ids are drawn: at the centre of each pixel, the
    `count` largest segments (in pixels of the result) of those that are not in `void`."""
    (height, width), result = ids.shape, np.zeros((size, size), int)
    for row in range(size):
        for column in range(size):
            id = ids[int((row + 0.5) * height / size), int((column + 0.5) * width / size)]
            result[row, column] = 0 if id in void else id
    areas = {id: (result == id).sum() for id in np.unique(result) if id}
    kept = sorted(areas, key=lambda id: -areas[id])[:count]
    return np.where(np.isin(result, kept), result, 0)

@pytest.mark.parametrize("shape, bits", [((50, 37), 3), ((20, 70), 2), ((32, 32), 3)])
def test_a_map_is_resized_and_its_largest_segments_take_other_ids(shape, bits):
    blocks = np.random.default_rng(0).integers(0, 6, (6, 8)).repeat(9, 0).repeat(9, 1)
    ids = np.array([0, 7, 300, 70000, 2**24 - 1, 5])[blocks[: shape[0], : shape[1]]]
    record = record_of(ids, crowds=[300])
    record["segments"] = [s for s in record["segments"] if s["id"] != 5]  # not listed: VOID
    result = prepared(record, bits=bits)["ids"].numpy()
    expected = shrunk(ids, 32, void=[300, 5], count=2**bits - 1)
    pairs = set(zip(expected.ravel().tolist(), result.ravel().tolist()))
    assert (0, 0) in pairs and len(pairs) == len(np.unique(expected)) == len(np.unique(result)) == 4
    assert result.max() < 2**bits

@pytest.mark.parametrize("augment, least, void", [(True, 10, 73), (False, 10, 64), (True, 0, 64)])
def test_small_segments_are_void_in_training_only(augment, least, void):
    ids = np.repeat([[1, 2]], [16, 16], 1).repeat(32, 0)
    ids[10:13, 4:7], ids[20:22, 4:9], ids[30:] = 3, 4, 0  # 9, 10 and 64 pixels
    result = prepared(record_of(ids), augment=augment, min_segment=least)["ids"]
    assert (result == 0).sum() == void and result.unique().numel() == (5 if void == 64 else 4)

def test_crops_cut_image_ids_and_depth_alike():
    y, x = np.mgrid[:60, :80]
    image = np.uint8(np.stack([3 * x, 4 * y, 0 * x], -1))  # a pixel's colour is its place
    record, shares = record_of(1 + x // 20 + 4 * (y // 20), image), []
    record |= {"depth": np.float32(y + 1), "file_name": ""}
    for seed in range(200):
        part = prepared(record, seed, True, target="depth", bits=4, crop=0.3)
        right, down = ((part["image"][c] + 1) * 127.5 / (3 + c) for c in (0, 1))
        shares.append(float((np.ptp(right.numpy()) + 1) * (np.ptp(down.numpy()) + 1)) / 4800)
        sure = ((right % 20 - 9.5).abs() < 7) & ((down % 20 - 9.5).abs() < 7)
        blocks = (right // 20 + 4 * (down // 20))[sure].tolist()
        pairs = set(zip(blocks, part["ids"][sure].tolist()))
        assert len(pairs) == len(dict(pairs)) == len({id for _, id in pairs})
        error = (part["depth"] * 28.3 + 29.5 - down)[part["depth"].abs() < 0.99]
        assert error.abs().max() < 2
    assert 0.27 < min(shares) < 0.35 and 0.9 < max(shares) < 1.01

def test_colours_are_jittered_in_training_only():
    def ratios(colour, augment=True):
        record = record_of(BLACK[..., 0], BLACK + np.uint8(colour))
        images = [prepared(record, seed, augment, jitter=0.3)["image"] for seed in range(100)]
        values = torch.stack(images)[:, :, 0, 0] / 2 + 0.5  # (100, 3) in [0, 1]
        return values[:, 0] / 0.4, values[:, 0] / values[:, 1]
    brightness, grey = ratios((102, 102, 102))
    assert 0.7 <= brightness.min() < 0.75 and 1.25 < brightness.max() <= 1.3
    torch.testing.assert_close(grey, torch.ones(100))
    _, red = ratios((102, 51, 51))
    assert 1.2 < red.min() < 1.6 and 2.5 < red.max() < 5
    assert ratios((102, 51, 51), augment=False)[1].unique().tolist() == pytest.approx([2])

def test_a_sample_depends_on_seed_and_position_alone_and_an_images_ids_on_the_epoch(data):
    datasets = [open_dataset(str(data), None, None, 32, "train"), ShapeScenes("train", 32)]
    one, other, third = (TrainingStream(datasets, small_config(), seed) for seed in (3, 3, 4))
    in_order = [one[p] for p in range(6)]
    for p in (5, 0, 3, 5):
        torch.testing.assert_close(other[p], in_order[p], rtol=0, atol=0)
    assert not any(torch.equal(third[p]["ids"], in_order[p]["ids"]) for p in range(6))
    stream = TrainingStream(datasets[:1], small_config(), seed=0)
    assert len({stream[p]["ids"].numpy().tobytes() for p in range(30)}) > 10

class Numbered(list):
    """A data set of its numbers: grey images of that brightness, one segment each."""

    def __getitem__(self, index):
        number = list.__getitem__(self, index)
        return record_of(np.ones((32, 32), int), np.full((32, 32, 3), number, np.uint8))

def test_data_sets_take_turns_and_epochs_have_orders_of_their_own():
    few, many = Numbered([0, 1, 255]), Numbered(range(100, 120))
    stream = TrainingStream([few, many], small_config(), seed=0)
    colours = [stream[p]["image"][0, 0, 0].item() for p in range(120)]
    assert min(colours) == -1 and max(colours) == 1
    visited = [round((colour + 1) * 127.5) for colour in colours]
    assert all(sorted(visited[i : i + 6 : 2]) == [0, 1, 255] for i in range(0, 120, 6))
    epochs = [visited[first : first + 40 : 2] for first in (1, 41, 81)]
    assert all(sorted(epoch) == list(range(100, 120)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3

@pytest.mark.parametrize("world, accumulate", [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2)])
def test_a_step_sees_the_same_samples_for_any_number_of_ranks(monkeypatch, world, accumulate):
    ranks = []
    for rank in range(world):
        monkeypatch.setattr("ldmseg.rank_and_world", lambda rank=rank: (rank, world))
        loader = training_loader(range(1000), 8, accumulate, start=2, stop=5, workers=0)
        ranks.append([batch.tolist() for batch in loader])
    for step in range(3):
        micro = [b for batches in ranks for b in batches[step * accumulate :][:accumulate]]
        assert sorted(sum(micro, [])) == [*range(8 * (2 + step), 8 * (3 + step))]
        assert {len(b) for b in micro} == {8 // world // accumulate}

# ---- generated scenes ----

@pytest.fixture(scope="module")
def scenes():
    return list(ShapeScenes("val", 64))

def test_a_scene_is_a_function_of_split_index_and_size(scenes):
    again = ShapeScenes("val", 64)[7]
    assert all(np.array_equal(again[name], scenes[7][name]) for name in ("image", "ids", "depth"))
    images = [s["image"] for s in scenes] + [ShapeScenes("train", 64)[i]["image"] for i in range(9)]
    assert len({image.tobytes() for image in images}) == 209

def test_a_scenes_segments_are_the_ids_of_its_map_and_later_things_are_nearer(scenes):
    for scene in scenes:
        assert scene["image"].shape == (64, 64, 3) and scene["image"].dtype == np.uint8
        listed = [s["id"] for s in scene["segments"]]
        assert sorted(listed) == sorted(set(np.unique(scene["ids"]).tolist()) - {0})
        assert 0 <= scene["depth"].min() < scene["depth"].max() <= 1
        depths = [np.unique(scene["depth"][scene["ids"] == s["id"]])
                  for s in scene["segments"] if s["category_id"] > 5]  # fmt: skip
        assert all(d.size == 1 for d in depths) and depths == sorted(depths, reverse=True)

def test_scenes_have_at_most_6_things_on_1_to_3_regions_and_a_quarter_a_blob(scenes):
    things = [sum(s["category_id"] > 5 for s in scene["segments"]) for scene in scenes]
    regions = {len(scene["segments"]) - n for scene, n in zip(scenes, things)}
    assert max(things) == 6 and min(things) <= 2 and {1, 2, 3} <= regions <= {0, 1, 2, 3}
    assert 0.15 < np.mean([(scene["ids"] == 0).mean() > 0.005 for scene in scenes]) < 0.35

# ---- files ----

FOLDER, ONE, EACH = "", "annotations/panoptic_val.json", "annotations/panoptic_{split}.json"

@pytest.mark.parametrize("annotations, images, split, kind, count", [
    (FOLDER, None, None, "train", 3), (FOLDER, None, "train", "val", 3),
    (ONE, "val", None, "train", 2), (EACH, "{split}", "train", "val", 3)])  # fmt: skip
def test_the_named_split_is_opened_or_the_only_one_of_its_kind(
        data, annotations, images, split, kind, count):
    dataset = open_dataset(str(data / annotations), split, images and str(data / images), 32, kind)
    assert len(dataset) == len(list(dataset)) == count

@pytest.mark.parametrize("annotations, images, kind, message", [
    (FOLDER, None, "val", "--split test, expected one of .*'train', 'val'"),
    ("nowhere", None, "train", "nowhere: no such folder, and no JSON"),
    (ONE, "val", "train", "panoptic_val.json: .* --train-split .*{split}"),
    (EACH, "{split}", "val", "panoptic_test.json: no such annotation file")])
def test_a_split_that_is_not_there_is_named(data, annotations, images, kind, message):
    with pytest.raises(UserError, match=message):
        open_dataset(str(data / annotations), "test", images and str(data / images), 32, kind)

def test_an_annotation_is_read_untouched(data):
    for record, (height, width, segments) in zip(open_dataset(data, None, None, 32, "val"),
                                                 SCENES["val"], strict=True):
        assert np.array_equal(record["ids"], paint(height, width, segments))
        assert record["image"].shape == (height, width, 3)
        assert [(s["id"], s["category_id"], s["iscrowd"]) for s in record["segments"]] == [
            segment[:3] for segment in segments]  # fmt: skip

CITY, ADE = "frankfurt_000000_000294", "ADE_val_00000001"
LAYOUTS = {  # as their converters leave them: JSON; its names of image and mask; where the image is
    "cityscapes": (
        "gtFine/cityscapes_panoptic_val.json", f"{CITY}_gtFine_leftImg8bit.png",
        f"{CITY}_gtFine_panoptic.png", f"leftImg8bit/val/frankfurt/{CITY}_leftImg8bit.png"),
    "ade20k": ("ade20k_panoptic_val.json", f"{ADE}.jpg", f"{ADE}.png",
               f"images/validation/{ADE}.jpg")}  # fmt: skip
IDS = np.repeat([[0, 7, 26001]], 4, 0)  # void, road, a car

def converted(root, layout, images):
    """The data set of one image of 4 x 3 pixels in that layout, with --images below root."""
    name, image_name, mask_name, picture = LAYOUTS[layout]
    folder = images.replace("{split}", "val")
    write_png(root / picture, np.full((4, 3, 3), 99, np.uint8))
    depth = picture.replace(folder, folder + "_depth", 1).replace(".jpg", ".png")
    write_png(root / depth, IDS.astype(np.uint16))
    write_png((root / name).with_suffix("") / mask_name, id2rgb(IDS))
    write_json(root / name, {
        "images": [{"id": "an id", "file_name": image_name}],
        "annotations": [{"image_id": "an id", "file_name": mask_name, "segments_info": [
            {"id": 7, "category_id": 0}, {"id": 26001, "category_id": 26}]}],
        "categories": [{"id": 0, "isthing": 0}, {"id": 26, "isthing": 1}]})  # fmt: skip
    name = name.replace("panoptic_val", "panoptic_{split}")
    return open_dataset(f"{root}/{name}", None, f"{root}/{images}", 32, "val", depth=True)

@pytest.mark.parametrize("layout, images", [
    ("cityscapes", "leftImg8bit/{split}"), ("cityscapes", "leftImg8bit"), ("ade20k", "images"),
    ("ade20k", "images/validation")])  # fmt: skip
def test_cityscapes_and_ade20k_are_read_as_their_converters_leave_them(tmp_path, layout, images):
    (record,) = converted(tmp_path, layout, images)
    assert np.array_equal(record["ids"], IDS) and (record["image"] == 99).all()
    assert np.array_equal(np.nan_to_num(record["depth"]), IDS)  # lies as the images do
    assert [s["id"] for s in record["segments"]] == [7, 26001] and record["image_id"] == "an id"

def test_an_image_that_is_found_twice_is_named_with_its_places(tmp_path):
    dataset, images = converted(tmp_path, "cityscapes", "leftImg8bit"), tmp_path / "leftImg8bit"
    shutil.copytree(images / "val", images / "copy")
    with pytest.raises(UserError, match="2 times below .*(copy|val)/f.*(copy|val)/f"):
        PanopticDataset(dataset.json_path, images)[0]

def test_the_file_name_itself_comes_before_others_of_its_base_name(tmp_path):
    write_png(tmp_path / "images/validation/old" / f"{ADE}.jpg", np.zeros((4, 3, 3), np.uint8))
    assert converted(tmp_path, "ade20k", "images/validation")[0]["image"].all()

def square(left, top, right, bottom):
    """A polygon around the pixels [left, right) x [top, bottom)."""
    return [left, top, right, top, right, bottom, left, bottom]

def map_of(*boxes):
    """The 6 x 9 map with (id, left, top, right, bottom) painted in this order."""
    ids = np.zeros((6, 9), int)
    for id, left, top, right, bottom in boxes:
        ids[top:bottom, left:right] = id
    return ids

def instances(root, shapes, depth=False, **fields):
    """The data set of one grey image of 6 x 9 pixels; `fields` of its annotations: lists."""
    write_png(root / "train" / "grey.png", np.full((6, 9, 3), 99, np.uint8))
    annotations = [{"id": 2**40 + i, "image_id": 4, "category_id": 3, "segmentation": shape}
                   | {key: values[i] for key, values in fields.items()}
                   for i, shape in enumerate(shapes)]  # fmt: skip
    images = [{"id": i, "file_name": "grey.png", "height": 6, "width": 9} for i in (1, 4)]
    write_json(root / "annotations" / "instances_train.json", {
        "images": images, "annotations": annotations,
        "categories": [{"id": 3, "name": "cell"}, {"id": 8, "isthing": 0}]})  # fmt: skip
    return open_dataset(root, None, None, 32, "train", depth)

@pytest.mark.parametrize("shape, boxes", [([square(-5, 4, 3, 90)], [(1, 0, 4, 3, 6)]),
    ([square(0, 0, 2, 2), square(5, 3, 9, 6)], [(1, 0, 0, 2, 2), (1, 5, 3, 9, 6)]),
    # pixels go down the columns: rows 1 to 3 of the second column
    ({"size": [6, 9], "counts": [6 + 1, 3, 54 - 10]}, [(1, 1, 1, 2, 4)]),
    # 5 bits a letter from "0" on, + 32 where more follow: 7 = "7", 3 = "3", 44 = 12 + 32, 1
    ({"size": [6, 9], "counts": "73\\1"}, [(1, 1, 1, 2, 4)])])  # fmt: skip
def test_polygons_and_run_lengths_cover_their_pixels(tmp_path, shape, boxes):
    assert np.array_equal(instances(tmp_path, [shape])[0]["ids"], map_of(*boxes))

@pytest.mark.parametrize("boxes, painted", [
    ([(3, 2, 8, 4), (0, 0, 9, 6), (1, 1, 6, 5)], [1, 2, 0]),  # of 10, 54 and 20 pixels
    ([(2, 0, 9, 2), (0, 0, 4, 2), (4, 0, 9, 2)], [1, 2])])  # fmt: skip
def test_the_smaller_instance_is_on_top_and_a_hidden_one_is_left_out(tmp_path, boxes, painted):
    record = instances(tmp_path, [[square(*box)] for box in boxes])[0]
    assert np.array_equal(record["ids"], map_of(*[(1 + i, *boxes[i]) for i in painted]))
    assert [s["id"] for s in record["segments"]] == sorted(1 + i for i in painted)

def test_too_few_counts_never_make_up_pixels(tmp_path):
    dataset = instances(tmp_path, [{"size": [6, 9], "counts": "73"}])
    for _ in range(50):
        with suppress(UserError):
            assert np.array_equal(dataset[0]["ids"], map_of((1, 1, 1, 2, 4)))

def two_squares(root, part, fields, encoding="utf-8"):
    """The data set of two squares in image 4, in whose JSON an entry of `part` has `fields`."""
    file = root / "annotations" / "instances_train.json"
    instances(root, [[square(0, 0, 2, 2)], [square(3, 0, 5, 2)]], category_id=[3, 8])
    content = json.loads(file.read_text())
    content[part][-1 if part != "categories" else 0] |= fields
    file.write_text(json.dumps(content), encoding)
    return open_dataset(root, None, None, 32, "train")

@pytest.mark.parametrize("part, fields", [("images", {}),  # a byte-order mark alone
    ("images", {"file_name": "..\\..\\tool\\grey.png"}), ("images", {"file_name": "/a/grey.png"}),
    ("images", {"id": "4"}), ("categories", {"id": "3", "isthing": "1"}),
    ("annotations", {"image_id": "4", "category_id": "8"})])
def test_what_other_tools_write_is_read_as_cocos(tmp_path, part, fields):
    dataset = two_squares(tmp_path, part, fields, "utf-8" if fields else "utf-8-sig")
    (record,) = dataset
    assert record["image_id"] == 4 and (record["image"] == 99).all()
    assert [(s["id"], s["category_id"]) for s in record["segments"]] == [(1, 3), (2, 8)]
    assert [(c["id"], c["isthing"]) for c in dataset.categories] == [(3, 1), (8, 0)]
    assert not {"..", ""} & set(record["file_name"].split("/"))

@pytest.mark.parametrize("value, crowd", [("0", 0), ("1", 1), (True, 1), (0.0, 0), (1.0, 1)])
def test_a_crowd_is_0_or_1_however_it_is_written(tmp_path, value, crowd):
    (record,) = two_squares(tmp_path, "annotations", {"iscrowd": value})
    assert record["segments"][1]["iscrowd"] == crowd
    counted = prepared(record)["ids"].unique()
    assert len(counted) == (2 if crowd else 3)  # VOID and one or two squares

@pytest.mark.parametrize("annotations, image", [
    ("annotations/instances_{}.json", "images/{}/grey.png"),  # CVAT, with its split "default"
    ("annotations/instances_{}.json", "{}2017/grey.png"),
    ("annotations/instances_{}.json", "grey.png"),
    ("{}/_annotations.coco.json", "{}/grey.png"),  # Roboflow
    ("{}.json", "images/grey.png"), ("{}.json", "JPEGImages/grey.png")])  # Label Studio, labelme
@pytest.mark.parametrize("splits", [["default"], ["train", "valid"]])
def test_folders_of_tools_are_found_without_flags(tmp_path, annotations, image, splits):
    instances(tmp_path / "made", [[square(0, 0, 2, 2)]])
    for split in splits:
        for name, source in ((annotations, "annotations/instances_train.json"),
                             (image, "train/grey.png")):
            path = tmp_path / "data" / name.format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "made" / source, path)
    for kind in ("train", "val"):
        (record,) = open_dataset(tmp_path / "data", None, None, 32, kind)
        assert np.array_equal(record["ids"], map_of((1, 0, 0, 2, 2)))

def test_a_mask_outside_its_folder_is_not_read(tmp_path):
    dataset = converted(tmp_path, "ade20k", "images")
    write_png(tmp_path / "other.png", id2rgb(IDS))
    content = json.loads(dataset.json_path.read_text())
    for name in ("../other.png", str(tmp_path / "other.png")):
        content["annotations"][0]["file_name"] = name
        write_json(dataset.json_path, content)
        with pytest.raises(UserError, match="ade20k_panoptic_val/other.png: no such image"):
            PanopticDataset(dataset.json_path, tmp_path / "images")[0]

@pytest.mark.parametrize("orientation, turns", [(3, 2), (6, 1), (8, 3)])
def test_an_image_is_turned_as_its_exif_tag_says(tmp_path, orientation, turns):
    shown = np.arange(0, 240, 10, np.uint8).reshape(4, 6)
    image = Image.fromarray(np.rot90(shown, turns))
    exif = image.getexif()
    exif[0x0112] = orientation
    for suffix in ("png", "tif"):
        image.save(tmp_path / f"a.{suffix}", exif=exif)
        assert np.array_equal(read_image(tmp_path / f"a.{suffix}")[..., 0], shown)
    assert np.array_equal(read_image(tmp_path / "a.png", exact=True)[..., 0], shown)

GREY_VALUES = np.arange(0, 256, 5, np.uint8).reshape(4, 13)

@pytest.mark.parametrize("stored", [
    GREY_VALUES, GREY_VALUES.astype(np.uint16) * 257, GREY_VALUES.astype(np.float32) / 255,
    GREY_VALUES.astype(np.float32), GREY_VALUES.astype(np.int32) * 257])
def test_grey_of_any_depth_is_the_same_picture(tmp_path, stored):
    Image.fromarray(stored).save(tmp_path / "a.tif")
    assert (np.abs(read_image(tmp_path / "a.tif")[..., 1].astype(int) - GREY_VALUES) <= 1).all()

def test_bad_samples_are_skipped_and_counted_if_asked(tmp_path, capsys):
    class Damaged(Numbered):
        def __getitem__(self, index):
            if index in (1, 2):
                raise UserError(f"file {index} is damaged")
            return super().__getitem__(index)

    damaged = Damaged(range(4))
    stream = TrainingStream([damaged], small_config(), 0, on_bad_sample="skip")
    assert {round((stream[p]["image"].max().item() + 1) * 127.5) for p in range(12)} == {0, 3}
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["skipped, number 1", "skipped, number 2"]
    with pytest.raises(UserError, match="is damaged"):
        [TrainingStream([damaged], small_config(), 0)[p] for p in range(4)]

DEPTH = np.arange(54.0).reshape(6, 9)
DEPTH[0, :4] = 0, np.nan, np.inf, -1  # all unknown
KNOWN = np.where(np.isfinite(DEPTH) & (DEPTH > 0), DEPTH, np.nan)

@pytest.mark.parametrize("dtype", ["float16", ">f4", "float64", "uint16"])
def test_depth_is_read_from_npy_of_floats_and_16_bit_png(tmp_path, dtype):
    shapes, path = [[square(0, 0, 2, 2)]], tmp_path / "train_depth" / "grey.npy"
    write_png(path.with_suffix(".png"), np.nan_to_num(KNOWN).astype(np.uint16))
    if dtype != "uint16":
        np.save(path, DEPTH.astype(dtype))
    depth = instances(tmp_path, shapes, depth=True)[0]["depth"]
    assert depth.dtype == np.float32 and depth.dtype.isnative
    assert np.array_equal(depth, KNOWN, equal_nan=True)
    assert "depth" not in instances(tmp_path, shapes)[0]

# ---- damage: what the one line says after the file, * is anything ----

def damage(file, how):
    """None: deletes it; "cut": truncates it; an array: in its place; a change of a JSON."""
    if how is None:
        file.unlink()
    elif isinstance(how, str):
        file.write_bytes(file.read_bytes()[:-20])
    elif callable(how):
        content = json.loads(file.read_text())
        how(content)
        write_json(file, content)
    else:
        (np.save if file.suffix == ".npy" else write_png)(file, how)

def shape(value):
    return lambda content: content["annotations"][1].update(segmentation=value)

def segment(**values):
    return lambda content: content["annotations"][1]["segments_info"][1].update(values)

JSON = "annotations/"
IMAGE, MASK, GREY = "train/train1.png", JSON + "panoptic_train/train1.png", "train_depth/grey.npy"
PANOPTIC, INSTANCES = JSON + "panoptic_train.json", JSON + "instances_train.json"
DAMAGE = [
    (IMAGE, None, "no such image"), (GREY, None, "no such depth map, .npy or .png"),
    (PANOPTIC, "cut", "not a readable annotation file"), (GREY, "cut", "not a readable depth map"),
    (MASK, IDS.astype(np.uint16), "expected a PNG of 8 bits per channel"),
    (MASK, id2rgb(IDS), "*(4, 3) pixels, expected (48, 33)"),
    (GREY, DEPTH.T, "float64 (9, 6), expected *(6, 9)"),
    (INSTANCES, shape([[1, 1, 5, float("inf"), 1, 5]]), "image 4: segmentation [[][[]1, 1, 5, inf"),
    (INSTANCES, shape({"size": [9, 6], "counts": [54]}), "image 4: segmentation *9, 6*(6, 9)"),
    (INSTANCES, shape({"size": [6, 9], "counts": [7, 3]}), "*expected the (6, 9) pixels"),
    (INSTANCES, shape({"counts": [54]}), "image 4: segmentation {'counts': [[]54]}: not a read*"),
    (INSTANCES, shape(None), "image 4: segmentation None: a box without an outline"),
    (INSTANCES, lambda c: c["images"][1].update(height=60), "*(60, 9) pixels, expected (6, 9)"),
    (INSTANCES, lambda c: c["images"][1].update(file_name="a\ud800"), "not a readable annotation"),
    (INSTANCES, lambda c: c["categories"][0].update(name="\ud800"), "not a readable annotation"),
    (PANOPTIC, segment(id=5), "image 11: segment: id 5 twice, expected once"),
    (PANOPTIC, segment(category_id=77), "image 11: *category_id is 77, expected {"),
    (MASK, id2rgb(np.full((48, 33), 77)), "*ids *77*"),
    (PANOPTIC, lambda c: c["annotations"][1].pop("segments_info"), "*segments_info is None, exp"),
    (PANOPTIC, lambda c: c["images"].pop(1), "*image 11"),
    (PANOPTIC, lambda c: c["annotations"].clear(), "no annotated image, expected at")]  # fmt: skip

@pytest.mark.parametrize("place, how, message", DAMAGE)
def test_damage_is_named_in_one_line(data, complaint, tmp_path, place, how, message):
    root = shutil.copytree(data, tmp_path / "data")
    instances(root, [[square(0, 0, 2, 2)]] * 2)
    (root / "train_depth").mkdir()
    np.save(root / GREY, DEPTH)
    damage(root / place, how)
    name, target = (INSTANCES, "depth") if place in (INSTANCES, GREY) else (PANOPTIC, "ids")
    command = [*ae_command(root / name, tmp_path / "run"), "--images", root / "train"]
    line = complaint(train_ae.main, *command, "--target", target)
    assert fnmatchcase(line, f"{root}/{place.removesuffix('.npy')}*: {message}*"), line
