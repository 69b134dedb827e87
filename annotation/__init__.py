"""What a model says of a video, frame by frame: labels, overlay, live, ONNX."""
