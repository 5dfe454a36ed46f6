"""How one ONNX file, one precision or one engine is made and gated; which of them a run wants, `delivery` knows."""
