# milpy's build, described once: setup.py calls `make ext`, CI and people call the rest.
# Sources are found by room; headers sit beside them and are included from csrc/ down.

# Objects, libmilpy.a and test programs; another BUILD keeps two trees apart. TREE holds what is linked
# with CUDA or without: another TREE keeps those two apart.
BUILD  ?= build/cpu
TREE   := $(if $(filter build/cpu,$(BUILD)),build,$(BUILD))
CC     ?= cc
AR     ?= ar
WERROR ?= 0
SAN    ?=
VENV   := .venv
VPY    := $(VENV)/bin/python
ROOMS  := base ops cpu loader comm layers model scheduler engine

# auto: where this machine has a CUDA device or driver, and nvcc. 0: never. 1: or fail.
MILPY_CUDA ?= auto
CUDA_BUILD ?= $(if $(filter build/cpu,$(BUILD)),build,$(BUILD))/cuda

# The Python that `make ext` builds for: the active environment, else ours, else the system's.
# `make demo`, `make test` and `make install` always use ours.
ifdef VIRTUAL_ENV
PYTHON ?= python3
else
PYTHON ?= $(if $(wildcard $(VPY)),$(VPY),python3)
endif
BASE_PYTHON ?= python3

JOBS ?= $(shell nproc 2>/dev/null || echo 2)
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(JOBS)
endif
MAKEFLAGS += --no-print-directory
# One short line per file; V=1 prints whole commands.
ifneq ($(V),1)
Q := @
endif

# ---- flags ----

WARN     := -Wall -Wextra -Wshadow -Wmissing-prototypes -Wstrict-prototypes -Wvla
ifeq ($(WERROR),1)
WARN     += -Werror
endif
# The float flags are part of the results: see docs/numerics.md. Never fast-math, never -march=native.
NUMERICS := -ffp-contract=off -fno-math-errno -fno-trapping-math
# _GNU_SOURCE because -std=c11 alone hides mmap, pread and thread affinity.
COMMON   := -std=c11 -D_GNU_SOURCE= -fPIC -pthread -fvisibility=hidden $(NUMERICS) $(WARN) -Icsrc
LINK     := -pthread -Wl,-z,relro,-z,now
ifeq ($(SAN),)
OPT      := -O2 -g1 -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2 -fstack-protector-strong
ifneq ($(findstring x86_64,$(shell $(CC) -dumpmachine 2>/dev/null)),)
OPT      += -fstack-clash-protection
endif
# Kernels trust their arguments, and the canaries cost there.
OPT_SIMD := -O3 -g1 -falign-functions=64 -falign-loops=64
else
OPT      := -O1 -g -fno-omit-frame-pointer -fsanitize=$(SAN) -fno-sanitize-recover=all
OPT_SIMD := $(OPT)
LINK     += -fsanitize=$(SAN)
endif

# A *_simd.c file is one body compiled once per instruction set; csrc/cpu picks a table at run time.
FLAGS_scalar     := -DMIL_ISA_SCALAR=1 -DMIL_ISA_NAME=scalar
FLAGS_avx2       := -mavx2 -mfma -mf16c -DMIL_ISA_AVX2=1 -DMIL_ISA_NAME=avx2
FLAGS_512        := -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -DMIL_ISA_AVX512=1
FLAGS_avx512     := $(FLAGS_512) -DMIL_ISA_NAME=avx512
FLAGS_avx512bf16 := $(FLAGS_512) -mavx512bf16 -DMIL_ISA_AVX512BF16=1 -DMIL_ISA_NAME=avx512bf16
ifneq ($(findstring x86_64,$(shell $(CC) -dumpmachine 2>/dev/null)),)
ISAS := scalar avx2 avx512 avx512bf16
else
ISAS := scalar
endif

