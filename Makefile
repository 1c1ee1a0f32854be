# make demo        README's example: a small language model learns to sort film reviews    (6 to 10 minutes on two cores, after the set-up)
# make test        build the wheel, install it into a clean environment, test it    (19 minutes on two cores; 10 once all is built)
# make quick       the core of everything, in the source tree, for work on the code    (a minute after an edit of Python)
# make t           one test, in the source tree: T=tests/python/layers/test_kinds.py, T='... -k dora', T=GemmTest, T=GemmTest.EverySize
# make style       types and style of Python
# make docs        the book, into build/docs; needs doxygen, too    (half a minute, once all is built)
# make wheel       a wheel for machines like this one; CUDA=ON: with the CUDA library, for all GPUs or for GPUS='75-real;120'
# make nightly     what is too long to wait for: sanitizers, the CUDA library, PEFT's tests, every architecture    (about 50 minutes)
# make clean       delete build/
#
# All need a C++20 compiler and Python >= 3.10 with its headers, and do the rest themselves, inside build/. With
# another Python: make test PYTHON=/usr/bin/python3.

PYTHON ?= python3
# Environments and wheels of one Python. The C++ tests' builds and the demo's results, in build/, are of none.
BUILD := build/$(shell $(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])' 2>/dev/null)
SOURCES := CMakeLists.txt pyproject.toml $(shell find cpp python -type f -not -name '*.so' -not -path '*/__pycache__/*')
GOOGLETEST_DIR ?= /usr/src/googletest
CUDA := OFF
GPUS := all
# CMake's tree of this Python: the wheel's and, in the same tree, that of the optimised C++ tests
TREE := $(BUILD)/release

BUILD_PYTHON := $(BUILD)/venv-build/bin/python
TEST_PYTHON := $(BUILD)/venv-test/bin/python
export PATH := $(abspath $(BUILD)/venv-build/bin):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The builds compile much of the same: wheels of several Pythons, with and without CUDA.
ifneq ($(shell command -v ccache),)
export CMAKE_CXX_COMPILER_LAUNCHER := ccache
export CMAKE_CUDA_COMPILER_LAUNCHER := ccache
endif
JOBS := $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

.PHONY: help demo test quick t t-python t-cpp t-nothing style docs wheel nightly clean \
  module build-cpp test-cpp test-torch-headers test-python versions
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make .*\)/\1/p' $(MAKEFILE_LIST)

demo: $(BUILD)/venv-demo.stamp $(BUILD)/smollm2.stamp $(BUILD)/reviews.stamp
	rm -rf build/demo
	PATH=$(abspath $(BUILD)/venv-demo/bin):$$PATH HF_HUB_OFFLINE=1 $(BUILD)/venv-demo/bin/python -m bench.demo \
	  --reviews $(BUILD)/reviews/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt --out build/demo

test:
	$(MAKE) -j 2 build-cpp $(BUILD)/venv-test-deps.stamp  # a compiler and pip, which waits for the network
	$(MAKE) test-cpp test-torch-headers test-python
	@echo "The instruction sets that were tested, and why not the others:"
	@$(TEST_PYTHON) -m pissa | grep isas_

# A process for each core, with one thread: tests that are about threads ask for them.
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(TEST_PYTHON) -m pytest -n $(JOBS)
# Ours: a file stays in one process, which makes its models once.
OUR_PYTEST = $(PYTEST) --dist loadfile

# Also without our kernels: the ops, a layer of each kind, and a model from its training to an answer.
COMPOSITE := ops layers/test_kinds.py journeys/test_finetune_then_generate.py

test-python: $(BUILD)/venv-test.stamp
	$(TEST_PYTHON) -m pissa
	$(OUR_PYTEST) --durations 20
	PISSA_COMPOSITE=1 $(OUR_PYTEST) -W ignore::pissa.notices.CompositeWarning $(COMPOSITE:%=tests/python/%)

build-cpp: $(BUILD)/tree.stamp
	cmake --build $(TREE)

test-cpp: build-cpp
	ctest --test-dir $(TREE) --output-on-failure -j $(JOBS)

test-torch-headers: $(BUILD)/torch-headers.stamp

