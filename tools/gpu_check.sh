#!/bin/sh
# Builds the extension and the ops' shim where they run and tests the ops: no .venv, no pip, no network.
# Needs nvcc, g++, make and a python3 with NumPy, ml_dtypes and pytest. Prints a table last.
#
#   tools/gpu_check.sh [-s] [-p] [pytest arguments, "tests/kernels" by default]
#     -s   the small ones once more under compute-sanitizer: tools/sanitize.sh
#     -p   once more from PTX: CUDA_FORCE_PTX_JIT=1, the portable path
#
# PYTHON, JOBS, GENCODE and the other variables of make are passed on: GENCODE=
# "-gencode=arch=compute_90,code=sm_90 -gencode=arch=compute_80,code=compute_80" halves the time.
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
sanitize=0 ptx=0
while getopts sp option; do
    case $option in
    s) sanitize=1 ;;
    p) ptx=1 ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || set -- tests/kernels
log=$(mktemp -d)
table=$log/table
failed=0

# step NAME COMMAND...: its output to the log and the terminal, its result to the table.
step() {
    name=$1
    shift
    echo "== $name"
    began=$(date +%s)
    { "$@" 2>&1; echo $? >"$log/status"; } | tee "$log/out"
    status=$(cat "$log/status")
    says=$(grep -E '(passed|failed|skipped|error|ERROR SUMMARY).*' "$log/out" | tail -n 1 | tr -d '=' | cut -c 1-90)
    [ "$status" = 0 ] && word=ok || { word="FAILED ($status)" && failed=1; }
    printf '%-22s %-12s %5ss  %s\n' "$name" "$word" $(($(date +%s) - began)) "$says" >>"$table"
}
tests() {
    "$PYTHON" -m pytest -q -rs -p no:cacheprovider "$@"
}

nvidia-smi --query-gpu=name,driver_version,memory.free --format=csv,noheader
"$PYTHON" -c 'import sys, numpy, ml_dtypes; print("python", sys.version.split()[0], "numpy", numpy.__version__)'
step build make MILPY_CUDA=1 PYTHON="$PYTHON" ext build/tests/libshim.so
if [ $failed = 0 ]; then
    step tests tests "$@"
    [ $ptx = 1 ] && step "tests, from PTX" env CUDA_FORCE_PTX_JIT=1 MILPY_CUDA_PATH=portable \
        "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu "$@"
    [ $sanitize = 1 ] && step sanitizers sh tools/sanitize.sh
fi
echo
cat "$table"
rm -rf "$log"
exit $failed
