#!/bin/sh
# compute-sanitizer over the tests marked `sanitize`: every kernel of the ops at its smallest, under
# memcheck, racecheck, initcheck and synccheck. A process for each tool and file, JOBS (as many as
# cores, at most 14) at a time, which share the GPU: 14 took 32 s where 32 took over 110 s. Needs the
# extension and build/tests/libshim.so. Prints a table, or why there is no compute-sanitizer here (77
# then). Hazards that racecheck sees inside one of cuBLAS's own kernels are told and do not count.
#
#   tools/sanitize.sh [test files, by default those of tests/kernels that hold such a test]
#   TOOLS=racecheck tools/sanitize.sh tests/kernels/test_attention_small.py
cd "$(dirname "$0")/.." || exit 1
export PYTHON="${PYTHON:-python3}"
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin

# What racecheck found in a log, each pair of places once.
races() {
    grep -A 1 'Race reported' "$1" | grep -o 'Race reported.*\|and \(Read\|Write\) access.*' |
        sed 's/+0x[0-9a-f]*//; s/ \[[0-9]* hazards\]//; s/^Race reported between //' | paste - - | sort | uniq -c
}

# --one LOGS TOOL FILE: one process, its output to a file, a line of the table.
if [ "$1" = --one ]; then
    log=$2/$3-$(basename "$4" .py)
    began=$(date +%s)
    # Both paths launch the same kernels here: the shapes see to it.
    compute-sanitizer --tool "$3" --error-exitcode 9 --target-processes all \
        "$PYTHON" -m pytest -q -p no:cacheprovider -m sanitize -k "not cuda-portable" "$4" \
        >"$log" 2>&1 && word=ok || word="FAILED ($?)"
    note=
    if [ "$3 $word" = "racecheck FAILED (9)" ] && ! grep -q ' failed' "$log" &&
        ! races "$log" | sed 's/access at nvjet_//g' | grep -q 'access at'; then
        word=ok note=" all inside cuBLAS;"
    fi
    says=$(grep -E 'SUMMARY|passed|failed|skipped|deselected' "$log" | tr -d '=' | tr -s ' ' | tr '\n' ';')
    printf '%-10s %-24s %-11s %4ss %s\n' "$3" "$(basename "$4" .py)" "$word" $(($(date +%s) - began)) "$says$note"
    [ "$word" = ok ] && exit
    mv "$log" "$log.failed"
    exit 1
fi

command -v compute-sanitizer >/dev/null || { echo "found no compute-sanitizer on PATH" && exit 77; }
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
    [ -e "$log" ] && echo "== $(basename "$log")" && races "$log" && head -n 60 "$log"
done
rm -rf "$logs"
exit $failed
