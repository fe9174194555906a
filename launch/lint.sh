#!/usr/bin/env bash
# launch/lint.sh [--fix]: formatting, style, types and spelling, the same for people and for CI.
# Every check runs, also after one has failed. --fix rewrites what can be rewritten.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$EPCOMM_ROOT"

fix=
if [[ ${1:-} == --fix ]]; then
    fix=1
elif [[ $# -gt 0 ]]; then
    die "usage: launch/lint.sh [--fix]"
fi

# Sources git knows or would add: neither build products nor virtual environments.
mapfile -t native < <(git ls-files --cached --others --exclude-standard -- \
    '*.h' '*.cc' '*.cpp' '*.cu' '*.cuh' | while read -r f; do [[ -f $f ]] && echo "$f"; done)
failed=()

check() {
    local name=$1
    shift
    if "$@"; then
        echo "lint: $name ok"
    else
        echo "lint: $name FAILED"
        failed+=("$name")
    fi
}

check ruff ruff check ${fix:+--fix} .
if [[ -n $fix ]]; then
    check "ruff format" ruff format .
    check clang-format clang-format -i "${native[@]}"
else
    check "ruff format" ruff format --check .
    check clang-format clang-format --dry-run --Werror "${native[@]}"
fi
check mypy mypy
check shellcheck shellcheck --external-sources launch/*.sh launch/vm/*.sh launch/*.sbatch .ci/run
check codespell codespell ${fix:+--write-changes}

[[ ${#failed[@]} -eq 0 ]] || die "lint failed: ${failed[*]}"
