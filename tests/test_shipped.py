"""The weights that come with the repository."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from ldmseg import (
    SHIPPED, PanopticQuality, ShapeScenes, evaluate_tasks, load_model, sampler_of,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return load_model(SHIPPED)


def test_the_shipped_weights_are_small(model):
    assert SHIPPED.stat().st_size < 12 * 2**20
    assert sum(p.numel() for p in model.parameters()) < 6e6


def test_the_shipped_autoencoder_reconstructs_scenes():
    autoencoder = load_model(SHIPPED).autoencoder
    config = autoencoder.config

    def reconstruct(batch):
        return [{"instance": one} for one in autoencoder.reconstruct(batch["ids"])]

    scenes = ShapeScenes("val", config.size)
    result, _ = evaluate_tasks(["instance"], reconstruct, scenes, replace(config, min_area=0),
                               torch.device("cpu"), limit=48)
    assert result["instance"]["All"]["pq"] > 0.8


def test_the_shipped_model_follows_the_image(model):
    """Its samples fit their own scene and not the next one."""
    scenes, config = ShapeScenes("val", model.config.size), model.config
    sample = sampler_of(model, ["instance"], 10, 0.0, nullcontext)
    result, kept = evaluate_tasks(["instance"], sample, scenes, config, torch.device("cpu"),
                                  limit=32, pictures=32)
    wrong = PanopticQuality(scenes.categories, class_agnostic=True)
    for (record, _), (_, drawn) in zip(kept, kept[1:] + kept[:1]):
        ids = drawn["instance"]
        segments = [{"id": i, "category_id": 1} for i in set(ids.ravel().tolist()) - {0}]
        wrong.update(record["ids"], record["segments"], ids, segments)
    assert result["instance"]["All"]["pq"] > 0.3 > 2 * wrong.compute()["All"]["pq"]
