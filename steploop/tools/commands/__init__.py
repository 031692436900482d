"""The commands: each a plain typed function, one a module, which imports what it needs when it is called."""
