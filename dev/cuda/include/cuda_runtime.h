/* Stands in for the runtime's header where train_gpt2.cu is compiled for the CPU: see ../emulate.h. */
#include "../emulate.h"
