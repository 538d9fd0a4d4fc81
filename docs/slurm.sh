#!/usr/bin/env bash
#SBATCH --job-name=flatcensus
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --requeue
# Lets running units finish before the time limit: the script gets SIGTERM ten minutes before it.
#SBATCH --signal=B:TERM@600
#
# One audit on a Ray cluster of the job's own nodes, as in: sbatch slurm.sh audit.toml /shared/runs/audit
# The manifest, its checkpoints and the run folder are on a disk that all nodes share (or the run
# folder is s3://...). Submit it from the activated environment that has flatcensus and its
# dependencies; nodes see the same one. Submitted again, or requeued, it continues.
set -euo pipefail

manifest=${1:?the manifest}
run=${2:?the run folder, on a shared disk or s3://}
port=${FLATCENSUS_RAY_PORT:-6379}
wait_seconds=${FLATCENSUS_WAIT_SECONDS:-120}

# Nobody else on these nodes may give Ray work: a token for this job alone, in a file for its owner.
umask 077
token_file=$(mktemp "${FLATCENSUS_TOKEN_FOLDER:-$HOME}/.flatcensus-token-XXXXXXXX")
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$token_file"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token_file

# Without these five, on every node, Ray misses a node whose packets go nowhere only after minutes.
export RAY_grpc_client_keepalive_time_ms=20000
export RAY_grpc_client_keepalive_timeout_ms=10000
export RAY_health_check_period_ms=3000
export RAY_health_check_timeout_ms=5000
export RAY_health_check_failure_threshold=3

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes[0]}
# A node may have several addresses, of both versions: the first of version 4.
address=$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname --ip-address |
  tr ' ' '\n' | grep -m 1 -E '^[0-9]+(\.[0-9]+){3}$')

on_node() { # in the background: a node's Ray, which lives as long as this script
  local node=$1
  shift
  srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap --export=ALL \
    ray start --block --disable-usage-stats --num-cpus="${SLURM_CPUS_PER_TASK:-1}" "$@" &
  started+=($!)
}

started=()
launch=
# shellcheck disable=SC2329 # called by the trap
finish() {
  for process in "${started[@]}"; do
    kill "$process" 2>/dev/null || true
  done
  rm -f "$token_file"
}
trap finish EXIT
# To the launch, which finishes its running units; a second one stops it at once.
trap '[ -z "$launch" ] || kill -TERM "$launch"' TERM INT

on_node "$first" --head --node-ip-address="$address" --port="$port" --include-dashboard=false
for ((tries = 0; ; tries++)); do
  if ray health-check --address="$address:$port" >/dev/null 2>&1; then
    break
  fi
  if ((tries >= wait_seconds)) || ! kill -0 "${started[0]}" 2>/dev/null; then
    echo "the head of Ray did not start on $first within $wait_seconds tries" >&2
    exit 4
  fi
  sleep 1
done
for node in "${nodes[@]:1}"; do
  on_node "$node" --address="$address:$port"
done

# Attached, on the job's first node, which is in the cluster; slots of nodes that come up later join.
srun --nodes=1 --ntasks=1 --nodelist="$first" --overlap --export=ALL \
  flatcensus launch "$manifest" --run "$run" --on "$address:$port" &
launch=$!
code=0
wait "$launch" || code=$?
while kill -0 "$launch" 2>/dev/null; do # a trap has ended the wait, not the launch
  code=0
  wait "$launch" || code=$?
done
exit "$code"
