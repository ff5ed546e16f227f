"""Batches: each text once, ragged rows, and positions among the candidates."""

import pytest
import torch
from samples import PROMPTS, picture

from clip_po.data.collator import DataCollatorForContrastivePreference, row_totals


def row(chosen, rejected, number=0, **more):
    return {
        "image": picture(number),
        "chosen": chosen,
        "rejected": rejected,
        "weight": 1.0,
        "reg_row_weight": 1.0,
        **more,
    }


@pytest.fixture
def own(processor):
    """Rows choose among their own texts."""
    return DataCollatorForContrastivePreference(processor)


@pytest.fixture
def fixed(processor):
    """Rows choose among the same four texts."""
    return DataCollatorForContrastivePreference(processor, PROMPTS)


def named(batch, name):
    """Positions among a row's candidates as texts."""
    return [
        [batch["texts"][candidates[position]] for position in positions if position >= 0]
        for candidates, positions in zip(batch["candidates"].tolist(), batch[name].tolist(), strict=True)
    ]


def test_rows_choose_among_their_own_texts(own):
    batch = own([row("a", ["b"]), row("b", ["c", "a"])])
    assert batch["texts"] == ["a", "b", "c"]
    assert batch["candidates"].tolist() == [[0, 1, -1], [1, 2, 0]]
    assert batch["chosen"].tolist() == [0, 0]
    assert batch["rejected"].tolist() == [[1, -1], [1, 2]]


def test_a_text_of_many_rows_stands_in_the_batch_once(own):
    batch = own([row("a", ["b"], number) for number in range(5)])
    assert batch["texts"] == ["a", "b"]


def test_a_rows_candidates_win_over_its_chosen_and_rejected_texts(own):
    batch = own([row("b", ["c"], candidates=["a", "b", "c"]), row("a", ["d"], candidates=None)])
    assert [[batch["texts"][i] for i in line if i >= 0] for line in batch["candidates"]] == [
        ["a", "b", "c"],
        ["a", "d"],
    ]
    assert batch["chosen"].tolist() == [1, 0]
    assert named(batch, "rejected") == [["c"], ["d"]]


def test_fixed_candidates_need_no_texts_in_the_batch(fixed):
    batch = fixed([row(PROMPTS[2], [PROMPTS[0]]), row(PROMPTS[1], [PROMPTS[3], PROMPTS[2]])])
    assert not {"texts", "candidates"} & set(batch)
    assert batch["chosen"].tolist() == [2, 1]
    assert batch["rejected"].tolist() == [[0, -1], [3, 2]]


def test_fixed_candidates_win_over_those_of_rows(fixed):
    batch = fixed([row(PROMPTS[3], [PROMPTS[0]], candidates=[PROMPTS[3], PROMPTS[0]])])
    assert (batch["chosen"].tolist(), batch["rejected"].tolist()) == ([3], [[0]])


def test_rows_without_rejected_texts_have_an_empty_column(fixed):
    assert fixed([row(PROMPTS[0], []), row(PROMPTS[1], [])])["rejected"].tolist() == [[-1], [-1]]


def test_pixels_are_those_of_the_processor(own, processor):
    batch = own([row("a", ["b"], 1, reg_image=picture(3)), row("a", ["b"], 2, reg_image=picture(4))])
    for key, numbers in (("pixel_values", (1, 2)), ("reg_pixel_values", (3, 4))):
        images = [picture(number) for number in numbers]
        assert torch.equal(batch[key], processor(images=images, return_tensors="pt")["pixel_values"])


def test_without_regularization_images_there_are_no_pixels_of_them(own):
    assert "reg_pixel_values" not in own([row("a", ["b"])])


def test_weights_are_carried_and_summed(own):
    padding = row("a", ["b"], weight=0.0, counted=0.0, reg_row_weight=0.0)
    batch = own([row("a", ["b"], weight=2.0), row("a", ["b"], weight=0.0), padding])
    assert batch["weight"].tolist() == [2.0, 0.0, 0.0]
    assert row_totals(batch).tolist() == [2.0, 2.0, 2.0]
    assert row_totals(batch, batch).tolist() == [4.0, 4.0, 4.0]


def test_known_embeddings_are_stacked(own):
    embeds = torch.randn(2, 4)
    batch = own([row("a", ["b"], ref_image_embeds=e, ref_reg_image_embeds=-e) for e in embeds])
    assert torch.equal(batch["ref_image_embeds"], embeds)
    assert torch.equal(batch["ref_reg_image_embeds"], -embeds)
