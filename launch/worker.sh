#!/usr/bin/env bash
# One node's share of a run: the one place where sft-dist's launcher, torchrun, accelerate and deepspeed are called.
#
#   launch/worker.sh RECIPE.yaml [MORE.yaml ...] [key=value ...]
#
# SFT_LAUNCHER  local (sft-dist's own, the default: watches for hangs, shows stacks) | torchrun | accelerate | deepspeed
# SFT_NPROC     processes on this node (default: one per visible GPU, else 1)
# SFT_PYTHON    interpreter (default: .venv beside this folder, else python3)
# SFT_FABRIC    network between nodes: auto (default) | none | ethernet | infiniband | efa; see launch/env/
# SFT_NNODES, SFT_NODE_RANK, MASTER_ADDR, MASTER_PORT, SFT_MEETING  for runs over several nodes (the last one: a word that
#               all nodes of this launch share and no other launch uses)
# SFT_PREFLIGHT 1: look at every node before ranks start; only: nothing else; SFT_NODE_NAMES: their names, for complaints
# SFT_STOP_FILE, SFT_EXIT_CODE_FILE  files to use for a stop request and for the exit code (default: temporary ones)
# SFT_RUN_SECRET  32 hexadecimal digits, the same on all nodes: what the keys of the ranks' store begin with
# SFT_GUARD=stdin  the first line of standard input is SFT_RUN_SECRET, every other one asks for a stop; its end means that
#               who started us is gone: all is killed
#
# Exits with sft-dist's codes: launchers turn every code of a worker into 0 or 1, so workers leave theirs in a file.
# SIGTERM, SIGUSR1 and SIGINT ask for a checkpoint and an orderly stop (exit 75); a second SIGINT ends at once.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${SFT_PYTHON:-$here/../.venv/bin/python}
[[ -x $python ]] || python=$(command -v "$python" || command -v python3)
nodes=${SFT_NNODES:-1}
node=${SFT_NODE_RANK:-0}
export SFT_NNODES=$nodes # also tells sft-dist that it is where the run is to be
launcher=${SFT_LAUNCHER:-local}

fail() {
  echo "worker.sh: error: $1" >&2
  exit 2
}

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# The fabric between nodes, as the kernel shows it.
find_fabric() {
  local devices
  devices=$(ls /sys/class/infiniband 2>/dev/null || true)
  case $devices in
    '') echo ethernet ;;
    *efa* | *rdmap*) echo efa ;;
    *) echo infiniband ;;
  esac
}

