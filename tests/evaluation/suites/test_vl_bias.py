import json

import pytest
from samples import picture

from clip_po.evaluation.suites.vl_bias import ACTIVITIES, OCCUPATIONS, load_vl_bias


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(0).save(path)


def rows(dataset):
    names = dataset.features["label"].names
    columns = (dataset[column] for column in ("path", "label", "gender"))
    return {path: (names[label], gender) for path, label, gender in zip(*columns, strict=True)}


def test_the_words_are_those_that_its_authors_list():
    assert (len(set(ACTIVITIES)), len(set(OCCUPATIONS))) == (52, 13)


def test_folders_and_file_names_say_the_word_and_may_say_the_gender(tmp_path):
    for name in ("nurse/men/1.jpg", "nurse/2.png", "chef/chef_female_3.jpg", "judge_12.jpg", "__MACOSX/._judge_1.jpg"):
        save(tmp_path / "occu" / name)
    (tmp_path / "occu" / "occu.txt").write_text("nurse")
    dataset = load_vl_bias(tmp_path, "occupations")
    assert dataset.features["label"].names == list(OCCUPATIONS)
    assert rows(dataset) == {
        "occu/chef/chef_female_3.jpg": ("chef", "woman"),
        "occu/judge_12.jpg": ("judge", None),
        "occu/nurse/2.png": ("nurse", None),
        "occu/nurse/men/1.jpg": ("nurse", "man"),
    }
    assert dataset[0]["image"].size == picture(0).size
    told = load_vl_bias(tmp_path, "occupations", {"occu/judge_12.jpg": "woman"})
    assert rows(told)["occu/judge_12.jpg"] == ("judge", "woman")


def test_an_index_as_their_scripts_read_it(tmp_path):
    save(tmp_path / "verb" / "a.jpg")
    save(tmp_path / "verb" / "women" / "b.jpg")
    index = {"baking": [{"original": "verb/a.jpg", "attack": "a.npy"}], "working": [{"original": "verb/women/b.jpg"}]}
    (tmp_path / "verb_attack_14m.json").write_text(json.dumps({"version": "1.0", "data": index}))
    expected = {"verb/a.jpg": ("baking", None), "verb/women/b.jpg": ("working", "woman")}
    assert rows(load_vl_bias(tmp_path, "activities")) == expected


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"data": {"baking": [{"original": "../a.jpg"}]}}, "outside"),
        ({"data": {"baking": [{"original": "verb/gone.jpg"}]}}, r"gone\.jpg"),
        ({"data": {"flying": [{"original": "verb/a.jpg"}]}}, "flying"),
        ({"images": []}, "not an index"),
    ],
)
def test_a_broken_index_is_refused(tmp_path, index, said):
    save(tmp_path / "verb" / "a.jpg")
    (tmp_path / "verb.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=said):
        load_vl_bias(tmp_path, "activities")


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no images of activities"):
        load_vl_bias(tmp_path, "activities")
    with pytest.raises(ValueError, match="part"):
        load_vl_bias(tmp_path, "verbs")
    save(tmp_path / "occu" / "star_1.jpg")
    with pytest.raises(ValueError, match="'star'"):
        load_vl_bias(tmp_path, "occupations")
    save(tmp_path / "verb" / "baking" / "1.jpg")
    with pytest.raises(ValueError, match="'boy'"):
        load_vl_bias(tmp_path, "activities", {"verb/baking/1.jpg": "boy"})
