# make            ./train_gpt2 and libgpt2.so, for this machine's processor
# make test       sets up .venv with what the tests need, then runs them
# make bench      times a training step, side by side with PyTorch where that is installed
# make clean      removes what was built (not your runs, not the data)
#
#   CC=clang            another compiler
#   ARCH=native         what to compile for: native, or avx512, avx2, x86-64, or any value of -march
#   OPENMP=0            without threads (found out by itself otherwise)
#   SANITIZE=1          with AddressSanitizer and UBSan
#   BUILD=DIR           where the results go (here)

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

.PHONY: all test bench clean
all: $(BUILD)/train_gpt2 $(BUILD)/libgpt2.so

$(BUILD)/train_gpt2: train_gpt2.c Makefile
	$(CC) $(CFLAGS) -o $@ train_gpt2.c -lm

$(BUILD)/libgpt2.so: train_gpt2.c Makefile
	$(CC) $(CFLAGS) -fPIC -shared -fvisibility=hidden -DGPT2_NO_MAIN -o $@ train_gpt2.c -lm

# pytest is all that the tests need; those that hold us against torch, transformers or tiktoken skip without them.
$(VENV)/bin/pytest:
	$(PYTHON) -m venv $(VENV) || { echo "make test needs Python's venv module (on Debian: apt install python3-venv)"; exit 1; }
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check pytest

test: all $(VENV)/bin/pytest
	$(VENV)/bin/python -m pytest -q test_gpt2.py

# TORCH names a Python that has PyTorch, for the comparison; without one, this project is timed alone.
TORCH ?= $(PYTHON)
bench: all
	mkdir -p build
	$(CC) $(CFLAGS) -o build/kernels dev/bench/kernels.c -lm
	$(PYTHON) dev/bench/bench.py --torch $(TORCH)
	build/kernels

clean:
	rm -f train_gpt2 libgpt2.so train_gpt2cu libgpt2cu.so
