"""Answers of any annotators: their order does not matter, and exchanging candidates exchanges the preference."""

from hypothesis import given
from hypothesis import strategies as st

from clip_po.data.feedback.agreement import rows_of, share_of_votes
from clip_po.data.feedback.judgements import WORSE, Judged

SCORES = st.lists(
    st.lists(st.sampled_from([None, WORSE, 0.0, 1.0, 2.0]), min_size=3, max_size=3), min_size=1, max_size=6
)
TEXTS = ["a", "b", "c"]


def preferences(scores, texts=TEXTS, agreement="soft"):
    rows = rows_of(Judged("row 0", ["image"], texts, scores), agreement)
    return {frozenset([row["chosen"], row["rejected"]]): row for row in rows}


@given(SCORES, st.randoms())
def test_the_order_of_annotators_does_not_matter(scores, random):
    shuffled = random.sample(scores, len(scores))
    assert preferences(shuffled) == preferences(scores)


@given(SCORES)
def test_votes_for_and_against_are_one(scores):
    share, other = share_of_votes(scores, 0, 1), share_of_votes(scores, 1, 0)
    assert (share is None) == (other is None)
    assert share is None or abs(share + other - 1) < 1e-12


@given(SCORES)
def test_exchanged_candidates_give_the_same_preferences(scores):
    turned = preferences([own[::-1] for own in scores], TEXTS[::-1])
    for pair, row in preferences(scores).items():
        same = turned[pair]
        assert abs(same["label_smoothing"] - row["label_smoothing"]) < 1e-12
        if row["label_smoothing"] < 0.5 - 1e-12:
            assert (same["chosen"], same["rejected"]) == (row["chosen"], row["rejected"])


@given(SCORES)
def test_a_majority_is_what_the_soft_label_leans_to(scores):
    soft, majority = preferences(scores), preferences(scores, agreement="majority")
    assert soft.keys() == majority.keys()
    for pair, row in soft.items():
        assert 0 <= row["label_smoothing"] <= 0.5
        assert (majority[pair]["chosen"], majority[pair]["rejected"]) == (row["chosen"], row["rejected"])
        assert majority[pair]["label_smoothing"] == (0.5 if row["label_smoothing"] == 0.5 else 0)


@given(st.lists(st.sampled_from([1.0, 0.0, -1.0]), min_size=1, max_size=6))
def test_shares_of_right_and_wrong_are_one(votes):
    for agreement in ("soft", "majority"):
        rows = list(rows_of(Judged("row 0", ["image"], ["a"], [[vote] for vote in votes]), agreement))
        assert abs(sum(row["weight"] for row in rows) - 1) < 1e-12
        assert len({row["label"] for row in rows}) == len(rows)
