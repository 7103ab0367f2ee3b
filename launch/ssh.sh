#!/usr/bin/env bash
# A run over several machines without a scheduler: launch/worker.sh on each, by ssh.
#
#   launch/ssh.sh HOSTFILE RECIPE.yaml [MORE.yaml ...] [key=value ...]
#
# HOSTFILE has one machine a line, the one with rank 0 first: `name`, or `name slots=4` for the number of processes there
# (the same everywhere). All machines see this folder and the run folder under the same paths, and ssh asks for nothing.
#
# SFT_SSH       command in front of the host (default: ssh without questions, noticing a dead peer within a minute)
# MASTER_ADDR, MASTER_PORT  where rank 0 listens (default: the first host, and a random port)
# SFT_PASS      names of further variables to hand on; SFT_LAUNCHER, SFT_NPROC, SFT_PYTHON, SFT_FABRIC, SFT_PREFLIGHT,
#               HF_HUB_OFFLINE, PYTHONPATH, CUDA_VISIBLE_DEVICES, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME always are
#
# SIGTERM, SIGUSR1 and SIGINT ask for a checkpoint and an orderly stop (exit 75). When one machine fails, the others end too.
# When this script dies, in whatever way, the remote ends of its pipes close, and worker.sh kills what it has started.
# Nothing is restarted: run the same command again to continue. Exits with the first machine's code; where it has none,
# with that of the machine that failed first.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read -r -a ssh <<<"${SFT_SSH:-ssh -T -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4}"
GRACE_SECONDS=${SFT_GRACE_SECONDS:-30} # for the others to notice that a machine has failed, before they are ended

fail() {
  echo "ssh.sh: error: $1" >&2
  exit 2
}

random_hex() { od -An -vtx1 -N "$1" /dev/urandom | tr -d ' \n'; } # so many bytes

[[ $# -gt 1 ]] || fail "usage: ssh.sh HOSTFILE RECIPE.yaml [key=value ...]"
[[ -r $1 ]] || fail "$1: no such host file"
hosts=() slots=()
while read -r host rest; do
  [[ -n $host && $host != \#* ]] || continue
  [[ $host =~ ^[A-Za-z0-9_.@:-]+$ && $host != -* ]] || fail "$1: $host: not the name of a machine"
  [[ -z $rest || $rest == \#* || $rest =~ ^slots=([0-9]+)$ ]] || fail "$1: $host $rest: write slots=N, or nothing"
  hosts+=("$host")
  slots+=("${BASH_REMATCH[1]:-}")
done <"$1"
shift
[[ ${#hosts[@]} -gt 0 ]] || fail "the host file names no machine"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
SFT_NODE_NAMES="${hosts[*]}" SFT_MEETING="ssh-$(date +%s)-$$-$RANDOM"
export SFT_NODE_NAMES SFT_MEETING SFT_NNODES=${#hosts[@]} SFT_GUARD=stdin
export MASTER_ADDR=${MASTER_ADDR:-${hosts[0]#*@}} MASTER_PORT=${MASTER_PORT:-$((20000 + 16#$(random_hex 4) % 10000))}
handed_on="SFT_LAUNCHER SFT_NPROC SFT_PYTHON SFT_FABRIC SFT_PREFLIGHT SFT_NODE_NAMES SFT_NNODES SFT_GUARD SFT_MEETING"
handed_on+=" MASTER_ADDR MASTER_PORT HF_HUB_OFFLINE PYTHONPATH CUDA_VISIBLE_DEVICES"
handed_on+=" GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME ${SFT_PASS:-}"

# The line that the remote shell reads; every word is quoted.
remote_line() {
  local name words=(env "SFT_NODE_RANK=$1")
  [[ -z ${slots[$1]} ]] || words+=("SFT_NPROC=${slots[$1]}")
  for name in $handed_on; do
    [[ -z ${!name+set} || ($name == SFT_NPROC && -n ${slots[$1]}) ]] || words+=("$name=${!name}")
  done
  shift
  printf 'cd %q && exec' "$PWD"
  printf ' %q' "${words[@]}" bash "$here/worker.sh" "$@"
}

# A pipe to each machine: its first line is the secret that the ranks' keys begin with (on a command line everybody on the
# machine could read it), every other line asks for a stop, its end ends all there. The ssh of one machine must not hold the
# pipes of others open.
pids=() pipes=() secret=$(random_hex 16)
for i in "${!hosts[@]}"; do
  mkfifo "$scratch/in.$i"
  (
    for pipe in "${pipes[@]}"; do exec {pipe}>&-; done
    exec "${ssh[@]}" "${hosts[$i]}" "$(remote_line "$i" "$@")"
  ) <"$scratch/in.$i" &
  pids+=($!)
  exec {pipe}>"$scratch/in.$i"
  (echo "$secret" >&"$pipe") 2>/dev/null || true # of a machine that is gone already its ssh tells
  pipes+=("$pipe")
done

# shellcheck disable=SC2329  # called by the traps
stop_all() {
  local pipe
  for pipe in "${pipes[@]}"; do (echo stop >&"$pipe") 2>/dev/null || true; done
}
end_all() {
  local pipe
  for pipe in "${pipes[@]}"; do exec {pipe}>&-; done
  pipes=()
}
interrupts=0
# shellcheck disable=SC2329  # called by the trap
interrupt() {
  interrupts=$((interrupts + 1))
  if [[ $interrupts -lt 2 ]]; then stop_all; else end_all; fi
}
trap stop_all TERM USR1
trap interrupt INT
trap '' PIPE # a machine that has ended must not end this script

mkfifo "$scratch/never"
exec {never}<>"$scratch/never"

codes=() num_ended=0 first_failure=0 deadline=''
for i in "${!hosts[@]}"; do codes+=(''); done
while [[ $num_ended -lt ${#hosts[@]} ]]; do
  for i in "${!hosts[@]}"; do
    if [[ -n ${codes[$i]} ]] || kill -0 "${pids[$i]}" 2>/dev/null; then continue; fi
    code=0
    wait "${pids[$i]}" || code=$?
    codes[i]=$code num_ended=$((num_ended + 1))
    if [[ $code -ne 0 && $code -ne 75 ]]; then
      echo "ssh.sh: ${hosts[$i]} (node $i) ended with $code" >&2
      [[ $first_failure -ne 0 && $first_failure -lt 128 ]] || first_failure=$code
      deadline=${deadline:-$((SECONDS + GRACE_SECONDS))}
    fi
  done
  if [[ -n $deadline && $SECONDS -ge $deadline && ${#pipes[@]} -gt 0 && $num_ended -lt ${#hosts[@]} ]]; then
    echo "ssh.sh: ending the other machines" >&2
    end_all
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done # the ssh of a machine that cannot be reached
  fi
  read -r -t 0.2 -u "$never" || true # a pause that starts no process
done

# Codes from 128 on are a signal's or ssh's own (255: no connection): they tell nothing that the caller could use.
code=$first_failure
[[ ${codes[0]} -eq 0 || ${codes[0]} -ge 128 ]] || code=${codes[0]}
[[ $code -lt 128 ]] || code=1
exit "$code"
