"""Read and write a checkpoint's files: safetensors, strict JSON, and the manifest."""
