# Sourced by the launchers: finds Python, makes the virtual environment ready, and puts it and an
# MPI launcher on PATH. Quick when nothing changed since the last time.
#
#   EPCOMM_INSTALL=0    use the current environment as it is
#   EPCOMM_PIP_ARGS     further arguments of pip install, such as --index-url=...
#
# shellcheck shell=bash
set -euo pipefail

EPCOMM_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export EPCOMM_ROOT

say() { printf '%s\n' "epcomm: $*" >&2; }
die() { say "$*"; exit 1; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "Python 3.10 or newer is needed; 'python3' is $(python3 --version 2>&1 || true)"
}

# An active environment (venv or conda) is used; otherwise .venv in the repository, made on demand.
activate() {
    if [[ -z ${VIRTUAL_ENV:-} && -n ${CONDA_PREFIX:-} ]]; then
        VIRTUAL_ENV=$CONDA_PREFIX
    elif [[ -z ${VIRTUAL_ENV:-} ]]; then
        VIRTUAL_ENV=$EPCOMM_ROOT/.venv
        if [[ ! -x $VIRTUAL_ENV/bin/python ]]; then
            local python
            python=$(find_python)
            say "making $VIRTUAL_ENV with $("$python" --version)"
            "$python" -m venv "$VIRTUAL_ENV" \
                || die "'$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv"
        fi
    fi
    export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"
    python -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || die "$VIRTUAL_ENV has $(python --version 2>&1); Python 3.10 or newer is needed"
}

# "GPUs SMs CUDA" of what the driver shows; zeros without one. No context is made.
find_gpus() { python3 "$EPCOMM_ROOT/launch/gpus.py"; }

# Whether the tests and benchmarks of the CUDA back end can run here; says why where a GPU is found
# and they cannot.
gpu_job() {
    local gpus
    read -r gpus _ _ < <(find_gpus)
    [[ $gpus -gt 0 ]] || return 1
    local reason
    reason=$(cd "$EPCOMM_ROOT" && python - <<'PY'
try:
    import cupy, torch  # noqa
    from epcomm.cuda import abi
except Exception as error:
    print(error)
else:
    if not abi.available:
        print("libepcomm was built without CUDA: put nvcc on PATH and install again")
    elif torch.version.cuda is None:
        print("torch is a build without CUDA")
PY
    ) || true
    [[ -z $reason ]] || { say "a GPU is here but not used: $reason"; return 1; }
}

# What an installation depends on. The path is part of it, because the installation is editable.
install_key() {
    {
        printf '%s\n' "$EPCOMM_ROOT" "${CXX:-}" "${EPCOMM_CXXFLAGS:-}" "$1"
        cd "$EPCOMM_ROOT"
        find pyproject.toml setup.py launch/requirements.txt csrc -type f -print0 | LC_ALL=C sort -z \
            | xargs -0 sha256sum
    } | sha256sum | cut -d' ' -f1
}

install() {
    local stamp=$VIRTUAL_ENV/.epcomm-installed key extras=bench,test,lint gpus cuda
    read -r gpus _ cuda < <(find_gpus)
    [[ $gpus -eq 0 ]] || extras+=,cuda$((cuda < 13 ? 12 : 13))
    key=$(install_key "$extras")
    if [[ -f $EPCOMM_ROOT/epcomm/libepcomm.so && $(cat "$stamp" 2>/dev/null) == "$key" ]]; then
        return
    fi
    command -v "${CXX:-g++}" >/dev/null \
        || die "a C++17 compiler is needed: '${CXX:-g++}' is not on PATH (set CXX to name another)"
    say "installing epcomm and its dependencies into $VIRTUAL_ENV"
    local -a arguments=(-r "$EPCOMM_ROOT/launch/requirements.txt" -e "${EPCOMM_ROOT}[$extras]")
    # An MPI of the machine is preferred: it knows the interconnect and the batch system.
    command -v mpirun >/dev/null || arguments+=(mpich)
    local -a extra
    read -ra extra <<<"${EPCOMM_PIP_ARGS:-}"
    python -m pip install --quiet ${extra[@]+"${extra[@]}"} "${arguments[@]}"
    printf '%s\n' "$key" >"$stamp"
}

check_mpi() {
    command -v mpirun >/dev/null || die "mpirun is not on PATH; 'pip install mpich' provides one"
    local message
    message=$(python -c 'from mpi4py import MPI' 2>&1) || die "mpi4py does not work with the MPI of" \
        "$(command -v mpirun). If that MPI has its own module or compiler wrapper, load it and try" \
        "'pip install --force-reinstall --no-binary mpi4py mpi4py'. The error was: $message"
}

# Compile the kernels once, before many ranks would compile them at the same time. The stamp lies
# in the folder that holds the compiled kernels, so that who deletes one deletes both.
warm_up() {
    local folder=$EPCOMM_ROOT/epcomm/cpu/__pycache__ key lock
    key=$({
        command -v python
        cd "$EPCOMM_ROOT"
        find epcomm -name '*.py' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    } | sha256sum | cut -d' ' -f1)
    [[ $(cat "$folder/.warm" 2>/dev/null) != "$key" ]] || return 0
    # Numba takes what another process has just put on disk for what it compiled itself, and fails;
    # so of two jobs that start together the second waits.
    mkdir -p "$folder"
    exec {lock}>"$folder/.warm.lock"
    flock --wait 600 "$lock" || say "another job has been compiling the kernels for 10 minutes"
    if [[ $(cat "$folder/.warm" 2>/dev/null) != "$key" ]]; then
        say "compiling the kernels"
        if (cd "$EPCOMM_ROOT" && python -m epcomm.cpu.warmup); then
            printf '%s\n' "$key" >"$folder/.warm"
        else
            say "that failed; every rank will compile them when it needs them"
        fi
    fi
    exec {lock}>&-
}

if [[ -z ${EPCOMM_READY:-} ]]; then
    if [[ ${EPCOMM_INSTALL:-1} != 0 ]]; then
        activate
        install
    elif ! command -v python >/dev/null; then
        PATH=$(python3 -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH
    fi
    check_mpi
    export EPCOMM_READY=1
fi
