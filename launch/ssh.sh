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
pids=() lines=() told=0
trap 'told=1; for line in "${lines[@]}"; do printf "\003" >&"$line"; done' INT TERM
for rank in "${!hosts[@]}"; do
    # -tt: a terminal there, so that the process ends with its connection; Ctrl-C is a
    # letter for it. An ssh that gets the signal itself would end, or ignore it.
    exec {line}> >(trap '' INT; exec ssh -tt "${hosts[$rank]}" "cd $(printf %q "$PWD") && source launch/environment.sh && \
        exec ${PYTHON:-.venv/bin/python} train.py --quiet \
        --distributed.coordinator ${hosts[0]}:$port \
        --distributed.num-processes ${#hosts[@]} --distributed.process-id $rank$arguments")
    pids+=($!) lines+=("$line")
done
worst=0
for pid in "${pids[@]}"; do
    while wait "$pid"; code=$?; ((told)); do told=0; done  # a signal ends a wait
    ((code > worst)) && worst=$code
done
exit $worst
