"""A model that replaces the trained one is evaluated by its own embeddings, of images and of texts."""

import pytest
import torch
from samples import PROMPTS, make_preferences, tiny_config
from tolerances import LOGPS
from transformers import CLIPModel

from clip_po.data.images import to_pixels
from clip_po.encoding import encode_images, encode_texts
from clip_po.policy import candidate_logps

TRAINED = {
    "vision": {},
    "text": {"train_vision_model": False, "train_text_model": True},
    "both": {"train_text_model": True},
    "logit scale": {"train_vision_model": False, "train_logit_scale": True},
    "another reference": {"ref_model": True},
    "embedded": {"precompute_ref_log_probs": True},
}


@pytest.mark.parametrize("arguments", TRAINED.values(), ids=TRAINED)
def test_a_replaced_model_is_evaluated_by_its_own_embeddings(arguments, make_trainer, processor):
    rows = make_preferences(5)
    torch.manual_seed(1)
    other = CLIPModel(tiny_config()).eval()
    if "ref_model" in arguments:
        arguments = {"ref_model": CLIPModel(tiny_config())}
    trainer = make_trainer(eval_dataset=rows, **arguments)
    before = trainer.evaluate()
    trainer.replace_model(other)
    after = trainer.evaluate()
    with torch.no_grad():
        images, texts = (
            encode_images(other, to_pixels(processor, list(rows["image"]))),
            encode_texts(other, processor, PROMPTS),
        )
        logps = candidate_logps(images, texts, other.logit_scale.exp())
    chosen = torch.tensor([PROMPTS.index(text) for text in rows["chosen"]])
    expected = logps.gather(1, chosen[:, None]).mean().item()
    assert after["eval_logps/chosen"] == pytest.approx(expected, abs=LOGPS)
    assert before["eval_logps/chosen"] != pytest.approx(expected, abs=1e-3)
    assert after["eval_kl"] > 0
