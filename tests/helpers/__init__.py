"""Shared by tests: writers of small models and files."""
