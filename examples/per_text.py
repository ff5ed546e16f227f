"""Align a CLIP so that a written word does not stand for the thing: for a text, prefer the photograph of the thing.

    python examples/per_text.py --dataset path/to/photos --output_dir aligned

--dataset takes a Hub id or a folder of labelled images (train/<class>/*.jpg). Each row has the text of a class, a
photograph of it, and a photograph of another class with the name of the first one written on it. The policy chooses
between the two images. Clean photographs with the texts of their classes hold the model. Every argument of
ContrastivePOConfig is a flag.
"""

import random
from dataclasses import dataclass, field

from datasets import Dataset, Features, Image, Value
from trl import TrlParser

from clip_po import ContrastivePOConfig, ContrastivePOTrainer
from clip_po.data import TypographicAttack, load_split, training_fonts

TEMPLATE = "a photo of a {}"
TEXT = Value("string")


@dataclass
class ScriptArguments:
    """Arguments of the script, in addition to those of the training."""

    dataset: str = field(metadata={"help": "Hub id or folder of labelled images."})
    model: str = field(default="openai/clip-vit-base-patch32", metadata={"help": "Hub id or folder of a CLIPModel."})


def image_pairs(photos, attack, seed):
    """For the text of a random other class of each photograph: that class against this photograph with its name."""
    names, rng = photos.features["label"].names, random.Random(seed)
    members = [[row for row, label in enumerate(photos["label"]) if label == number] for number in range(len(names))]
    rows = {"text": [], "chosen_image": [], "rejected_image": []}
    for number, photo in enumerate(photos):
        written = rng.choice([label for label in range(len(names)) if label != photo["label"] and members[label]])
        rows["text"].append(TEMPLATE.format(names[written]))
        rows["chosen_image"].append(photos[rng.choice(members[written])]["image"])
        rows["rejected_image"].append(attack.draw(photo["image"].convert("RGB"), names[written], number, 0))
    return Dataset.from_dict(rows, Features({"text": TEXT, "chosen_image": Image(), "rejected_image": Image()}))


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, ContrastivePOConfig))
    parser.set_defaults_with_config(beta=1.0, eval_strategy="epoch")
    script_args, training_args = parser.parse_args_and_config()
    photos = load_split(script_args.dataset, "train")
    names = photos.features["label"].names
    attack = TypographicAttack(words=names, fonts=training_fonts(), seed=training_args.seed)

    parts = image_pairs(photos, attack, training_args.seed).train_test_split(test_size=0.1, seed=training_args.seed)
    captions = [TEMPLATE.format(names[label]) for label in photos["label"]]
    trainer = ContrastivePOTrainer(
        script_args.model,
        args=training_args,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        reg_dataset=photos.remove_columns("label").add_column("text", captions),
    )
    trainer.train()
    trainer.save_model()
    print(f"Pairs in which the photograph of the thing wins: {trainer.evaluate()['eval_rewards/accuracies']:.0%}")
