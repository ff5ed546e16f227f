"""clip-po convert: checkpoints of open_clip to transformers, and back."""

from __future__ import annotations

from collections.abc import Sequence

from clip_po.cli.convert_arguments import OPEN_CLIP, ConvertArguments
from clip_po.cli.flags import FlagParser, parse_flags
from clip_po.open_clip import from_open_clip, to_open_clip


def main(argv: Sequence[str]) -> None:
    """Convert a checkpoint, and print where it is and how to load it."""
    (args,) = parse_flags(FlagParser([ConvertArguments], "convert"), argv)
    if args.to == OPEN_CLIP:
        to_open_clip(args.model_name_or_path, args.output_dir)
        print(f"Wrote {args.output_dir}. open_clip loads it as 'local-dir:{args.output_dir}'.")
    else:
        from_open_clip(args.model_name_or_path, args.output_dir, args.arch, args.tokenizer)
        print(f"Wrote {args.output_dir}. Use it as --model_name_or_path of every command.")
