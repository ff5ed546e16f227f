"""The entry point of the command line: fast help and one-line errors."""

import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from clip_po.cli import help as help_pages
from clip_po.cli import main as cli


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "clip_po.cli.main", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], [], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys; from clip_po.cli import main as cli; status = cli.main(sys.argv[1:]); "
        "sys.exit(status or bool({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: clip-po" in done.stdout


TESTED = dict(
    re.findall(r"(?m)^([\w.-]+)==(\S+)", (Path(__file__).parents[2] / "requirements" / "tested.txt").read_text())
)
ON_TESTED_VERSIONS = all(version(name) == TESTED[name] for name in ("transformers", "trl"))


@pytest.mark.skipif(not ON_TESTED_VERSIONS, reason="help texts of transformers and trl differ by version")
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_pages_match_the_arguments(command):
    file = help_pages.files("clip_po").joinpath("assets", "help", f"{command}.txt")
    assert file.read_text() == help_pages.page(command), "stale: run `make help`"


@pytest.mark.skipif(not ON_TESTED_VERSIONS, reason="help texts of transformers and trl differ by version")
@pytest.mark.parametrize("command", help_pages.MAIN_FLAGS)
def test_short_help_pages_match_the_arguments(command):
    file = help_pages.files("clip_po").joinpath("assets", "help", f"{command}-short.txt")
    assert file.read_text() == help_pages.short_page(command), "stale: run `make help`"


def test_help_lists_the_flags_of_the_parser():
    page = help_pages.page("train")
    for flag in (
        "--loss_type",
        "--preset",
        "--lora_r",
        "--learning_rate",
        "--attack_words",
        "--resume_from_checkpoint",
    ):
        assert f"  {flag}" in page


def test_an_unknown_command_is_refused():
    done = run("align")
    assert done.returncode == 2
    assert "'align'" in done.stderr
    assert ", ".join(cli.COMMANDS) in done.stderr


def test_an_error_is_one_line_without_a_traceback():
    start = time.time()
    done = run("train", "--model_name_or_path", "nowhere", "--output_dir", "out")
    assert done.returncode == 2
    assert "--dataset_name is missing" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.time() - start < 60
