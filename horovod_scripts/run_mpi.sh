#!/usr/bin/env bash
# Runs a script under Open MPI, with a Horovod built by `install_horovod.sh --mpi`.
#
#     horovod_scripts/run_mpi.sh 8 host1:4,host2:4 examples/distributed_resnet.py --epochs=3
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
command -v mpirun >/dev/null || { echo "there is no mpirun: use run_hosts.sh, which needs no MPI" >&2; exit 1; }
PROCESSES=$1 HOSTS=$2; shift 2
EXPORTED=(-x PATH -x HOROVOD_CPU_OPERATIONS=MPI)
# Open MPI takes those of its own everywhere; of these it warns where they are not set.
for name in LD_LIBRARY_PATH PYTHONPATH KERAS_BACKEND; do
  [ -z "${!name:-}" ] || EXPORTED+=(-x "$name")
done
exec mpirun -np "$PROCESSES" -H "$HOSTS" -bind-to none -map-by slot "${EXPORTED[@]}" \
  -mca pml ob1 -mca btl ^openib python "$@"
