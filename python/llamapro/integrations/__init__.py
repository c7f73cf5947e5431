"""Block expansion of other libraries' models."""
