"""The commands of `clip-po`, one file each."""
