"""From a channel graph to the kernels a runtime will execute, without compiling."""
