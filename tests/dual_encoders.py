"""Tiny random models of every supported architecture, with their processors."""

import string
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from samples import IMAGE_SIZE, tiny_config, tiny_processor
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
IMAGE = {"image_size": IMAGE_SIZE, "patch_size": 8}
POSITIONS = 32
"""Number of tokens that each text tower reads."""


def tiny_tokenizer(first: tuple[str, ...], around: str, names: tuple[str, ...], **specials: str):
    """A tokenizer of lower-case letters.

    Args:
        first: Special tokens, with the ids 0, 1, ...
        around: Template of a text, in which `$A` is the text.
        names: Names of the tensors that the model reads.
        **specials: Special tokens by role, such as `pad_token`.
    """
    vocabulary = {token: number for number, token in enumerate((*first, *string.ascii_lowercase))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    letters = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), letters])
    used = [(token, vocabulary[token]) for token in first if token in around.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=list(names), model_max_length=POSITIONS, **specials
    )


def bert_tokenizer():
    return tiny_tokenizer(
        ("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
        "[CLS] $A [SEP]",
        ("input_ids", "token_type_ids", "attention_mask"),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def roberta_tokenizer():
    return tiny_tokenizer(
        ("<s>", "<pad>", "</s>", "<unk>"),
        "<s> $A </s>",
        ("input_ids", "attention_mask"),
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def t5_tokenizer():
    """As of SigLIP: the end of a text is also its padding, and the model reads no attention mask."""
    tokens = ("<unk>", "</s>")
    return tiny_tokenizer(tokens, "$A </s>", ("input_ids",), pad_token="</s>", eos_token="</s>", unk_token="<unk>")


def gemma_tokenizer():
    """As of SigLIP 2."""
    tokens = ("<pad>", "<eos>", "<bos>", "<unk>")
    return tiny_tokenizer(tokens, "$A <eos>", ("input_ids",), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def image_processor(name: str, **size):
    """An image processor of transformers that works without torchvision."""
    pil = getattr(transformers, f"{name}Pil", None)
    return (pil or getattr(transformers, name))(**size)


SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
CROP = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": SQUARE}
BERT_TEXT = {**TOWER, "vocab_size": 64, "max_position_embeddings": POSITIONS}
ROBERTA_TEXT = {**BERT_TEXT, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


def clip():
    return tiny_config(), tiny_processor()


def siglip():
    text = {**TOWER, "vocab_size": 64, "max_position_embeddings": POSITIONS, "pad_token_id": 1, "eos_token_id": 1}
    config = transformers.SiglipConfig(text_config=text, vision_config={**TOWER, **IMAGE})
    images = image_processor("SiglipImageProcessor", size=SQUARE)
    return config, transformers.SiglipProcessor(images, t5_tokenizer())


def siglip2():
    text = {**TOWER, "vocab_size": 64, "max_position_embeddings": POSITIONS, "pad_token_id": 0, "eos_token_id": 1}
    vision = {**TOWER, "patch_size": 8, "num_patches": 16}
    config = transformers.Siglip2Config(text_config=text, vision_config=vision)
    images = image_processor("Siglip2ImageProcessor", patch_size=8, max_num_patches=16)
    return config, transformers.Siglip2Processor(images, gemma_tokenizer())


def metaclip_2():
    config = transformers.MetaClip2Config(
        text_config=ROBERTA_TEXT, vision_config={**TOWER, **IMAGE}, projection_dim=16
    )
    return config, transformers.CLIPProcessor(image_processor("CLIPImageProcessor", **CROP), roberta_tokenizer())


def altclip():
    text = {**ROBERTA_TEXT, "max_position_embeddings": POSITIONS + 2, "project_dim": 24}
    config = transformers.AltCLIPConfig(text_config=text, vision_config={**TOWER, **IMAGE}, projection_dim=16)
    return config, transformers.AltCLIPProcessor(image_processor("CLIPImageProcessor", **CROP), roberta_tokenizer())


def chinese_clip():
    config = transformers.ChineseCLIPConfig(text_config=BERT_TEXT, vision_config={**TOWER, **IMAGE}, projection_dim=16)
    images = image_processor("ChineseCLIPImageProcessor", size=SQUARE, crop_size=SQUARE)
    return config, transformers.ChineseCLIPProcessor(images, bert_tokenizer())


def align():
    vision = {
        "image_size": IMAGE_SIZE,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "kernel_sizes": [3, 3],
        "in_channels": [32, 8],
        "out_channels": [8, 16],
        "strides": [1, 2],
        "num_block_repeats": [1, 2],
        "expand_ratios": [1, 2],
        "hidden_dim": 16,
    }
    config = transformers.AlignConfig(
        text_config=BERT_TEXT, vision_config=vision, projection_dim=16, temperature_init_value=0.07
    )
    images = image_processor("EfficientNetImageProcessor", size=SQUARE)
    return config, transformers.AlignProcessor(images, bert_tokenizer())


def vision_text_dual_encoder():
    config = transformers.VisionTextDualEncoderConfig(
        text_config=transformers.BertConfig(**BERT_TEXT).to_dict(),
        vision_config=transformers.ViTConfig(**TOWER, **IMAGE).to_dict(),
        projection_dim=16,
    )
    images = image_processor("ViTImageProcessor", size=SQUARE)
    return config, transformers.VisionTextDualEncoderProcessor(images, bert_tokenizer())


def tipsv2():
    text = {**TOWER, "vocab_size": 64, "max_position_embeddings": POSITIONS}
    vision = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "mlp_ratio": 2, **IMAGE}
    config = transformers.Tipsv2Config(text_config=text, vision_config=vision, temperature_init_value=0.07)
    tokens = ("<pad>", "<unk>")
    tokenizer = tiny_tokenizer(tokens, "$A", ("input_ids", "attention_mask"), pad_token="<pad>", unk_token="<unk>")
    # Its own image processor needs torchvision, and does the same.
    images = image_processor("ViTImageProcessor", size=SQUARE, do_normalize=False)
    return config, transformers.Tipsv2Processor(images, tokenizer)


KINDS: dict[str, Callable] = {
    "clip": clip,
    "siglip": siglip,
    "siglip2": siglip2,
    "metaclip_2": metaclip_2,
    "altclip": altclip,
    "chinese_clip": chinese_clip,
    "align": align,
    "vision-text-dual-encoder": vision_text_dual_encoder,
    "tipsv2": tipsv2,
}
"""Functions that return configuration and processor, by model type."""

SUPPORTED = tuple(kind for kind in KINDS if kind in CONFIG_MAPPING)
"""The kinds that the installed transformers has."""


def tiny_dual_encoder(kind: str, folder: Path | None = None, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a tiny random model.

    Args:
        kind: One of `KINDS`.
        folder: Where model and processor are saved; None to save nothing.
        seed: Seed of its weights.

    Returns:
        The model in evaluation mode, and its processor.
    """
    config, processor = KINDS[kind]()
    torch.manual_seed(seed)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # initial weights are so small that all inputs would get nearly the same embedding
                parameter.normal_(0, parameter[0].numel() ** -0.5)
        if hasattr(model, "logit_bias"):
            model.logit_scale.fill_(2.6592)
            model.logit_bias.fill_(-3.0)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # as after a training: a fresh one does not normalize
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    if folder is not None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return model, processor
