"""A data loader worker that is killed: the error says what happened and what to do."""

import os
import signal

import pytest
import torch
from samples import make_preferences
from torch.utils.data import get_worker_info

from clip_po.data.killed_workers import killed_workers_explained
from clip_po.evaluation.zero_shot import collect_answers


def killed(batch):
    """A transform that the operating system ends, as it does when memory runs out."""
    if get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch


def crashed(batch):
    """A transform in a library that ends its process."""
    if get_worker_info() is not None:
        os._exit(3)
    return batch


def train(make_trainer, end):
    make_trainer(make_preferences(8).with_transform(end), dataloader_num_workers=1, max_steps=2).train()


def evaluate(make_trainer, end):
    rows = make_preferences(8).with_transform(end)
    make_trainer(make_preferences(8), eval_dataset=rows, dataloader_num_workers=1).evaluate()


def predict(make_trainer, end):
    rows = make_preferences(8).with_transform(end)
    make_trainer(make_preferences(8), dataloader_num_workers=1).predict(rows)


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return killed({"pixels": torch.zeros(1)})


def collect(make_trainer, end):
    """As every evaluator does."""
    collect_answers(Items(), lambda batch: batch["pixels"], width=1, batch_size=1, num_workers=1)


@pytest.mark.parametrize("use", [train, evaluate, predict, collect])
def test_a_killed_worker_is_explained(make_trainer, use):
    with pytest.raises(ChildProcessError, match=r"one of 1 workers\) .*memory.*dataloader_num_workers"):
        use(make_trainer, killed)


def test_a_worker_that_ends_itself_is_explained(make_trainer):
    with pytest.raises(ChildProcessError, match=r"pid \d+, one of 1 workers\) ended \(status 3\).*0 workers"):
        train(make_trainer, crashed)


BARE = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of"


def test_full_shared_memory_is_named():
    with pytest.raises(ChildProcessError, match=r"/dev/shm.*--shm-size"), killed_workers_explained(4):
        raise RuntimeError(BARE)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), ValueError("DataLoader worker (pid 7) exited unexpectedly")]
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as passed, killed_workers_explained(1):
        raise error
    assert passed.value is error
