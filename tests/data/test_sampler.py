"""The order of rows: whole, new each epoch, and the same for every number of processes and every resume."""

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from clip_po.data.sampler import EpochSampler, permutation


def keys(length, multiple, seed=0, epoch=0, drop_last=False):
    sampler = EpochSampler(length, multiple, seed, drop_last)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize(("length", "multiple"), [(13, 4), (12, 4), (3, 8), (1, 1), (1, 5)])
def test_every_row_comes_once_in_an_epoch_before_padding(length, multiple):
    rows = [row for _, position, row in keys(length, multiple) if position < length]
    assert sorted(rows) == list(range(length))


@pytest.mark.parametrize(("length", "multiple", "total"), [(13, 4, 16), (12, 4, 12), (3, 8, 8), (1, 5, 5)])
def test_an_epoch_is_filled_up_to_whole_global_batches_with_rows_of_its_own(length, multiple, total):
    sampler = EpochSampler(length, multiple, seed=0)
    named = list(sampler)
    assert len(named) == len(sampler) == total
    assert [position for _, position, _ in named] == list(range(total))
    assert all(named[position][2] == named[position % length][2] for position in range(total))


@pytest.mark.parametrize(("length", "multiple", "total"), [(13, 4, 12), (12, 4, 12), (3, 8, 8)])
def test_an_incomplete_batch_may_be_dropped_unless_it_is_the_only_one(length, multiple, total):
    named = keys(length, multiple, drop_last=True)
    assert len(named) == total
    assert named == keys(length, multiple)[:total]


def test_order_changes_with_epoch_and_seed_and_repeats_with_them():
    orders = {
        tuple(row for *_, row in keys(50, 1, seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2) for _ in range(2)
    }
    assert len(orders) == 6


def test_keys_carry_the_epoch():
    assert {epoch for epoch, *_ in keys(5, 2, epoch=3)} == {3}


def test_without_a_seed_the_order_is_that_of_the_data_set():
    assert [row for *_, row in keys(5, 3, seed=None, epoch=4)] == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize("processes", [2, 4])
def test_a_step_sees_the_same_rows_whatever_the_number_of_processes(processes):
    def steps(processes):
        share = 8 // processes
        shards = [
            list(
                BatchSamplerShard(
                    BatchSampler(EpochSampler(21, 8, seed=3), share, drop_last=False),
                    num_processes=processes,
                    process_index=process,
                )
            )
            for process in range(processes)
        ]
        return [sorted(key for batch in step for key in batch) for step in zip(*shards, strict=True)]

    assert steps(processes) == steps(1)
    assert len(steps(1)) == 3


def test_an_iteration_starts_anew_so_that_a_resume_only_skips():
    sampler = EpochSampler(10, 4, seed=0)
    first = iter(sampler)
    for _ in range(3):
        next(first)
    assert list(sampler)[3:] == list(first)


@pytest.mark.parametrize("seed", [-1, 0, 2**40])
def test_permutation_holds_every_number_once_for_any_seed(seed):
    assert sorted(permutation(20, seed, 5)) == list(range(20))
