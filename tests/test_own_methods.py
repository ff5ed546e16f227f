"""Subclasses of CLIPModel: methods of their own, which the package would not call, are refused by name."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from samples import PROMPTS, picture
from transformers import CLIPModel

from clip_po.concept.transform import ConceptTransform
from clip_po.encoding import encode_images, encode_texts
from clip_po.evaluation.zero_shot import class_embeddings


class OwnForward(CLIPModel):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits_per_image = 2 * outputs.logits_per_image
        return outputs


class OwnImages(CLIPModel):
    def get_image_features(self, *args, **kwargs):
        return super().get_image_features(*args, **kwargs)


class OwnTexts(CLIPModel):
    def get_text_features(self, *args, **kwargs):
        return super().get_text_features(*args, **kwargs)


class OwnCall(CLIPModel):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Below(OwnForward):
    """Inherits the method of its parent."""


class Mixin:
    forward = OwnForward.forward


class Mixed(Mixin, CLIPModel):
    """Has the method from a class that is no model."""


OWN = [
    (OwnForward, "OwnForward.forward"),
    (OwnImages, "OwnImages.get_image_features"),
    (OwnTexts, "OwnTexts.get_text_features"),
    (OwnCall, "OwnCall.__call__"),
    (Below, "Below.forward"),
    (Mixed, "Mixed.forward"),
]


@pytest.fixture(params=OWN, ids=lambda case: case[1])
def own(request, clip_folder):
    kind, name = request.param
    return kind.from_pretrained(clip_folder), name


USES = {
    "model": lambda m, make, processor: make(model=m),
    "adapters": lambda m, make, processor: make(
        model=get_peft_model(m, LoraConfig(r=2, target_modules=r".*vision_model.*\.(q_proj|v_proj)"))
    ),
    "reference": lambda m, make, processor: make(ref_model=m),
    "concept": lambda m, make, processor: make(model=m, concept=ConceptTransform(16)),
    "folding": lambda m, make, processor: ConceptTransform(16).fold_into(m),
    "images": lambda m, make, processor: encode_images(m, torch.zeros(1, 3, 32, 32)),
    "texts": lambda m, make, processor: encode_texts(m, processor, PROMPTS),
    "classes": lambda m, make, processor: class_embeddings(m, processor, PROMPTS, ["{}"]),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_subclass_with_a_method_of_its_own_is_refused_by_name(use, own, make_trainer, processor):
    model, name = own
    with pytest.raises(TypeError, match=rf"{name.replace('.', '[.]')}.*CLIPModel\.from_pretrained"):
        use(model, make_trainer, processor)


class Documented(CLIPModel):
    """A subclass that answers as its parent does."""

    def describe(self):
        return "mine"


def test_a_subclass_that_answers_as_its_parent_is_accepted(make_trainer, clip_folder):
    trainer = make_trainer(model=Documented.from_pretrained(clip_folder), max_steps=1)
    trainer.train()
    assert trainer.model.describe() == "mine"


def test_towers_and_hooks_of_the_users_own_take_part(make_trainer, clip_folder, processor):
    """They are called in training and evaluation, so that nothing of them is ignored."""
    model = CLIPModel.from_pretrained(clip_folder)
    pixels = processor(images=picture(0), return_tensors="pt")["pixel_values"]
    before = encode_images(model, pixels)
    model.vision_model.post_layernorm.register_forward_hook(lambda _, args, out: out.flip(-1))
    assert not torch.allclose(encode_images(model, pixels), before)
