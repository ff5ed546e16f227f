"""What every kind of `clip-po evaluate` shares."""

from types import SimpleNamespace

import pytest

from clip_po.cli.evaluate_common import Models


@pytest.mark.parametrize("is_main", [True, False])
def test_only_the_process_that_writes_the_report_computes_it(is_main):
    calls = []
    evaluator = SimpleNamespace(resamples=7, report=lambda *arguments: calls.append(arguments) or {"aligned": {}})
    models = Models({"base": None, "aligned": None}, None, SimpleNamespace(is_main_process=is_main))
    assert models.report(evaluator, {"aligned": 1}) == ({"aligned": {}} if is_main else {})
    assert calls == ([({"aligned": 1}, "base", 7)] if is_main else [])
