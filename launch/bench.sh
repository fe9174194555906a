#!/usr/bin/env bash
# launch/bench.sh [options]: run the benchmark, by default as 2 nodes of 4 ranks on this machine.
# --help lists the options; --ranks decides how many ranks mpirun starts.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$EPCOMM_ROOT"

for argument in "$@"; do
    if [[ $argument == -h || $argument == --help ]]; then
        exec python -m benchmarks.main --help
    fi
done
# MPICH's own default while waiting, sched_yield: a flat all-to-all is fastest with it, and epcomm does
# not depend on it.
export MPIR_CVAR_ENABLE_HEAVY_YIELD=${MPIR_CVAR_ENABLE_HEAVY_YIELD:-0}
ranks=$(python -m benchmarks.options "$@")
exec bash launch/mpirun.sh "$ranks" -m benchmarks.main "$@"
