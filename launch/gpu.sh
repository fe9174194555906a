#!/usr/bin/env bash
# Run a program with several ranks on this machine's GPUs, under a CUDA MPS of its own:
#
#     bash launch/gpu.sh [-n RANKS] [--sms SMS] [--timeout SECONDS] [--once] PROGRAM [ARGUMENTS...]
#
# Ranks fill one GPU after the other, so that those of a virtual node share one where they can.
# Kernels of ranks that share a GPU wait for each other, so all their thread blocks must be resident
# together: RANKS x SMS per GPU may not exceed its SMs.
# By default 8 ranks and 16 SMs, or as many as fit. --once: PROGRAM is run once and starts the ranks
# itself, as torchrun does; EPCOMM_GPU_RANKS tells it how many share a GPU.
# Exit status: the program's; 2 for wrong arguments; 3 where MPS does not start.
set -euo pipefail

ranks=8 sms='' limit=0 once=
usage() { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    -n) ranks=$2; shift 2 ;;
    --sms) sms=$2; shift 2 ;;
    --timeout) limit=$2; shift 2 ;;
    --once) once=1; shift ;;
    -*) usage ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || usage

read -r gpus device_sms _ < <(python3 "$(dirname "$0")/gpus.py")
[ "$gpus" -gt 0 ] || { echo "gpu.sh: no GPU found" >&2; exit 2; }
per_gpu=$(((ranks + gpus - 1) / gpus))
if [ -z "$sms" ]; then
  sms=$((device_sms / per_gpu < 16 ? device_sms / per_gpu : 16))
fi
if [ $((per_gpu * sms)) -gt "$device_sms" ]; then
  echo "gpu.sh: $per_gpu ranks on a GPU x $sms SMs exceed its $device_sms SMs; pass --sms" \
       "$((device_sms / per_gpu)) or less, or fewer ranks" >&2
  exit 2
fi

# One scratch directory holds the MPS pipes and logs, so that two jobs never meet.
work=$(mktemp -d "${TMPDIR:-/tmp}/epcomm-mps.XXXXXX")
stop() {
  if [ -n "${mps:-}" ]; then
    # After a rank was killed, the server may wait for it for ever: it is given 5 seconds.
    local pid=none request wait
    read -r pid 2>/dev/null <"$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid" || true
    for request in "quit -t 5" quit; do
      echo "$request" | timeout 20 nvidia-cuda-mps-control >/dev/null 2>&1 || true
      for wait in 0.1 0.4 1 2; do
        kill -0 "$pid" 2>/dev/null || break 2
        sleep "$wait"
      done
    done
    kill -KILL "$pid" 2>/dev/null || true
  fi
  rm -rf "$work"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
if [ "$per_gpu" -gt 1 ]; then
  export CUDA_MPS_PIPE_DIRECTORY=$work/pipe CUDA_MPS_LOG_DIRECTORY=$work/log
  mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
  if ! nvidia-cuda-mps-control -d; then
    echo "gpu.sh: MPS did not start; without it, ranks on one GPU take turns and wait for" \
         "each other's time slices" >&2
    exit 3
  fi
  mps=1
fi

# A kernel loaded late would wait for the ones that spin; load all at start.
export CUDA_MODULE_LOADING=EAGER EPCOMM_GPU_SMS=$sms EPCOMM_GPU_RANKS=$per_gpu
cores=$(env -u OMP_NUM_THREADS nproc)
threads=$((cores > ranks ? cores / ranks : 1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} NUMBA_NUM_THREADS=${NUMBA_NUM_THREADS:-$threads}
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
flags=()
if mpirun --version 2>/dev/null | grep -q "Open MPI"; then
  flags=(--oversubscribe --bind-to none)
fi
guard=()
[ "$limit" -gt 0 ] && guard=(timeout --kill-after=5 "$limit")
if [ -n "$once" ]; then
  "${guard[@]}" "$@"
  exit
fi
# shellcheck disable=SC2016  # each rank expands it
"${guard[@]}" mpirun "${flags[@]}" -n "$ranks" bash -c '
  local_rank=${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-${PMI_RANK:-0}}}
  export CUDA_VISIBLE_DEVICES=$((local_rank / EPCOMM_GPU_RANKS))
  exec "$@"' rank "$@"