# The oldest torch, the newest, and those between that lost or brought a name.
$(BUILD)/torch-headers.stamp: tests/torch_headers.sh $(BUILD)/venv-build.stamp $(wildcard cpp/pissa/*.h cpp/pissa/*/*.h cpp/pissa/torch/*) $(wildcard tests/cpp/cuda_sim/*.h)
	sh tests/torch_headers.sh $(BUILD)/torch-headers $(BUILD_PYTHON)
	touch $@

versions: $(BUILD)/venv-test.stamp
	@$(TEST_PYTHON) tests/python/support/versions.py "$(PASSED)"

# The rules, the ops, a layer of each kind, files, conversion, the command line: in the source tree, with the module out of
# CMake's tree before what the environment may have installed. The first time it installs pissa.
QUICK := $(addprefix rules/test_,rooms.py bases.py peft_private.py cpp_layers.py built_module.py) \
  $(addprefix ops/test_,ops_linear.py ops_nf4.py low_rank.py) layers/test_kinds.py $(addprefix adapters/test_,save.py restore.py) \
  conversion/test_convert_ranks.py cli/test_cli_convert.py

quick: module
	cmake --build $(TREE) --target quick_tests
	[ $(BUILD)/quick-cpp.stamp -nt $(TREE)/tests/cpp/cpu_test ] || \
	  { ctest --test-dir $(TREE) --output-on-failure -j $(JOBS) -L '^(cpu|tiles)$$' && touch $(BUILD)/quick-cpp.stamp; }
	PYTHONPATH=$(abspath python) $(OUR_PYTEST) $(QUICK:%=tests/python/%)

# python/pissa as `PYTHONPATH=python` finds it, with its compiled module.
module: $(BUILD)/tree.stamp $(if $(wildcard $(BUILD)/venv-test.stamp),,$(BUILD)/venv-test.stamp)
	cmake --build $(TREE) --target _C
	cmake -E copy_if_different $(TREE)/_C*.so python/pissa/

# T is a file of the Python tests, with what pytest is to be told besides; or a C++ test's name, or how it begins.
T_PYTHON = $(filter tests/python/%,$(wildcard $(firstword $(subst ::, ,$(T)))))
T_CPP = $(if $(T),$(shell grep -rlE "^TEST(_[FP])?.$(subst .,$(comma) *,$(T))" tests/cpp))
comma := ,
# Which program has the C++ tests of a folder, on a machine without a GPU.
PROGRAM_core := cpu_test
PROGRAM_cpu := cpu_test
PROGRAM_cuda := cuda_sim_test
PROGRAM_cuda_sim := sim_test
T_PROGRAM = $(PROGRAM_$(word 3,$(subst /, ,$(firstword $(T_CPP)))))

t: $(if $(T_PYTHON),t-python,$(if $(T_CPP),t-cpp,t-nothing))

t-python: module
	PYTHONPATH=$(abspath python) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(TEST_PYTHON) -m pytest $(T)

t-cpp: $(BUILD)/tree.stamp
	cmake --build $(TREE) --target $(T_PROGRAM)
	$(TREE)/tests/cpp/$(T_PROGRAM) --gtest_filter='$(T)*:*/$(T)*'

t-nothing:
	@echo "T=$(T): no file of tests/python, no test of tests/cpp. T=tests/python/layers/test_kinds.py is one, T=GemmTest another" >&2
	@exit 1

# With an emulator and a cross compiler also: make test-arm.
nightly: test-cpp-asan test-cpp-tsan macos-wheel test-cuda-build test-gpu-rehearsal test-peft \
  test-python-nightly test-python-isas test-python-without-calls

# Types and style of Python. pre-commit checks the style, too.
style: $(BUILD)/venv-test-deps.stamp
	$(TEST_PYTHON) -m mypy
	$(TEST_PYTHON) -m ruff check .
	$(TEST_PYTHON) -m ruff format --check python tests bench

# The book: docs/ and some pages of bench/, with what the comments of the C++ headers and the docstrings of the installed
# package say. A warning is an error.
docs: tools-docs $(BUILD)/docs.stamp $(BUILD)/venv-test.stamp
	rm -rf build/doxygen build/docs
	doxygen docs/Doxyfile
	$(TEST_PYTHON) -m sphinx --fail-on-warning --keep-going --quiet -c docs -b html . build/docs
	$(TEST_PYTHON) docs/man.py build/docs/pissa.1

wheel: $(if $(filter ON,$(CUDA)),$(BUILD)/wheel-cuda.stamp,$(BUILD)/wheel.stamp)
	@ls $(BUILD)/$(if $(filter ON,$(CUDA)),dist-cuda,dist)/*.whl

clean:
	rm -rf build

include mk/environments.mk mk/wheels.mk mk/nightly.mk
