#!/bin/bash
# One process a host over plain ssh, which takes all GPUs of its host. The project lies at
# the same place on all, with its environment in .venv. Ctrl-C here is Ctrl-C there.
#
#     HOSTS="node0 node1" launch/ssh.sh --config configs/llama3_8b.yaml --run.folder /shared/runs/llama
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
read -ra hosts <<< "${HOSTS:?the hosts, with spaces between them}"
port=${PORT:-1234}
arguments=$(printf ' %q' "$@")
pids=()
for rank in "${!hosts[@]}"; do
    # -tt: a terminal there, so that the process ends with its connection.
    ssh -tt "${hosts[$rank]}" "cd $(printf %q "$PWD") && source launch/environment.sh && \
        exec ${PYTHON:-.venv/bin/python} train.py --quiet \
        --distributed.coordinator ${hosts[0]}:$port \
        --distributed.num-processes ${#hosts[@]} --distributed.process-id $rank$arguments" &
    pids+=($!)
done
trap 'kill -INT "${pids[@]}"' INT TERM
worst=0
for pid in "${pids[@]}"; do
    wait "$pid" || { code=$?; ((code > worst)) && worst=$code; }
done
exit $worst
