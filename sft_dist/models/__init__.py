"""Models: loaded, made segment-aware, tuned, and wrapped with the loss head."""
