"""ONNX graphs of a packed file: static (one width), dynamic (width as input), integer, QONNX."""
