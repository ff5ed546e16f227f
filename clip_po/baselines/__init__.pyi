from .defense_prefix import learn_prefix as learn_prefix
from .head_ablation import ablate_reading_heads as ablate_reading_heads
from .mirror_mask import mask_by_mirror as mask_by_mirror
from .spelling_projection import learn_spelling_projection as learn_spelling_projection
from .text_removal import TextRemoval as TextRemoval
