"""ONNX files, their precisions, and the engines built from them; every file passes a gate."""
