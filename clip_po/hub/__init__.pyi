from .card import model_card as model_card
from .card import update_card as update_card
from .publishing import push_checkpoint as push_checkpoint
from .publishing import save_pretrained as save_pretrained
from .redaction import redacted as redacted
from .safe_loading import refuse_pickles as refuse_pickles
