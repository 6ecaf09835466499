#!/usr/bin/env bash
# Runs a script in several processes of this machine.
#
#     horovod_scripts/run_local.sh 2 examples/distributed_resnet.py --epochs=3
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
PROCESSES=$1; shift
# horovodrun takes what follows for options of its own, such as --network, unless there is a -- before it.
exec horovodrun -np "$PROCESSES" -H "localhost:$PROCESSES" --gloo env -- python "$@"
