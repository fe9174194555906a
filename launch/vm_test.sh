#!/usr/bin/env bash
# launch/vm_test.sh [pytest arguments]: the fabric's tests with real verbs, in the virtual machine of
# launch/vm.sh. Status 77 = skipped, with the reason on the last line.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$EPCOMM_ROOT"
cache=${EPCOMM_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/epcomm/vm}

# The emulated processor would compile the kernels for minutes. They are compiled here, for a
# processor that both have; the kernels of transfers between nodes by a run over shared memory.
export NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES='' NUMBA_CACHE_DIR=$cache/numba
mkdir -p "$NUMBA_CACHE_DIR"
key=$(find epcomm/cpu epcomm/formats -name '*.py' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum \
    | cat - <(command -v python) | sha256sum | cut -d' ' -f1)
if [[ $(cat "$NUMBA_CACHE_DIR/key" 2>/dev/null) != "$key" ]]; then
    say "compiling the kernels for the virtual machine"
    rm -rf "$NUMBA_CACHE_DIR"
    mkdir -p "$NUMBA_CACHE_DIR"
    PYTHONPATH=$EPCOMM_ROOT timeout 400 python -m epcomm.cpu.warmup
    PYTHONPATH=$EPCOMM_ROOT timeout 400 python tests/fabric/dispatch_combine.py 4 2 proxy/local
    printf '%s\n' "$key" >"$NUMBA_CACHE_DIR/key"
fi

# Plugins that the tests do not use would be imported slowly.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 GLOO_SOCKET_IFNAME=lo PYTHONPATH=$EPCOMM_ROOT
export EPCOMM_VM_TIMEOUT=${EPCOMM_VM_TIMEOUT:-1200}
exec bash launch/vm.sh python -m pytest -p pytest_timeout --confcutdir=tests/fabric --color=no \
    --durations=3 -m "not gpu" tests/fabric "$@"
