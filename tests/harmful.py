"""What a pickle may do."""

from pathlib import Path


class Program:
    """What a pickle does that was made to do harm: it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)
