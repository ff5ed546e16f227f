"""policy="sigmoid": every candidate right or wrong by itself, for models trained by a sigmoid of each pair."""

import pytest
import torch
from dual_encoders import tiny_dual_encoder
from samples import PROMPTS, make_preferences, make_trainer, run_config, weights
from torch.distributions import Bernoulli, kl_divergence
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

from clip_po.candidate_logps import candidate_logps, pair_logps
from clip_po.concept import ConceptTransform
from clip_po.losses import bernoulli_kl

ROWS = 7


@pytest.fixture(scope="module", params=["siglip", "siglip2"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny_dual_encoder(request.param, folder)
    return str(folder)


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def test_a_candidate_has_the_probability_of_its_own_pair():
    images, texts = unit(3, 8), unit(5, 8)
    candidates, candidate_images = torch.tensor([[4, 0], [2, -1]]), torch.tensor([[1, 1], [0, 0]])
    found = candidate_logps(images, texts, 10.0, candidates, candidate_images, logit_bias=-3.0)
    for row, column in ((0, 0), (0, 1), (1, 0)):
        cosine = images[candidate_images[row, column]] @ texts[candidates[row, column]]
        expected = torch.log(1 / (1 + torch.exp(-(10 * cosine - 3))))
        assert found[row, column] == pytest.approx(expected.item(), abs=1e-5)
    assert found[1, 1] == -torch.inf
    alone = candidate_logps(images[:1], texts[2:3], 10.0, logit_bias=-3.0)
    assert alone.item() == pytest.approx(found[1, 0].item(), abs=1e-6), "other candidates change nothing"


def test_pairs_have_one_probability_in_both_directions():
    images, texts, counted = unit(3, 8), unit(3, 8), torch.tensor([True, True, False])
    found = pair_logps(images, texts, 10.0, counted, logit_bias=-3.0)
    expected = F.logsigmoid(10 * images @ texts.T - 3)
    assert found[:, 2].isneginf().tolist() == [True, True, False]
    torch.testing.assert_close(found[:, :2], expected[:, :2])


def test_the_kl_is_the_sum_over_the_candidates():
    ref, policy = torch.randn(4, 6, dtype=torch.float64) * 5, torch.randn(4, 6, dtype=torch.float64) * 5
    expected = kl_divergence(Bernoulli(logits=ref), Bernoulli(logits=policy))
    found = bernoulli_kl(F.logsigmoid(ref), F.logsigmoid(policy))
    torch.testing.assert_close(found, expected.sum(-1))
    absent = torch.zeros(4, 6, dtype=torch.bool)
    absent[:, 2] = True
    found = bernoulli_kl(*(F.logsigmoid(x).masked_fill(absent, -torch.inf) for x in (ref, policy)))
    torch.testing.assert_close(found, expected.masked_fill(absent, 0).sum(-1))


@pytest.mark.parametrize("logit", [-90.0, -20.0, -0.6, 0.0, 0.7, 15.0, 70.0])
def test_the_kl_and_its_gradient_are_finite_and_right_far_from_0(logit):
    start = torch.tensor([[logit]], requires_grad=True)
    same = bernoulli_kl(F.logsigmoid(start).detach(), F.logsigmoid(start))
    same.backward()
    assert same.item() == pytest.approx(0, abs=1e-6)
    assert start.grad.item() == pytest.approx(0, abs=1e-5)
    moved = torch.tensor([[logit]], requires_grad=True)
    reference = torch.tensor([[0.3]])
    bernoulli_kl(F.logsigmoid(reference), F.logsigmoid(moved)).backward()
    expected = torch.sigmoid(moved.detach()) - torch.sigmoid(reference)
    assert moved.grad.item() == pytest.approx(expected.item(), abs=1e-4)


@torch.no_grad()
def plain_logits(folder, images, texts=PROMPTS):
    """The logits of transformers itself."""
    images = list(images)
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    tokens = processor.tokenizer(texts, padding="max_length", max_length=32, return_tensors="pt")
    return model(**tokens, **processor.image_processor(images, return_tensors="pt")).logits_per_image


def test_the_loss_is_the_equation_of_what_transformers_answers(folder, tmp_path):
    rows = make_preferences(ROWS)
    settings = {"policy": "sigmoid", "beta": 0.7, "reg_weight": 0.5, "max_steps": 3, "learning_rate": 1e-3}
    trainer = make_trainer(folder, tmp_path, train_dataset=rows, eval_dataset=rows, **settings)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5)
    trainer.train()
    trainer.save_model(tmp_path / "aligned")
    result = trainer.evaluate()
    policy, reference = (F.logsigmoid(plain_logits(name, rows["image"])) for name in (tmp_path / "aligned", folder))
    chosen, rejected = (
        torch.tensor([[PROMPTS.index(text)] for text in rows[name]]) for name in ("chosen", "rejected")
    )
    ratio = policy - reference
    dpo = -F.logsigmoid(0.7 * (ratio.gather(1, chosen) - ratio.gather(1, rejected))).mean()
    clean = [plain_logits(name, rows["clean_image"]) for name in (folder, tmp_path / "aligned")]
    kl = kl_divergence(*(Bernoulli(logits=logits) for logits in clean)).sum(-1).mean()
    assert kl > 1e-5
    assert result["eval_loss"] == pytest.approx((dpo + 0.5 * kl).item(), abs=1e-4)
    assert result["eval_kl"] == pytest.approx(kl.item(), abs=1e-4)
    assert result["eval_logps/chosen"] == pytest.approx(policy.gather(1, chosen).mean().item(), abs=1e-4)


@pytest.mark.parametrize(
    ("policy", "moved"), [("softmax", {"logit_scale"}), ("sigmoid", {"logit_scale", "logit_bias"})]
)
def test_the_bias_trains_with_the_scale_where_it_counts(policy, moved, folder, tmp_path):
    settings = {"train_vision_model": False, "train_logit_scale": True, "learning_rate": 1e-2, "max_steps": 2}
    trainer = make_trainer(folder, tmp_path, policy=policy, **settings)
    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert changed == moved


def test_softmax_models_are_refused(clip_folder, folder, tmp_path):
    with pytest.raises(ValueError, match=r"model is a CLIPModel.*SigLIP"):
        make_trainer(str(clip_folder), tmp_path, policy="sigmoid")
    with pytest.raises(ValueError, match=r"ref_model is a CLIPModel"):
        make_trainer(folder, tmp_path, policy="sigmoid", ref_model=AutoModel.from_pretrained(clip_folder))


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"policy must be one of \['softmax', 'sigmoid'\]"):
        run_config(tmp_path, policy="bernoulli")
    with pytest.raises(ValueError, match="embedding_distillation"):
        run_config(tmp_path, policy="sigmoid", loss_type=["distillation"])


