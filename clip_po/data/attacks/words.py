"""Everyday words for attacks whose word is no class."""

from importlib.resources import files

EVERYDAY_WORDS = tuple(files("clip_po").joinpath("assets", "everyday_words.txt").read_text().split())
"""Common English nouns of everyday life, in alphabetical order; no animals and no vehicles."""
