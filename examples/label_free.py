"""Teach a CLIP to believe the picture and not the words written on it, with images that nobody labelled.

    python examples/label_free.py --dataset path/to/images --class_names cat dog ship --output_dir aligned

--dataset is a Hub id or a folder of images (train/*.jpg). What the model answers on an image as it is, it is to answer
with a word on it too: its answers on clean images are the targets, hard (sft, weighted by its confidence) and soft
(distillation). A tenth of the images is kept out, and measured after every epoch.
Every argument of ContrastivePOConfig is a flag.
"""

from dataclasses import dataclass, field

from transformers import CLIPModel, CLIPProcessor
from trl import TrlParser

from clip_po import (
    ContrastivePOConfig,
    ContrastivePOTrainer,
    EvaluatorCallback,
    RobustnessEvaluator,
    RobustnessImages,
    TypographicAttack,
    TypographicPreferences,
    pseudo_labels,
)
from clip_po.data.attacks.fonts import training_fonts, unseen_fonts
from clip_po.data.loading import load_split

TEMPLATE = "a photo of a {}"


@dataclass
class ScriptArguments:
    """Which model, on which images, and what may be in them."""

    dataset: str = field(metadata={"help": "Hub id or folder of images."})
    class_names: list[str] = field(metadata={"help": "What may be in the images."})
    model: str = field(default="openai/clip-vit-base-patch32", metadata={"help": "Hub id or folder of a CLIPModel."})


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, ContrastivePOConfig))
    parser.set_defaults_with_config(loss_type=["distillation", "sft"], eval_strategy="epoch")
    script_args, training_args = parser.parse_args_and_config()
    names = script_args.class_names
    model = CLIPModel.from_pretrained(script_args.model).to(training_args.device)
    processor = CLIPProcessor.from_pretrained(script_args.model)

    # Labels that the data set may have are not read.
    answered = pseudo_labels(model, processor, load_split(script_args.dataset, "train"), names, [TEMPLATE])
    parts = answered.train_test_split(test_size=0.1, seed=training_args.seed)

    attack = TypographicAttack(words=names, fonts=training_fonts())
    train, held_out = (
        TypographicPreferences(parts[part], attack, template=TEMPLATE, weight_column="weight")
        for part in ("train", "test")
    )
    trainer = ContrastivePOTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        candidate_texts=train.candidate_texts,
    )
    # "Right" is here what the model answered before alignment, so that its own clean accuracy is 1.
    unseen = TypographicAttack(words=names, fonts=unseen_fonts(), seed=1)
    evaluator = RobustnessEvaluator(RobustnessImages(parts["test"], unseen, processor), [TEMPLATE])
    trainer.add_callback(EvaluatorCallback(trainer, evaluator))
    trainer.train()
    trainer.save_model()

    measured = trainer.evaluate()
    if trainer.is_world_process_zero():
        print(f"Answers that a word does not change: {measured['eval_kept_answers']:.3f}")
        print(f"Clean answers that changed: {measured['eval_clean_cost']:.2f} of 100")