def test_an_open_vocabulary_counts_each_text_by_itself(folder, tmp_path):
    rows, texts = make_preferences(ROWS), ["a tree", "a boat", "something else"]
    settings = {"policy": "sigmoid", "reg_type": "kl_open", "reg_candidate_texts": texts, "reg_weight": 2.0}
    trainer = make_trainer(
        folder, tmp_path, train_dataset=rows, eval_dataset=rows, max_steps=3, learning_rate=1e-3, **settings
    )
    trainer.train()
    trainer.save_model(tmp_path / "aligned")
    reference, policy = (plain_logits(name, rows["clean_image"], texts) for name in (folder, tmp_path / "aligned"))
    kl = kl_divergence(Bernoulli(logits=reference), Bernoulli(logits=policy)).sum(-1).mean()
    assert kl > 1e-5
    assert trainer.evaluate()["eval_loss/regularization"] == pytest.approx(2 * kl.item(), abs=1e-4)


def test_a_concept_trains_under_the_same_policy(folder, tmp_path):
    rows = make_preferences(ROWS)
    settings = {"policy": "sigmoid", "max_steps": 3, "learning_rate": 1e-2}
    trainer = make_trainer(
        folder, tmp_path, concept=ConceptTransform(32), train_dataset=rows, eval_dataset=rows, **settings
    )
    reference = F.logsigmoid(plain_logits(folder, rows["image"]))
    chosen = torch.tensor([[PROMPTS.index(text)] for text in rows["chosen"]])
    start = trainer.evaluate()
    assert start["eval_logps/chosen"] == pytest.approx(reference.gather(1, chosen).mean().item(), abs=1e-4)
    assert start["eval_kl"] == pytest.approx(0, abs=1e-6)
    trainer.train()
    assert trainer.evaluate()["eval_rewards/margins"] > 0
