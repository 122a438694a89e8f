#!/bin/bash
#SBATCH --job-name=ulysses
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
# One process a GPU. USR1 comes 600 s before the time is over: the run saves its step and
# ends with 130, and the job goes back into the queue; so it does where a process was lost
# (75), three times in a row without a new checkpoint at most (launch/requeue.sh). It then
# goes on from its last checkpoint.
#
#     sbatch launch/slurm.sh --config configs/llama3_8b.yaml --run.folder /shared/runs/llama
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
source launch/environment.sh
source launch/requeue.sh
srun --kill-on-bad-exit=0 "${PYTHON:-python}" train.py --quiet "$@"
end $?
