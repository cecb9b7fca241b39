# make             builds ./train_gpt2 and libgpt2.so for this machine; with a GPU and nvcc, also `make cuda`
# make test        sets up .venv with pytest and runs the tests
# make bench       times training steps, next to PyTorch if it is installed, then each kernel
# make cuda        builds ./train_gpt2cu and libgpt2cu.so for NVIDIA GPUs
# make emulated    builds train_gpt2.cu for the emulated GPU of dev/cuda/emulate.h; needs a C++ compiler
# make fuzz        fuzzes every file reader for FUZZ_SECONDS=60 in total; needs clang (FUZZ_CC=clang)
# make memcheck    runs the library's tests and the binary under valgrind
# make clean       removes build results; keeps runs, data and .venv
# make help        prints this
#
# Variables, as in `make CC=clang ARCH=avx2`:
#   CC, CXX, NVCC       compilers
#   ARCH=native         target processor: native, avx512, avx2, x86-64 or any value of -march
#   OPENMP=0            single-threaded build (default: OpenMP if the compiler has it)
#   SANITIZE=1          build with AddressSanitizer and UBSan
#   EXTRA=FLAGS         additional compiler flags, such as -Werror
#   BUILD=DIR           output directory (default: this one)
#   FP32=1              with `make cuda`: fp32 instead of bf16, for verification; names end in _fp32
#   CUBLAS=DIR          include/ and lib/ of cuBLASLt, if not in the CUDA toolkit (pip install nvidia-cublas)
#   CUDA_ARCHS='80 90'  GPU architectures to compile for (default: this machine's, or these two)
#   TORCH=PYTHON        with `make bench`: a Python that has PyTorch

CC ?= cc
ARCH ?= native
BUILD ?= .
PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(PYTHON)
CUDA_BUILD ?= build/cuda
EMULATED ?= build/emulated

# try: "yes" if the C compiler accepts a flag. need: one sentence and status 1 if a program is missing.
try = $(shell out=$$(mktemp) && echo 'int main(void) { return 0; }' | \
	$(CC) $(1) -x c - -o $$out 2>/dev/null && echo yes; rm -f $$out)
need = @command -v $(firstword $(1)) >/dev/null || { echo "$(firstword $(1)) was not found: $(2)"; exit 1; }

# --- Flags -------------------------------------------------------------------------------------------------
march_avx512 = x86-64-v4
march_avx2 = x86-64-v3
MARCH := $(or $(march_$(ARCH)),$(ARCH))
ifeq ($(call try,-march=$(MARCH)),yes)
MARCH_FLAG := -march=$(MARCH)
else ifneq ($(filter-out clean help,$(or $(MAKECMDGOALS),all)),)
ifneq ($(call try,),yes)
$(error $(CC) cannot compile C: install a compiler (Debian: apt install gcc libc6-dev) or name one with CC=)
endif
endif

OPENMP ?= $(if $(call try,-fopenmp),1,0)
ifeq ($(OPENMP),1)
OPENMP_FLAG := -fopenmp
endif

SANITIZERS = address,undefined -fno-sanitize-recover=all
ifeq ($(SANITIZE),1)
SANITIZE_FLAGS = -g -fsanitize=$(SANITIZERS)
endif

# No -ffast-math: it reorders sums and removes NaN checks. -fno-math-errno lets sqrtf be one instruction.
COMMON = $(MARCH_FLAG) -fno-math-errno -Wall -Wextra
THREADS = $(or $(OPENMP_FLAG),-Wno-unknown-pragmas)
CFLAGS = $(strip -O3 -std=gnu11 $(COMMON) $(SANITIZE_FLAGS) $(THREADS) $(EXTRA))
SHARED = -fPIC -fvisibility=hidden

# --- CPU ---------------------------------------------------------------------------------------------------
.PHONY: all cuda emulated test bench fuzz memcheck clean help
all: $(BUILD)/train_gpt2 $(BUILD)/libgpt2.so

$(BUILD)/train_gpt2: train_gpt2.c Makefile
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -o $@ train_gpt2.c -lm

$(BUILD)/libgpt2.so: train_gpt2.c Makefile
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) $(SHARED) -shared -DGPT2_NO_MAIN -o $@ train_gpt2.c -lm

# The host code for a GPU build: train_gpt2.c without its model, for a library and for a program.
$(CUDA_BUILD)/host.o $(EMULATED)/host.o: HOST_FLAGS = $(SHARED) -DGPT2_NO_MAIN
$(foreach dir,$(CUDA_BUILD) $(EMULATED),$(dir)/host.o $(dir)/main.o): train_gpt2.c Makefile
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) $(HOST_FLAGS) -DGPT2_NO_MODEL -c -o $@ train_gpt2.c

