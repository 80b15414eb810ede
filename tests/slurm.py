"""What the commands of SLURM would do, on one machine: submitit writes the script, srun sets the variables."""

import os
import sys
from pathlib import Path

SBATCH = """#!{python}
import os, re, subprocess, sys
script = sys.argv[-1]
job = 10_000 + 10 * os.getpid()  # of the array; its jobs have the numbers from there on
asked = dict(re.findall(r"#SBATCH --([a-z-]+)=(\\S+)", open(script).read()))
for index in range(int(asked["array"].partition("-")[2].partition("%")[0]) + 1):
    tasks, nodes = int(asked["ntasks-per-node"]), int(asked["nodes"])
    env = dict(os.environ, SLURM_JOB_ID=str(job + index), SLURM_ARRAY_JOB_ID=str(job), SLURM_ARRAY_TASK_ID=str(index))
    env |= dict(SLURM_JOB_NAME=asked["job-name"], SLURM_NTASKS_PER_NODE=str(tasks), SLURM_NNODES=str(nodes))
    env |= dict(SLURM_NTASKS=str(tasks * nodes), SLURM_JOB_NUM_NODES=str(nodes), SLURM_NODELIST="127.0.0.1")
    out = open(os.devnull, "w")
    subprocess.Popen(["bash", script], env=env, stdout=out, stderr=out, start_new_session=True)
print("Submitted batch job", job)
"""
SRUN = """#!{python}
import os, subprocess, sys
words, files = sys.argv[1:], {}
while words[0].startswith("--"):
    word = words.pop(0)
    if word in ("--output", "--error"):
        files[word] = words.pop(0)
array = os.environ["SLURM_ARRAY_JOB_ID"] + "_" + os.environ["SLURM_ARRAY_TASK_ID"]
tasks = int(os.environ["SLURM_NTASKS_PER_NODE"])
started = []
for rank in range(int(os.environ["SLURM_NTASKS"])):
    env = dict(os.environ, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank % tasks), SLURM_NODEID=str(rank // tasks))
    names = [files[f].replace("%A_%a", array).replace("%t", str(rank)) for f in ("--output", "--error")]
    os.makedirs(os.path.dirname(names[0]), exist_ok=True)  # submitit may not be back from sbatch yet
    out, err = (open(name, "w") for name in names)
    started.append(subprocess.Popen(words, env=env, stdout=out, stderr=err))
sys.exit(max(process.wait() for process in started))
"""
SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
"""


def pretend_slurm(folder: Path) -> str:
    """Makes sbatch, srun and sacct, and returns a PATH that finds them."""
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        path = folder / name
        path.write_text(text.replace("{python}", sys.executable))
        path.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
