"""Arguments that can't be used are refused before anything is loaded."""

import pytest
from bad_input.table import INF, NAN, case, check

CASES = {
    "beta-is-text": case(lambda b: b.config(beta="0.1"), TypeError, "beta must be a finite", "'0.1' (str)", "sft"),
    "beta-is-a-switch": case(lambda b: b.config(beta=True), TypeError, "beta must be a finite", "True (bool)"),
    "loss-is-a-number": case(lambda b: b.config(loss_type=3), TypeError, "loss_type", "3 (int)", "sigmoid"),
    "loss-is-unknown": case(lambda b: b.config(loss_type=["dpo"]), ValueError, "['dpo']", "DPO is 'sigmoid'"),
    "weight-of-a-loss-is-nan": case(
        lambda b: b.config(loss_type=["sft", "ipo"], loss_weights=[1.0, NAN]), ValueError, "loss_weights[1]", "nan"
    ),
    "weight-of-a-loss-is-negative": case(
        lambda b: b.config(loss_weights=[-1.0]), ValueError, "loss_weights[0] must be a finite number >= 0", "-1.0"
    ),
    "weights-of-losses-are-no-list": case(
        lambda b: b.config(loss_weights=1.0), ValueError, "loss_weights must hold one weight for each", "1.0"
    ),
    "smoothing-is-text": case(lambda b: b.config(label_smoothing="a"), TypeError, "label_smoothing", "[0, 0.5)"),
    "regularization-is-missing": case(
        lambda b: b.config(reg_weight=INF), ValueError, "reg_weight must be a finite number >= 0", "inf"
    ),
    "learning-rate-is-negative": case(
        lambda b: b.config(learning_rate=-1e-4), ValueError, "learning_rate must be a finite number >= 0", "-0.0001"
    ),
    "learning-rate-is-nan": case(lambda b: b.config(learning_rate=NAN), ValueError, "learning_rate", "nan"),
    "learning-rate-is-text": case(
        lambda b: b.config(learning_rate="1e-4"), TypeError, "learning_rate must be a finite number", "'1e-4' (str)"
    ),
    "epochs-are-negative": case(
        lambda b: b.config(num_train_epochs=-1), ValueError, "num_train_epochs must be a finite number > 0", "-1"
    ),
    "epochs-are-nan": case(lambda b: b.config(num_train_epochs=NAN), ValueError, "num_train_epochs", "nan"),
    "steps-are-none": case(lambda b: b.config(max_steps=0), ValueError, "max_steps", ">= 1, or -1", "0"),
    "steps-are-a-fraction": case(lambda b: b.config(max_steps=2.5), TypeError, "max_steps", "2.5 (float)"),
    "batch-is-empty": case(
        lambda b: b.config(per_device_train_batch_size=0),
        ValueError,
        "per_device_train_batch_size must be a whole number >= 1, got 0",
    ),
    "batch-of-evaluation-is-negative": case(
        lambda b: b.config(per_device_eval_batch_size=-4), ValueError, "per_device_eval_batch_size", ">= 1, got -4"
    ),
    "accumulation-of-nothing": case(
        lambda b: b.config(gradient_accumulation_steps=0), ValueError, "gradient_accumulation_steps", "got 0"
    ),
    "clipping-at-nan": case(lambda b: b.config(max_grad_norm=NAN), ValueError, "max_grad_norm", "got nan"),
    "decay-is-negative": case(lambda b: b.config(weight_decay=-0.1), ValueError, "weight_decay", "-0.1"),
    "workers-are-negative": case(
        lambda b: b.config(dataloader_num_workers=-1), ValueError, "dataloader_num_workers", ">= 0, got -1"
    ),
    "saves-never": case(
        lambda b: b.config(save_steps=0, save_strategy="steps"), ValueError, "save_steps must be a finite number > 0"
    ),
    "seed-is-negative": case(lambda b: b.config(seed=-1), ValueError, "seed", "0 to 2**32 - 1, got -1"),
    "seed-is-text": case(lambda b: b.config(data_seed="a"), TypeError, "data_seed", "'a' (str)"),
    "momentum-is-too-large": case(lambda b: b.config(adam_beta1=1.0), ValueError, "adam_beta1", "[0, 1), got 1.0"),
    "switch-is-text": case(
        lambda b: b.config(train_text_model="false"), TypeError, "train_text_model must be True or False", "'false'"
    ),
    "precomputing-is-text": case(
        lambda b: b.config(precompute_ref_log_probs="yes"), TypeError, "precompute_ref_log_probs", "None, got 'yes'"
    ),
    "cache-is-a-number": case(lambda b: b.config(embeddings_cache=3), TypeError, "embeddings_cache", "got 3"),
    "output-is-nowhere": case(lambda b: b.config(output_dir=""), TypeError, "output_dir", "path of a folder", "''"),
    "arguments-of-the-model-are-a-list": case(
        lambda b: b.trainer(model_init_kwargs=["eager"]), ValueError, "model_init_kwargs must be a dict", "['eager']"
    ),
    "arguments-are-a-dict": case(lambda b: b.trainer(args={"beta": 1}), TypeError, "ContrastivePOConfig, got dict"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_argument_that_cannot_be_used_is_refused(name, bench):
    check(CASES[name], bench)


def changed(bench, **arguments):
    config = bench.config()
    for name, value in arguments.items():
        setattr(config, name, value)
    return bench.trainer(args=config)


LATER = {
    "beta": case(lambda b: changed(b, beta=-1.0), ValueError, "beta must be a finite number > 0, got -1.0"),
    "learning-rate-never-given": case(
        lambda b: changed(b, learning_rate=None), TypeError, "learning_rate must be", "None (NoneType)"
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_an_argument_that_was_changed_later_is_looked_at_again(name, bench):
    check(LATER[name], bench)
