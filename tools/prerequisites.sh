#!/bin/sh
# Says, by Debian package name, what this machine lacks to build milpy; silent when nothing is missing.
# Run by make before anything else, so it needs no more than a POSIX shell.
CC=${CC:-cc}
PYTHON=${PYTHON:-python3}
packages=
note() {
    echo "milpy: $1" >&2
    packages="$packages $2"
}

if ! command -v "${CC%% *}" >/dev/null 2>&1; then
    note "no C compiler: found no '$CC', expected gcc >= 11 or clang >= 14" gcc
else
    set -- $(printf '#ifdef __clang__\nclang __clang_major__ 14\n#else\ngcc __GNUC__ 11\n#endif\n' |
        $CC -E -P -x c - 2>/dev/null)
    if [ "${2:-0}" -lt "${3:-0}" ] 2>/dev/null; then
        note "C compiler too old: found $1 $2, expected gcc >= 11 or clang >= 14" gcc
    elif ! printf '#include <stdlib.h>\nint main(void) { return 0; }\n' |
        $CC -x c -o /dev/null - 2>/dev/null; then
        note "'$CC' cannot build a program: the C library's headers are absent" libc6-dev
    fi
fi
command -v make >/dev/null 2>&1 || note "no make" make
if ! command -v "$PYTHON" >/dev/null 2>&1; then
    note "no Python: found no '$PYTHON', expected Python >= 3.10" "python3 python3-dev python3-venv"
elif ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    note "Python too old: found $("$PYTHON" -V 2>&1), expected >= 3.10" "python3 python3-dev python3-venv"
else
    "$PYTHON" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        note "no Python headers: found no Python.h for $("$PYTHON" -V 2>&1)" python3-dev
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
        note "Python cannot create a virtual environment: no 'venv' or 'ensurepip'" python3-venv
fi
if [ -n "$packages" ]; then
    echo "milpy: on Debian or Ubuntu: apt-get install$packages" >&2
    exit 1
fi
