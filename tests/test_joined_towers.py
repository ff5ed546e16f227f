"""VisionTextDualEncoderModel with towers of several kinds: embeddings, training and reloading."""

import pytest
import torch
import transformers
from dual_encoders import (
    BERT_TEXT,
    IMAGE,
    POSITIONS,
    ROBERTA_TEXT,
    SQUARE,
    TOWER,
    bert_tokenizer,
    image_processor,
    roberta_tokenizer,
)
from samples import make_trainer
from test_architectures import EXACT, TEXTS, answers, pictures, without_gradient

from clip_po.data.images import to_pixels
from clip_po.encoding import encode_images, encode_texts
from clip_po.models import load_model, read_processor

# Positions of RoBERTa are counted from the id of the padding on.
ROBERTA = {**ROBERTA_TEXT, "max_position_embeddings": POSITIONS + 2}
VISION = {
    "clip": lambda: transformers.CLIPVisionConfig(**TOWER, **IMAGE),
    "vit": lambda: transformers.ViTConfig(**TOWER, **IMAGE),
    "dinov2": lambda: transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, **IMAGE
    ),
    "swin": lambda: transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
}
TEXT = {
    "bert": (lambda: transformers.BertConfig(**BERT_TEXT), bert_tokenizer),
    "roberta": (lambda: transformers.RobertaConfig(**ROBERTA), roberta_tokenizer),
    "xlm-roberta": (lambda: transformers.XLMRobertaConfig(**ROBERTA), roberta_tokenizer),
}


def joined(vision, text, folder):
    config, tokenizer = TEXT[text]
    towers = {"vision_config": VISION[vision]().to_dict(), "text_config": config().to_dict()}
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(transformers.VisionTextDualEncoderConfig(**towers, projection_dim=16))
    model.save_pretrained(folder)
    images = image_processor("ViTImageProcessor", size=SQUARE)
    transformers.VisionTextDualEncoderProcessor(images, tokenizer()).save_pretrained(folder)


@pytest.mark.parametrize(
    ("vision", "text"), [("clip", "bert"), ("clip", "xlm-roberta"), ("vit", "roberta"), ("dinov2", "bert")]
)
def test_towers_of_several_kinds_embed_as_in_transformers_and_train(vision, text, tmp_path):
    folder = tmp_path / "model"
    joined(vision, text, folder)
    model, processor = load_model(str(folder)), read_processor(folder)
    plain = answers(transformers.AutoModel.from_pretrained(folder), processor, "joined", pictures(), TEXTS)
    with torch.no_grad():
        images = encode_images(model, to_pixels(processor, pictures()))
    torch.testing.assert_close(images, plain.images, **EXACT)
    torch.testing.assert_close(encode_texts(model, processor, TEXTS), plain.texts, **EXACT)
    trainer = make_trainer(model, tmp_path / "run", processing_class=processor, max_steps=1, train_text_model=True)
    trainer.train()
    assert not without_gradient(trainer)


def test_a_tower_without_one_width_is_refused(tmp_path):
    joined("swin", "bert", tmp_path)
    with pytest.raises(ValueError, match="num_attention_heads"):
        load_model(str(tmp_path))
