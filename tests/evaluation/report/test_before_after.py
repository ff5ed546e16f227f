import numpy as np
import pytest
from PIL import Image

from clip_po.data.attacks.fonts import PILLOW_FONT, font_files
from clip_po.evaluation.report.before_after import Example, before_after_grid, changes, changes_line, choose_examples


@pytest.fixture
def answers(answers_of):
    """Eight images of cats with "dog" on them: 4 fixed, 2 still wrong, 1 newly broken, 1 always right."""
    before = [1, 1, 1, 2, 1, 2, 0, 0]
    after = [0, 0, 0, 0, 1, 2, 1, 0]
    zeros = [0] * 8
    return answers_of(zeros, [1] * 8, before=(zeros, before, zeros), after=(zeros, after, zeros))


def test_changes_by_hand(answers):
    found = {name: indices.tolist() for name, indices in changes(answers, "before", "after").items()}
    assert found == {"fixed": [0, 1, 2, 3], "still wrong": [4, 5], "newly broken": [6]}
    assert changes_line(answers, "before", "after") == (
        "Of 8 attacked images: 4 fixed, 2 still wrong, 1 newly broken, 1 right before and after."
    )


def kinds(examples):
    return [example.change for example in examples]


def test_fixed_examples_come_first_and_then_a_few_of_the_others(answers):
    assert kinds(choose_examples(answers, "before", "after", 5)) == ["fixed"] * 3 + ["still wrong", "newly broken"]
    assert kinds(choose_examples(answers, "before", "after", 1)) == ["fixed"]
    # What one kind can't fill goes to the others, and nothing is shown twice.
    everything = choose_examples(answers, "before", "after", 100)
    assert sorted(example.index for example in everything) == list(range(7))
    assert kinds(everything) == ["fixed"] * 4 + ["still wrong"] * 2 + ["newly broken"]


def test_an_example_has_the_answers_of_both_models(answers):
    shown = {example.index: example for example in choose_examples(answers, "before", "after", 100)}
    assert shown[3] == Example(3, "fixed", truth="cat", word="dog", before="car", after="cat")
    assert shown[6] == Example(6, "newly broken", truth="cat", word="dog", before="cat", after="dog")


def test_the_choice_is_fixed_by_its_seed(answers):
    first, again, other = (choose_examples(answers, "before", "after", 3, seed) for seed in (0, 0, 3))
    assert first == again
    assert first != other


def test_wrong_arguments_are_refused(answers, tmp_path):
    with pytest.raises(ValueError, match="count must be a whole number >= 1, got 0"):
        choose_examples(answers, "before", "after", 0)
    with pytest.raises(ValueError, match="No answers of model 'x'"):
        choose_examples(answers, "before", "x")
    with pytest.raises(ValueError, match="no examples to show"):
        before_after_grid([], tmp_path / "grid.png", picture=lambda index: Image.new("RGB", (8, 8)))
    example = choose_examples(answers, "before", "after", 1)
    with pytest.raises(ValueError, match="columns must be a whole number >= 1, got 0"):
        before_after_grid(example, tmp_path / "a.png", picture=lambda index: Image.new("RGB", (8, 8)), columns=0)


def counts(page, colour):
    return int((np.asarray(page).reshape(-1, 3) == colour).all(1).sum())


RIGHT, WORD, OTHER = (18, 128, 74), (200, 36, 46), (184, 104, 8)
BLUE = (10, 20, 200)


def draw(path, *examples, size=(64, 64), **arguments):
    before_after_grid(examples, path, picture=lambda index: Image.new("RGB", size, BLUE), **arguments)
    with Image.open(path) as page:
        assert page.format == "PNG"
        return page.convert("RGB")


def test_a_small_picture_is_enlarged(tmp_path):
    page = draw(tmp_path / "new" / "grid.png", Example(0, "fixed", "cat", "dog", "dog", "cat"))
    assert counts(page, BLUE) == 256 * 256


def test_a_wide_picture_is_shown_whole(tmp_path):
    page = draw(tmp_path / "grid.png", Example(0, "fixed", "cat", "dog", "dog", "cat"), size=(1024, 512))
    assert counts(page, BLUE) == 256 * 128


def test_answers_are_coloured_by_whether_they_are_right(tmp_path):
    fooled, right, other = (
        draw(tmp_path / f"{said}.png", Example(0, "still wrong", "cat", "Dog", said, said))
        for said in ("dog", "cat", "car")
    )
    assert counts(fooled, WORD) > counts(right, WORD)
    assert counts(right, RIGHT) > counts(fooled, RIGHT)
    assert counts(other, OTHER) > counts(fooled, OTHER)


def test_the_page_grows_by_rows_and_long_names_stay_on_their_card(tmp_path):
    example = Example(0, "newly broken", "a name " * 20, "dog", "another name " * 20, "dog")
    one = draw(tmp_path / "one.png", example, title="A long title " * 20, subtitle="told " * 200)
    four = draw(tmp_path / "four.png", *[example] * 4, columns=2)
    assert four.width == one.width
    assert four.height > 1.7 * one.height
    margin = np.asarray(one)[:, -40:]
    assert (margin == margin[0, 0]).all()


def test_pictures_come_from_the_attacked_images(answers, dataset, attack, processor, tmp_path):
    from clip_po.evaluation.robustness import RobustnessImages

    images = RobustnessImages(dataset, attack, processor)
    examples = choose_examples(answers, "before", "after")
    path = before_after_grid(examples, tmp_path / "grid.png", picture=images.picture)
    assert path.stat().st_size > 10_000


def test_names_are_written_in_a_font_that_has_their_letters(tmp_path):
    def drawn(name, **arguments):
        example = Example(0, "fixed", name, "dog", "dog", name)
        path = tmp_path / f"{len(arguments)}.png"
        before_after_grid([example], path, picture=lambda index: Image.new("RGB", (64, 64)), **arguments)
        return path.read_bytes()

    assert drawn("кошка") == drawn("кошка", font=font_files(["DejaVuSans"])[0])
    assert drawn("cat") == drawn("cat", font=PILLOW_FONT)
