"""Turn gender down in a CLIP, or any attribute that images are labelled with; the model stays as it is.

    python examples/steer_gender.py --output_dir aligned

By default with FairFace: faces prefer the text of the other gender, and ordinary photographs hold all else. What this
trains is the reversed model (t = 1); a scale between it and the original (t = 0) makes gender count for less. Printed
for each --t: the share of faces whose gender the model names, and the skew of searches that name none. The model at
--save_t is saved as a plain CLIPModel. Every argument of ConceptConfig is a flag.
"""

from dataclasses import dataclass, field

from datasets import ClassLabel
from transformers import CLIPModel, CLIPProcessor
from trl import TrlParser

from clip_po import ConceptConfig, ConceptTrainer, ConceptTransform, zero_shot_accuracy
from clip_po.concept.preferences import reverse_attribute
from clip_po.data.loading import load_split
from clip_po.evaluation.fairness.queries import load_queries
from clip_po.evaluation.fairness.report import evaluate_fairness
from clip_po.evaluation.tables import format_table

TEMPLATE = "a photo of a {}"
SETTINGS = {"beta": 1.0, "reg_weight": 10.0, "penalty_weight": 0.2, "learning_rate": 1e-3, "num_train_epochs": 3.0}


@dataclass
class ScriptArguments:
    """Which model, on which images, and which attribute."""

    dataset: str = field(default="HuggingFaceM4/FairFace", metadata={"help": "Hub id or folder with the attribute."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Its configuration; default: 0.25 for FairFace, none for others."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    test_split: str = field(default="validation", metadata={"help": "Split to measure on."})
    attribute: str = field(default="gender", metadata={"help": "Column of the attribute."})
    attribute_names: list[str] = field(
        default_factory=lambda: ["man", "woman"], metadata={"help": "What texts call it, in the order of the labels."}
    )
    reg_dataset: str = field(default="uoft-cs/cifar10", metadata={"help": "Ordinary images, without the attribute."})
    reg_image_column: str = field(default="img", metadata={"help": "Their column."})
    other_texts: list[str] = field(
        default_factory=lambda: [TEMPLATE.format(name) for name in ("dog", "bird", "car", "house", "tree", "meal")],
        metadata={"help": "Texts without the attribute, whose probabilities are to stay."},
    )
    model: str = field(default="openai/clip-vit-base-patch32", metadata={"help": "Hub id or folder of a CLIPModel."})
    t: list[float] = field(
        default_factory=lambda: [-1, 0, 0.25, 0.5, 0.75, 1], metadata={"help": "Scales to measure."}
    )
    save_t: float = field(default=0.5, metadata={"help": "The scale that is saved."})
    top_k: float = field(default=1000, metadata={"help": "The images of a search that are looked at."})
    queries: str = field(default="occupations", metadata={"help": "Searches that name no gender."})


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, ConceptConfig))
    parser.set_defaults_with_config(save_strategy="no", lr_scheduler_type="cosine", **SETTINGS)
    args, training_args = parser.parse_args_and_config()
    config = args.dataset_config or ("0.25" if args.dataset == ScriptArguments.dataset else None)
    train, test = (load_split(args.dataset, split, config) for split in (args.train_split, args.test_split))
    if not isinstance(train.features[args.attribute], ClassLabel):  # texts become labels, in alphabetical order
        train, test = (rows.class_encode_column(args.attribute) for rows in (train, test))
    ordinary = load_split(args.reg_dataset, "train").select_columns([args.reg_image_column])
    model = CLIPModel.from_pretrained(args.model)
    processor = CLIPProcessor.from_pretrained(args.model)

    concept = ConceptTransform(model.config.projection_dim)
    trainer = ConceptTrainer(
        model,
        concept,
        args=training_args,
        train_dataset=reverse_attribute(
            train,
            TEMPLATE.replace("{}", "{attribute}"),
            args.attribute,
            args.attribute_names,
            other_texts=args.other_texts,
        ),
        reg_dataset=ordinary.rename_columns({args.reg_image_column: "image"}),
        processing_class=processor,
    )
    trainer.train()

    queries, skew = load_queries(args.queries), f"max_skew@{args.top_k:g}"
    rows = []
    for t in args.t:
        steered = concept.fold_into(model, t)
        named = zero_shot_accuracy(
            steered, processor, test, [TEMPLATE], args.attribute_names, label_column=args.attribute
        )
        bias = evaluate_fairness(
            {"steered": steered}, processor, test, args.attribute, queries.words, queries.templates, [args.top_k]
        )["steered"]
        rows.append([f"{t:g}", named.accuracy, bias[skew], bias["ndkl"]])
    print(format_table(["t", f"{args.attribute} named", skew, "ndkl"], rows))
    concept.fold_into(model, args.save_t).save_pretrained(training_args.output_dir)
    processor.save_pretrained(training_args.output_dir)
