#!/usr/bin/env bash
# Runs a script on several machines, which this one reaches by ssh without a password, and which have the project and its
# environment in the same places. All slots are used.
#
#     horovod_scripts/run_hosts.sh host1:4,host2:4 examples/distributed_resnet.py --epochs=3
#
# Environment: SSH_PORT (default 22), NETWORK (names of network interfaces; default: those that all machines share).
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
HOSTS=$1; shift
PROCESSES=$(tr ',' '\n' <<<"$HOSTS" | awk -F: '{ n += ($2 == "" ? 1 : $2) } END { print n }')
OPTIONS=(--gloo --ssh-port "${SSH_PORT:-22}")
[ -z "${NETWORK:-}" ] || OPTIONS+=(--network-interfaces "$NETWORK")
# See run_local.sh for the --.
exec horovodrun -np "$PROCESSES" -H "$HOSTS" "${OPTIONS[@]}" env -- "$(command -v python)" "$@"
