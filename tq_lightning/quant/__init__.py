"""Quantization of any nn.Module: pure PyTorch, without Lightning, timm or files."""
