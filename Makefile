# make            ./train_gpt2 and libgpt2.so, for this machine's processor
# make test       sets up .venv with what the tests need, then runs them
# make bench      times a training step, side by side with PyTorch where that is installed
# make cuda       ./train_gpt2cu and libgpt2cu.so, for NVIDIA GPUs; `make` does it where nvcc and a GPU are found
# make emulated   train_gpt2.cu for a GPU that is emulated, see dev/cuda/emulate.h; needs a C++ compiler; for tests
# make fuzz       hands damaged files to every reader, for FUZZ_SECONDS=60 in all; needs clang (FUZZ_CC=clang-14)
# make memcheck   runs the tests of the library, and the binary, under valgrind
# make clean      removes what was built (not your runs, not the data)
#
#   CC=clang            another compiler
#   ARCH=native         what to compile for: native, or avx512, avx2, x86-64, or any value of -march
#   OPENMP=0            without threads (found out by itself otherwise)
#   SANITIZE=1          with AddressSanitizer and UBSan
#   BUILD=DIR           where the results go (here)
#   FP32=1              with make cuda: in fp32, to verify with; the names end in _fp32
#   CUBLAS=DIR          cuBLASLt's include and lib, where the CUDA toolkit has none (pip install nvidia-cublas)
#   CUDA_ARCHS='80 90'  GPUs to compile for; found out by itself, or these two

CC ?= cc
ARCH ?= native
BUILD ?= .
PYTHON ?= python3
VENV ?= .venv

march_avx512 = x86-64-v4
march_avx2 = x86-64-v3
MARCH = $(or $(march_$(ARCH)),$(ARCH))

# No -ffast-math: it may drop the order of sums and the checks for NaN. Only errno of sqrtf is not wanted.
WARNINGS = -Wall -Wextra
CFLAGS = -O3 -std=gnu11 -march=$(MARCH) -fno-math-errno $(WARNINGS) $(EXTRA)
ifeq ($(SANITIZE),1)
CFLAGS += -g -fsanitize=address,undefined -fno-sanitize-recover=all
endif

# Does this compiler know -march, and can it link OpenMP?
try = $(shell printf '%s\n' 'int main(void) { return 0; }' | $(CC) $(1) -x c - -o /dev/null 2>/dev/null && echo yes)
ifneq ($(call try,-march=$(MARCH)),yes)
CFLAGS := $(filter-out -march=%,$(CFLAGS))
endif
OPENMP ?= $(if $(call try,-fopenmp),1,0)
ifeq ($(OPENMP),1)
CFLAGS += -fopenmp
else
CFLAGS += -Wno-unknown-pragmas
endif

.PHONY: all cuda emulated test bench fuzz memcheck clean
all: $(BUILD)/train_gpt2 $(BUILD)/libgpt2.so

# The GPU's half comes from nvcc; the host half is train_gpt2.c without its model. Looking for a device file takes
# no time where there is none. A toolkit without cuBLASLt does not count, unless CUBLAS says where that is.
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc) nvcc)
GPU = $(wildcard /dev/nvidia[0-9])
ifneq ($(GPU),)
ifneq ($(wildcard $(CUBLAS)/include/cublasLt.h $(dir $(NVCC))../include/cublasLt.h \
	$(dir $(realpath $(NVCC)))../include/cublasLt.h),)
all: cuda
endif
endif

CUDA_BUILD ?= build/cuda
CUDA_SUFFIX = $(if $(filter 1,$(FP32)),_fp32)
CUDA_FOUND = $(if $(GPU),$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | tr -d . | sort -u))
CUDA_ARCHS ?= $(or $(CUDA_FOUND),80 90)
CUDA_LAST = $(lastword $(CUDA_ARCHS))
NVCC_FLAGS = -O3 -std=c++17 $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) \
	-gencode arch=compute_$(CUDA_LAST),code=compute_$(CUDA_LAST) -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra \
	$(if $(CUBLAS),-I$(CUBLAS)/include) $(if $(CUDA_SUFFIX),-DGPT2_FP32,-ftz=true) $(NVCC_EXTRA)
CUDA_LIBS = $(if $(CUBLAS),-Xlinker $(firstword $(wildcard $(CUBLAS)/lib/libcublasLt.so*)) -Xlinker -rpath=$(abspath $(CUBLAS))/lib,-lcublasLt) \
	$(if $(filter 1,$(OPENMP)),-Xcompiler -fopenmp)

cuda: $(BUILD)/libgpt2cu$(CUDA_SUFFIX).so $(BUILD)/train_gpt2cu$(CUDA_SUFFIX)

