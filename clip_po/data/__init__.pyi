from .attacks.typographic import TypographicAttack as TypographicAttack
from .attacks.words import EVERYDAY_WORDS as EVERYDAY_WORDS
from .collator import DataCollatorForContrastivePreference as DataCollatorForContrastivePreference
from .digits import load_digits_dataset as load_digits_dataset
from .loading import load_split as load_split
from .typographic import TypographicPreferences as TypographicPreferences
from .typographic import TypographicStream as TypographicStream
