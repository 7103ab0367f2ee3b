# shellcheck shell=bash disable=SC2154,SC2034  # variables that the sourcing script sets or reads
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

random_hex() { od -An -vtx1 -N "$1" /dev/urandom | tr -d ' \n'; } # so many bytes

# Where the nodes of this start meet, under which secret, and the files through which they and the batch script speak.
# srun hands its environment to all nodes.
name_meeting_point() {
  SFT_NODE_NAMES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd ' ')
  export SFT_NODE_NAMES MASTER_ADDR=${SFT_NODE_NAMES%% *} MASTER_PORT=$((20000 + 16#$(random_hex 4) % 10000))
  SFT_RUN_SECRET=$(random_hex 16)
  export SFT_RUN_SECRET
  export SFT_MEETING=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  export SFT_STOP_FILE=$run/slurm/stop.$SFT_MEETING SFT_RESULT_FILE=$run/slurm/code.$SFT_MEETING
  local end
  if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then # not told by every Slurm (22.05 does not); a run without a limit has no date
    end=$(squeue -h -j "$SLURM_JOB_ID" -o %e 2>/dev/null | head -n1 || true)
    [[ $end != 2* ]] || SLURM_JOB_END_TIME=$(date -d "$end" +%s)
    export SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-0}
  fi
}

# task.sh on every node, in the background, because bash runs traps only while it waits: a trap that sets `again` ends a
# wait. Leaves the exit code in `status`. Words of the user (srun flags, a container) come from a file, one a line.
# No --unbuffered: it gives the tasks a terminal, and they would draw progress bars.
run_nodes() {
  local words step_pid code
  mapfile -t words <"$run/slurm/srun.args"
  srun --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 --label --cpu-bind=none "${words[@]}" \
    bash "$SFT_HOME/slurm/task.sh" "$run" &
  step_pid=$! status=0
  while true; do
    again='' code=0
    wait "$step_pid" || code=$?
    [[ $code -eq 127 ]] || status=$code # 127: the wait before has had its code already
    [[ -n $again ]] || break
  done
  [[ ! -s $SFT_RESULT_FILE || $(<"$SFT_RESULT_FILE") -eq 0 ]] || status=$(<"$SFT_RESULT_FILE")
  rm -f "$SFT_STOP_FILE" "$SFT_RESULT_FILE"
}
