"""Everyday words, for attacks whose word is not a class."""

from importlib.resources import files

EVERYDAY_WORDS = tuple(files("clip_po").joinpath("assets", "everyday_words.txt").read_text().split())
"""Common English nouns in alphabetical order, without animals and vehicles."""
