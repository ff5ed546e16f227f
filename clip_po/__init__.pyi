from .concept.transform import ConceptTransform as ConceptTransform
from .config import ContrastivePOConfig as ContrastivePOConfig
from .data.attacks.typographic import TypographicAttack as TypographicAttack
from .data.collator import DataCollatorForContrastivePreference as DataCollatorForContrastivePreference
from .data.pairs import TypographicPreferences as TypographicPreferences
from .data.streamed_pairs import TypographicStream as TypographicStream
from .evaluation.evaluator import RobustnessEvaluator as RobustnessEvaluator
from .evaluation.interpolation import choose_alpha as choose_alpha
from .evaluation.interpolation import interpolate as interpolate
from .evaluation.interpolation import interpolation_table as interpolation_table
from .evaluation.interpolation import sweep_interpolation as sweep_interpolation
from .evaluation.pseudo_labels import pseudo_labels as pseudo_labels
from .evaluation.robustness import RobustnessImages as RobustnessImages
from .evaluation.robustness import evaluate_robustness as evaluate_robustness
from .evaluation.robustness import robustness_report as robustness_report
from .evaluation.robustness import robustness_table as robustness_table
from .evaluation.zero_shot import zero_shot_accuracy as zero_shot_accuracy
from .trainer import ContrastivePOTrainer as ContrastivePOTrainer
from .training.averaging import BetaMovingAverageCallback as BetaMovingAverageCallback
from .training.callbacks import EvaluatorCallback as EvaluatorCallback

__version__: str