# The host half, as a part of a library and of a program; for the emulated GPU further down too.
EMULATED ?= build/emulated
$(CUDA_BUILD)/host.o $(EMULATED)/host.o: train_gpt2.c Makefile
	mkdir -p $(@D)
	$(CC) $(CFLAGS) -fPIC -fvisibility=hidden -DGPT2_NO_MODEL -DGPT2_NO_MAIN -c -o $@ train_gpt2.c

$(CUDA_BUILD)/main.o $(EMULATED)/main.o: train_gpt2.c Makefile
	mkdir -p $(@D)
	$(CC) $(CFLAGS) -DGPT2_NO_MODEL -c -o $@ train_gpt2.c

$(CUDA_BUILD)/model$(CUDA_SUFFIX).o: train_gpt2.cu train_gpt2.c Makefile
	mkdir -p $(CUDA_BUILD)
	$(NVCC) $(NVCC_FLAGS) -c -o $@ train_gpt2.cu

$(BUILD)/libgpt2cu$(CUDA_SUFFIX).so: $(CUDA_BUILD)/model$(CUDA_SUFFIX).o $(CUDA_BUILD)/host.o
	$(NVCC) -shared -o $@ $^ $(CUDA_LIBS)

$(BUILD)/train_gpt2cu$(CUDA_SUFFIX): $(CUDA_BUILD)/model$(CUDA_SUFFIX).o $(CUDA_BUILD)/main.o
	$(NVCC) -o $@ $^ $(CUDA_LIBS)

$(CUDA_BUILD)/profile$(CUDA_SUFFIX): dev/cuda/profile.cu train_gpt2.cu $(CUDA_BUILD)/host.o
	$(NVCC) $(NVCC_FLAGS) -o $@ dev/cuda/profile.cu $(CUDA_BUILD)/host.o $(CUDA_LIBS)

$(BUILD)/train_gpt2: train_gpt2.c Makefile
	$(CC) $(CFLAGS) -o $@ train_gpt2.c -lm

$(BUILD)/libgpt2.so: train_gpt2.c Makefile
	$(CC) $(CFLAGS) -fPIC -shared -fvisibility=hidden -DGPT2_NO_MAIN -o $@ train_gpt2.c -lm

