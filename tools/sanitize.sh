#!/bin/sh
# compute-sanitizer over the tests marked `sanitize`: every kernel of the ops at its smallest, under
# memcheck, racecheck, initcheck and synccheck. A process for each tool and file, JOBS (as many as
# cores, at most 14) at a time, which share the GPU: 14 took 32 s where 32 took over 110 s. Needs the
# extension and build/tests/libshim.so. Prints a table. Where compute-sanitizer cannot run here, or is
# not there and MILPY_TEST_GPU is not 1, it says so and ends with 77. Where all that racecheck has
# against a file are hazards inside cuBLAS's own kernels, they are told and do not count.
#
# Memcheck and initcheck are given bare arrays (tests/shim/shim_bare.c): guards and fills would hide
# from them what they look for. MILPY_SHIM_BARE=0 or 1 says it for every tool.
#
#   tools/sanitize.sh [test files, by default those of tests/kernels that hold such a test]
#   TOOLS=racecheck tools/sanitize.sh tests/kernels/test_attention_small.py
case $1 in
-h | --help)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
cd "$(dirname "$0")/.." || exit 1
export PYTHON="${PYTHON:-python3}"
limit_s=1800  # for one process
most=60       # lines shown of a log
padding=65536 # bytes that memcheck adds behind each allocation: the next one may begin right there
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin

# What racecheck found in a log, each pair of places once.
races() {
    grep -A 1 'Race reported' "$1" | grep -o 'Race reported.*\|and \(Read\|Write\) access.*' |
        sed 's/+0x[0-9a-f]*//; s/ \[[0-9]* hazards\]//; s/^Race reported between //' | paste - - | sort | uniq -c
}

# Did the tests pass, and is every error in a log a hazard between two places of cuBLAS's kernels? A
# process that died and a fault of the driver are errors as well. pytest's dots may stand before one.
all_inside_cublas() {
    errors=$(grep -c '=========.*Error' "$1")
    theirs=$(grep -A 1 'Error: Race reported between .* access at nvjet_' "$1" |
        grep -c 'and .* access at nvjet_')
    [ "$errors" -gt 0 ] && [ "$errors" = "$theirs" ] &&
        grep -Eq '^[0-9]+ passed(, [0-9]+ (skipped|deselected|warnings?))* in ' "$1"
}

# --one LOGS TOOL FILE: one process, its output to a file, a line of the table.
if [ "$1" = --one ]; then
    log=$2/$3-$(basename "$4" .py)
    began=$(date +%s)
    options=
    case $3 in memcheck | initcheck) export MILPY_SHIM_BARE="${MILPY_SHIM_BARE:-1}" ;; esac
    [ "$3" = memcheck ] && options="--padding $padding"
    # Both paths launch the same kernels here: the shapes see to it.
    timeout $limit_s compute-sanitizer --tool "$3" $options --error-exitcode 9 --target-processes all \
        "$PYTHON" -m pytest -q -p no:cacheprovider -m sanitize -k "not cuda-portable" "$4" \
        >"$log" 2>&1 && word=ok || word="FAILED ($?)"
    note=
    [ "$word" = "FAILED (124)" ] && note=" ended after $limit_s s;"
    if [ "$3 $word" = "racecheck FAILED (9)" ] && all_inside_cublas "$log"; then
        word=ok note=" all inside cuBLAS;"
    fi
    says=$(grep -E 'SUMMARY|passed|failed|skipped|deselected' "$log" | tr -d '=' | tr -s ' ' | tr '\n' ';')
    printf '%-10s %-24s %-11s %4ss %s\n' "$3" "$(basename "$4" .py)" "$word" $(($(date +%s) - began)) "$says$note"
    [ "$word" = ok ] && exit
    mv "$log" "$log.failed"
    exit 1
fi

if ! command -v compute-sanitizer >/dev/null; then
    echo "found no compute-sanitizer on PATH or in \$CUDA_HOME/bin"
    [ "$MILPY_TEST_GPU" = 1 ] && exit 1
    exit 77
fi
# Under some virtual machines it knows no GPU, whatever it is asked.
opened=$(compute-sanitizer "$PYTHON" -c 'import sys
sys.path[:0] = ["tests", "."]
from helpers.cpu_shim import cuda_paths
cuda_paths()' 2>&1)
case $opened in
*"Device not supported"*) echo "compute-sanitizer says here: Device not supported" && exit 77 ;;
esac
[ $# -gt 0 ] || set -- $(grep -lE 'mark\.sanitize|small\(' tests/kernels/test_*.py)
logs=$(mktemp -d)
jobs=$(nproc)
[ "$jobs" -le 14 ] || jobs=14
for tool in ${TOOLS:-racecheck initcheck memcheck synccheck}; do # the slowest first
    for file in "$@"; do
        echo "$tool $file"
    done
done | xargs -P "${JOBS:-$jobs}" -L 1 sh tools/sanitize.sh --one "$logs"
failed=$?
for log in "$logs"/*.failed; do
    [ -e "$log" ] || continue
    echo "== $(basename "$log")"
    races "$log"
    head -n "$most" "$log"
    lines=$(wc -l <"$log")
    [ "$lines" -le "$most" ] || echo "... and $((lines - most)) more lines"
done
rm -rf "$logs"
exit $failed
