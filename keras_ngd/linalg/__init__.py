"""Pure tensor functions; nothing here knows layers, optimizers or workers."""
