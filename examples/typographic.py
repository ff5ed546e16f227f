"""Align a CLIP so that it ignores words written on images, and evaluate it before and after.

    python examples/typographic.py --dataset path/to/photos --output_dir aligned --num_train_epochs 3

--dataset takes a Hub id or a folder with train/<class>/*.jpg and test/<class>/*.jpg. Every argument of
ContrastivePOConfig is a flag: --loss_type ipo, --beta 0.01, --reg_weight 0.01, --learning_rate 1e-5, ...
"""

from dataclasses import dataclass, field

from transformers import CLIPModel, CLIPProcessor
from trl import TrlParser

from clip_po import ContrastivePOConfig, ContrastivePOTrainer
from clip_po.data import TypographicAttack, TypographicPreferences, load_split, training_fonts, unseen_fonts
from clip_po.evaluation import RobustnessImages, evaluate_robustness, robustness_report, robustness_table


@dataclass
class ScriptArguments:
    """Arguments of the script, in addition to those of the training."""

    dataset: str = field(metadata={"help": "Hub id or folder of labelled images, with the splits train and test."})
    model: str = field(default="openai/clip-vit-base-patch32", metadata={"help": "Hub id or folder of a CLIPModel."})


if __name__ == "__main__":
    script_args, training_args = TrlParser((ScriptArguments, ContrastivePOConfig)).parse_args_and_config()
    train, test = (load_split(script_args.dataset, split) for split in ("train", "test"))
    names = train.features["label"].names
    processor = CLIPProcessor.from_pretrained(script_args.model)

    preferences = TypographicPreferences(train, TypographicAttack(words=names, fonts=training_fonts()))
    trainer = ContrastivePOTrainer(
        model=CLIPModel.from_pretrained(script_args.model),
        args=training_args,
        train_dataset=preferences,
        processing_class=processor,
        candidate_texts=preferences.candidate_texts,
    )
    trainer.train()
    trainer.save_model()

    before = CLIPModel.from_pretrained(script_args.model).to(trainer.accelerator.device)
    images = RobustnessImages(test, TypographicAttack(words=names, fonts=unseen_fonts(), seed=1), processor)
    models = {"before": before, "after": trainer.model}
    answers = evaluate_robustness(models, images, [preferences.template], accelerator=trainer.accelerator)
    if trainer.is_world_process_zero():
        before_after = {"before": None, "after": "before"}
        print(robustness_table({name: robustness_report(answers, name, base) for name, base in before_after.items()}))
