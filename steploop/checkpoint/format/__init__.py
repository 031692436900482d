"""The checkpoint's files: safetensors, strict JSON, and the manifest that seals them."""