# Variables of launch/env/FABRIC.env, where nobody has set them already.
adopt_fabric() {
  local line file=$here/env/$1.env
  [[ -r $file ]] || fail "SFT_FABRIC=$1: must be auto, none or one of ethernet, infiniband, efa"
  while IFS= read -r line; do
    [[ $line =~ ^([A-Z][A-Z0-9_]*)=([^#]*[^#[:space:]])([[:space:]]+#.*)?$ ]] || continue
    [[ -n ${!BASH_REMATCH[1]:-} ]] || export "${BASH_REMATCH[1]}=${BASH_REMATCH[2]}"
  done <"$file"
}

[[ $# -gt 0 ]] || fail "usage: worker.sh RECIPE.yaml [key=value ...]"
if [[ ${SFT_GUARD:-} == stdin ]]; then
  IFS= read -r SFT_RUN_SECRET || fail "SFT_GUARD=stdin, and its first line is missing: the secret of this start"
  export SFT_RUN_SECRET
fi
nproc=${SFT_NPROC:-$("$python" -c 'from sft_dist.launch.job import choose_num_processes as n; print(n(None))')}
if [[ $nodes -gt 1 ]]; then
  [[ -n ${MASTER_ADDR:-} && -n ${MASTER_PORT:-} ]] ||
    fail "SFT_NNODES=$nodes needs MASTER_ADDR and MASTER_PORT: the first node's address and a free port there"
  [[ $launcher != deepspeed ]] ||
    fail "SFT_LAUNCHER=deepspeed starts one node only: parallel.strategy=zero1..3 runs with local, torchrun, accelerate"
  fabric=${SFT_FABRIC:-auto}
  [[ $fabric != auto ]] || fabric=$(find_fabric)
  [[ $fabric == none ]] || adopt_fabric "$fabric"
else # nobody outside this machine may connect; what you have set yourself is kept
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else torchrun opens a store on all interfaces for workers to use
fi

# Before any rank starts: can these nodes do it together? 77 and the names of bad nodes when not.
if [[ ${SFT_PREFLIGHT:-0} != 0 ]]; then
  "$python" -m sft_dist.preflight "$@" || exit $?
  [[ $SFT_PREFLIGHT != only ]] || exit 0
fi

case $launcher in
  local) # passes signals on, watches its workers and translates exit codes itself
    command=("$python" -m sft_dist.cli.main train "$@" --nproc "$nproc")
    [[ ${SFT_GUARD:-} == stdin ]] || exec "${command[@]}"
    set -- # they are in the command already
    ;;
  torchrun) # the stop signals are ours: torchrun would kill its workers 30 s after a SIGTERM, and die of SIGUSR1
    command=("$python" -m torch.distributed.run --nproc-per-node "$nproc" --signals-to-handle "SIGHUP,SIGQUIT")
    if [[ $nodes -gt 1 ]]; then
      command+=(--nnodes "$nodes" --node-rank "$node" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
    else # the agent's store is a file: nothing listens on the network
      command+=(--rdzv-backend c10d --rdzv-conf store_type=file --local-addr 127.0.0.1)
    fi
    command+=(-m -- sft_dist.train) # after --, torchrun does not take the recipe's words for abbreviations of its own
    ;;
  accelerate)
    command=("$python" -m accelerate.commands.launch --num_processes $((nproc * nodes)) --num_machines "$nodes")
    if [[ $nodes -gt 1 ]]; then
      command+=(--multi_gpu --machine_rank "$node" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
    elif [[ $nproc -gt 1 ]]; then # on CPUs too: without --multi_gpu accelerate runs the script once
      command+=(--multi_gpu --main_process_port 0 --rdzv_backend c10d --rdzv_conf store_type=file)
    fi
    command+=(-m sft_dist.train)
    ;;
  deepspeed)
    command=("$python" -m deepspeed.launcher.runner --num_gpus "$nproc" --master_port "$(free_port)")
    command+=(--module sft_dist.train)
    ;;
  *) fail "SFT_LAUNCHER=$launcher: must be local, torchrun, accelerate or deepspeed" ;;
esac

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
[[ $nodes -gt 1 ]] || export SFT_RENDEZVOUS=file://$scratch/rendezvous # workers of one machine meet without a port
export SFT_STOP_FILE=${SFT_STOP_FILE:-$scratch/stop} SFT_EXIT_CODE_FILE=${SFT_EXIT_CODE_FILE:-$scratch/exit_code}

interrupts=0
# shellcheck disable=SC2329  # called by the trap
interrupt() {
  : >"$SFT_STOP_FILE"
  interrupts=$((interrupts + 1))
  [[ $interrupts -lt 2 ]] || kill -KILL "$launcher_pid" 2>/dev/null || true
}
trap ': >"$SFT_STOP_FILE"' TERM USR1
trap interrupt INT

# In the background, because bash runs traps only while it waits; deaf to the stop signals, which reach workers by file.
(
  trap '' TERM USR1 INT
  exec "${command[@]}" "$@"
) </dev/null &
launcher_pid=$!

if [[ ${SFT_GUARD:-} == stdin ]]; then
  ( # its own standard input, which bash would else replace for what runs in the background
    while IFS= read -r _; do : >"$SFT_STOP_FILE"; done
    kill -KILL "$launcher_pid" 2>/dev/null || true
  ) <&0 &
  guard_pid=$!
fi

while true; do
  status=0
  wait "$launcher_pid" || status=$?
  kill -0 "$launcher_pid" 2>/dev/null || break
done
[[ -z ${guard_pid:-} ]] || kill "$guard_pid" 2>/dev/null || true

if [[ $launcher == local ]]; then
  exit "$status"
fi
code=$(cat "$SFT_EXIT_CODE_FILE" 2>/dev/null || true)
if [[ -n $code && ($code -ne 0 || $status -eq 0) ]]; then
  exit "$code"
fi
# No word from rank 0: right on another node than the first, where only the launcher's status tells; else a failure.
[[ $status -eq 0 && $node -gt 0 ]] && exit 0
exit 1
