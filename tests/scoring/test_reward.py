"""RewardModel as TRL and trainers of diffusion models call it, against transformers' own forward pass."""

import inspect
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from dual_encoders import POSITIONS, SUPPORTED, tiny_dual_encoder
from peft import LoraConfig, get_peft_model
from samples import PROMPTS, picture
from transformers import AutoProcessor, CLIPModel, CLIPProcessor

from clip_po import RewardModel
from clip_po.cli.main import main

IMAGES = [picture(number) for number in range(6)]
TEXTS = [PROMPTS[number % 4] for number in range(6)]


@pytest.fixture(scope="module")
def reward(clip_folder):
    return RewardModel(clip_folder, batch_size=4)


def cosines(model, folder, images, texts):
    inputs = CLIPProcessor.from_pretrained(folder)(text=texts, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    return (outputs.image_embeds * outputs.text_embeds).sum(-1)


@pytest.fixture(scope="module")
def expected(clip_folder):
    return cosines(CLIPModel.from_pretrained(clip_folder), clip_folder, IMAGES, TEXTS)


FORMS = {
    "PIL": IMAGES,
    "uint8 tensors": torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in IMAGES]),
    "floats": torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in IMAGES]),
    "arrays": np.stack([np.asarray(image) for image in IMAGES]),
    "float arrays": np.stack([np.asarray(image) / 255 for image in IMAGES]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_diffusion_trainer_gets_rewards_and_info(reward, expected, form):
    rewards, info = reward(FORMS[form], TEXTS, [{}] * 6)
    torch.testing.assert_close(rewards, expected, atol=1e-6, rtol=0)
    assert info == {}
    assert torch.equal(reward(FORMS[form], TEXTS, [{}] * 6)[0], rewards)


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("chat", ["text", "messages", "parts"])
def test_a_language_model_trainer_gets_a_float_for_each_completion(reward, expected, column, chat):
    def completion(text):
        content = [{"type": "text", "text": text}] if chat == "parts" else text
        return text if chat == "text" else [{"role": "assistant", "content": content}]

    found = reward(
        prompts=["describe"] * 6,
        completions=list(map(completion, TEXTS)),
        completion_ids=[[1]] * 6,
        trainer_state=None,
        log_extra=print,
        log_metric=print,
        **{column: IMAGES if column == "image" else [[image] for image in IMAGES]},
    )
    assert all(type(value) is float for value in found)
    assert found == pytest.approx(expected.tolist(), abs=1e-6)


def test_trl_calls_it_in_a_training(clip_folder, tmp_path):
    """GRPOTrainer, on a language model of one layer, logs the reward under the name of the function."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "cat", "dog", "bird", "ship", "a"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_positions=32, n_embd=16, n_layer=1, n_head=1))
    rows = datasets.Dataset.from_dict({"prompt": ["a"] * 2, "photo": IMAGES[:2]})
    calls = []

    class Recorded(RewardModel):
        def __call__(self, **columns):
            calls.append((columns["completions"], columns["photo"], super().__call__(**columns)))
            return calls[-1][-1]

    reward = Recorded(clip_folder, image_column="photo")
    args = GRPOConfig(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(model, reward, args, rows, processing_class=tokenizer)
    trainer.train()
    logs = {name for log in trainer.state.log_history for name in log}
    assert f"rewards/{reward.__name__}/mean" in logs
    assert calls
    for completions, images, found in calls:
        wanted = cosines(CLIPModel.from_pretrained(clip_folder), clip_folder, images, completions)
        assert found == pytest.approx(wanted.tolist(), abs=1e-6)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_every_architecture_has_the_cosines_of_transformers(kind, tmp_path):
    model, _ = tiny_dual_encoder(kind, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    tokens = processor.tokenizer(
        TEXTS, return_tensors="pt", padding="max_length", max_length=POSITIONS, truncation=True
    )
    with torch.no_grad():
        outputs = model(**tokens, **processor.image_processor(IMAGES, return_tensors="pt"))
    expected = torch.nn.functional.cosine_similarity(outputs.image_embeds, outputs.text_embeds)
    rewards, _ = RewardModel(tmp_path, batch_size=4)(IMAGES, TEXTS)
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)
    assert rewards.std() > 1e-3


def test_trl_names_it_and_takes_it_for_an_ordinary_function(reward, clip_folder):
    assert reward.__name__ == f"clip_reward_{clip_folder.name}"
    assert not inspect.iscoroutinefunction(reward.__call__)


def test_adapters_are_loaded_on_their_base(clip_folder, tmp_path):
    torch.manual_seed(1)
    model = get_peft_model(CLIPModel.from_pretrained(clip_folder), LoraConfig(target_modules=["q_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path)
    CLIPProcessor.from_pretrained(clip_folder).save_pretrained(tmp_path)
    found, _ = RewardModel(tmp_path)(IMAGES, TEXTS)
    torch.testing.assert_close(found, cosines(model, clip_folder, IMAGES, TEXTS), atol=1e-6, rtol=0)


def test_pickled_weights_are_refused(clip_folder, tmp_path):
    model = CLIPModel.from_pretrained(clip_folder)
    model.config.save_pretrained(tmp_path)
    CLIPProcessor.from_pretrained(clip_folder).save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="pickle"):
        RewardModel(tmp_path)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda r: r(prompts=["a"], completions=["b"], label=[1]), r"only the columns \['label'\]"),
        (lambda r: r(prompts=["a"], completions=["b"], images=[IMAGES[:2]]), "has 2 images"),
        (lambda r: r(prompts=["a"], completions=[3], image=IMAGES[:1]), "must be a text or a list of messages"),
        (lambda r: r(IMAGES, TEXTS[:2]), "got 6 and 2"),
        (lambda r: r([], []), "at least one"),
        (lambda r: r(2 * FORMS["floats"] - 1, TEXTS), r"got -1 to 1. Convert"),
        (lambda r: r(["a.png"], ["a"]), "got str"),
        (lambda r: r(torch.zeros(1, 4, 8, 8), ["a"]), r"shape torch.Size\(\[4, 8, 8\]\)"),
    ],
)
def test_wrong_calls_say_what_to_give(reward, call, said):
    with pytest.raises((ValueError, TypeError), match=said):
        call(reward)


@pytest.mark.shared
@pytest.mark.slow
def test_photographs_of_a_class_are_ranked_first_for_its_name(tmp_path, capsys):
    """The real model, on photographs whose classes are known: as often right as it is in zero-shot classification."""
    shared = Path(os.environ.get("CLIP_PO_SHARED", Path(__file__).parents[3] / "shared"))
    if not shared.exists():
        pytest.skip(f"no folder {shared}")
    rows = datasets.load_dataset(str(shared / "data" / "photographs"), split="test").select(range(400))
    names = rows.features["label"].names
    for number, row in enumerate(rows):
        row["image"].save(tmp_path / f"{number:03}.png")
    prompts = [f"a photo of a {name}" for name in names]
    words = ["score", "--model_name_or_path", str(shared / "models" / "photographs-clip"), "--dataset_name"]
    assert main([*words, str(tmp_path), "--text", *prompts, "--top_k", "1", "--rank", "texts"]) == 0
    answers = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert np.mean([prompts[label] == text for label, text in zip(rows["label"], answers, strict=True)]) > 0.6
    assert main([*words, str(tmp_path), "--text", *prompts, "--top_k", "10", "--rank", "images"]) == 0
    best = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert np.mean([prompts[rows[line["row"]]["label"]] == line["text"] for line in best]) > 0.8
