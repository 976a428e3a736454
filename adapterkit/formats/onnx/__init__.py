"""The adapters of onnxruntime: `.onnx_adapter` files, whose names are the inputs of a graph."""
