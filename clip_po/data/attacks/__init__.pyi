from .attack import TypographicAttack as TypographicAttack
from .fonts import training_fonts as training_fonts
from .fonts import unseen_fonts as unseen_fonts
from .words import EVERYDAY_WORDS as EVERYDAY_WORDS
