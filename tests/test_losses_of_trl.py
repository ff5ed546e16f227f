"""Every loss gives the numbers of TRL's trainers for the same log-probabilities.

TRL's policy is a tiny language model. A prompt is one token and an answer one token, so that the vocabulary takes the
place of the candidate texts. TRL computes its loss from the model; the log-probabilities that our losses get are
computed here from the model's logits.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from clip_po.losses import LOSSES, UNPAIRED, LossSettings, PreferenceLogps, preference_loss, readers

VOCABULARY = ["<pad>", "<eos>", *"abcdefghij"]
ROWS = 6
OF_PAIRS = [name for name in LOSSES if name not in UNPAIRED | {"kto_pair", "simpo", "distillation"}]
OF_PAIRS.remove("embedding_distillation")
"""The losses that DPOTrainer has too."""


def make_model(seed):
    """A language model whose answers are far from uniform, so that log-ratios are a few nats."""
    torch.manual_seed(seed)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": len(VOCABULARY)}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=1, eos_token_id=1, pad_token_id=0))
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    return model.eval()


def make_trl_trainer(trainer, config, folder, columns, **arguments):
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    args = config(str(folder), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **arguments)
    return trainer(
        make_model(0),
        make_model(1),
        args=args,
        train_dataset=Dataset.from_dict(columns),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
    )


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    columns = {"prompt": ["a"] * 2, "chosen": ["b"] * 2, "rejected": ["c"] * 2}
    return make_trl_trainer(DPOTrainer, DPOConfig, tmp_path_factory.mktemp("dpo"), columns)


@pytest.fixture(scope="module")
def kto(tmp_path_factory):
    columns = {"prompt": ["a"] * 2, "completion": ["b", "c"], "label": [True, False]}
    if not hasattr(KTOTrainer, "_compute_loss"):
        pytest.skip("KTOTrainer of trl 1.0 names its batch otherwise")
    order = {"train_sampling_strategy": "sequential"}
    return make_trl_trainer(KTOTrainer, KTOConfig, tmp_path_factory.mktemp("kto"), columns, **order)


def drawn_tokens(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, len(VOCABULARY), shape, generator=generator)


def batch_of(prompts, answers, prefix=""):
    """What TRL's collators make of prompts and answers of one token."""
    tokens = torch.stack([prompts, answers], dim=1)
    answer = torch.tensor([[0, 1]]).expand(len(tokens), 2)
    masks = {"attention_mask": torch.ones_like(tokens), "completion_mask": answer}
    return {f"{prefix}{name}": value for name, value in {"input_ids": tokens, **masks}.items()}


def logps_of(model, prompts, answers):
    """log pi(answer | prompt), Tensor[B]."""
    with torch.no_grad():
        logits = model(input_ids=prompts.unsqueeze(-1)).logits[:, -1].double()
    return logits.log_softmax(dim=-1).gather(-1, answers.unsqueeze(-1)).squeeze(-1)


def preferences():
    """Prompts, chosen and rejected answers, Tensor[B] each; every preference has two different ones."""
    prompts, chosen = drawn_tokens(2, ROWS)
    rejected = 2 + (chosen - 2 + 1 + drawn_tokens(ROWS, seed=1) % 5) % (len(VOCABULARY) - 2)
    return prompts, chosen, rejected


def our_logps(trainer):
    prompts, chosen, rejected = preferences()
    policy, reference = (
        [logps_of(model, prompts, answers) for answers in (chosen, rejected)]
        for model in (trainer.model, trainer.ref_model)
    )
    return PreferenceLogps(policy[0], policy[1].unsqueeze(-1), reference[0], reference[1].unsqueeze(-1))


def trl_loss(trainer, **settings):
    """The loss of TRL's trainer for its batch, as its `compute_loss` returns it."""
    for name, value in settings.items():
        setattr(trainer.args if name == "discopop_tau" else trainer, name, value)
    prompts, chosen, rejected = preferences()
    batch = batch_of(prompts.repeat(2), torch.cat([chosen, rejected]))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return trainer.compute_loss(trainer.model, batch).item()
        except ValueError as error:
            if "Unknown loss type" in str(error):
                pytest.skip(f"an older DPOTrainer: {error}")
            raise


def check_equal(trainer, loss_types, loss_weights=(1.0,), **settings):
    """Compare the mean of our losses with TRL's loss."""
    ours = LossSettings(**settings)
    losses = preference_loss(our_logps(trainer), list(loss_types), list(loss_weights), ours, torch.tensor(0.0))
    theirs = trl_loss(
        trainer,
        loss_types=list(loss_types),
        loss_weights=list(loss_weights),
        **{
            name: getattr(ours, name)
            for name in ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau")
        },
    )
    assert losses.mean().item() == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_the_log_ratios_of_these_models_are_large_and_of_both_signs(dpo):
    """Near 0 all losses are alike."""
    logps = our_logps(dpo)
    margins = logps.chosen_logratios - logps.rejected_logratios.squeeze(-1)
    assert margins.min() < -1 < 1 < margins.max()


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("loss_type", OF_PAIRS)
def test_a_loss_of_pairs_is_that_of_dpo_trainer(loss_type, beta, dpo):
    check_equal(dpo, [loss_type], beta=beta, label_smoothing=0.1 if loss_type == "exo_pair" else 0.0)


