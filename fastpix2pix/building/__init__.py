"""From a trained generator to a file that runs fast: ONNX, TensorRT, and the gate between them."""