# The CUDA backend: NVCC, the toolkit's headers and cudart, or nothing. See tools/find_cuda.sh.
FOUND_CUDA :=
ifneq ($(MILPY_CUDA),0)
FOUND_CUDA := $(shell sh tools/find_cuda.sh '$(MILPY_CUDA)' $(PYTHON))
# Three words; none only from auto, so that a script that did not run is no answer either.
ifneq ($(words $(FOUND_CUDA)),$(if $(FOUND_CUDA)$(filter-out auto,$(MILPY_CUDA)),3,0))
$(error MILPY_CUDA=$(MILPY_CUDA): CUDA cannot be built here, see above)
endif
endif
# Said where something is linked: a plain `make` after MILPY_CUDA=1 may link without it again.
WITH      := $(if $(FOUND_CUDA),CUDA,no CUDA)
NVCC      := $(word 1,$(FOUND_CUDA))
CUDA_LINK := $(if $(FOUND_CUDA),-L$(word 3,$(FOUND_CUDA)) -lcudart_static -ldl -lrt)
# The compilers' own folder is not named: it would come before the C++ library's.
CUDA_INCLUDE := $(filter-out /usr/include,$(wildcard $(word 2,$(FOUND_CUDA)) $(word 2,$(FOUND_CUDA))/cccl))
CUDA_INCLUDE := $(addprefix -isystem ,$(CUDA_INCLUDE))
# x.cu runs anywhere: code for sm_80 and sm_90, and PTX for what comes later. x_sm90.cu holds what only
# Hopper has.
GENCODE      ?= -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90 \
	-gencode=arch=compute_80,code=compute_80
GENCODE_SM90 ?= -gencode=arch=compute_90a,code=sm_90a
# Host code without exceptions or guards, so that nothing of libstdc++ is linked.
NVCCFLAGS := -std=c++17 -O3 -lineinfo -Icsrc $(CUDA_INCLUDE) -Xptxas=--warn-on-spills \
	-Xcompiler=-fPIC,-pthread,-fvisibility=hidden,-fno-exceptions,-fno-threadsafe-statics,-Wall,-Wextra
ifeq ($(WERROR),1)
NVCCFLAGS += --Werror=all-warnings
endif
# ptxas only notes that it serialised wgmma: as bad as a spill.
PTXAS_NOTES := $(if $(filter 1,$(WERROR)),C7511|C7517,^never$$)

# ---- what is built ----

