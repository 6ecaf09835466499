#!/usr/bin/env bash
# A Slurm job: one process for each task, started by Horovod over Gloo.
#
#     sbatch --nodes=4 --ntasks-per-node=4 horovod_scripts/slurm.sh examples/distributed_resnet.py --epochs=3
#
#SBATCH --job-name=keras_ngd
#SBATCH --output=keras_ngd-%j.log
set -euo pipefail
: "${SLURM_JOB_NODELIST:?this is a job script: sbatch $0 SCRIPT}" "${SLURM_NTASKS_PER_NODE:?give sbatch --ntasks-per-node}"
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/:$SLURM_NTASKS_PER_NODE/" | paste -sd,)
exec "${SLURM_SUBMIT_DIR:-.}/horovod_scripts/run_hosts.sh" "$HOSTS" "$@"