# --- GPU ---------------------------------------------------------------------------------------------------
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc) nvcc)
GPU = $(wildcard /dev/nvidia[0-9])
TOOLKITS = $(CUBLAS) $(dir $(NVCC)).. $(dir $(realpath $(NVCC)))..
CUBLAS_HEADER = $(wildcard $(addsuffix /include/cublasLt.h,$(TOOLKITS)))
ifneq ($(GPU),)
ifneq ($(CUBLAS_HEADER),)
all: cuda
endif
CUDA_ARCHS_FOUND = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | tr -d . | sort -u)
endif

ifeq ($(FP32),1)
FP = _fp32
FP_FLAGS = -DGPT2_FP32
else
FP_FLAGS = -ftz=true
endif
ifdef CUBLAS
CUBLAS_FLAGS = -I$(CUBLAS)/include
CUBLAS_LIBS = $(addprefix -Xlinker ,$(firstword $(wildcard $(CUBLAS)/lib/libcublasLt.so*)) \
	-rpath=$(abspath $(CUBLAS))/lib)
endif
CUDA_ARCHS ?= $(or $(CUDA_ARCHS_FOUND),80 90)
NEWEST_ARCH = $(lastword $(CUDA_ARCHS))
# sm_90a has wgmma, which sm_90 has not; PTX is for later GPUs, and must not be for 90a.
GENCODE = $(foreach arch,$(CUDA_ARCHS:90=90a),-gencode arch=compute_$(arch),code=sm_$(arch)) \
	-gencode arch=compute_$(NEWEST_ARCH),code=compute_$(NEWEST_ARCH)
NVCC_FLAGS = -O3 -std=c++17 $(GENCODE) -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra \
	$(CUBLAS_FLAGS) $(FP_FLAGS) $(NVCC_EXTRA)
CUDA_LIBS = $(or $(CUBLAS_LIBS),-lcublasLt) $(addprefix -Xcompiler ,$(OPENMP_FLAG))

cuda: $(BUILD)/libgpt2cu$(FP).so $(BUILD)/train_gpt2cu$(FP)

$(CUDA_BUILD)/model$(FP).o: train_gpt2.cu train_gpt2.c Makefile
	@mkdir -p $(@D)
	$(call need,$(NVCC),make cuda needs the CUDA toolkit; name its compiler with NVCC=)
	$(NVCC) $(NVCC_FLAGS) -c -o $@ train_gpt2.cu

$(BUILD)/libgpt2cu$(FP).so: $(CUDA_BUILD)/model$(FP).o $(CUDA_BUILD)/host.o
	@mkdir -p $(@D)
	$(NVCC) -shared -o $@ $^ $(CUDA_LIBS)

$(BUILD)/train_gpt2cu$(FP): $(CUDA_BUILD)/model$(FP).o $(CUDA_BUILD)/main.o
	@mkdir -p $(@D)
	$(NVCC) -o $@ $^ $(CUDA_LIBS)

CUDA_TOOLS = $(CUDA_BUILD)/profile$(FP) $(CUDA_BUILD)/selftest$(FP)
$(CUDA_TOOLS): $(CUDA_BUILD)/%$(FP): dev/cuda/%.cu train_gpt2.cu $(CUDA_BUILD)/host.o
	$(NVCC) $(NVCC_FLAGS) -o $@ $< $(CUDA_BUILD)/host.o $(CUDA_LIBS)

# --- Emulated GPU: train_gpt2.cu as C++ for the CPU, in both precisions ------------------------------------
EMULATED_FLAGS = -O2 -std=c++17 $(COMMON) $(SHARED) -Wno-unknown-pragmas $(SANITIZE_FLAGS) $(EXTRA) \
	-DGPT2_EMULATE -Idev/cuda/include -DGPT2_LOGITS_BYTES=30000
EMULATED_LIBS = $(OPENMP_FLAG) -lpthread -lm

