"""Interfaces of other libraries, on the functions of this package."""
