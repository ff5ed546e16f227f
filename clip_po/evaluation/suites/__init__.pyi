from .suite import load_suite as load_suite
