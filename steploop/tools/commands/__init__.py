"""The commands, one typed function a module; each imports what it needs when it is called."""
