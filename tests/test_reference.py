"""The reference policy: where training started from, computed or taken from the batch."""

import pytest
import torch
from accelerate import Accelerator
from samples import PROMPTS
from tolerances import LOGPS
from torch.nn import functional as F

from clip_po.candidates import CandidateTexts
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.collator import DataCollatorForContrastivePreference
from clip_po.data.embedding_cache import EmbeddingCache
from clip_po.data.pairs import PreferencePairs
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.encoding import CachedTextEmbeddings, encode_images, encode_texts
from clip_po.policy import Policy, candidate_logps
from clip_po.reference import ReferencePolicy, embed_fixed_images, frozen_copy


@pytest.fixture
def pairs(preferences):
    return PreferencePairs(preferences, "clean_image")


@pytest.fixture
def collate(processor):
    return DataCollatorForContrastivePreference(processor)


@pytest.fixture
def reference(model, processor):
    return ReferencePolicy(frozen_copy(model), processor, CandidateTexts(None))


def first_rows(pairs, rows=4):
    return [pairs[index] for index in range(rows)]


def wrong_embeds(rows=4):
    return F.normalize(torch.randn(rows, 16, generator=torch.Generator().manual_seed(1)), dim=-1)


@pytest.mark.numeric
def test_at_the_start_reference_and_policy_are_equal(model, processor, pairs, collate, reference):
    batch = collate(first_rows(pairs))
    policy = Policy(processor, CandidateTexts(None), CachedTextEmbeddings(model, processor))(model, model, batch)
    found = reference(batch)
    torch.testing.assert_close(found.preference, policy.preference.detach(), rtol=0, atol=LOGPS)
    torch.testing.assert_close(found.regularization, policy.regularization.detach(), rtol=0, atol=LOGPS)


@pytest.mark.numeric
def test_the_reference_stays_when_the_policy_moves(model, pairs, collate, reference):
    batch = collate(first_rows(pairs))
    before = reference(batch).preference
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(reference(batch).preference, before)


def test_the_reference_takes_no_gradients(pairs, collate, model, processor):
    found = ReferencePolicy(model, processor, CandidateTexts(None))(collate(first_rows(pairs)))
    assert not found.preference.requires_grad
    assert not found.regularization.requires_grad


def test_fixed_candidates_are_those_of_the_reference_too(model, processor, preferences):
    batch = DataCollatorForContrastivePreference(processor, PROMPTS)(
        first_rows(PreferencePairs(preferences, "clean_image", CandidateTexts(PROMPTS)))
    )
    found = ReferencePolicy(model, processor, CandidateTexts(PROMPTS))(batch).preference
    images, texts = encode_images(model, batch["pixel_values"]), encode_texts(model, processor, PROMPTS)
    torch.testing.assert_close(found, candidate_logps(images, texts, model.logit_scale.exp()))


@pytest.mark.parametrize(
    ("given", "changed", "kept"),
    [
        ("ref_image_embeds", "preference", "regularization"),
        ("ref_reg_image_embeds", "regularization", "preference"),
    ],
)
def test_embeddings_in_the_batch_are_taken_as_they_are(reference, pairs, collate, given, changed, kept):
    batch = collate(first_rows(pairs))
    computed, embeds = reference(batch), wrong_embeds()
    found = reference({**batch, given: embeds})
    texts = reference.text_embeddings(batch["texts"])
    expected = candidate_logps(embeds, texts, reference.logit_scale, batch["candidates"])
    assert torch.equal(getattr(found, changed), expected)
    assert not torch.allclose(getattr(found, changed), getattr(computed, changed))
    torch.testing.assert_close(getattr(found, kept), getattr(computed, kept))


def test_no_image_is_encoded_where_all_embeddings_are_known(reference, pairs, collate):
    batch = collate(first_rows(pairs))
    calls = []
    reference.model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    reference({**batch, "ref_image_embeds": wrong_embeds(), "ref_reg_image_embeds": wrong_embeds()})
    assert calls == []


def test_images_that_are_not_known_are_encoded_in_one_forward(reference, pairs, collate):
    sizes = []
    reference.model.vision_model.register_forward_hook(
        lambda _, args, kwargs, output: sizes.append(len(output[0])), with_kwargs=True
    )
    reference(collate(first_rows(pairs)))
    assert sizes == [8]


def test_without_ordinary_images_there_are_no_logps_of_them(reference, preferences, collate):
    assert reference(collate(first_rows(PreferencePairs(preferences)))).regularization is None


