"""docs/models.md names every two-tower model of transformers: the supported ones, and the others with a reason."""

import re
from pathlib import Path

import pytest
import transformers
from dual_encoders import KINDS
from packaging.version import Version
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES

from clip_po.families import FAMILIES
from clip_po.other_kinds import OTHER_WAYS

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def rows_under(heading):
    """The cells of the table under a heading, without its head."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]


def kinds_under(heading):
    return [kind for row in rows_under(heading) for kind in re.findall(r"`([^`]+)`", row[0])]


def test_the_table_has_every_supported_architecture_with_its_class_and_padding():
    rows = {row[0].strip("`"): row for row in rows_under("Architectures")}
    assert set(rows) == set(FAMILIES) == set(KINDS)
    for kind, family in FAMILIES.items():
        _, name, logit, texts, _ = rows[kind]
        assert name == f"`{family.class_name}`"
        assert set(re.findall(r"`(\w+)`", logit)) == {*family.scales, *family.biases}
        assert texts.startswith("padded to the full length" if family.padding == "max_length" else "padded to the lon")
        assert ("no mask" in texts) == ("attention_mask" not in family.text_inputs)


def test_every_model_that_transformers_lists_is_supported_or_left_out_with_a_reason():
    listed = set(MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    left_out = set(kinds_under("Left out"))
    assert listed - set(FAMILIES) <= left_out
    assert set(OTHER_WAYS) <= left_out
    assert not left_out & set(FAMILIES)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="older releases lack some of them")
@pytest.mark.parametrize("kind", kinds_under("Left out"))
def test_what_is_left_out_is_a_model_type(kind):
    assert kind in CONFIG_MAPPING
