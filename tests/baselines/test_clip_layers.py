"""Baselines that change CLIP's own layers refuse other models, and a comparison does so before it runs a method."""

import pytest
import yaml
from dual_encoders import tiny_dual_encoder
from samples import typographic, write_parquet

from clip_po.baselines.defense_prefix import learn_prefix
from clip_po.baselines.head_ablation import silence_heads
from clip_po.baselines.mirror_mask import mask_by_mirror
from clip_po.cli.main import main
from clip_po.models import load_model, read_processor


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    tiny_dual_encoder("siglip", folder)
    return folder


@pytest.mark.parametrize(
    "run",
    [
        lambda model, processor: learn_prefix(model, processor, typographic(4), steps=0),
        lambda model, processor: mask_by_mirror(model),
        lambda model, processor: silence_heads(model, [(0, 0)]),
    ],
    ids=["defense_prefix", "mirror_mask", "head_ablation"],
)
def test_another_model_is_refused(siglip, run):
    with pytest.raises(TypeError, match=r"CLIPModel, got SiglipModel"):
        run(load_model(str(siglip)), read_processor(siglip))


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("defense_prefix", "defense_prefix changes the layers of a CLIPModel, got SiglipModel"),
        ("mirror_mask", "mirror_mask changes the layers"),
        ("head_ablation", "head_ablation changes the layers"),
        ("spelling_projection", "has no visual_projection"),
    ],
)
def test_a_comparison_refuses_the_method_before_it_runs_another(siglip, method, error, tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    write_parquet(photos, train=8, validation=8, test=8)
    recipe = tmp_path / "recipe.yaml"
    methods = {"removal": {"method": "text_removal"}, "other": {"method": method}}
    recipe.write_text(yaml.safe_dump({"methods": methods}))
    command = ["compare", "--config", str(recipe), "--model_name_or_path", str(siglip)]
    data = ["--dataset_name", str(photos), "--dataset_validation_split", "validation"]
    assert main([*command, *data, "--output_dir", str(out)]) == 2
    assert error in capsys.readouterr().err
    assert not list(out.rglob("log.txt"))
