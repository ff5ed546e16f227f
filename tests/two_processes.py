"""Two processes on gloo that run one script after another.

Importing torch and transformers takes longer than any of the scripts, so that one pair of processes serves all tests.
"""

import json
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

TESTS = Path(__file__).parent
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file"]
CONFIG = TESTS.parent / "examples" / "accelerate_configs" / "ddp_cpu.yaml"
PAUSE = 0.02


class TwoProcesses:
    """Started at the first script by accelerate, with the configuration of the examples.

    Args:
        folder: An empty folder for scripts, outcomes and output.
    """

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "log"
        self.launcher, self.jobs = None, 0

    def run(self, script, *arguments):
        """Run a script, given as its path or its text, in both processes and return what they wrote meanwhile."""
        if self.launcher is None:
            self.start()
        job = self.folder / f"{self.jobs}.json"
        if not isinstance(script, Path):
            job.with_suffix(".py").write_text(script)
            script = job.with_suffix(".py")
        self.jobs, begin = self.jobs + 1, self.log.stat().st_size
        job.with_suffix(".part").write_text(json.dumps([str(script), *map(str, arguments)]))
        job.with_suffix(".part").rename(job)
        try:
            said = self.wait_for([job.with_suffix(f".{rank}") for rank in range(2)])
            wrote = self.log.read_bytes()[begin:].decode(errors="replace")
            assert said == ["", ""], "\n".join([*said, wrote[-4000:]])
        except BaseException:
            self.stop()  # a failure of one process leaves the other waiting
            raise
        return wrote

    def wait_for(self, outcomes):
        """Return what each process says of its end, "" if all is well, as soon as both ended or one failed."""
        while True:
            ended = self.launcher.poll() is not None
            said = [outcome.read_text() if outcome.exists() else None for outcome in outcomes]
            if ended or any(said) or None not in said:
                return [text if text is not None else "it did not end" for text in said]
            time.sleep(PAUSE)

    def start(self):
        path = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with socket.create_server(("localhost", 0)) as free:  # another test run may use the default port
            port = free.getsockname()[1]
        command = [sys.executable, *LAUNCH, CONFIG, "--main_process_port", port, __file__, self.folder, self.jobs]
        with self.log.open("ab") as log:
            self.launcher = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)

    def stop(self):
        if self.launcher is not None:
            self.launcher.terminate()  # which ends both processes
            self.launcher.wait()
            self.launcher = None


def serve(folder, number):
    """What each of the two processes does: run the scripts of a folder as they come."""
    import torch
    from accelerate.state import AcceleratorState, PartialState

    torch.set_num_threads(1)
    rank = PartialState(cpu=True).process_index
    torch.distributed.destroy_process_group = lambda group=None: None  # by which scripts end: the next one needs it
    while True:
        job = folder / f"{number}.json"
        if not job.exists():
            time.sleep(PAUSE)
            continue
        sys.argv, environment, failure = json.loads(job.read_text()), dict(os.environ), ""
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            failure = f"it ended with status {end.code}" if end.code else ""
        except BaseException:
            failure = traceback.format_exc()
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(environment)
        sys.stderr.flush()
        sys.stdout.flush()
        outcome = job.with_suffix(f".{rank}")
        outcome.with_suffix(f".part{rank}").write_text(failure)
        outcome.with_suffix(f".part{rank}").rename(outcome)
        number += 1


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