@pytest.mark.numeric
def test_the_target_is_the_answer_on_the_rows_own_clean_image(reference, preferences, processor, collate):
    others = PreferencePairs(preferences, preferences.select_columns("image"), targets="clean_image")
    own = PreferencePairs(preferences, "clean_image", targets="clean_image")
    batch, found = collate(first_rows(own)), reference(collate(first_rows(others)))
    torch.testing.assert_close(found.target, reference(batch).regularization, rtol=0, atol=LOGPS)
    assert reference(batch).target is None
    embed(reference, others, processor)
    torch.testing.assert_close(reference(collate(first_rows(others))).target, found.target, rtol=0, atol=LOGPS)


def test_texts_of_the_policy_are_shared_where_they_are_given(model, processor, pairs, collate):
    shared = CachedTextEmbeddings(model, processor)
    other = frozen_copy(model)
    with torch.no_grad():
        for parameter in other.text_model.parameters():
            parameter.zero_()
    batch = collate(first_rows(pairs))
    expected = ReferencePolicy(model, processor, CandidateTexts(None))(batch).preference
    assert torch.equal(ReferencePolicy(other, processor, CandidateTexts(None), shared)(batch).preference, expected)


# ---- Embeddings of fixed images


def embed(reference, pairs, processor, **changes):
    embed_fixed_images(reference, pairs, processor, Accelerator(cpu=True), **{"batch_size": 4, **changes})
    return pairs


@pytest.mark.numeric
def test_fixed_images_are_embedded_in_the_order_of_the_data_set(reference, pairs, processor, preferences):
    embed(reference, pairs, processor)
    for column, source in (("image", "image"), ("reg_image", "clean_image")):
        pixels = processor(images=list(preferences[source]), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pairs.reference[column], encode_images(reference.model, pixels))


@pytest.mark.numeric
def test_known_embeddings_change_no_logps(reference, pairs, processor, collate):
    keys = [(0, 0, 7), (0, 1, 2), (0, 2, 12)]
    computed = reference(collate([pairs[key] for key in keys]))
    embed(reference, pairs, processor)
    batch = collate([pairs[key] for key in keys])
    assert {"ref_image_embeds", "ref_reg_image_embeds"} <= set(batch)
    torch.testing.assert_close(reference(batch).preference, computed.preference, rtol=0, atol=LOGPS)
    torch.testing.assert_close(reference(batch).regularization, computed.regularization, rtol=0, atol=LOGPS)


def test_images_are_embedded_only_once(reference, pairs, processor):
    embeds = embed(reference, pairs, processor).reference
    assert embed(reference, pairs, processor).reference is embeds


def test_of_drawn_attacks_only_the_clean_images_are_embedded(reference, labelled, processor):
    attack = TypographicAttack(["cat", "dog"], min_side=32)
    pairs = PreferencePairs(TypographicPreferences(labelled, attack), "clean_image")
    assert set(embed(reference, pairs, processor).reference) == {"reg_image"}


def test_a_second_run_computes_a_probe_alone_and_a_change_all(reference, preferences, labelled, processor, tmp_path):
    cache, seen = EmbeddingCache(tmp_path), []
    reference.model.vision_model.register_forward_hook(lambda *_: seen.append(1))

    def images_seen(rows, regularization="clean_image"):
        seen.clear()
        pairs = embed(reference, PreferencePairs(rows, regularization), processor, cache=cache)
        return len(seen), pairs.reference

    first, embeds = images_seen(preferences)
    again, found = images_seen(preferences)
    assert (first, again) == (1 + 8, 1)
    assert all(torch.equal(embeds[column], found[column]) for column in ("image", "reg_image"))
    turned = preferences.map(lambda row, i: {"image": row["image"].rotate(90)} if i == 3 else {}, with_indices=True)
    assert images_seen(turned)[0] == 1 + 4
    drawn = TypographicPreferences(labelled, TypographicAttack(["cat", "dog"], min_side=32, redraw="never"))
    redrawn = TypographicPreferences(labelled, TypographicAttack(["cat", "dog"], min_side=32, redraw="never", seed=1))
    assert [images_seen(rows)[0] for rows in (drawn, drawn, redrawn)] == [1 + 8, 1, 1 + 4]
    with torch.no_grad():
        reference.model.visual_projection.weight[0, 0] += 1e-3
    assert images_seen(preferences)[0] == 1 + 8


def test_workers_embed_the_same(reference, preferences, processor):
    alone, shared = (
        embed(reference, PreferencePairs(preferences, "clean_image"), processor, num_workers=workers).reference
        for workers in (0, 2)
    )
    assert all(torch.equal(alone[column], shared[column]) for column in ("image", "reg_image"))
