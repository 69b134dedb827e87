"""Frames out of videos, and frames into videos."""
