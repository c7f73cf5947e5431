"""Other people's models and trainers on these kernels; each file imports its library itself."""
