from .conversion import from_open_clip as from_open_clip
from .conversion import to_open_clip as to_open_clip
