"""Align a CLIP with what annotators answered, and measure the agreement on held-out answers.

    python examples/annotations.py --answers path/to/answers/answers.csv --text caption_1 caption_2

The table has a line for each answer: the image (a path relative to the table), the captions that were compared, and
the name of the better one, or "tie". Several annotators may answer the same question; their disagreement becomes label
smoothing. A fifth of the questions is held out and evaluated after every epoch. Every argument of ContrastivePOConfig
is a flag.
"""

from dataclasses import dataclass, field

from transformers import CLIPModel, CLIPProcessor
from trl import TrlParser

from clip_po import ContrastivePOConfig, ContrastivePOTrainer, EvaluatorCallback
from clip_po.data import read_answers
from clip_po.evaluation import PreferenceEvaluator, format_table


@dataclass
class ScriptArguments:
    """Arguments of the script, in addition to those of the training."""

    answers: str = field(metadata={"help": "CSV, TSV, JSON lines or Parquet file of answers."})
    text: list[str] = field(metadata={"help": "Columns of the texts that were compared."})
    image: str = field(default="image", metadata={"help": "Column of the image."})
    answer: str = field(default="answer", metadata={"help": "Column of the answer."})
    model: str = field(default="openai/clip-vit-base-patch32", metadata={"help": "Hub id or folder of a CLIPModel."})


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, ContrastivePOConfig))
    parser.set_defaults_with_config(loss_type="sigmoid", beta=1.0, eval_strategy="epoch")
    script_args, training_args = parser.parse_args_and_config()
    processor = CLIPProcessor.from_pretrained(script_args.model)

    preferences = read_answers(
        script_args.answers,
        image=script_args.image,
        text=script_args.text,
        answer=script_args.answer,
        agreement="soft",
    )
    parts = preferences.train_test_split(test_size=0.2, seed=training_args.seed)
    trainer = ContrastivePOTrainer(
        model=script_args.model,
        args=training_args,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        reg_dataset=parts["train"].select_columns("image"),
        processing_class=processor,
    )
    evaluator = PreferenceEvaluator(parts["test"], processor)
    trainer.add_callback(EvaluatorCallback(trainer, evaluator))
    trainer.train()
    trainer.save_model()

    base = CLIPModel.from_pretrained(script_args.model).to(training_args.device)
    metrics = evaluator({"before": base, "after": trainer.model}, base="before")
    columns = ["pairwise_accuracy", "margin", "calibration_error", "pairwise_accuracy_difference"]
    print(format_table(["model", *columns], [[name, *map(found.get, columns)] for name, found in metrics.items()]))
