"""Scale, bias, mask, FP32 softmax and dropout of attention scores."""
