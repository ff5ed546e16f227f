from .photographs import accuracy_report as accuracy_report
from .photographs import ask_photographs as ask_photographs
from .photographs import candidate_sets as candidate_sets
from .photographs import mean_report as mean_report
from .suite import load_suite as load_suite
from .vl_bias import load_vl_bias as load_vl_bias
