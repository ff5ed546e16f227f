"""Turn what is written on an image up, off or around by one number t; the model stays as it is.

    python examples/steer.py --dataset path/to/photos --output_dir aligned

--dataset is a Hub id or a folder with train/<class>/*.jpg and test/<class>/*.jpg. A transformation of the embeddings
is trained, each image is seen by the model once, and a plain CLIPModel is saved, with the transformation at --t in its
projections: 0 is the original, 1 the trained one, in between lies neutral, below 0 words count for more.
Every argument of ConceptConfig is a flag. `clip-po steer` does the same, and chooses t on validation images.
"""

from dataclasses import dataclass, field

from transformers import CLIPModel, CLIPProcessor
from trl import TrlParser

from clip_po import (
    ConceptConfig,
    ConceptTrainer,
    ConceptTransform,
    RobustnessImages,
    TypographicAttack,
    TypographicPreferences,
)
from clip_po.concept.sweep import embed_variants, scale_table, sweep_scales
from clip_po.data.attacks.fonts import training_fonts
from clip_po.data.loading import load_split

SETTINGS = {"beta": 1.0, "reg_weight": 10.0, "penalty_weight": 0.2, "learning_rate": 1e-3, "num_train_epochs": 10.0}


@dataclass
class ScriptArguments:
    """Which model, on which images, and which scale is saved."""

    dataset: str = field(metadata={"help": "Hub id or folder of labelled images with the splits train and test."})
    model: str = field(default="openai/clip-vit-base-patch32", metadata={"help": "Hub id or folder of a CLIPModel."})
    t: float = field(default=1.0, metadata={"help": "The scale that is saved."})


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, ConceptConfig))
    parser.set_defaults_with_config(save_strategy="no", lr_scheduler_type="cosine", **SETTINGS)
    script_args, training_args = parser.parse_args_and_config()
    train, test = (load_split(script_args.dataset, split) for split in ("train", "test"))
    names = train.features["label"].names
    model = CLIPModel.from_pretrained(script_args.model)
    processor = CLIPProcessor.from_pretrained(script_args.model)

    # Drawn once, so that each image is embedded once.
    attack = TypographicAttack(words=names, fonts=training_fonts(), redraw="never")
    preferences = TypographicPreferences(train, attack)
    concept = ConceptTransform(model.config.projection_dim)
    trainer = ConceptTrainer(
        model,
        concept,
        args=training_args,
        train_dataset=preferences,
        processing_class=processor,
        candidate_texts=preferences.candidate_texts,
    )
    trainer.train()

    images = RobustnessImages(test, TypographicAttack(words=names, fonts=training_fonts(), seed=1), processor)
    embeds = embed_variants(model, images, [preferences.template], accelerator=trainer.accelerator)
    points = sweep_scales(embeds, concept, [-2, -1, 0, 0.25, 0.5, 0.75, 1, 2])
    if trainer.is_world_process_zero():
        print(scale_table({f"{point.t:g}": point for point in points}))
        concept.save(training_args.output_dir)
        concept.fold_into(model, script_args.t).save_pretrained(training_args.output_dir)
        processor.save_pretrained(training_args.output_dir)
