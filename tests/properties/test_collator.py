"""Batches of any rows in any order: each row keeps its own log-probabilities, and each text is encoded once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import picture, tiny_processor

from clip_po.data.collator import DataCollatorForContrastivePreference
from clip_po.policy import CandidateLogps, candidate_logps, preference_logps

TEXTS = [f"a photo of {name}" for name in ("a cat", "a dog", "a bird", "a ship", "猫", "a hot dog", "nothing", "two")]
EMBEDS = torch.nn.functional.normalize(torch.randn(len(TEXTS), 8, generator=torch.Generator().manual_seed(0)), dim=-1)
PICTURES = [picture(number) for number in range(6)]
PIXELS_EMBED = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), dim=-1)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@st.composite
def a_row(draw):
    """A row: some texts with one chosen, perhaps with candidates that are neither, and which picture it shows."""
    order = draw(st.permutations(range(len(TEXTS))))
    rejected = draw(st.integers(1, 4))
    row = {"chosen": TEXTS[order[0]], "rejected": [TEXTS[i] for i in order[1 : 1 + rejected]]}
    if draw(st.booleans()):
        others = draw(st.integers(0, len(TEXTS) - 1 - rejected))
        row["candidates"] = draw(st.permutations([TEXTS[i] for i in order[: 1 + rejected + others]]))
    return {**row, "number": draw(st.integers(0, 5)), "weight": draw(st.floats(0, 4)), "reg_row_weight": 1.0}


ROWS = st.lists(a_row(), min_size=1, max_size=7)


def collate(processor, rows, candidate_texts=None, images=False):
    pictures = [{"image": PICTURES[row["number"]]} if images else {} for row in rows]
    return DataCollatorForContrastivePreference(processor, candidate_texts)(
        [{**row, **picture} for row, picture in zip(rows, pictures, strict=True)]
    )


def logps_of(batch, rows, candidate_texts=None):
    """Log-probabilities of the chosen [B] and rejected [B, R] texts, with fixed embeddings for towers."""
    texts = batch.get("texts", candidate_texts)
    images = PIXELS_EMBED[[row["number"] for row in rows]]
    logps = candidate_logps(images, EMBEDS[[TEXTS.index(text) for text in texts]], 20.0, batch.get("candidates"))
    found = preference_logps(CandidateLogps(logps, None), CandidateLogps(logps, logps), batch)
    return found.chosen, found.rejected


def expected(row, candidate_texts=None):
    """The same for one row, by hand."""
    own = candidate_texts or row.get("candidates") or [row["chosen"], *row["rejected"]]
    logits = 20.0 * EMBEDS[[TEXTS.index(text) for text in own]] @ PIXELS_EMBED[row["number"]]
    logps = dict(zip(own, logits.log_softmax(-1), strict=True))
    return logps[row["chosen"]], torch.stack([logps[text] for text in row["rejected"]])


@given(ROWS, st.booleans())
def test_each_row_of_a_batch_has_the_log_probabilities_that_it_has_alone(processor, rows, given_once):
    candidate_texts = TEXTS if given_once else None
    batch = collate(processor, rows, candidate_texts)
    chosen, rejected = logps_of(batch, rows, candidate_texts)
    for index, row in enumerate(rows):
        best, worse = expected(row, candidate_texts)
        torch.testing.assert_close(chosen[index], best, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rejected[index, : len(worse)], worse, rtol=1e-4, atol=1e-5)
        assert rejected[index, len(worse) :].isneginf().all()
    assert batch["weight"].tolist() == pytest.approx([row["weight"] for row in rows])


@given(ROWS)
def test_each_text_is_there_once_and_none_for_nothing(processor, rows):
    batch = collate(processor, rows)
    used = {text for row in rows for text in row.get("candidates") or [row["chosen"], *row["rejected"]]}
    assert len(batch["texts"]) == len(set(batch["texts"]))
    assert set(batch["texts"]) == used
    assert set(batch["candidates"].flatten().tolist()) - {-1} == set(range(len(used)))


@settings(max_examples=30)
@given(ROWS, st.randoms(use_true_random=False))
def test_rows_in_another_order_make_the_same_batch_in_that_order(processor, rows, random):
    order = random.sample(range(len(rows)), len(rows))
    moved = [rows[index] for index in order]
    first, second = collate(processor, rows, images=True), collate(processor, moved, images=True)
    for before, after in zip(logps_of(first, rows), logps_of(second, moved), strict=True):
        torch.testing.assert_close(before[order], after, rtol=1e-4, atol=1e-5)
    for name in ("pixel_values", "weight", "reg_row_weight"):
        assert torch.equal(first[name][order], second[name])
    assert set(first["texts"]) == set(second["texts"])


@given(ROWS, a_row())
def test_a_row_with_more_candidates_changes_none_of_the_others(processor, rows, more):
    wide = {**more, "candidates": TEXTS}
    alone = logps_of(collate(processor, rows), rows)
    together = logps_of(collate(processor, [*rows, wide]), [*rows, wide])
    for before, after in zip(alone, together, strict=True):
        after = after[: len(rows)]
        if after.ndim == 2:
            assert after[:, before.shape[1] :].isneginf().all()
            after = after[:, : before.shape[1]]
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


@settings(max_examples=30)
@given(ROWS, st.integers(1, 7))
def test_batches_of_any_size_hold_the_same_rows(processor, rows, size):
    whole = collate(processor, rows, images=True)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    batches = [collate(processor, part, images=True) for part in parts]
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    assert torch.equal(whole["pixel_values"], pixels)
    chosen = torch.cat([logps_of(batch, part)[0] for batch, part in zip(batches, parts, strict=True)])
    torch.testing.assert_close(logps_of(whole, rows)[0], chosen, rtol=1e-4, atol=1e-5)
