/* CUDA on a CPU, for tests: with this header train_gpt2.cu compiles as C++ for the host, and runs there.

     make emulated                    build/emulated/libgpt2cu.so, without a GPU
     g++ -x c++ -std=c++17 -DGPT2_EMULATE -Idev/cuda/include ... train_gpt2.cu -lpthread

   include/ has files with the names of the CUDA toolkit's headers, each of which includes this one. It
   implements the part of CUDA that train_gpt2.cu uses, in its strictest meaning:

     threads       The threads of a block are fibers and run one at a time, up to the next __syncthreads or
                   warp operation. One that not all threads reach is an error.
     memory        The host cannot access device memory: it is mapped only during kernels and copies. Pointers
                   to host memory in a kernel's arguments are rejected. Every allocation has guard pages. New
                   device, pinned and shared memory is NaN, shared memory before each block.
     time          Operations of a stream run as late as CUDA allows, when something waits for them, and
                   cp.async copies at its wait: reading without waiting gives NaN, or the previous content.
     cuBLASLt      Plain loops, products and sums in fp32; what the manual forbids is rejected.

   It is not a simulator: no timing, no caches, no memory model. Blocks run one after another, so races
   between blocks are not detected; one inside a block is, by a different result in descending order. A
   shuffle hides a missing __syncwarp, because it orders memory here but not on a GPU.

     GPT2_EMULATE_ORDER=descending    threads of a block run from the last to the first
     GPT2_EMULATE_STREAMS=at-once     streams run as early as CUDA allows
     GPT2_EMULATE_MEMORY=BYTES        size of device memory (4 GiB)

   cudaGetErrorString returns one sentence about an error. An error of a kernel is sticky, as in CUDA: every
   later call returns it, until cudaDeviceReset. */
#pragma once
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <array>
#include <cmath>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "emulate/types.h"
#include "emulate/memory.h"
#include "emulate/streams.h"
#include "emulate/threads.h"
#include "emulate/runtime.h"
#include "emulate/warps.h"
#include "emulate/wgmma.h"
#include "emulate/cublaslt.h"