@pytest.mark.parametrize("label_smoothing", [1e-3, 0.3])
@pytest.mark.parametrize("loss_type", ["exo_pair", "robust", "aot", "aot_unpaired"])
def test_label_smoothing_is_that_of_dpo_trainer(loss_type, label_smoothing, dpo):
    """DPOTrainer's sigmoid does not read it. Ours does, which is conservative DPO."""
    assert loss_type in readers("label_smoothing")
    check_equal(dpo, [loss_type], beta=0.4, label_smoothing=label_smoothing)


@pytest.mark.parametrize(
    ("f_divergence_type", "alpha"),
    [("forward_kl", 0.5), ("js_divergence", 0.5), *(("alpha_divergence", alpha) for alpha in (-0.5, 0.5, 1.0, 1.7))],
)
@pytest.mark.parametrize("loss_type", sorted(readers("f_divergence_type")))
def test_an_f_divergence_is_that_of_dpo_trainer(loss_type, f_divergence_type, alpha, dpo):
    divergence = {"f_divergence_type": f_divergence_type, "f_alpha_divergence_coef": alpha}
    check_equal(dpo, [loss_type], beta=0.3, label_smoothing=0.1 if loss_type == "exo_pair" else 0.0, **divergence)


@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_the_blend_of_discopop_is_that_of_dpo_trainer(tau, dpo):
    check_equal(dpo, ["discopop"], beta=0.4, discopop_tau=tau)


def test_losses_are_mixed_as_in_dpo_trainer(dpo):
    check_equal(dpo, ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], beta=0.2)


def test_dpo_trainer_knows_no_pairwise_loss_that_is_missing(dpo):
    names = trl_loss_types(dpo)
    assert names - set(OF_PAIRS) == set()


def trl_loss_types(trainer):
    """The names in the message by which DPOTrainer refuses an unknown one."""
    trainer.loss_types, trainer.loss_weights = ["none of these"], [1.0]
    prompts, chosen, rejected = preferences()
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        trainer.compute_loss(trainer.model, batch_of(prompts.repeat(2), torch.cat([chosen, rejected])))
    return set(str(error.value).split("[", 1)[1].rstrip("]").replace("'", "").split(", "))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.4)])
@pytest.mark.parametrize("loss_type", sorted(UNPAIRED))
def test_a_loss_of_unpaired_feedback_is_that_of_kto_trainer(loss_type, weights, kto):
    prompts, answers = drawn_tokens(2, ROWS, seed=7)
    label, mismatched = torch.tensor([True, False, False, True, True, False]), answers.roll(1)
    kto.loss_type, kto.calculate_KL, kto.beta = loss_type, loss_type == "kto", 0.4
    kto.desirable_weight, kto.undesirable_weight = weights
    batch = {**batch_of(prompts, answers), **batch_of(prompts, mismatched, prefix="KL_"), "label": label}
    with torch.no_grad():
        theirs = kto.compute_loss(kto.model, batch).item()

    policy, reference = (logps_of(model, prompts, answers) for model in (kto.model, kto.ref_model))
    ratios = logps_of(kto.model, prompts, mismatched) - logps_of(kto.ref_model, prompts, mismatched)
    none = torch.full((ROWS, 1), -torch.inf)
    logps = PreferenceLogps(
        policy, none, reference, none, desirable=label.long(), mismatched_kl=ratios.mean().clamp(min=0)
    )
    assert ratios.mean() > 0.1  # else the reference point is 0 in both
    losses = preference_loss(logps, [loss_type], [1.0], LossSettings(0.4, 0.0, *weights))
    assert losses.mean().item() == pytest.approx(theirs, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_simpo_is_that_of_cpo_trainer(gamma, label_smoothing, dpo):
    cpo = pytest.importorskip("trl.experimental.cpo")
    logps = our_logps(dpo)
    trainer = SimpleNamespace(
        loss_type="simpo", beta=2.0, simpo_gamma=gamma, label_smoothing=label_smoothing, alpha=0.0
    )
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"))
    theirs, *_ = cpo.CPOTrainer.cpo_loss(trainer, logps.chosen, logps.rejected.squeeze(-1))
    settings = LossSettings(beta=2.0, label_smoothing=label_smoothing, simpo_gamma=gamma)
    torch.testing.assert_close(preference_loss(logps, ["simpo"], [1.0], settings), theirs, rtol=1e-6, atol=1e-6)
