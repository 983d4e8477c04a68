#!/bin/sh
# Prints what the CUDA part of a build needs, "NVCC INCLUDE-DIR LIB-DIR", or nothing where CUDA is not
# to be built. The first argument is MILPY_CUDA:
#   0     never
#   auto  only where this machine has a CUDA device or driver; what is missing then is said
#   1     whatever the machine has (CI compiles so); a missing piece is named, and "error" printed
# The second is the Python whose wheels may bring what is missing elsewhere. nvcc is CUDA_HOME's where
# that is set, else the one on PATH, else /usr/local/cuda's, else the wheels'. Nothing of cuBLAS is
# needed to build: csrc/kernels declares what it calls, and the library is found at run time.
case $1 in
-h | --help)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
mode=${1:-auto}
python=${2:-python3}
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
0) exit 0 ;;
1) ;;
auto) has_device || exit 0 ;;
*)
    echo "milpy: MILPY_CUDA is \"$mode\", expected auto, 0 or 1" >&2
    echo error
    exit 0
    ;;
esac

# pip lays CUDA's wheels out as one toolkit: nvidia/cu13.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' 2>/dev/null)
for wheels in "$site"/nvidia/cu[0-9]*; do :; done
# Whoever names a toolkit wants no other one.
[ -z "$CUDA_HOME" ] || [ -x "$CUDA_HOME/bin/nvcc" ] ||
    missing "found no bin/nvcc in CUDA_HOME ($CUDA_HOME), expected a toolkit of CUDA there, or CUDA_HOME unset"
for nvcc in "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "$(command -v nvcc)" /usr/local/cuda/bin/nvcc \
    "$wheels/bin/nvcc"; do
    [ -x "$nvcc" ] && break
    nvcc=
done
# All five of one release: see README.
[ -n "$nvcc" ] || missing "found no nvcc on PATH, in /usr/local/cuda or among the wheels of $python, and \
CUDA_HOME is not set; expected the toolkit, or cuda-nvcc and cuda-cudart-dev (NVIDIA's apt), or \
nvidia-{cuda-nvcc,cuda-cccl,cuda-crt,cuda-runtime,nvvm}'==13.0.*' (pip)"
set -- $("$nvcc" --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
[ $((${1:-0} * 100 + ${2:-0})) -ge 1204 ] ||
    missing "found nvcc ${1:-?}.${2:-?} ($nvcc), expected 12.4 or newer"
command -v g++ >/dev/null 2>&1 || missing "found no g++, which nvcc compiles host code with; expected g++"

# nvcc itself knows its toolkit, also where the one on PATH is a wrapper; Debian's is /usr. Headers of
# another major version are not for it.
top=$("$nvcc" --dryrun -x cu -c /dev/null -o /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
for root in "$top" "$CUDA_HOME" /usr/local/cuda /usr "$wheels"; do
    header=$root/include/cuda_runtime_api.h
    [ -n "$root" ] && grep -Eq "define CUDART_VERSION +$1[0-9]{3}" "$header" 2>/dev/null && break
    root=
done
cudart="expected cuda-cudart-dev (NVIDIA's apt) or nvidia-cuda-runtime (pip, CUDA 13)"
[ -n "$root" ] || missing "found no cuda_runtime_api.h of CUDA $1 for $nvcc; $cudart"
for lib in "$root/lib64" "$root/lib" "$root/lib/$(uname -m)-linux-gnu" \
    "$root/targets/$(uname -m)-linux/lib" "$root"/targets/*/lib; do
    [ -f "$lib/libcudart_static.a" ] && break
    lib=
done
[ -n "$lib" ] || missing "found no libcudart_static.a below $root; $cudart"
[ -f "$root/include/nv/target" ] || [ -f "$root/include/cccl/nv/target" ] ||
    missing "found no nv/target in $root/include; expected cuda-cccl (NVIDIA's apt) or nvidia-cuda-cccl (pip)"
echo "$nvcc $root/include $lib"
