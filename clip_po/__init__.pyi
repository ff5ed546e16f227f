from .concept.transform import ConceptTransform as ConceptTransform
from .config import ContrastivePOConfig as ContrastivePOConfig
from .data.attacks.typographic import TypographicAttack as TypographicAttack
from .data.collator import DataCollatorForContrastivePreference as DataCollatorForContrastivePreference
from .data.typographic import TypographicPreferences as TypographicPreferences
from .data.typographic import TypographicStream as TypographicStream
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
from .losses import distillation_loss as distillation_loss
from .losses import ipo_loss as ipo_loss
from .losses import kl_regularization as kl_regularization
from .losses import kto_pair_loss as kto_pair_loss
from .losses import sft_loss as sft_loss
from .losses import sigmoid_loss as sigmoid_loss
from .trainer import ContrastivePOTrainer as ContrastivePOTrainer
from .training.averaging import BetaMovingAverageCallback as BetaMovingAverageCallback
from .training.callbacks import RobustnessCallback as RobustnessCallback
from .training.checkpoints import last_whole_checkpoint as last_whole_checkpoint

__version__: str
