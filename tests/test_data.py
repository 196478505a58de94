"""Generated scenes, COCO panoptic files and training samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SCENES, paint, small_config
from ldmseg import (
    PanopticDataset, ShapeScenes, TrainingStream, id2rgb, open_dataset, prepare, rgb2id,
    training_loader,
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