SRC      := $(foreach room,$(ROOMS),$(wildcard csrc/$(room)/*.c))
SRC_SIMD := $(filter %_simd.c,$(SRC))
OBJ      := $(patsubst %.c,$(BUILD)/%.o,$(filter-out %_simd.c,$(SRC)))
OBJ_SIMD := $(foreach isa,$(ISAS),$(patsubst %.c,$(BUILD)/%.$(isa).o,$(SRC_SIMD)))
LIB      := $(BUILD)/libmilpy.a
# Stand before the library in a link: their find.o knows CUDA, and the library's is left out.
SRC_CUDA := $(wildcard csrc/kernels/*.cu csrc/kernels/*.c) csrc/ops/find.c
OBJ_CUDA := $(if $(FOUND_CUDA),$(patsubst %,$(CUDA_BUILD)/%.o,$(SRC_CUDA)))
# Changes with what is linked, so that MILPY_CUDA=0 after 1 links again.
LINKED   := $(TREE)/linked

PY_INFO    := $(shell $(PYTHON) -c "import sysconfig as s; print(s.get_config_var('EXT_SUFFIX'), \
	s.get_path('include'))" 2>/dev/null)
EXT_SUFFIX := $(word 1,$(PY_INFO))
# find_spec, because importing NumPy takes a tenth of a second and this line runs often. NumPy 1 has
# its headers elsewhere.
NUMPY_INCLUDE ?= $(shell $(PYTHON) -c "import os; from importlib.util import find_spec as f; \
	path = f('numpy').submodule_search_locations[0] + '/_core/include'; \
	print(path if os.path.exists(path) else '')" 2>/dev/null)
EXT_DIR  ?= milpy
EXT      := $(EXT_DIR)/_C$(EXT_SUFFIX)
SRC_EXT  := $(wildcard csrc/python/*.c)
OBJ_EXT  := $(patsubst %.c,$(BUILD)/py$(EXT_SUFFIX)/%.o,$(SRC_EXT))

TESTS    := $(patsubst tests/c/%.c,$(BUILD)/tests/%,$(wildcard tests/c/test_*.c))
# What pytest reaches the backend's ops through, by ctypes.
SHIM     := $(TREE)/tests/libshim.so
# The extension with late hosts and devices (csrc/ops/chaos.h), and with one of two faults. What asks
# for chaos is compiled again and stands before the objects and the library that it replaces.
CHAOS     := $(TREE)/chaos
SRC_CHAOS := $(shell grep -l 'include "ops/chaos.h"' csrc/*/*.c)
SRC_CHAOS := $(if $(FOUND_CUDA),$(SRC_CHAOS),$(filter-out csrc/kernels/%,$(SRC_CHAOS))) \
	tests/chaos/chaos.c tests/chaos/late_cpu.c \
	$(if $(FOUND_CUDA),tests/chaos/delay.cu tests/chaos/launches.c)
OBJ_CHAOS := $(SRC_CHAOS:%=$(CHAOS)/%.o)
OBJ_CALM  := $(filter-out $(SRC_CHAOS:%=$(CUDA_BUILD)/%.o),$(OBJ_CUDA))
# Calls that come by tests/chaos first.
WRAPPED   := mil_backend_find cudaLaunchKernelExC mil_cuda_lora_shrink mil_cuda_status
CHAOS_EXT := $(foreach kind,late ring fence,$(CHAOS)/$(kind)/_C$(EXT_SUFFIX))
FUZZERS  := $(patsubst tests/fuzz/%.c,$(BUILD)/fuzz/%,$(wildcard tests/fuzz/fuzz_*.c))

.DEFAULT_GOAL := all
.DELETE_ON_ERROR:
.PHONY: all lib ext chaos cuda cuda-all ptx ptx-all codebase install-server install demo test test-c test-ref \
	test-gpu test-gpu-here cuda-found python-found asan tsan fuzz format lint tidy check bench clean help prerequisites FORCE

all: ext           ## the extension, in place (the same as ext)

lib: $(LIB)        ## the C core and the CPU kernels, as a static library

ext: $(if $(SRC_EXT),$(EXT))        ## milpy/_C*.so for PYTHON, linked with the core; after an edit this is enough

chaos: $(CHAOS_EXT)                ## the extension of the order tests: late at random, and broken twice

codebase: lib $(OBJ_CUDA)          ## C core and kernels

# Beside the build that milpy/ holds: what is linked is in a tree of its own. nvcc is looked for before
# pip fetches anything.
cuda: cuda-found                  ## compile every CUDA source and link all of it; needs nvcc, no GPU and no cuBLAS
	@$(MAKE) $(VENV)/.stamp-build
	@$(MAKE) cuda-all MILPY_CUDA=1 TREE=build/with-cuda EXT_DIR=build/with-cuda/milpy PYTHON=$(VPY)

cuda-all: ext chaos $(SHIM) $(TREE)/bench/bench_ops

# What the driver compiles on a GPU that is newer than all that there is code for.
PTX := -gencode=arch=compute_80,code=compute_80
ptx:                              ## extension and shim, portable kernels as PTX alone, in build/ptx: test_gpu.py's stage ptx
	@$(MAKE) ptx-all MILPY_CUDA=1 TREE=build/ptx CUDA_BUILD=build/ptx/cuda EXT_DIR=build/ptx/milpy \
		GENCODE="$(PTX)"

ptx-all: ext $(SHIM)

$(LIB): $(OBJ) $(OBJ_SIMD)
	@rm -f $@
	@mkdir -p $(@D)
	@echo "  ar   $@"
	$(Q)$(AR) rcs $@ $^

# Moved into place, so that a process that has the old file mapped keeps it.
$(EXT): $(OBJ_EXT) $(OBJ_CUDA) $(LIB) $(LINKED)
	@mkdir -p $(@D)
	@echo "  link $@ ($(WITH))"
	$(Q)$(CC) -shared -o $(TREE)/_C.so $(OBJ_EXT) $(OBJ_CUDA) $(LIB) $(LINK) $(CUDA_LINK) \
		-Wl,--exclude-libs,ALL -lm
	@mv -f $(TREE)/_C.so $@

$(foreach room,loader scheduler engine,$(eval $(BUILD)/csrc/$(room)/%.o: ROOM_FLAGS := -Wconversion))

$(OBJ): $(BUILD)/%.o: %.c Makefile
	@mkdir -p $(@D)
	@echo "  cc   $@"
	$(Q)$(CC) $(COMMON) $(OPT) $(ROOM_FLAGS) $(CFLAGS) -MMD -MP -c $< -o $@

CHAOS_CC = $(CC) $(COMMON) $(OPT) $(CFLAGS) -DMIL_CHAOS=1 -Itests/chaos -MMD -MP -MF $(@:.o=.d) \
	$(CUDA_INCLUDE)

$(CHAOS)/%.c.o: %.c Makefile
	@mkdir -p $(@D)
	@echo "  cc   $@"
	$(Q)$(CHAOS_CC) -c $< -o $@

$(CHAOS)/%.cu.o: %.cu Makefile
	@mkdir -p $(@D)
	@echo "  nvcc $@"
	$(Q)$(NVCC) $(NVCCFLAGS) -Itests/chaos $(GENCODE) -DMIL_CHAOS=1 -MMD -MP -MF $(@:.o=.d) -c $< -o $@

# Each fault is one file compiled once more.
OBJ_late  := $(OBJ_CHAOS)
OBJ_ring  := $(CHAOS)/ring/fault.o $(filter-out %/runner.c.o,$(OBJ_CHAOS))
OBJ_fence := $(CHAOS)/fence/fault.o $(filter-out %/scheduler.c.o,$(OBJ_CHAOS))
$(CHAOS)/ring/fault.o: csrc/model/runner.c
$(CHAOS)/ring/fault.o: FAULT := -DMIL_BREAK_RING=1
$(CHAOS)/fence/fault.o: csrc/scheduler/scheduler.c
$(CHAOS)/fence/fault.o: FAULT := -DMIL_BREAK_FENCE=1

$(CHAOS)/ring/fault.o $(CHAOS)/fence/fault.o: Makefile
	@mkdir -p $(@D)
	@echo "  cc   $@"
	$(Q)$(CHAOS_CC) $(FAULT) -c $(filter %.c,$^) -o $@

define chaos_rule
$(CHAOS)/$(1)/_C$(EXT_SUFFIX): $(OBJ_$(1)) $(OBJ_EXT) $(OBJ_CALM) $(LIB) $(LINKED)
	@mkdir -p $$(@D)
	@echo "  link $$@ ($(WITH))"
	$$(Q)$$(CC) -shared -o $$@ $(OBJ_$(1)) $(OBJ_EXT) $(OBJ_CALM) $(LIB) $(LINK) $(CUDA_LINK) \
		-Wl,--exclude-libs,ALL $(WRAPPED:%=-Wl,--wrap=%) -lm
endef
$(foreach kind,late ring fence,$(eval $(call chaos_rule,$(kind))))

define isa_rule
$(patsubst %.c,$(BUILD)/%.$(1).o,$(SRC_SIMD)): $(BUILD)/%.$(1).o: %.c Makefile
	@mkdir -p $$(@D)
	@echo "  cc   $$@"
	$$(Q)$$(CC) $$(COMMON) $$(OPT_SIMD) $$(FLAGS_$(1)) $$(CFLAGS) -MMD -MP -c $$< -o $$@
endef
ifneq ($(SRC_SIMD),)
$(foreach isa,$(ISAS),$(eval $(call isa_rule,$(isa))))
endif

$(LINKED): FORCE
	@mkdir -p $(@D)
	@echo "$(OBJ_CUDA) $(CUDA_LINK)" | cmp -s - $@ || echo "$(OBJ_CUDA) $(CUDA_LINK)" >$@

$(filter %.c.o,$(OBJ_CUDA)): $(CUDA_BUILD)/%.o: % Makefile
	@mkdir -p $(@D)
	@echo "  cc   $@"
	$(Q)$(CC) $(COMMON) $(OPT) $(CFLAGS) -DMIL_WITH_CUDA=1 $(CUDA_INCLUDE) -MMD -MP \
		-MF $(@:.o=.d) -c $< -o $@

$(filter %.cu.o,$(OBJ_CUDA)): $(CUDA_BUILD)/%.o: % Makefile
	@mkdir -p $(@D)
	@echo "  nvcc $@"
	$(Q)$(NVCC) $(NVCCFLAGS) $(if $(filter %_sm90.cu,$<),$(GENCODE_SM90),$(GENCODE)) -MMD -MP \
		-MF $(@:.o=.d) -c $< -o $@ 2>$@.log; status=$$?; cat $@.log >&2; \
		test $$status = 0 && ! grep -Eq '$(PTXAS_NOTES)' $@.log

# Without either the compiler would only name a header.
python-found:
	@$(if $(EXT_SUFFIX),,$(error found no Python at $(PYTHON), expected 3.10 or newer))
	@$(if $(NUMPY_INCLUDE),,$(error found no NumPy 2 or newer in $(PYTHON)))

$(OBJ_EXT): $(BUILD)/py$(EXT_SUFFIX)/%.o: %.c Makefile | python-found
	@mkdir -p $(@D)
	@echo "  cc   $@"
	$(Q)$(CC) $(COMMON) $(OPT) $(CFLAGS) -isystem $(word 2,$(PY_INFO)) -isystem $(NUMPY_INCLUDE) \
		-MMD -MP -c $< -o $@

$(TESTS): $(BUILD)/tests/%: tests/c/%.c $(LIB) Makefile
	@mkdir -p $(@D)
	@echo "  cc   $@"
	$(Q)$(CC) $(COMMON) $(OPT) $(CFLAGS) -Itests/c -MMD -MP $< -o $@ $(LIB) $(LINK) -lm

$(SHIM): $(wildcard tests/shim/*.c tests/shim/*.h csrc/ops/*.h) $(OBJ_CUDA) $(LIB) $(LINKED) Makefile
	@mkdir -p $(@D)
	@echo "  link $@ ($(WITH))"
	$(Q)$(CC) $(COMMON) $(OPT) $(CFLAGS) -Itests/shim -shared $(filter %.c,$^) -o $@.new \
		$(OBJ_CUDA) $(LIB) $(LINK) $(CUDA_LINK) -Wl,--exclude-libs,ALL -lm
	@mv -f $@.new $@

$(FUZZERS): $(BUILD)/fuzz/%: tests/fuzz/%.c $(LIB) Makefile
	@mkdir -p $(@D)
	@echo "  cc   $@"
	$(Q)$(CC) $(COMMON) $(OPT) $(CFLAGS) -Itests/fuzz -MMD -MP $< -o $@ $(LIB) $(LINK) -lm

-include $(OBJ:.o=.d) $(OBJ_SIMD:.o=.d) $(OBJ_CUDA:.o=.d) $(OBJ_EXT:.o=.d) $(OBJ_CHAOS:.o=.d) \
	$(CHAOS)/ring/fault.d $(CHAOS)/fence/fault.d $(TESTS:=.d) $(FUZZERS:=.d)

# ---- set-up: one stamp per extra, so that the second `make test` starts at once ----

prerequisites:
	@CC="$(CC)" PYTHON="$(BASE_PYTHON)" sh tools/prerequisites.sh

# What the build itself needs comes first and without isolation, so that pip compiles nothing twice.
$(VENV)/.stamp-build: | prerequisites
	@echo "== creating $(VENV)"
	$(BASE_PYTHON) -m venv $(VENV)
	sed -n '/^requires = /s/[^"]*\("[^"]*"\)[^"]*/\1 /gp' pyproject.toml | \
		xargs $(VPY) -m pip install --disable-pip-version-check
	@touch $@

# The core compiles while pip downloads.
$(VENV)/.stamp-%: pyproject.toml setup.py | prerequisites
	@echo "== setting up $(VENV) ($*)"
	@$(MAKE) $(VENV)/.stamp-build lib
	$(VPY) -m pip install --disable-pip-version-check --no-build-isolation \
		-e '.$(if $(filter base,$*),,[$*])'
	@touch $@

.PRECIOUS: $(VENV)/.stamp-%

install: $(VENV)/.stamp-base  ## everything, into .venv
	@$(MAKE) ext PYTHON=$(VPY)

install-server: install       ## the server (an alias of install until the server exists)

# ---- run and test ----

demo: $(VENV)/.stamp-base     ## set up, then one batch: the base and three adapters
	@$(MAKE) ext PYTHON=$(VPY)
	$(VENV)/bin/milpy demo $(DEMO_ARGS)

# These are the CPU's tests, and LLM's device is auto: where there is a GPU they must not see it.
NO_GPU := CUDA_VISIBLE_DEVICES=
MARKS ?= not ref and not gpu and not multigpu
test: $(VENV)/.stamp-test     ## set up, then the C tests and every pytest that needs no GPU and no torch
	@$(MAKE) ext PYTHON=$(VPY)
	@$(MAKE) $(SHIM) chaos PYTHON=$(VPY)
	@$(MAKE) test-c
	$(NO_GPU) $(VPY) -m pytest -m "$(MARKS)" $(PYTEST_ARGS)

test-c: $(TESTS)              ## the C tests, linked with the core
	@failed=0; for t in $(TESTS); do echo "== $$t"; ./$$t || failed=1; done; exit $$failed

test-ref: $(VENV)/.stamp-ref  ## compare with transformers and peft, live
	@$(MAKE) ext PYTHON=$(VPY)
	$(NO_GPU) MILPY_TEST_REF=1 $(VPY) -m pytest -m ref $(PYTEST_ARGS)

# Without a GPU all of it skips, and torch need not come for that. With one, what the build needs is
# looked for before torch comes.
ifneq ($(filter test-gpu,$(MAKECMDGOALS)),)
HAS_GPU := $(shell $(BASE_PYTHON) tests/helpers/devices.py)
endif
$(VENV)/.stamp-gpu: | cuda-found
cuda-found:
	@set -- $$(sh tools/find_cuda.sh 1 $(VPY)); test $$# = 3
test-gpu: $(VENV)/.stamp-$(if $(HAS_GPU),gpu,test) ## set up, then all that needs a GPU; skips with the reason where there is none
	@$(MAKE) ext chaos $(SHIM) PYTHON=$(VPY) MILPY_CUDA=$(if $(HAS_GPU),1,0)
	$(if $(HAS_GPU),@$(MAKE) ptx PYTHON=$(VPY))
	$(VPY) tools/test_gpu.py $(PYTEST_ARGS)

test-gpu-here:                ## the same with PYTHON as it is: no .venv, no pip, no network
	@$(MAKE) ext chaos $(SHIM) MILPY_CUDA=1
	@$(MAKE) ptx
	$(PYTHON) tools/test_gpu.py $(PYTEST_ARGS)

asan:                         ## core and C tests again, under ASan and UBSan
	@$(MAKE) test-c BUILD=build/asan SAN=address,undefined

tsan:                         ## core and C tests again, under TSan
	@$(MAKE) test-c BUILD=build/tsan SAN=thread

FUZZ_SECONDS ?= 10
fuzz: $(VENV)/.stamp-test     ## every reader of untrusted bytes, FUZZ_SECONDS each, under ASan
	@$(MAKE) ext PYTHON=$(VPY)
	@$(MAKE) run-fuzzers BUILD=build/asan SAN=address,undefined
	$(VPY) -m pytest tests/fuzz $(PYTEST_ARGS)

.PHONY: run-fuzzers
run-fuzzers: $(FUZZERS)
	@for f in $(FUZZERS); do echo "== $$f"; ./$$f $(FUZZ_SECONDS) || exit 1; done

# ---- form ----

C_FILES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.c csrc/kernels/*.cu csrc/kernels/*.cuh tests/c/*.h tests/c/*.c tests/shim/*.h \
	tests/shim/*.c tests/chaos/*.h tests/chaos/*.c tests/chaos/*.cu tests/fuzz/*.h tests/fuzz/*.c benchmarks/*.h benchmarks/*.c benchmarks/*.cu)

format: $(VENV)/.stamp-dev    ## rewrite C and Python in the house's format
	$(VENV)/bin/clang-format -i $(C_FILES)
	$(VENV)/bin/ruff check --fix-only -q .
	$(VENV)/bin/ruff format .

lint: $(VENV)/.stamp-dev      ## format, types, rooms, symbols: all checked, nothing changed
	@$(MAKE) ext PYTHON=$(VPY)
	$(VENV)/bin/clang-format --dry-run -Werror $(C_FILES)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VPY) tools/check_rooms.py $(LIB) milpy/_C$(EXT_SUFFIX)

tidy: $(VENV)/.stamp-tidy     ## clang-tidy over the core (slow, not part of lint)
	$(VENV)/bin/clang-tidy --quiet $(filter-out %_simd.c,$(SRC)) -- $(COMMON)

check:                        ## what a change must pass: lint, test, asan, with warnings as errors
	@$(MAKE) lint WERROR=1
	@$(MAKE) test WERROR=1
	@$(MAKE) asan WERROR=1

# The ops' driver in C, linked with the CUDA objects: bench_ops.py asks for it with MILPY_CUDA=1.
BENCH_OPS := $(TREE)/bench/bench_ops
$(BENCH_OPS): benchmarks/bench_ops.c $(BENCH_OPS)-read.o $(OBJ_CUDA) $(LIB) $(LINKED) \
		$(wildcard benchmarks/*.h csrc/ops/*.h csrc/kernels/*.h) Makefile
	@mkdir -p $(@D)
	@echo "  cc   $@"
	$(Q)$(CC) $(COMMON) $(OPT) $(CFLAGS) $(CUDA_INCLUDE) $(filter %.c,$^) -o $@ \
		$(BENCH_OPS)-read.o $(OBJ_CUDA) $(LIB) $(LINK) $(CUDA_LINK) -lm

$(BENCH_OPS)-read.o: benchmarks/read_roof.cu benchmarks/read_roof.h Makefile
	@mkdir -p $(@D)
	@echo "  nvcc $@"
	$(Q)$(NVCC) $(NVCCFLAGS) $(GENCODE) -c $< -o $@

bench: $(VENV)/.stamp-base    ## every figure beside its roof, measured in the same round
	@$(MAKE) ext PYTHON=$(VPY)
	$(VPY) -m benchmarks $(BENCH_ARGS)

clean:                        ## build outputs; .venv stays
	rm -rf build milpy/_C*.so milpy.egg-info

help:                         ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | \
		awk -F'\t' '{ printf "make %-16s %s\n", $$1, $$2 }'
