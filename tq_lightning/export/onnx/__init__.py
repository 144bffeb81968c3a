"""ONNX graphs of a packed file: static (one width), dynamic (width as an input), and QONNX."""
