#!/usr/bin/env bash
# One node's task of a Slurm job: task.sh RUN_DIR
#
# Slurm signals only this process where proctrack/cgroup is used, and all of its children elsewhere. Either way stopping
# is asked for by the file SFT_STOP_FILE, which the batch script makes; so the signals themselves are ignored here.
set -euo pipefail

run=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=slurm/job.sh
source "$here/job.sh"
load_environment
run_setup
export SFT_NNODES=$SLURM_STEP_NUM_NODES SFT_NODE_RANK=$SLURM_NODEID
trap '' TERM USR1

if [[ ${SFT_STEP:-train} == prepare ]]; then
  "$SFT_PYTHON" -m sft_dist.cli.main data prepare "$run/slurm/recipe.yaml"
  exec "$SFT_PYTHON" -m sft_dist.cli.main data plan "$run/slurm/recipe.yaml"
fi

code=0
bash "$here/../launch/worker.sh" "$run/slurm/recipe.yaml" || code=$?
# Rank 0 leaves its code in SFT_RESULT_FILE; where no rank came that far, the first node with a code of ours does.
[[ $code -le 1 ]] || (set -o noclobber && echo "$code" >"$SFT_RESULT_FILE") 2>/dev/null || true
[[ $code -ne 75 ]] || exit 0 # an orderly stop must not make srun kill the nodes that are still about it
exit "$code"
