"""Embeddings on disk: found again under the same fingerprint, and under no other."""

import datasets
import pytest
import torch
from samples import IMAGE_SIZE, make_labelled, picture, tiny_processor
from transformers import CLIPModel

from clip_po.data.embedding_cache import EmbeddingCache, fingerprint, image_digest, model_digest, processor_digest


def test_embeddings_come_back_bit_for_bit(tmp_path):
    cache, embeds = EmbeddingCache(tmp_path / "new" / "folder"), torch.randn(5, 3)
    assert cache.get("a", 5) is None
    cache.put("a", embeds)
    assert torch.equal(cache.get("a", 5), embeds)
    assert cache.get("b", 5) is None
    assert cache.get("a", 6) is None
    assert [file.name for file in cache.folder.iterdir()] == ["a.safetensors"]


def test_a_damaged_file_is_written_anew(tmp_path):
    cache, embeds = EmbeddingCache(tmp_path), torch.randn(2, 3)
    (tmp_path / "a.safetensors").write_bytes(b"half a fi")
    assert cache.get("a", 2) is None
    cache.put("a", embeds)
    assert torch.equal(cache.get("a", 2), embeds)


def test_one_bit_of_one_weight_is_another_model(clip_folder):
    model, other = (CLIPModel.from_pretrained(clip_folder) for _ in range(2))
    assert model_digest(model) == model_digest(other)
    with torch.no_grad():
        weight = other.visual_projection.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    assert model_digest(model) != model_digest(other)
    assert model_digest(model.vision_model) == model_digest(other.vision_model)


def test_another_size_is_another_processor():
    assert processor_digest(tiny_processor()) == processor_digest(tiny_processor())
    assert processor_digest(tiny_processor()) != processor_digest(tiny_processor(IMAGE_SIZE + 8))


def test_a_changed_image_is_other_data(tmp_path):
    files = []
    for number in range(3):
        files.append(str(tmp_path / f"{number}.png"))
        picture(number).save(files[-1])
    rows = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    before = image_digest(rows, "image")
    assert image_digest(rows, "image") == before
    assert image_digest(rows.select([0, 2, 1]), "image") != before
    assert image_digest(rows.select([0, 1]), "image") != before
    picture(7).save(files[1])
    assert image_digest(rows, "image") != before
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match="Row 1: the image in column 'image' can't be read"):
        image_digest(rows, "image")


def test_images_within_the_table_count_as_well():
    assert image_digest(make_labelled(4), "image") == image_digest(make_labelled(4), "image")
    assert image_digest(make_labelled(4), "image") != image_digest(make_labelled(5), "image")


def test_a_fingerprint_knows_the_order_of_its_parts():
    assert fingerprint("a", "b") != fingerprint("b", "a")
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
