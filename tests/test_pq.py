"""From logits to segments, and Panoptic Quality."""

import json
import math

import numpy as np
import pytest
import torch
from ldmseg import PanopticQuality, postprocess, read_image, rgb2id, segments_of

# ---- post-processing ----


def logits_of(probabilities):
    """Logits (N, 4, 4) of the same probabilities everywhere."""
    return torch.tensor(probabilities).log().view(-1, 1, 1).expand(-1, 4, 4)


@pytest.mark.parametrize("threshold, id", [(0.5, 2), (0.7, 0)])
def test_pixels_less_confident_than_the_threshold_are_void(threshold, id):
    ids = postprocess(logits_of([0.3, 0.1, 0.6]), (8, 8), threshold, min_area=0)
    assert ids.unique().tolist() == [id]


def test_channel_0_competes_and_means_void():
    ids = postprocess(logits_of([0.6, 0.1, 0.3]), (8, 8), mask_threshold=0, min_area=0)
    assert ids.unique().tolist() == [0]


def stripes(ids, n=4, strength=20.0):
    """Logits (n, 4, 4) that say id `ids[j]` in column j."""
    logits = torch.zeros(n, 4, 4)
    for column, id in enumerate(ids):
        logits[id, :, column] = strength
    return logits


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (5, 6)])
def test_ids_are_resized_to_the_image(size):
    ids = postprocess(stripes([1, 1, 3, 3]), size, mask_threshold=0, min_area=0)
    half = size[1] // 2
    assert ids.tolist() == [[1] * half + [3] * half] * size[0]


@pytest.mark.parametrize("min_area, expected", [(16, [1, 2]), (17, [0, 2])])
def test_segments_smaller_than_min_area_are_void(min_area, expected):
    ids = postprocess(stripes([1, 2, 2, 2]), (8, 8), mask_threshold=0, min_area=min_area)
    assert ids.unique().tolist() == expected


def test_segments_info_counts_areas_and_boxes():
    ids = np.zeros((5, 7), np.int64)
    ids[1:4, 2:6], ids[4, 0] = 9, 300
    ids[2, 3] = 0
    assert segments_of(ids) == [
        {"id": 9, "category_id": 1, "area": 11, "iscrowd": 0, "bbox": [2, 1, 4, 3]},
        {"id": 300, "category_id": 1, "area": 1, "iscrowd": 0, "bbox": [0, 4, 1, 1]},
    ]


# ---- PQ by hand: a row of pixels, categories 1 (thing) and 2 (stuff) ----

CATEGORIES = [{"id": 1, "isthing": 1}, {"id": 2, "isthing": 0}]


def score(truth, prediction, truth_segments, predicted_segments, **options):
    """PQ of one image. Segments are {id: category}, or {id: (category, "crowd")} in the truth."""
    def listed(segments):
        pairs = ((id, c if isinstance(c, tuple) else (c,)) for id, c in segments.items())
        return [{"id": id, "category_id": c[0], "iscrowd": len(c) - 1} for id, c in pairs]

    metric = PanopticQuality(CATEGORIES, **options)
    metric.update(np.array([truth]), listed(truth_segments), np.array([prediction]),
                  listed(predicted_segments))
    return metric.compute()


def counts(result, category=1):
    row = result["per_class"][str(category)]
    return row["tp"], row["fp"], row["fn"]


def test_a_perfect_prediction_scores_1():
    result = score([5, 5, 6, 6], [1, 1, 2, 2], {5: 1, 6: 2}, {1: 1, 2: 2})
    assert result["All"] == {"pq": 1, "sq": 1, "rq": 1, "n": 2}
    assert counts(result, 1) == counts(result, 2) == (1, 0, 0)


def test_pq_by_hand():
    # segment 1: IoU 3/4; segment 2: missed; prediction 3: wrong
    truth, prediction = [1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 0, 3, 0, 0, 0]
    row = score(truth, prediction, {1: 1, 2: 1}, {1: 1, 3: 1})["per_class"]["1"]
    assert row == {"pq": 0.375, "sq": 0.75, "rq": 0.5, "tp": 1, "fp": 1, "fn": 1}


def test_iou_of_exactly_a_half_is_no_match():
    result = score([1, 1, 1, 2], [1, 1, 0, 1], {1: 1, 2: 2}, {1: 1})
    assert counts(result) == (0, 1, 1)
    result = score([1, 1, 1, 1], [1, 1, 1, 0], {1: 1}, {1: 1})
    assert counts(result) == (1, 0, 0)


def test_void_of_the_truth_is_left_out_of_the_union():
    result = score([1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], {1: 1}, {1: 1})
    assert result["per_class"]["1"]["sq"] == 1


def test_another_category_is_no_match():
    result = score([1, 1], [1, 1], {1: 1}, {1: 2})
    assert counts(result, 1) == (0, 0, 1) and counts(result, 2) == (0, 1, 0)


def test_class_agnostic_ignores_categories():
    result = score([1, 1], [1, 1], {1: 1}, {1: 2}, class_agnostic=True)
    assert result["All"] == {"pq": 1, "sq": 1, "rq": 1, "n": 1}


