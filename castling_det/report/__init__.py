"""Builds the comparison of a set of runs from their work dirs, and renders it. Nothing is measured here."""
