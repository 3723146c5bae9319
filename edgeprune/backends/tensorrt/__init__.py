"""TensorRT: engines that are built on the board that runs them, by its own `trtexec`."""
