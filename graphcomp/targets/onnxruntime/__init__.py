"""ONNX files that onnxruntime runs with integer kernels."""
