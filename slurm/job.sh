# shellcheck shell=bash disable=SC2154
# What the scripts of a Slurm job share. Sourced with `run` (the run folder) set; everything that a user chose is read
# from files below RUN_DIR/slurm/, so no value is ever part of a script's text.

say() { echo "[slurm $(date +%T) restart ${SLURM_RESTART_COUNT:-0}] $*" >&2; }

# The lines NAME=VALUE of RUN_DIR/slurm/job.env become variables; nothing in them is expanded.
load_environment() {
  local line
  while IFS= read -r line; do
    export "${line%%=*}=${line#*=}"
  done <"$run/slurm/job.env"
}

# The user's `cluster.setup` lines, such as `module load cuda`; they may use variables that are not set.
run_setup() {
  [[ -s $run/slurm/setup.sh ]] || return 0
  set +u
  # shellcheck disable=SC1091  # written by `sft-dist submit`
  source "$run/slurm/setup.sh" || {
    say "error: a line of cluster.setup failed; see $run/slurm/setup.sh"
    exit 2
  }
  set -u
}