@pytest.mark.parametrize("void, false_positives", [(3, 0), (2, 1)])
def test_a_false_positive_mostly_on_void_is_ignored(void, false_positives):
    truth = [0] * void + [1] * (8 - void)
    result = score(truth, [2] * 4 + [1] * 4, {1: 1}, {1: 1, 2: 1})
    assert counts(result)[1] == false_positives


@pytest.mark.parametrize("crowd_category, false_positives", [(1, 0), (2, 1)])
def test_a_crowd_of_the_class_absorbs_a_false_positive(crowd_category, false_positives):
    truth, prediction = [1, 1, 9, 9, 9, 9], [1, 1, 0, 3, 3, 3]
    result = score(truth, prediction, {1: 1, 9: (crowd_category, "crowd")}, {1: 1, 3: 1})
    assert counts(result) == (1, false_positives, 0)


@pytest.mark.parametrize("predicted, false_positives", [([1, 1, 0, 0], 1), ([0, 0, 1, 1], 0)])
def test_of_several_crowds_of_a_class_the_last_absorbs(predicted, false_positives):
    crowds = {8: (1, "crowd"), 9: (1, "crowd")}
    result = score([2, 8, 8, 9, 9], [2, *predicted], {2: 1, **crowds}, {2: 1, 1: 1})
    assert counts(result) == (1, false_positives, 0)


def test_a_crowd_is_neither_matched_nor_missed():
    result = score([9, 9, 1, 1], [9, 9, 1, 1], {9: (1, "crowd"), 1: 1}, {9: 1, 1: 1})
    assert counts(result) == (1, 0, 0)
    result = score([9, 9, 1, 1], [0, 0, 1, 1], {9: (1, "crowd"), 1: 1}, {1: 1})
    assert counts(result) == (1, 0, 0)


def test_categories_that_never_occur_do_not_count():
    result = score([2, 2, 2, 2], [2, 2, 2, 0], {2: 2}, {2: 2})
    assert result["All"] == result["Stuff"] == {"pq": 0.75, "sq": 0.75, "rq": 1, "n": 1}
    assert result["Things"] == {"pq": 0, "sq": 0, "rq": 0, "n": 0}


def test_an_empty_image_counts_nothing():
    result = score([0, 0], [0, 0], {}, {})
    assert result["per_class"] == {} and result["All"]["n"] == 0


def test_an_empty_prediction_misses_everything():
    assert counts(score([1, 2], [0, 0], {1: 1, 2: 1}, {})) == (0, 0, 2)


def test_a_predicted_id_without_a_segment_is_an_error():
    with pytest.raises(ValueError, match="not in its list"):
        score([1, 1], [1, 7], {1: 1}, {1: 1})


def test_a_prediction_of_another_size_is_an_error():
    with pytest.raises(ValueError, match=r"\(1, 3\), expected \(1, 2\)"):
        score([1, 1], [1, 1, 1], {1: 1}, {1: 1})


# ---- PQ against the reference implementation ----


@pytest.fixture(scope="module")
def reference(shared):
    """Its 12 images as arguments of PanopticQuality.update, the categories, its results."""
    folder, images = shared / "golden" / "pq_small", []
    gt, pred = (json.loads((folder / f"{name}.json").read_text()) for name in ("gt", "pred"))
    predicted = {a["image_id"]: a for a in pred["annotations"]}
    for annotation in gt["annotations"]:
        image = []
        for name, one in (("gt", annotation), ("pred", predicted[annotation["image_id"]])):
            image += [rgb2id(read_image(folder / name / one["file_name"])), one["segments_info"]]
        images.append(image)
    return images, gt["categories"], json.loads((folder / "expected.json").read_text())


def metric_over(images, categories, **options):
    metric = PanopticQuality(categories, **options)
    for image in images:
        metric.update(*image)
    return metric


def assert_same_scores(got, expected):
    for name, value in expected.items():
        assert math.isclose(got[name], value, abs_tol=1e-12), name


@pytest.mark.parametrize("group", ["All", "Things", "Stuff"])
def test_pq_of_a_group_equals_the_reference(reference, group):
    images, categories, expected = reference
    assert_same_scores(metric_over(images, categories).compute()[group], expected[group])


def test_pq_of_each_class_equals_the_reference(reference):
    images, categories, expected = reference
    result = metric_over(images, categories).compute()["per_class"]
    assert result.keys() == expected["per_class"].keys()
    for category, row in expected["per_class"].items():
        assert_same_scores(result[category], row)


def test_class_agnostic_pq_equals_the_reference(reference):
    images, categories, expected = reference
    metric = metric_over(images, categories, class_agnostic=True)
    assert_same_scores(metric.compute()["All"], expected["class_agnostic"])


def test_states_add_up_over_images(reference):
    images, categories, _ = reference
    parts = [metric_over(some, categories) for some in (images[:5], images[5:])]
    whole = metric_over(images, categories)
    np.testing.assert_allclose(sum(part.state for part in parts), whole.state, rtol=1e-12)
