from .queries import load_queries as load_queries
from .report import evaluate_fairness as evaluate_fairness
from .report import fairness_report as fairness_report
