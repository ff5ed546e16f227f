from .answer_tables import read_answers as read_answers
from .argilla import read_argilla as read_argilla
from .label_studio import read_label_studio as read_label_studio
