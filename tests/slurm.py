"""Stand-ins for the commands of SLURM that slurm/*.sh and docs/cluster.md use, for tests on one machine.

`sbatch` runs the tasks of an array one after the other, and each again as often as it is requeued. `srun` starts all
tasks of a step, passes SIGUSR1 on, and ends with the highest exit code. `scontrol` notes what is requeued.
"""

import shutil
import sys
from pathlib import Path

PROGRAMS = {
    "sbatch": """
import itertools, os, re, subprocess, sys
options = [*itertools.takewhile(lambda argument: argument.startswith("--"), sys.argv[1:])]
command = sys.argv[1 + len(options):]
(array,) = [option for option in options if option.startswith("--array=")] or ["--array=0-0"]
first, last = map(int, re.findall(r"\\d+", array))
for task in range(first, last + 1):
    environment = dict(SLURM_JOB_ID=str(4000 + task), SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_TASK_MIN=str(first),
                       SLURM_ARRAY_TASK_COUNT=str(last - first + 1), SLURM_JOB_NODELIST="127.0.0.1")
    while True:
        code = subprocess.call(command, env=os.environ | environment)
        requeued = {folder!r} + "/requeued"
        if code != 75 or not os.path.exists(requeued):
            break
        os.rename(requeued, requeued + ".started")
    if code:
        sys.exit(code)
""",
    "srun": """
import os, re, signal, subprocess, sys
count = int(re.fullmatch(r"--ntasks=(\\d+)", sys.argv[1])[1])
tasks = []
for number in range(count):
    environment = dict(SLURM_PROCID=str(number), SLURM_LOCALID=str(number), SLURM_NTASKS=str(count))
    tasks.append(subprocess.Popen(sys.argv[2:], env=os.environ | environment))
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
""",
    "scontrol": """
import pathlib, sys
if sys.argv[1] == "requeue":
    pathlib.Path({folder!r}, "requeued").write_text(sys.argv[2])
else:
    assert sys.argv[1:3] == ["show", "hostnames"]
    print(sys.argv[3])
""",
}


def install(folder: Path) -> Path:
    """Writes the programs into a folder, which belongs on PATH."""
    folder.mkdir()
    for name, text in PROGRAMS.items():
        path = folder / name
        path.write_text(f"#!{shutil.which(sys.executable)}\n{text.replace('{folder!r}', repr(str(folder)))}")
        path.chmod(0o755)
    return folder