GPU_FILES = train_gpt2cu libgpt2cu.so $(foreach code,fp32 hopper,train_gpt2cu_$(code) libgpt2cu_$(code).so)
EMULATE_HEADERS = dev/cuda/emulate.h $(wildcard dev/cuda/emulate/*.h)
emulated: $(addprefix $(EMULATED)/,$(GPU_FILES) selftest profile)

$(EMULATED)/model_fp32.o: PRECISION = -DGPT2_FP32
$(EMULATED)/model_hopper.o: PRECISION = -DGPT2_EMULATE_HOPPER
$(addprefix $(EMULATED)/model,.o _fp32.o _hopper.o): train_gpt2.cu train_gpt2.c $(EMULATE_HEADERS) Makefile
	@mkdir -p $(@D)
	$(call need,$(CXX),make emulated needs a C++ compiler; name another with CXX=)
	$(CXX) $(EMULATED_FLAGS) $(PRECISION) -c -o $@ -x c++ train_gpt2.cu

$(EMULATED)/libgpt2cu.so $(EMULATED)/train_gpt2cu: $(EMULATED)/model.o
$(EMULATED)/libgpt2cu_fp32.so $(EMULATED)/train_gpt2cu_fp32: $(EMULATED)/model_fp32.o
$(EMULATED)/libgpt2cu_hopper.so $(EMULATED)/train_gpt2cu_hopper: $(EMULATED)/model_hopper.o

$(EMULATED)/libgpt2cu.so $(EMULATED)/libgpt2cu_fp32.so $(EMULATED)/libgpt2cu_hopper.so: $(EMULATED)/host.o
	$(CXX) $(EMULATED_FLAGS) -shared -o $@ $^ $(EMULATED_LIBS)

$(EMULATED)/train_gpt2cu $(EMULATED)/train_gpt2cu_fp32 $(EMULATED)/train_gpt2cu_hopper: $(EMULATED)/main.o
	$(CXX) $(EMULATED_FLAGS) -o $@ $^ $(EMULATED_LIBS)

$(EMULATED)/selftest: dev/cuda/selftest.cu $(EMULATE_HEADERS) Makefile
	@mkdir -p $(@D)
	$(CXX) $(EMULATED_FLAGS) -o $@ -x c++ dev/cuda/selftest.cu -lpthread -lm

$(EMULATED)/profile: dev/cuda/profile.cu train_gpt2.cu $(EMULATE_HEADERS) $(EMULATED)/host.o
	$(CXX) $(EMULATED_FLAGS) -o $@ $(EMULATED)/host.o -x c++ dev/cuda/profile.cu $(EMULATED_LIBS)

# --- Tests: need pytest; comparisons with torch, transformers or tiktoken are skipped without them ----------
# still: before a command, shows every PATIENCE seconds what is still being done
PATIENCE ?= 4
still = (while sleep $(PATIENCE) >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do echo "still $(1)"; done) & \
	ticker=$$!; trap 'kill $$ticker' EXIT;

$(VENV)/bin/pytest:
	@echo "creating $(VENV), with pytest, for the tests"
	@$(call still,creating $(VENV)) $(PYTHON) -m venv $(VENV) >/dev/null || \
		{ echo "make test could not create $(VENV): install Python's venv module (Debian:" \
		"apt install python3-venv)"; exit 1; }
	@$(call still,installing pytest) \
		$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check pytest || \
		{ echo "make test could not install pytest into $(VENV): see pip's message above"; exit 1; }

test: all $(if $(shell command -v $(firstword $(CXX))),emulated) $(VENV)/bin/pytest
	$(VENV)/bin/python -m pytest -q test_gpt2.py dev/test

memcheck:
	$(MAKE) BUILD=build/valgrind ARCH=x86-64 OPENMP=0 EXTRA=-g
	$(firstword $(wildcard $(VENV)/bin/python) $(PYTHON)) dev/fuzz/memcheck.py --build build/valgrind

# --- Benchmarks --------------------------------------------------------------------------------------------
build/kernels build/gemm_steps: build/%: dev/bench/%.c dev/bench/timing.h train_gpt2.c Makefile
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -o $@ $< -lm

bench: all build/kernels $(if $(GPU),$(CUDA_BUILD)/profile)
	$(PYTHON) dev/bench/bench.py --torch $(TORCH)
	build/kernels
ifneq ($(GPU),)
	$(PYTHON) dev/cuda/bench_cuda.py
	$(CUDA_BUILD)/profile
endif

# --- Fuzzing: build/fuzz keeps inputs with new coverage (corpus/) and failures (READER-crash-...) -----------
FUZZ_CC ?= clang
FUZZ_SECONDS ?= 60
FUZZ_READERS ?= model state shards tokenizer hellaswag reference strings
FUZZ_LIMITS = -timeout=1 -malloc_limit_mb=16 -rss_limit_mb=512 -max_len=8192
FUZZ_FLAGS = -g -O2 -std=gnu11 $(COMMON) -Wno-unknown-pragmas \
	-fsanitize=fuzzer,$(SANITIZERS) -fno-sanitize-coverage=trace-cmp

build/fuzz/readers: dev/fuzz/readers.c train_gpt2.c Makefile
	@mkdir -p $(@D)
	@printf '%s\n' 'int LLVMFuzzerTestOneInput(const char *p, unsigned long n) { return p && n > 9; }' | \
		$(FUZZ_CC) -fsanitize=fuzzer,address -x c - -o build/fuzz/try 2>/dev/null || \
		{ echo "make fuzz needs clang with libFuzzer, which $(FUZZ_CC) is not: on Debian, apt install clang" \
		"libclang-rt-14-dev, or name one with FUZZ_CC="; exit 1; }
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

# --- The rest ----------------------------------------------------------------------------------------------
clean:
	rm -f $(addprefix $(BUILD)/,train_gpt2 libgpt2.so $(GPU_FILES)) build/kernels build/gemm_steps
	rm -rf $(CUDA_BUILD) $(EMULATED) build/valgrind

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//; p' Makefile
