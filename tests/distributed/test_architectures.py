"""Two processes train every architecture as one process does, whole or sharded."""

import json
from pathlib import Path

import pytest
from distributed import architectures_worker as worker
from dual_encoders import SUPPORTED, tiny_dual_encoder
from safetensors.torch import load_file
from tolerances import LOGPS, RUNS, rounding
from torch.testing import assert_close
from transformers import AutoModel

from clip_po.training.sharding import SHARDING_IS_EXACT

pytestmark = pytest.mark.slow

LAYOUTS = ["whole", *(["sharded"] if SHARDING_IS_EXACT else [])]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", SUPPORTED)
def test_two_processes_train_as_one(kind, layout, tmp_path, two_processes):
    tiny_dual_encoder(kind, tmp_path / "start")
    worker.main(str(tmp_path / "start"), tmp_path, layout)
    two_processes.run(Path(worker.__file__), tmp_path / "start", tmp_path, layout)
    one, two = (json.loads((tmp_path / f"{layout}-{n}" / "found.json").read_text()) for n in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=RUNS, abs=LOGPS)
    assert two["eval"] == pytest.approx(one["eval"], rel=RUNS, abs=LOGPS)
    assert ("DTensor" in two["kinds"]) == (layout == "sharded")
    weights = [load_file(tmp_path / f"{layout}-{n}" / "model.safetensors") for n in (1, 2)]
    assert weights[0].keys() == weights[1].keys()
    for key, weight in weights[0].items():
        assert_close(weights[1][key], weight, rtol=RUNS, atol=rounding())
    AutoModel.from_pretrained(tmp_path / f"{layout}-2")
