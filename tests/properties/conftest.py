"""Properties that hold for any input: hypothesis looks for one that breaks them, the same inputs in every run."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "clip_po",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    # The tiny model's folder is made once for all examples.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("clip_po")
