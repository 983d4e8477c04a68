#!/bin/sh
# Prints what the CUDA part of a build needs, "NVCC INCLUDE-DIR LIB-DIR", or nothing where CUDA is not
# to be built. The argument is MILPY_CUDA:
#   auto  only where this machine has a CUDA device or driver; what is missing then is said
#   1     whatever the machine has (CI compiles so); a missing piece is named, and "error" printed
# nvcc is CUDA_HOME's, else the one on PATH, else /usr/local/cuda's. Nothing of cuBLAS is needed
# to build: csrc/kernels declares what it calls, and the library is found at run time.
mode=${1:-auto}
missing() {
    echo "milpy: CUDA: $1" >&2
    [ "$mode" = 1 ] && echo error
    exit 0
}
has_device() {
    for path in /dev/nvidia[0-9]* /dev/dxg /usr/lib/*/libcuda.so.1 /usr/lib64/libcuda.so.1 \
        /usr/local/nvidia/lib64/libcuda.so.1; do
        [ -e "$path" ] && return 0
    done
    return 1
}
case $mode in
1) ;;
auto) has_device || exit 0 ;;
*)
    echo "milpy: MILPY_CUDA is \"$mode\", expected auto, 0 or 1" >&2
    echo error
    exit 0
    ;;
esac

packages="cuda-nvcc and cuda-cudart-dev (NVIDIA's apt), or the toolkit, or CUDA_HOME"
for nvcc in "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "$(command -v nvcc)" /usr/local/cuda/bin/nvcc; do
    [ -x "$nvcc" ] && break
    nvcc=
done
[ -n "$nvcc" ] || missing "found no nvcc on PATH, in CUDA_HOME or /usr/local/cuda; expected $packages"
set -- $("$nvcc" --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
[ $((${1:-0} * 100 + ${2:-0})) -ge 1204 ] ||
    missing "found nvcc ${1:-?}.${2:-?} ($nvcc), expected 12.4 or newer"
command -v g++ >/dev/null 2>&1 || missing "found no g++, which nvcc compiles host code with; expected g++"

# nvcc itself knows its toolkit, also where the one on PATH is a wrapper or a wheel's.
top=$("$nvcc" --dryrun -x cu -c /dev/null -o /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
for root in "$top" "$CUDA_HOME" /usr/local/cuda; do
    [ -n "$root" ] && [ -f "$root/include/cuda_runtime_api.h" ] && break
    root=
done
[ -n "$root" ] || missing "found no cuda_runtime_api.h beside $nvcc; expected $packages"
for lib in "$root/lib64" "$root/lib" "$root/targets/$(uname -m)-linux/lib" "$root"/targets/*/lib; do
    [ -f "$lib/libcudart_static.a" ] && break
    lib=
done
[ -n "$lib" ] || missing "found no libcudart_static.a below $root; expected $packages"
echo "$nvcc $root/include $lib"
