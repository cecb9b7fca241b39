/* Replaces the CUDA runtime's header when train_gpt2.cu is compiled for the emulated GPU: ../emulate.h. */
#include "../emulate.h"
