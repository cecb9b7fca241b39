# make            ./train_gpt2 and libgpt2.so, for this machine's processor
# make test       sets up .venv with pytest, then runs the tests
# make bench      times training steps, beside PyTorch where that is installed, then each kernel
# make cuda       ./train_gpt2cu and libgpt2cu.so, for NVIDIA GPUs; part of `make` where it finds nvcc and a GPU
# make emulated   train_gpt2.cu for an emulated GPU (dev/cuda/emulate.h), for tests; needs a C++ compiler
# make fuzz       fuzzes every reader of the library, FUZZ_SECONDS=60 in all; needs clang (FUZZ_CC=clang-14)
# make memcheck   runs tests of the library, and the binary, under valgrind
# make clean      removes what was built (not your runs, not the data)
#
#   CC=clang            another compiler
#   ARCH=native         target: native, avx512, avx2, x86-64, or any value of -march
#   OPENMP=0            one thread (detected otherwise)
#   SANITIZE=1          AddressSanitizer and UBSan
#   BUILD=DIR           output folder (this one)
#   FP32=1              with make cuda: in fp32, for verification; the names end in _fp32
#   CUBLAS=DIR          cuBLASLt's include and lib, if not in the CUDA toolkit (pip install nvidia-cublas)
#   CUDA_ARCHS='80 90'  GPUs to compile for (detected, or these two)
#   TORCH=PYTHON        with make bench: a Python that has PyTorch

CC ?= cc
ARCH ?= native
BUILD ?= .
PYTHON ?= python3
VENV ?= .venv

march_avx512 = x86-64-v4
march_avx2 = x86-64-v3
MARCH = $(or $(march_$(ARCH)),$(ARCH))

# No -ffast-math: it may change the order of sums and drop checks for NaN. errno of sqrtf is not needed.
WARNINGS = -Wall -Wextra
CFLAGS = -O3 -std=gnu11 -march=$(MARCH) -fno-math-errno $(WARNINGS) $(EXTRA)
ifeq ($(SANITIZE),1)
CFLAGS += -g -fsanitize=address,undefined -fno-sanitize-recover=all
endif

# Whether the compiler accepts an option.
try = $(shell out=$$(mktemp) && echo 'int main(void) { return 0; }' | \
	$(CC) $(1) -x c - -o $$out 2>/dev/null && echo yes; rm -f $$out)
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

# nvcc compiles the GPU model; the host code is train_gpt2.c without its model. A toolkit without cuBLASLt is
# not used, unless CUBLAS names it.
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
CUDA_FOUND = $(if $(GPU),\
	$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | tr -d . | sort -u))
CUDA_ARCHS ?= $(or $(CUDA_FOUND),80 90)
CUDA_LAST = $(lastword $(CUDA_ARCHS))
NVCC_FLAGS = -O3 -std=c++17 $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) \
	-gencode arch=compute_$(CUDA_LAST),code=compute_$(CUDA_LAST) \
	-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra \
	$(if $(CUBLAS),-I$(CUBLAS)/include) $(if $(CUDA_SUFFIX),-DGPT2_FP32,-ftz=true) $(NVCC_EXTRA)
CUBLAS_LIB = -Xlinker $(firstword $(wildcard $(CUBLAS)/lib/libcublasLt.so*)) -Xlinker -rpath=$(abspath $(CUBLAS))/lib
CUDA_LIBS = $(if $(CUBLAS),$(CUBLAS_LIB),-lcublasLt) $(if $(filter 1,$(OPENMP)),-Xcompiler -fopenmp)

cuda: $(BUILD)/libgpt2cu$(CUDA_SUFFIX).so $(BUILD)/train_gpt2cu$(CUDA_SUFFIX)

# The host code, for a library and for a program; also for the emulated GPU.
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

# The CUDA source as C++ for the CPU, in both precisions, with the same host code, and a self-test.
EMULATE_HEADERS = dev/cuda/emulate.h $(wildcard dev/cuda/emulate/*.h)
EMULATED_FLAGS = -O2 -std=c++17 -march=$(MARCH) -fno-math-errno -fPIC -fvisibility=hidden $(WARNINGS) \
	-Wno-unknown-pragmas $(EXTRA) -DGPT2_EMULATE -Idev/cuda/include -DGPT2_LOGITS_BYTES=30000
ifeq ($(SANITIZE),1)
EMULATED_FLAGS += -g -fsanitize=address,undefined -fno-sanitize-recover=all
endif
ifneq ($(call try,-march=$(MARCH)),yes)
EMULATED_FLAGS := $(filter-out -march=%,$(EMULATED_FLAGS))
endif

emulated: $(addprefix $(EMULATED)/,selftest profile libgpt2cu.so libgpt2cu_fp32.so train_gpt2cu \
	train_gpt2cu_fp32)

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
	$(CXX) $(EMULATED_FLAGS) -o $@ $(EMULATED)/host.o -x c++ dev/cuda/profile.cu \
		$(filter -fopenmp,$(CFLAGS)) -lpthread -lm

# Tests that compare with torch, transformers or tiktoken are skipped without these.
$(VENV)/bin/pytest:
	$(PYTHON) -m venv $(VENV) || \
		{ echo "make test needs Python's venv module (on Debian: apt install python3-venv)"; exit 1; }
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check pytest

test: all $(if $(shell command -v $(firstword $(CXX))),emulated) $(VENV)/bin/pytest
	$(VENV)/bin/python -m pytest -q test_gpt2.py dev/test

TORCH ?= $(PYTHON)
build/kernels build/gemm_steps: build/%: dev/bench/%.c train_gpt2.c Makefile
	mkdir -p build
	$(CC) $(CFLAGS) -o $@ $< -lm

bench: all build/kernels $(if $(GPU),$(CUDA_BUILD)/profile)
	$(PYTHON) dev/bench/bench.py --torch $(TORCH)
	build/kernels
	$(if $(GPU),$(PYTHON) dev/cuda/bench_cuda.py)
	$(if $(GPU),$(CUDA_BUILD)/profile)

# libFuzzer comes with clang. Inputs that reach new code stay in build/fuzz/corpus, failing ones in build/fuzz
# as READER-crash-..., READER-timeout-... and so on.
FUZZ_CC ?= clang
FUZZ_SECONDS ?= 60
FUZZ_READERS ?= model state shards tokenizer hellaswag reference strings
FUZZ_LIMITS = -timeout=1 -malloc_limit_mb=16 -rss_limit_mb=512 -max_len=8192
FUZZ_FLAGS = -g -O2 -std=gnu11 -march=$(MARCH) -fno-math-errno $(WARNINGS) -Wno-unknown-pragmas \
	-fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -fno-sanitize-coverage=trace-cmp

build/fuzz/readers: dev/fuzz/readers.c train_gpt2.c Makefile
	mkdir -p build/fuzz
	@printf '%s\n' 'int LLVMFuzzerTestOneInput(const char *p, unsigned long n) { return p && n > 9; }' | \
		$(FUZZ_CC) -fsanitize=fuzzer,address -x c - -o build/fuzz/try 2>/dev/null || { echo "make fuzz needs clang \
	with libFuzzer, which $(FUZZ_CC) is not (on Debian: apt install clang libclang-rt-14-dev)"; exit 1; }
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
