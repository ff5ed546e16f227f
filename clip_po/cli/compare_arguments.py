"""Flags and recipe of `clip-po compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from clip_po.cli.arguments import TaskArguments, read_mapping
from clip_po.cli.compare_methods import METHODS, check_settings
from clip_po.cli.flags import FlagParser, flag_value, without_config
from clip_po.evaluation.bounds import check_bound

RECIPE_KEYS = ("methods", "attacks", "training")
"""Keys of a recipe that are not flags: settings of each method, of each attack, and of all trained methods."""

REQUIRED = ("model_name_or_path", "output_dir", "dataset_validation_split")
"""Flags without a usable default."""

DEFAULT_ATTACKS: Mapping[str, Mapping[str, Any]] = {"class words": {}}


@dataclass
class CompareArguments(TaskArguments):
    """Flags of `clip-po compare`. The methods to compare are in the recipe."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The model before alignment."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the results, the report, the table and the plots."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds to run each method with."})
    dataset_validation_split: str | None = field(
        default=None, metadata={"help": "Split to select settings on; no method trains on it."}
    )
    max_test_samples: int | None = field(
        default=None, metadata={"help": "Number of test images to measure on, drawn at random; default: all."}
    )
    max_clean_cost: float = field(
        default=0.5, metadata={"help": "Largest clean cost of the best method, in percentage points."}
    )
    retention: list[str] | None = field(
        default=None,
        metadata={
            "help": "Also measure what each method keeps of other tasks: sets of images, as for clip-po evaluate. "
            "They give the columns retention cost and drift, and a plot of recovery against retention cost."
        },
    )
    renderings: int = field(default=1, metadata={"help": "Number of attacked copies of each test image."})
    batch_size: int = field(default=256, metadata={"help": "Number of images in a forward pass."})
    test_seed: int = field(default=1000, metadata={"help": "Seed of the attacks on the test images."})

    def __post_init__(self) -> None:
        """Raise if a flag is missing or cannot work, before anything is loaded."""
        super().__post_init__()
        self.check_single_prompt()
        check_bound(self.max_clean_cost)
        if self.attack_fonts is not None:
            raise ValueError(
                "--attack_fonts would set the same fonts for training and test images, but test images use fonts that "
                "training has not seen. Leave it out, or set fonts under attacks: in the recipe."
            )
        for name in REQUIRED:
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is missing. Pass it as a flag or set it in the recipe.")

    def measurement_settings(self) -> dict[str, Any]:
        """Return the flags that every stored result depends on.

        Returns:
            Values by name.
        """
        free = ("output_dir", "seeds", "max_clean_cost", "batch_size")
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass(frozen=True)
class Recipe:
    """The methods and attacks to compare.

    Attributes:
        methods: Settings of each method, by the name of its row in the table.
        attacks: Settings of each attack, by name. The first one gives recovery.
        training: Flags of `clip-po train` shared by all trained methods.

    Raises:
        ValueError: If the recipe names no methods, an unknown method, or settings of the wrong type.
    """

    methods: Mapping[str, Mapping[str, Any]]
    attacks: Mapping[str, Mapping[str, Any]]
    training: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Check every method before the first one runs."""
        for key, settings in (("methods", self.methods), ("attacks", self.attacks)):
            if not isinstance(settings, Mapping) or not all(isinstance(s, Mapping) for s in settings.values()):
                raise ValueError(
                    f"{key} must map names to settings, such as DPO: {{loss_type: sigmoid}}, or {{}} for none. "
                    f"Got {settings!r}."
                )
        if not isinstance(self.training, Mapping):
            raise ValueError(f"training must map flags of clip-po train to their values, got {self.training!r}.")
        if not self.methods:
            raise ValueError("The recipe names no methods. Add at least one under methods:, such as DPO: {}.")
        names = list(self.methods)
        for name, settings in self.methods.items():
            method, aligned = settings.get("method", "train"), settings.get("of")
            if method not in METHODS:
                raise ValueError(f"methods: {name!r} has method {method!r}. Choose one of {sorted(METHODS)}.")
            if method == "interpolation" and aligned not in names[: names.index(name)]:
                raise ValueError(
                    f"methods: {name!r} interpolates towards {aligned!r}, which is not a method above it. Set of: to "
                    "the name of a method above it."
                )


def parse(argv: Sequence[str]) -> tuple[CompareArguments, Recipe]:
    """Parse the flags and the recipe. Flags override the recipe.

    Args:
        argv: Command line after `clip-po compare`. It must contain --config.

    Returns:
        The flags and the recipe.

    Raises:
        ValueError: If --config is missing, the recipe has unknown keys, or a flag or setting is invalid.
        OSError: If the recipe is not readable.
    """
    file = flag_value("config", argv)
    if file is None:
        raise ValueError("--config is missing. Pass a YAML recipe with methods, such as examples/compare.yaml.")
    settings = read_mapping(file)
    named = {key: settings.pop(key) for key in RECIPE_KEYS if key in settings}
    recipe = Recipe(**{"attacks": DEFAULT_ATTACKS, "methods": {}, "training": {}, **named})
    parser = FlagParser([CompareArguments], "compare")
    parser.check_recipe(settings, file)
    parser.set_defaults(**settings)
    flags = without_config(argv)
    parser.check_flags(flags)
    (args,) = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    shared = {"dataset_name": args.dataset_name, "output_dir": args.output_dir, **recipe.training}
    for name, found in recipe.methods.items():
        try:
            check_settings(shared, **found)
        except (ValueError, TypeError) as error:
            raise ValueError(f"methods: {name!r}: {error}") from error
    return args, recipe