# The CUDA source as C++ for the CPU, in both precisions, and the tests of the layer that makes this possible. Its
# host half is train_gpt2.c's, as in the real build.
EMULATE_HEADERS = dev/cuda/emulate.h $(wildcard dev/cuda/emulate/*.h)
EMULATED_FLAGS = -O2 -std=c++17 -march=$(MARCH) -fno-math-errno -fPIC -fvisibility=hidden $(WARNINGS) \
	-Wno-unknown-pragmas $(EXTRA) -DGPT2_EMULATE -Idev/cuda/include -DGPT2_LOGITS_BYTES=30000
ifeq ($(SANITIZE),1)
EMULATED_FLAGS += -g -fsanitize=address,undefined -fno-sanitize-recover=all
endif
ifneq ($(call try,-march=$(MARCH)),yes)
EMULATED_FLAGS := $(filter-out -march=%,$(EMULATED_FLAGS))
endif

emulated: $(addprefix $(EMULATED)/,selftest profile libgpt2cu.so libgpt2cu_fp32.so train_gpt2cu train_gpt2cu_fp32)

$(EMULATED)/model.o $(EMULATED)/model_fp32.o: train_gpt2.cu train_gpt2.c $(EMULATE_HEADERS) Makefile
	mkdir -p $(EMULATED)
	$(CXX) $(EMULATED_FLAGS) $(if $(findstring fp32,$@),-DGPT2_FP32) -c -o $@ -x c++ train_gpt2.cu

$(EMULATED)/libgpt2cu%so: $(EMULATED)/model%o $(EMULATED)/host.o
	$(CXX) $(EMULATED_FLAGS) -shared -o $@ $^ $(filter -fopenmp,$(CFLAGS)) -lpthread -lm

$(EMULATED)/train_gpt2cu: $(EMULATED)/model.o $(EMULATED)/main.o
	$(CXX) $(EMULATED_FLAGS) -o $@ $^ $(filter -fopenmp,$(CFLAGS)) -lpthread -lm

$(EMULATED)/train_gpt2cu_fp32: $(EMULATED)/model_fp32.o $(EMULATED)/main.o
	$(CXX) $(EMULATED_FLAGS) -o $@ $^ $(filter -fopenmp,$(CFLAGS)) -lpthread -lm

$(EMULATED)/selftest: dev/cuda/selftest.cu $(EMULATE_HEADERS) Makefile
	mkdir -p $(EMULATED)
	$(CXX) $(EMULATED_FLAGS) -o $@ -x c++ dev/cuda/selftest.cu -lpthread -lm

$(EMULATED)/profile: dev/cuda/profile.cu train_gpt2.cu $(EMULATE_HEADERS) $(EMULATED)/host.o
	$(CXX) $(EMULATED_FLAGS) -o $@ $(EMULATED)/host.o -x c++ dev/cuda/profile.cu $(filter -fopenmp,$(CFLAGS)) -lpthread -lm

# pytest is all that the tests need; those that hold us against torch, transformers or tiktoken skip without them.
$(VENV)/bin/pytest:
	$(PYTHON) -m venv $(VENV) || { echo "make test needs Python's venv module (on Debian: apt install python3-venv)"; exit 1; }
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check pytest

test: all $(if $(shell command -v $(firstword $(CXX))),emulated) $(VENV)/bin/pytest
	$(VENV)/bin/python -m pytest -q test_gpt2.py dev/test

# TORCH names a Python that has PyTorch, for the comparison; without one, this project is timed alone.
TORCH ?= $(PYTHON)
bench: all $(if $(GPU),$(CUDA_BUILD)/profile)
	mkdir -p build
	$(CC) $(CFLAGS) -o build/kernels dev/bench/kernels.c -lm
	$(PYTHON) dev/bench/bench.py --torch $(TORCH)
	build/kernels
	$(if $(GPU),$(PYTHON) dev/cuda/bench_cuda.py)
	$(if $(GPU),$(CUDA_BUILD)/profile)

# libFuzzer is clang's, whatever compiler the rest has. What it found stays in build/fuzz: inputs that reached
# something new in corpus/, and one that broke something as READER-crash-..., READER-timeout-... and so on.
FUZZ_CC ?= clang
FUZZ_SECONDS ?= 60
FUZZ_READERS ?= model state shards tokenizer hellaswag reference strings
FUZZ_LIMITS = -timeout=1 -malloc_limit_mb=16 -rss_limit_mb=512 -max_len=8192
FUZZ_FLAGS = -g -O2 -std=gnu11 -march=$(MARCH) -fno-math-errno $(WARNINGS) -Wno-unknown-pragmas \
	-fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -fno-sanitize-coverage=trace-cmp

build/fuzz/readers: dev/fuzz/readers.c train_gpt2.c Makefile
	mkdir -p build/fuzz
	@printf '%s\n' 'int LLVMFuzzerTestOneInput(const char *p, unsigned long n) { return p && n > 9; }' | \
		$(FUZZ_CC) -fsanitize=fuzzer,address -x c - -o build/fuzz/try 2>/dev/null || { echo "make fuzz needs a clang \
	with libFuzzer, and $(FUZZ_CC) is none (on Debian: apt install clang libclang-rt-14-dev)"; exit 1; }
	$(FUZZ_CC) $(FUZZ_FLAGS) -o $@ dev/fuzz/readers.c -lm

fuzz: build/fuzz/readers all
	GPT2_LIBRARY=$(abspath $(BUILD))/libgpt2.so $(PYTHON) dev/fuzz/seeds.py build/fuzz/seeds
	@for reader in $(FUZZ_READERS); do \
		mkdir -p build/fuzz/corpus/$$reader; \
		build/fuzz/readers -max_total_time=$$(($(FUZZ_SECONDS) / $(words $(FUZZ_READERS)))) $(FUZZ_LIMITS) \
			-artifact_prefix=build/fuzz/$$reader- build/fuzz/corpus/$$reader build/fuzz/seeds/$$reader \
			>build/fuzz/$$reader.log 2>&1 || { tail -n 40 build/fuzz/$$reader.log; exit 1; }; \
		tail -n 1 build/fuzz/$$reader.log; \
	done

memcheck:
	mkdir -p build/valgrind
	$(MAKE) BUILD=build/valgrind ARCH=x86-64 OPENMP=0 EXTRA=-g
	$(if $(wildcard $(VENV)/bin/pytest),$(VENV)/bin/python,$(PYTHON)) dev/fuzz/memcheck.py --build build/valgrind

clean:
	rm -f train_gpt2 libgpt2.so train_gpt2cu libgpt2cu.so train_gpt2cu_fp32 libgpt2cu_fp32.so
	rm -rf $(CUDA_BUILD)
