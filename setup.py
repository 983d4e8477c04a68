"""The extension is built by the Makefile; setuptools only says for which Python and where to."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class MakeExt(build_ext):
    """Calls `make ext`: into the tree for an editable install, into build_lib for a wheel."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        target = Path(__file__).parent if in_place else Path(self.build_lib).resolve()
        # A make above this one holds a job server whose descriptors pip has closed.
        env = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}}
        command = ["make", "ext", f"PYTHON={sys.executable}"]
        command += [f"NUMPY_INCLUDE={numpy.get_include()}"]
        if not in_place:
            command += [f"EXT_DIR={target / 'milpy'}"]
        if subprocess.run(command, cwd=Path(__file__).parent, env=env).returncode != 0:
            sys.exit(f"milpy: the build failed: {' '.join(command)}")


setup(
    ext_modules=[Extension("milpy._C", sources=[])],
    cmdclass={"build_ext": MakeExt},
)
