"""Real integers: the packed file, and ONNX graphs made from it."""
