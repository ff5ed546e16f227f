from .defense_prefix import learn_prefix as learn_prefix
from .head_ablation import ablate_reading_heads as ablate_reading_heads
from .text_removal import TextRemoval as TextRemoval
