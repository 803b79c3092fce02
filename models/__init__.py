"""Models that ship with the program: ONNX files and their cards."""
