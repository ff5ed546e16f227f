"""What commands print: a pipe that closes early stops no work."""

import os
import subprocess
import sys

import pytest
from samples import TINY_RUN, write_parquet


def run_into_closed_pipe(*arguments):
    """Run a command whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        command = [sys.executable, "-m", "clip_po.cli.main", *map(str, arguments)]
        return subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("photos"), train=20, test=8)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]])
def test_help_into_a_closed_pipe_is_no_error(arguments):
    done = run_into_closed_pipe(*arguments)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_evaluation_whose_reader_leaves_writes_its_report(clip_folder, photos, tmp_path):
    data = ["--model_name_or_path", clip_folder, "--dataset_name", photos, "--output_dir", tmp_path]
    done = run_into_closed_pipe("evaluate", *data)
    assert done.returncode == 0
    assert "BrokenPipe" not in done.stderr
    assert {"report.json", "report.html", "answers.parquet", "classes.csv"} <= set(os.listdir(tmp_path))


def test_a_training_whose_reader_leaves_trains_to_its_end(clip_folder, photos, tmp_path):
    data = ["--model_name_or_path", clip_folder, "--dataset_name", photos, "--output_dir", tmp_path]
    done = run_into_closed_pipe("train", *data, *TINY_RUN, "--logging_steps", "1", "--save_strategy", "no")
    assert done.returncode == 0
    assert "BrokenPipe" not in done.stderr
    assert (tmp_path / "model.safetensors").is_file()


def test_an_output_that_fails_otherwise_is_an_error():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "clip_po.cli.main", "train", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0
