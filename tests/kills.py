"""Training that is killed and goes on, run by hand: python tests/kills.py [COUNT [SEED]]

Each row of KINDS trains a tiny configuration, is killed its share of COUNT (25) times and started
again by the same command. Half of the kills come while a file is written, the others at any moment.
At the end weights, averages and optimizer must have the bits of an undisturbed run, else exit code
1. The processes of a killed torchrun must end alone. About a minute a kill on two busy cores.
"""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import REPO, SCENES, ae_command, ldm_command, write_split
from test_running import equal_weights

KINDS = [  # stage, processes, who gets which signals
    ("ae", 1, "process", ["SIGKILL"]), ("ldm", 1, "process", ["SIGKILL"]),
    ("ae", 1, "process", ["SIGTERM"]), ("ldm", 1, "process", ["SIGTERM"]),
    ("ae", 1, "process", ["SIGINT"]), ("ldm", 1, "process", ["SIGINT", "SIGINT"]),
    ("ae", 2, "a rank", ["SIGKILL"]), ("ldm", 2, "torchrun", ["SIGKILL"])]  # fmt: skip
LENGTH = {"ae": "60", "ldm": "40"}  # steps, a few seconds
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
RNG = random.Random()


def wait_for(condition, what, pause=0.0005):
    give_up = time.time() + 120
    while not condition():
        if time.time() > give_up:
            sys.exit(f"2 minutes without {what}")
        time.sleep(pause)


def start(stage, processes, folder, name):
    """Start a training in the run folder `name`; what it prints goes to a file beside it."""
    data, out = folder / "data", folder / name
    flags = ae_command(data, out) if stage == "ae" else ldm_command(data, folder / "ae1", out)
    command = [*(TORCHRUN if processes > 1 else []), f"train_{stage}.py", *flags,
               "--steps", LENGTH[stage], "--eval-every", "5", "--limit", "1"]  # fmt: skip
    with open(f"{out}.txt", "w") as printed:
        return subprocess.Popen([sys.executable, *command], stdout=printed, stderr=printed,
                                cwd=REPO, env=os.environ | ENVIRONMENT)


def kill(process, out, whom, signals):
    """Wait until it trains, then for a random moment; send the signals and wait for the end.
    Returns whether there was something to kill."""
    writing = RNG.random() < 0.5
    for left in out.glob(".*.part") if writing else ():
        left.unlink()  # of the last kill
    files, printed = [*out.glob("*")], Path(f"{out}.txt")
    ended = lambda: process.poll() is not None  # noqa: E731
    wait_for(lambda: ended() or "resuming" in printed.read_text() or [*out.glob("*")] != files,
             "a first step", 0.01)
    moment = time.time() + RNG.uniform(0, 2)
    wait_for(lambda: ended() or time.time() > moment, "a random moment", 0.01)
    if writing:
        wait_for(lambda: ended() or [*out.glob(".*.part")], "a file being written")
    if ended():
        return False
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for name in signals:
        os.kill(int(RNG.choice(ranks)) if whom == "a rank" else process.pid, signal.Signals[name])
        time.sleep(0.02)
    process.wait()
    for rank in ranks:
        wait_for(lambda: not Path("/proc", rank).exists(), f"the end of process {rank}", 0.1)
    return True


def finish(stage, processes, folder, name, count=0, *victim):
    """Train to the end in spite of `count` kills. Returns how many there were and the steps it
    went on from."""
    kills, steps = 0, []
    while True:
        process = start(stage, processes, folder, name)
        killed = kills < count and kill(process, folder / name, *victim)
        failed, printed = process.wait(), Path(f"{folder / name}.txt").read_text()
        steps += re.findall("(?:resuming from|finished at) step ([0-9]+)", printed)
        kills += killed
        if failed and not killed:
            sys.exit(f"{name}: exit code {failed}\n{printed}")
        if not failed:
            return kills, " ".join(steps)


def main(count="25", seed="0"):
    RNG.seed(int(seed))
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for split, scenes in SCENES.items():
            write_split(folder / "data", split, scenes)
        for stage, processes in dict.fromkeys(kind[:2] for kind in KINDS):
            finish(stage, processes, folder, f"{stage}{processes}")
        print("stage  processes  killed    by              kills  identical  went on from step")
        for row, (stage, processes, whom, signals) in enumerate(KINDS):
            share = len(range(row, int(count), len(KINDS)))
            kills, steps = finish(stage, processes, folder, f"killed{row}", share, whom, signals)
            equal = equal_weights(folder / f"killed{row}", folder / f"{stage}{processes}")
            different += not equal
            print(f"{stage:5}  {processes:9}  {whom:8}  {' '.join(signals):14}  {kills:5}  "
                  f"{'yes' if equal else 'NO':9}  {steps}", flush=True)
    sys.exit(bool(different))


if __name__ == "__main__":
    main(*sys.argv[1:])
