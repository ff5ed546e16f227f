"""W multiplied into the projections of each architecture that has them, and refused by the others."""

import pytest
import torch
from dual_encoders import SUPPORTED, tiny_dual_encoder
from samples import PROMPTS, make_trainer, picture
from torch.nn import functional as F
from transformers import AutoModel

from clip_po.cli.main import main
from clip_po.concept.transform import ConceptTransform
from clip_po.data.images import to_pixels
from clip_po.dual_encoder import as_dual_encoder
from clip_po.encoding import encode_images, encode_texts

WITHOUT_PROJECTIONS = {"siglip", "siglip2", "align", "tipsv2"}


def random_transform(model, output_dim=5):
    concept = ConceptTransform(as_dual_encoder(model).dim, output_dim, towers="each")
    with torch.no_grad():
        for parameter in concept.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    return concept


@torch.no_grad()
def embeddings(model, processor):
    pixels = to_pixels(processor, [picture(number) for number in range(3)])
    return encode_images(model, pixels), encode_texts(model, processor, PROMPTS)


@pytest.mark.parametrize("kind", [kind for kind in SUPPORTED if kind not in WITHOUT_PROJECTIONS])
def test_a_folded_model_has_the_transformed_embeddings_in_plain_transformers(kind, tmp_path):
    model, processor = tiny_dual_encoder(kind)
    concept = random_transform(model)
    weights = (concept.image_weight, concept.text_weight)
    expected = [F.normalize(e @ w.T, dim=-1) for e, w in zip(embeddings(model, processor), weights, strict=True)]
    concept.fold_into(model).save_pretrained(tmp_path)
    found = embeddings(AutoModel.from_pretrained(tmp_path), processor)
    for transformed, folded in zip(expected, found, strict=True):
        torch.testing.assert_close(folded, transformed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in SUPPORTED if kind in WITHOUT_PROJECTIONS])
def test_a_model_without_projections_is_refused_with_what_to_do(kind):
    model, _ = tiny_dual_encoder(kind)
    with pytest.raises(ValueError, match=r"has no visual_projection.*concept\(image_embeds, text_embeds\)"):
        random_transform(model).fold_into(model)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_w_trains_on_the_embeddings_of_every_architecture(kind, tmp_path):
    model, processor = tiny_dual_encoder(kind)
    concept = ConceptTransform(as_dual_encoder(model).dim)
    trainer = make_trainer(
        model, tmp_path, concept=concept, processing_class=processor, max_steps=2, learning_rate=1e-2
    )
    trainer.train()
    assert not torch.equal(concept.image_weight, torch.eye(concept.dim))


def test_steer_refuses_such_a_model_before_it_trains(tmp_path, labelled, capsys):
    folder, photos = tmp_path / "model", tmp_path / "photos"
    tiny_dual_encoder("siglip", folder)
    for split in ("train", "validation", "test"):
        photos.mkdir(exist_ok=True)
        labelled.to_parquet(photos / f"{split}-00000-of-00001.parquet")
    command = ["steer", "--model_name_or_path", str(folder), "--dataset_name", str(photos)]
    assert main([*command, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]) == 2
    captured = capsys.readouterr()
    assert "has no visual_projection" in captured.err
    assert "loss" not in captured.out
