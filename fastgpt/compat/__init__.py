"""Adapters to other libraries, each imported by its own name; none is needed by the rest of the package."""
