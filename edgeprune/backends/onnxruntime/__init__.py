"""ONNX Runtime: portable .onnx engines, run by the CPU execution provider."""
