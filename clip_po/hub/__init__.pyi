from .publishing import model_card as model_card
from .redaction import redacted as redacted
from .safe_loading import refuse_pickles as refuse_pickles
