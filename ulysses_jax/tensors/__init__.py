"""A model's parameters in files of tensors: safetensors, by their families' names."""
