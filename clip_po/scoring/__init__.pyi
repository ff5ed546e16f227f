from .hard_candidates import hard_images as hard_images
from .hard_candidates import hard_texts as hard_texts
from .reward import RewardModel as RewardModel
from .scorer import Scorer as Scorer
