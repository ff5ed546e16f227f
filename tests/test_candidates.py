import pytest
import torch
from samples import PROMPTS, make_preferences
from torch import distributed

from clip_po import candidates
from clip_po.candidate_images import OwnCandidates
from clip_po.candidates import CandidateTexts, in_batch_candidates, share_of_texts
from clip_po.config import ContrastivePOConfig
from clip_po.data.collator import DataCollatorForContrastivePreference
from clip_po.encoding import CachedTextEmbeddings
from clip_po.policy import Policy
from clip_po.trainer import ContrastivePOTrainer


def row(image, chosen, *rejected, candidates=None):
    return {
        "image": image,
        "chosen": chosen,
        "rejected": list(rejected),
        "candidates": candidates,
        "weight": 1.0,
        "reg_row_weight": 0.0,
    }


@pytest.fixture
def rows(labelled):
    image = labelled[0]["image"]
    return [
        row(image, "a cat", "a dog", "a fish", "a bird"),
        row(image, "a dog", "a cat"),
        row(image, "a ship", "a cat", "a dog", candidates=["a dog", "a ship", "a cat", "a hat"]),
        row(image, "a bird", "a fish"),
    ]


@pytest.fixture
def collate(processor):
    return DataCollatorForContrastivePreference(processor)


def texts_of(batch):
    """The chosen and the rejected texts that the positions of a batch name."""
    chosen = [batch["texts"][position] for position in batch["chosen"]]
    return chosen, [[batch["texts"][p] for p in positions if p >= 0] for positions in batch["rejected"]]


def as_one_of_two(monkeypatch, others, rank=0):
    def gather(found, own):
        found[rank], found[1 - rank] = own, others

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(distributed, "all_gather_object", gather)


def test_positions_still_name_each_rows_own_texts(rows, collate):
    found = in_batch_candidates(collate(rows))
    assert found["texts"] == ["a cat", "a dog", "a fish", "a bird", "a ship", "a hat"]
    assert texts_of(found) == ([r["chosen"] for r in rows], [r["rejected"] for r in rows])
    assert "candidates" not in found


@pytest.mark.parametrize("rank", [0, 1])
def test_the_halves_of_a_batch_have_its_candidates_in_one_order(rows, collate, monkeypatch, rank):
    whole, halves = in_batch_candidates(collate(rows)), [collate(rows[:2]), collate(rows[2:])]
    other = halves[1 - rank]
    as_one_of_two(monkeypatch, (other["texts"], OwnCandidates.of(other)), rank)
    found = in_batch_candidates(halves[rank])
    assert found["texts"] == whole["texts"]
    own = rows[2 * rank : 2 * rank + 2]
    assert texts_of(found) == ([r["chosen"] for r in own], [r["rejected"] for r in own])


def test_the_texts_of_padding_are_no_candidates(rows, collate):
    padding = {**rows[-1], "chosen": "a ghost", "rejected": ["a shadow"], "weight": 0.0, "counted": 0.0}
    whole, padded = in_batch_candidates(collate(rows)), in_batch_candidates(collate([*rows, padding]))
    assert padded["texts"] == whole["texts"]
    for name in ("chosen", "rejected"):
        assert padded[name][:-1].tolist() == whole[name].tolist()


@pytest.mark.parametrize(("rank", "expected"), [(0, ["a", "b"]), (1, ["c", ""])])
def test_each_process_encodes_equally_many_texts(monkeypatch, rank, expected):
    as_one_of_two(monkeypatch, [], rank)
    assert share_of_texts(["a", "b", "c"]) == expected


def test_one_process_encodes_all_texts():
    assert share_of_texts(["a", "b", "c"]) == ["a", "b", "c"]
    assert candidates.embeds_of_all(torch.ones(3, 2), 3).shape == (3, 2)


def test_the_policy_chooses_among_the_texts_of_the_batch(rows, collate, model, processor):
    batch = in_batch_candidates(collate(rows))
    given = {**batch, "candidates": torch.arange(6).expand(4, 6)}
    policy = Policy(processor, CandidateTexts(None), CachedTextEmbeddings(model, processor))
    found = policy(model, model, batch).preference
    assert found.shape == (4, 6)
    torch.testing.assert_close(found, policy(model, model, given).preference)


def test_candidates_of_two_kinds_are_refused(clip_folder, tmp_path):
    args = ContrastivePOConfig(str(tmp_path), in_batch_candidates=True, report_to="none")
    with pytest.raises(ValueError, match="Leave one of the two out"):
        ContrastivePOTrainer(str(clip_folder), args=args, train_dataset=make_preferences(4), candidate_texts=PROMPTS)
