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
# As slurm.sh, in a container (Pyxis and Enroot). The image has this project with its
# extra [gpu]; SHARED is a folder that all nodes see, with the text and the runs.
#
#     IMAGE=registry#project:tag SHARED=/shared sbatch launch/slurm_container.sh \
#         --config configs/llama3_8b.yaml --run.folder /shared/runs/llama
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
source launch/environment.sh
source launch/requeue.sh
srun --kill-on-bad-exit=0 --container-image="${IMAGE:?the image}" \
    --container-mounts="${SHARED:?the shared folder}:$SHARED,$PWD:$PWD" \
    --container-workdir="$PWD" "${PYTHON:-python}" train.py --quiet "$@"
end $?
