"""The commands of `clip-po`, one module each."""
