"""Export of integer weights: the packed file, and ONNX and ExecuTorch files created from it."""
