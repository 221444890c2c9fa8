"""Pairs: what belongs together, what never counts as a negative, what never crosses a split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_altmoe import LatentStore
from trainer.pairs import LatentPairs

BOTH = ["image->text", "text->image"]


def several_captions(items=6, captions=3):
    """One image and several captions an item."""
    latents = {"image": torch.randn(items, 4), "text": torch.randn(items * captions, 5)}
    keys = {"image": [f"k{i}" for i in range(items)], "text": [f"k{i // captions}" for i in range(items * captions)]}
    return LatentPairs(latents, keys, BOTH)


def test_rows_of_a_batch_belong_together():
    pairs = several_captions()
    for direction in BOTH:
        batch = pairs.batch(direction, range(len(pairs)), np.random.default_rng(0))
        matches = pairs.matches(direction, batch["source_rows"], batch["target_rows"])
        assert matches.diagonal().all()
    assert len(pairs) == 18  # the longer direction


def test_captions_of_one_image_are_all_right():
    pairs = several_captions()
    matches = pairs.matches("image->text", np.arange(6), np.arange(18))
    assert torch.equal(matches, torch.eye(6, dtype=torch.bool).repeat_interleave(3, dim=1))


def test_another_generator_state_chooses_another_caption():
    pairs = several_captions()
    chosen = {tuple(pairs.batch("image->text", range(6), np.random.default_rng(s))["target_rows"]) for s in range(20)}
    assert len(chosen) > 5


def test_identical_captions_are_matches_of_both_images():
    text = torch.randn(4, 5)
    text[2] = text[0]
    keys = ["a", "b", "c", "d"]
    pairs = LatentPairs({"image": torch.randn(4, 4), "text": text}, {"image": keys, "text": keys}, BOTH)
    matches = pairs.matches("image->text", np.arange(4), np.arange(4))
    assert matches[0, 2] and matches[2, 0] and matches.sum() == 6
    assert torch.equal(pairs.matches("text->image", np.arange(4), np.arange(4)), matches.T)


def test_only_keys_with_every_modality_count():
    latents = {"image": torch.randn(3, 4), "text": torch.randn(2, 5), "audio": torch.randn(1, 3)}
    keys = {"image": ["a", "b", "c"], "text": ["c", "a"], "audio": ["b"]}
    pairs = LatentPairs(latents, keys, ["image->text"])
    batch = pairs.batch("image->text", range(2))
    assert batch["source_rows"].tolist() == [0, 2] and batch["target_rows"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="no key has all of its modalities"):
        LatentPairs(latents, keys, ["text->audio"])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 50), concepts=st.integers(8, 40))
def test_no_concept_stands_on_two_sides(seed, concepts):
    rng = np.random.default_rng(seed)
    keys = [f"k{i}" for i in range(3 * concepts)]
    groups = {key: f"g{rng.integers(concepts)}" for key in keys}
    latents = {m: torch.randn(len(keys), 4) for m in ("image", "text")}
    parts = LatentPairs(latents, {m: keys for m in latents}, BOTH, groups).split(seed, 0.2, 0.2)
    sides = {part: {its.groups[key] for key in its.key_names} for part, its in parts.items()}
    assert not sides["train"] & sides["test"] and not sides["train"] & sides["validation"]
    assert not sides["validation"] & sides["test"]
    assert sum(len(its.latents["image"]) for its in parts.values()) == len(keys)


def test_stores_are_linked_by_key_and_grouped(tmp_path):
    columns = {"key": "string", "group": "string"}
    with LatentStore.create(tmp_path / "t", "text", {"latent_size": 5}, columns=columns) as store:
        store.append(["t1", "t2"], torch.randn(2, 5), key=["x", "y"], group=["g", "g"])
    with LatentStore.create(tmp_path / "i", "image", {"latent_size": 4}) as store:
        store.append(["y", "x"], torch.randn(2, 4))
    stores = {"image": LatentStore.open(tmp_path / "i"), "text": LatentStore.open(tmp_path / "t")}
    pairs = LatentPairs.from_stores(stores, BOTH)
    assert pairs.batch("text->image", range(2))["target_rows"].tolist() == [1, 0]
    assert set(pairs.groups.values()) == {"g"}


def test_bad_pairs_are_refused():
    with pytest.raises(ValueError, match="image: 3 latents, but 2 keys"):
        LatentPairs({"image": torch.zeros(3, 2)}, {"image": ["a", "b"]}, [])
    bad = torch.randn(3, 2)
    bad[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"image: NaN or infinity in 1 latents, rows \[2\]"):
        LatentPairs({"image": bad}, {"image": ["a", "b", "c"]}, [])
    with pytest.raises(ValueError, match="Unknown modality 'txt'"):
        LatentPairs({"image": torch.zeros(1, 2)}, {"image": ["a"]}, ["image->txt"])


def test_samples_of_concepts_are_nested_and_whole():
    keys = [f"k{i}" for i in range(30)]
    groups = {key: f"g{i // 3}" for i, key in enumerate(keys)}
    latents = {m: torch.randn(30, 4) for m in ("image", "text")}
    pairs = LatentPairs(latents, {m: keys for m in latents}, BOTH, groups)
    small, large = (pairs.sample_concepts(count, seed=1) for count in (3, 6))
    assert len(small.latents["image"]) == 9 and len(large.latents["text"]) == 18
    assert set(small.keys["image"]) < set(large.keys["image"])
    assert small.keys["text"] == pairs.sample_concepts(3, seed=1).keys["text"]
    assert small.keys["text"] != pairs.sample_concepts(3, seed=2).keys["text"]
    with pytest.raises(ValueError, match="train_concepts=11, but only 10 concepts"):
        pairs.sample_concepts(11, seed=1)


def test_items_join_keys_that_share_a_latent():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 4, generator=generator)
    image, text = rows[[0, 1, 2, 3]], rows[[0, 0, 1, 2]]  # a and b share a text; c and d share nothing
    keys = ["a", "b", "c", "d"]
    pairs = LatentPairs({"image": image, "text": text}, {"image": keys, "text": keys}, ["image->text"])
    assert pairs.items_of_keys().tolist() == [0, 0, 2, 3]
    chained = LatentPairs({"image": rows[[0, 1, 1, 3]], "text": text}, {"image": keys, "text": keys}, ["image->text"])
    assert chained.items_of_keys().tolist() == [0, 0, 0, 3]  # b and c share a picture
